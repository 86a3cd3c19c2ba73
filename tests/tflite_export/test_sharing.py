"""Equal quantization vectors are written once; what is read back is the same."""

import keras
import numpy as np
from keras import layers

import kqat
import tflite_export
from tflite_export import flatbuffer


def test_equal_vectors_are_written_once_and_read_back_alike() -> None:
    channels = 200
    x = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(channels, bias_initializer="ones")])
    blob = tflite_export.convert(kqat.quantize_model(model, calibration_data=x))
    graph = flatbuffer.read(blob).subgraphs[0]
    per_channel = [
        t.quantization
        for t in graph.tensors
        if t.quantization is not None and len(t.quantization.scale) == channels
    ]
    assert len(per_channel) == 2  # weights and bias
    for params in per_channel:
        np.testing.assert_array_equal(params.zeroPoint, np.zeros(channels))
    # Two vectors of scales, one of zero points, the integers; the rest is names and tables.
    payload = channels * (2 * 4 + 8 + 8 + 4)
    assert payload < len(blob) < payload + channels * 8
