"""`FrozenModel` to marked float flatbuffer, by the official TensorFlow converter.

It goes without a SavedModel: the graph that the converter reads is traced with the weights as
constants. A graph with variables would have to be written, loaded and frozen first, which took
more time than the conversion itself.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.base import ExportError, LoweringError, array_of
from kqat.freezing import (
    ByteInput,
    FrozenLSTM,
    FrozenModel,
    IndexOperation,
    Marker,
    MarkerKind,
    Node,
    Tabulated,
    TiedWeight,
    WeightUse,
    call_signature,
    reads_rows,
)
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT

SIGNATURE = "serve"
_BROADCASTING = {"ADD", "SUB", "MUL"}


def lower(
    frozen: FrozenModel, batch_size: int = 1, computed: frozenset[int] = frozenset()
) -> ModelT:
    """The float flatbuffer of `frozen`, with QUANTIZE/DEQUANTIZE pairs where markers stand.

    The signature's inputs are named `input_0` …, its outputs `output_0` …, in the model's order.

    Args:
        frozen: the model.
        batch_size: samples per invocation that the file will take.
        computed: indexes of the tables that ship as an operator, not as a table.

    Raises:
        ExportError: if Keras does not run on TensorFlow.
        LoweringError: if the converter fails.
    """
    if keras.backend.backend() != "tensorflow":
        raise ExportError(
            f"Expected the TensorFlow backend, on which the converter works. Received: "
            f"'{keras.backend.backend()}'. Save the model and convert it in a process with "
            "KERAS_BACKEND=tensorflow."
        )
    model = flatbuffer.read(_convert(_concrete(frozen, batch_size, computed), frozen.model.name))
    _sign(model)
    return _without_squeezes(with_whole_pairs(model))


def _concrete(frozen: FrozenModel, batch_size: int, computed: frozenset[int]) -> Any:
    """The model with its markers as a TensorFlow function whose weights are constants.

    Layers run as in inference, on a batch of `batch_size`.
    """
    import tensorflow as tf

    model, call = frozen.model, _with_markers(frozen, computed)
    values = [(variable, array_of(variable)) for variable in model.variables]

    def serve(*tensors: Any) -> list[Any]:
        weights = [(variable, tf.constant(value)) for variable, value in values]
        with keras.StatelessScope(state_mapping=weights), _scope(frozen):
            outputs = keras.tree.flatten(frozen.graph.run(tensors, call))
        # A value that is an output twice, or an input too, needs an operator of its own.
        return [tf.identity(t) for t in outputs]

    # A site takes float32 alone, also where the model declares an input of half precision.
    real = [
        keras.backend.is_float_dtype(t.dtype) or name in frozen.byte_inputs
        for t, name in zip(model.inputs, frozen.input_names, strict=True)
    ]
    signature = [
        tf.TensorSpec(
            (batch_size, *t.shape[1:]), "float32" if is_real else t.dtype, name=f"input_{i}"
        )
        for i, (t, is_real) in enumerate(zip(model.inputs, real, strict=True))
    ]
    return tf.function(serve, input_signature=signature, autograph=False).get_concrete_function()


def _scope(frozen: FrozenModel) -> contextlib.AbstractContextManager[Any]:
    """An outer name scope where a layer's name cannot be one: TensorFlow lets none begin with _."""
    import tensorflow as tf

    names = (node.layer.name for node in frozen.graph.nodes)
    inner = any(not name[0].isalnum() for name in names)
    return tf.name_scope("model") if inner else contextlib.nullcontext()


def _with_markers(frozen: FrozenModel, computed: frozenset[int]) -> Callable[..., Any]:
    """What computes a node's output, for `Graph.run`.

    A marker stands where a function ships as a table, or an LSTM as one operator.
    """

    lstms = [id(layer) for layer in frozen.lstms]
    inputs = zip(frozen.graph.inputs, frozen.input_names, strict=True)
    byte_inputs = {ref for ref, name in inputs if name in frozen.byte_inputs}
    plain: dict[int, _Plain] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.layer
        if isinstance(layer, ByteInput) and node.inputs[0] in byte_inputs:
            return args[0]  # The marker behind it gives the input its scale.
        if isinstance(layer, Tabulated) and layer.index not in computed:
            layer = Marker("table", layer.index, name=frozen.unused_name(f"{layer.name}_marker"))
        elif isinstance(layer, FrozenLSTM):
            layer = _StandIn(
                layer.units,
                lstms.index(id(layer)),
                name=frozen.unused_name(f"{layer.name}_stand_in"),
            )
        elif not kwargs.get("reverse") and (
            isinstance(layer, _TRANSLATED) or _is_dilated(layer) or reads_rows(layer, kwargs)
        ):
            for option in ("use", "reverse"):  # Backwards, a float ReversibleEmbedding is itself.
                kwargs.pop(option, None)
            if id(layer) not in plain:  # Calls of one layer stay those of one layer.
                plain[id(layer)] = _Plain(layer, name=frozen.unused_name(f"{layer.name}_plain"))
            layer = plain[id(layer)]
        if isinstance(layer, Marker):
            return _marked(layer, *args)
        if "training" in call_signature(layer).parameters:
            kwargs["training"] = False  # The default of Keras's augmenting layers is True.
        return layer(*args, **kwargs)

    return call


def _marked(marker: Marker, x: Any) -> Any:
    """What a marker computes, under the name that a layer's value would bear.

    Of markers that are no sites, names stay in the file. Keras enters the scope of a layer twice,
    and TensorFlow numbers the second time.
    """
    import tensorflow as tf

    if marker.kind is not MarkerKind.SITE:
        with tf.name_scope(marker.name):
            pass
    with tf.name_scope(marker.name):
        return marker.call(x)


class _StandIn(keras.layers.Layer):
    """Anything that the converter knows with an LSTM's shapes, and a marker that says which."""

    def __init__(self, units: int, index: int, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.units, self.index = units, index
        self.marker = Marker("lstm", index, name=f"{self.name}_marker")

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        # Numbers of its own for each, or the converter would make one of two.
        numbers = np.arange(x.shape[-1] * self.units, dtype=np.float32) + self.index + 2
        # TensorFlow's own product keeps the sequence's three axes, of which Keras's makes two; but
        # it would take the DEQUANTIZE of the marker before it in.
        return _marked(self.marker, tf.matmul(tf.abs(x), numbers.reshape(-1, self.units)))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:2], self.units)


_TRANSLATED = (
    keras.layers.Add,
    keras.layers.Embedding,
    keras.layers.UnitNormalization,
    IndexOperation,
)


_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)


def _is_dilated(layer: Any) -> bool:
    """Whether a stock convolution has holes in its kernel."""
    return type(layer) in _CONVOLUTIONS and max(layer.dilation_rate) > 1


def _dilated(layer: Any, x: Any) -> Any:
    """A dilated convolution as one TensorFlow operator.

    Keras makes three: the batch takes in every n-th row, and is parted again. The converter knows
    them again only where nothing else reads the same rows, as two gates of a WaveNet do.
    """
    import tensorflow as tf

    rates, strides, padding = layer.dilation_rate, layer.strides, layer.padding.upper()
    kernel = layer.kernel.value
    one_d = len(rates) == 1
    if padding == "CAUSAL":
        reach = rates[0] * (layer.kernel_size[0] - 1)
        x, padding = tf.pad(x, [[0, 0], [reach, 0], [0, 0]]), "VALID"
    if one_d:
        # The kernels of one axis want equal strides and, for depth, equal rates along both.
        x, kernel = tf.expand_dims(x, 1), tf.expand_dims(kernel, 0)
        rates, strides = (1, *rates), (1, *strides)
    if isinstance(layer, keras.layers.Conv1D | keras.layers.Conv2D):
        y = tf.nn.conv2d(x, kernel, strides, padding, dilations=rates)
    else:
        y = tf.raw_ops.DepthwiseConv2dNative(
            input=x,
            filter=kernel,
            strides=(1, *strides, 1),
            padding=padding,
            dilations=(1, *rates, 1),
        )
    if one_d:
        y = tf.squeeze(y, 1)
    if layer.use_bias:
        y = tf.nn.bias_add(y, layer.bias.value)
    return y if layer.activation is None else layer.activation(y)


class _Plain(keras.layers.Layer):
    """A layer in the TensorFlow words that the converter knows as one operator.

    Keras lets `take` count from the end and `argmax` know minus zero, in further operators; and
    takes a summand for a bias of the last axis where, for a batch of one, only one of its axes is
    longer than one.
    """

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(autocast=False, dtype="float32", **kwargs)
        self.layer = layer

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        layer: Any = self.layer
        if _is_dilated(layer):
            return _dilated(layer, x)
        if isinstance(layer, keras.layers.Add):
            return functools.reduce(tf.add, x)
        if isinstance(layer, keras.layers.Embedding | TiedWeight):
            tied = isinstance(layer, TiedWeight)
            table = layer.kernel if tied else layer.embeddings
            return tf.gather(table.value, tf.cast(x, "int32") if x.dtype == "bool" else x)
        if isinstance(layer, keras.layers.UnitNormalization):
            return tf.math.l2_normalize(x, layer.axis)
        if layer.kind not in ("argmax", "argmin"):
            return layer(x)
        axis = layer.options["axis"]
        index = getattr(tf.math, layer.kind)(x, axis, output_type=tf.int32)
        return tf.expand_dims(index, axis) if layer.options["keepdims"] else index

    def compute_output_spec(self, x: Any) -> Any:
        rows = {"use": WeightUse.ROWS} if isinstance(self.layer, TiedWeight) else {}
        return self.layer.compute_output_spec(x, **rows)


def _convert(concrete: Any, name: str) -> bytes:

    try:
        given = concrete.inputs[: len(concrete.structured_input_signature[0])]
        converter = _converter_class()(_without_captures(concrete), given, concrete.outputs)
        # It tells how TensorFlow optimized, and costs reading and writing the file once more.
        converter.exclude_conversion_metadata = True
        return converter.convert()
    except Exception as error:
        raise LoweringError(
            f"Expected '{name}' to convert. Received from the TensorFlow converter: "
            f"{str(error).strip()[:2000]}"
        ) from error


@functools.cache
def _converter_class() -> Any:
    """TensorFlow's converter, without what it does to a file of floats afterwards.

    It would read the file into Python twice and write it again, to store equal constants once, as
    `flatbuffer.share_constants` does. Where a release of TensorFlow has no such method, this one is
    never called.
    """
    import tensorflow as tf

    class Converter(tf.compat.v1.lite.TFLiteConverter):
        def _optimize_tflite_model(self, model: bytes, *_: Any, **__: Any) -> bytes:
            return model

    return Converter


def _without_captures(concrete: Any) -> Any:
    """The function's graph, in which tensors that a layer closes over are constants.

    TensorFlow makes constants of small ones by itself, and inputs of the function of all others.
    """
    import tensorflow as tf

    definition = concrete.graph.as_graph_def()
    nodes = {node.name: node for node in definition.node}
    for outer, inner in concrete.graph.captures:
        node = nodes[inner.op.name]
        if node.op != "Placeholder":
            continue
        if outer.dtype == tf.resource:
            raise ValueError(
                f"a layer reads the variable behind '{inner.name}', which the model does not own. "
                "Make it an attribute of the layer, with add_weight."
            )
        value = tf.make_tensor_proto(outer.numpy())
        node.Clear()
        node.name, node.op = inner.op.name, "Const"
        node.attr["dtype"].type = value.dtype
        node.attr["value"].tensor.CopyFrom(value)
    return definition


def _sign(model: ModelT) -> None:
    """Gives `model` a signature, which the converter makes only where it reads a SavedModel."""
    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey = SIGNATURE.encode()
    signature.subgraphIndex = 0
    signature.inputs = _entries("input", graph.inputs)
    signature.outputs = _entries("output", graph.outputs)
    model.signatureDefs = [signature]


def _entries(kind: str, tensors: Sequence[int]) -> list[schema.TensorMapT]:
    entries = []
    for i, tensor in enumerate(tensors):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = f"{kind}_{i}".encode(), int(tensor)
        entries.append(entry)
    return entries


def with_whole_pairs(model: ModelT) -> ModelT:
    """`model` with a DEQUANTIZE behind each QUANTIZE that another operator reads; in place.

    Converters before TensorFlow 2.20 let a FULLY_CONNECTED read a marker's QUANTIZE itself where it
    had read a reshaped value, and left the DEQUANTIZE of the pair out.
    """
    graph = model.subgraphs[0]
    quantized: set[int] = set()
    floats: dict[int, int] = {}  # what a QUANTIZE writes -> what a DEQUANTIZE makes of it
    kept = []
    for operator in graph.operators:
        name = flatbuffer.op_name(model, operator)
        if name == "QUANTIZE":
            quantized.add(int(operator.outputs[0]))
        elif name != "DEQUANTIZE":
            for tensor in quantized & set(map(int, operator.inputs)):
                if tensor not in floats:
                    like = graph.tensors[tensor]
                    kind = schema.TensorType.FLOAT32
                    floats[tensor] = flatbuffer.add_tensor(model, like.shape, kind, name=like.name)
                    pair = [tensor], [floats[tensor]]
                    kept.append(flatbuffer.new_operator(model, "DEQUANTIZE", *pair))
            operator.inputs = [floats.get(int(t), int(t)) for t in operator.inputs]
        kept.append(operator)
    graph.operators = kept
    return model


def _without_squeezes(model: ModelT) -> ModelT:
    """`model` without RESHAPEs from `(1, n)` to `(n,)` whose readers broadcast either; in place.

    The converter puts one before each ADD, SUB or MUL of two matrices of one row.
    """
    graph = model.subgraphs[0]
    ranks = [len(flatbuffer.tensor_shape(tensor)) for tensor in graph.tensors]
    needed = {int(t) for t in graph.outputs}  # tensors that must keep their rank
    for operator in graph.operators:
        same = [t for t in map(int, operator.inputs) if ranks[t] < ranks[int(operator.outputs[0])]]
        broadcasts = flatbuffer.op_name(model, operator) in _BROADCASTING
        needed.update(set(map(int, operator.inputs)) - set(same if broadcasts else []))
    kept, alias = [], {}
    for operator in graph.operators:
        source, result = int(operator.inputs[0]), int(operator.outputs[0])
        shapes = [flatbuffer.tensor_shape(graph.tensors[t]) for t in (source, result)]
        squeezes = flatbuffer.op_name(model, operator) == "RESHAPE"
        if squeezes and shapes[0] == (1, *shapes[1]) and result not in needed:
            alias[result] = source
            continue
        operator.inputs = [alias.get(int(t), int(t)) for t in operator.inputs]
        kept.append(operator)
    graph.operators = kept
    return model
