"""TensorFlow's own converter, as its documentation uses it: what ours is compared with."""

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def float_tflite(model: keras.Model) -> bytes:
    """`model` as TensorFlow converts it without any quantization, for one sample at a time."""
    return _convert(model, None)


def post_training_int8(model: keras.Model, samples: np.ndarray) -> bytes:
    """The converter's own full-integer quantization of a model of one input; int8 in and out.

    `samples` (n, …) are its representative dataset, fed one by one.
    """
    return _convert(model, samples)


def make_integer(converter: Any, samples: np.ndarray) -> None:
    """Sets a converter up for full-integer quantization with a representative dataset."""

    def one_by_one() -> Iterator[list[np.ndarray]]:
        yield from ([sample[None]] for sample in samples)

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = one_by_one
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8


def packed(model: keras.Model, inputs: Sequence[Any]) -> Any:
    """The inputs in the model's own structure: old files have a list of one, and Keras warns."""
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
