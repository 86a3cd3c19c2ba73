"""Functions written in TensorFlow, kept as the graph that TensorFlow traces of them."""

import base64
from collections.abc import Callable
from typing import Any

import keras

from kqat.graph import frozen_function


@keras.saving.register_keras_serializable("kqat")
class TensorFlowFunction(keras.layers.Layer):
    """A function of one tensor made of TensorFlow's own operations; TensorFlow backend only.

    It is saved as its graph, so loading needs nothing of the user's. Gradients are TensorFlow's.

    Args:
        graph: the serialized `GraphDef`, in base64.
        source: name of its input tensor.
        result: name of its output tensor.
    """

    def __init__(self, graph: str, source: str, result: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.graph, self.source, self.result = graph, source, result
        self._run: Any = None

    @classmethod
    def of(cls, function: Callable[[Any], Any], **kwargs: Any) -> "TensorFlowFunction":
        """The layer of a Python function of a tensor of shape `(batch, 1)`; variables are fixed."""
        graph, source, result = frozen_function(function, (None, 1))
        return cls(base64.b64encode(graph).decode(), source, result, **kwargs)

    def call(self, x: Any) -> Any:
        """The function's value."""
        import tensorflow as tf

        if self._run is None:
            definition = tf.compat.v1.GraphDef()
            definition.ParseFromString(base64.b64decode(self.graph))
            whole = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(definition, name=""), [])
            self._run = whole.prune(self.source, self.result)
        return self._run(x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape: it is a function of each number alone."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The graph, beside what every layer has."""
        own = {"graph": self.graph, "source": self.source, "result": self.result}
        return {**super().get_config(), **own}
