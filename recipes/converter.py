"""Conversion by TensorFlow's own converter, used as in its documentation, for comparison."""

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter


def float_tflite(model: keras.Model) -> bytes:
    """`model` converted by TensorFlow without quantization, for one sample at a time."""
    return _convert(model, None)


def post_training_int8(model: keras.Model, samples: np.ndarray) -> bytes:
    """The converter's own full-integer quantization of a model of one input; int8 in and out.

    `samples` (n, …) are its representative dataset, fed one by one.
    """
    return _convert(model, samples)


def post_training_int8_of_many(model: keras.Model, inputs: Any) -> bytes:
    """As `post_training_int8`, for a model of any inputs; `inputs` have the model's structure.

    Variables become constants during the call, so that no SavedModel is needed. Token ids stay
    int32, and so do their inputs.
    """
    names = input_names(model)
    fixed = [(v, tf.constant(v.numpy())) for v in model.variables]

    def call(**tensors: Any) -> Any:
        with keras.StatelessScope(state_mapping=fixed):
            return model(packed(model, [tensors[name] for name in names]), training=False)

    signature = {
        name: tf.TensorSpec((1, *t.shape[1:]), t.dtype, name=name)
        for name, t in zip(names, model.inputs, strict=True)
    }
    concrete = tf.function(call).get_concrete_function(**signature)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    arrays = keras.tree.flatten(inputs)
    # The inputs that follow are constants that the call captured.
    order = [t.name.split(":")[0] for t in concrete.inputs[: len(names)]]

    def one_by_one() -> Iterator[list[np.ndarray]]:
        for sample in range(len(arrays[0])):
            yield [arrays[names.index(name)][sample : sample + 1] for name in order]

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = one_by_one
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter.convert()


def input_names(model: keras.Model) -> list[str]:
    """A name for each input of `model`, in the order of `model.inputs`."""
    return [f"input_{index}" for index in range(len(model.inputs))]


def run_signature(blob: bytes, model: keras.Model, inputs: Any) -> list[np.ndarray]:
    """The outputs of a file of `post_training_int8_of_many`, one array per output."""
    runner = Interpreter(model_content=blob)
    runner.allocate_tensors()
    by_name = {d["name"].split(":")[0]: d["index"] for d in runner.get_input_details()}
    arrays = dict(zip(input_names(model), keras.tree.flatten(inputs), strict=True))
    rows: list[list[np.ndarray]] = []
    for sample in range(len(next(iter(arrays.values())))):
        for name, index in by_name.items():
            key = next(n for n in arrays if name.endswith(n))
            runner.set_tensor(index, arrays[key][sample : sample + 1])
        runner.invoke()
        rows.append([runner.get_tensor(d["index"]) for d in runner.get_output_details()])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def make_integer(converter: Any, samples: np.ndarray) -> None:
    """Configures a converter for full-integer quantization with a representative dataset."""

    def one_by_one() -> Iterator[list[np.ndarray]]:
        yield from ([sample[None]] for sample in samples)

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = one_by_one
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8


def packed(model: keras.Model, inputs: Sequence[Any]) -> Any:
    """The inputs in the model's own structure; Keras warns if a model wants a list of one."""
    if isinstance(model, keras.Sequential):  # It has no `input` until it is called.
        return inputs[0]
    return keras.tree.pack_sequence_as(model.input, list(inputs))


def _convert(model: keras.Model, samples: np.ndarray | None) -> bytes:
    signature = [tf.TensorSpec((1, *t.shape[1:]), t.dtype, name=t.name) for t in model.inputs]
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serve", lambda *inputs: model(packed(model, inputs), training=False), signature
    )
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serve"])
        if samples is not None:
            make_integer(converter, samples)
        return converter.convert()
