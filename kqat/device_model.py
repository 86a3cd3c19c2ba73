"""What the device will compute, as a Keras model: evaluated like any other, equal to the integer.

Above everything but the command line: it converts, so it needs `tflite_export`, which is imported
when it is called.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kqat.base import ModelError
from kqat.freezing import FrozenModel, freeze
from kqat.training import trained_model


def integer_model(
    qat: keras.Model | FrozenModel,
    runtime: str = "litert",
    *,
    inputs: str = "float",
    outputs: str = "float",
) -> keras.Model:
    """The model that a runtime runs, in Keras: every output integer of every sample is the file's.

    `evaluate` and `predict` judge a whole data set as the device will, any batch size, on any
    machine. Inputs and outputs have the QAT model's names and structures. The model holds the
    integers of `qat` as they are now: make another after more training.

    Args:
        qat: a model from `kqat.quantize_model`, or what `kqat.freeze` made of it.
        runtime: `"litert"` (XNNPACK), `"litert_reference"` or `"tflite_micro"` (and CMSIS-NN).
        inputs: `"float"`, or `"integers"` on the inputs' grids. uint8 inputs take their bytes.
        outputs: `"float"`: real values on the outputs' grids, for losses and metrics;
            `"integers"`: the file's own.

    Raises:
        ExportError: if the integer arithmetic of an operator is not known, as where a layer is
            left float.
    """
    import tflite_export

    frozen = qat if isinstance(qat, FrozenModel) else freeze(qat)
    blob = tflite_export.convert(frozen)
    # The bytes of a uint8 input are the file's integers.
    kinds = ["integers" if n in frozen.byte_inputs else inputs for n in frozen.input_names]
    model = tflite_export.integer_model(blob, runtime, inputs=kinds, outputs=outputs)
    if isinstance(qat, FrozenModel):
        return model
    # The file has flat lists; the QAT model may have dicts.
    structure = [qat.input, qat.output]
    given = keras.tree.pack_sequence_as(structure[0], model.inputs)
    result = keras.tree.pack_sequence_as(structure[1], model.outputs)
    return keras.Model(given, result, name=f"{qat.name}_on_{runtime}")


class GapCallback(keras.callbacks.Callback):
    """Logs after each epoch how the model does on the device: `val_loss_device` and each metric.

    The QAT model is converted and its integer model evaluated with the loss and metrics that `fit`
    was compiled with. A callback behind it can go by these logs, as
    `keras.callbacks.EarlyStopping("val_accuracy_device", mode="max", restore_best_weights=True)`
    does. In a `kqat.Distiller` the QAT model is the student. A trainer of your own names its QAT
    model by an attribute `trained_model`.

    Args:
        data: what `evaluate` takes: `(x, y)`, `(x, y, sample_weight)`, or a data set.
        runtime: as of `kqat.integer_model`.
        batch_size: as of `evaluate`, for arrays.
    """

    def __init__(
        self, data: Any, *, runtime: str = "litert", batch_size: int | None = None
    ) -> None:
        super().__init__()
        self.data = data
        self.runtime = runtime
        self.batch_size = batch_size

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Evaluates the integer model and adds to `logs`."""
        if not self.model.compiled:
            raise ModelError(
                f"Expected a compiled model for GapCallback. Received: '{self.model.name}', which "
                "is not compiled. Use model.compile first."
            )
        qat = trained_model(self.model)
        if not hasattr(qat, "inputs"):
            raise ModelError(
                "Expected a QAT model for GapCallback, or a trainer that has it as the attribute "
                f"trained_model. Received: '{qat.name}' of type {type(qat).__name__}, which has "
                "none. Set self.trained_model to the QAT model inside, if its outputs are the "
                "trainer's."
            )
        device = integer_model(qat, self.runtime)
        _compile_alike(device, self.model)
        found = _evaluated(device, self.data, self.batch_size)
        if logs is not None:
            logs.update({f"val_{name}_device": value for name, value in found.items()})


def _compile_alike(device: keras.Model, model: keras.Model) -> None:
    """Gives `device` a loss and metrics of its own like those of `model`."""
    config = model.get_compile_config()
    parts = {
        key: keras.saving.deserialize_keras_object(config[key])
        for key in ("loss", "loss_weights", "metrics", "weighted_metrics")
        if config.get(key) is not None
    }
    # Nothing is trained: the optimizer is never called.
    device.compile(optimizer="sgd", **parts)


def _evaluated(device: keras.Model, data: Any, batch_size: int | None) -> Mapping[str, float]:
    if isinstance(data, Sequence):
        keywords = dict(zip(("x", "y", "sample_weight"), data, strict=False))
        found = device.evaluate(**keywords, batch_size=batch_size, verbose=0, return_dict=True)
    else:
        found = device.evaluate(data, verbose=0, return_dict=True)
    return {name: float(value) for name, value in found.items()}
