"""TensorFlow's own converter: what our files are compared with."""

import keras
import numpy as np

from recipes import converter
from tflite_export import flatbuffer


def test_its_post_training_quantization_is_full_integer() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, activation="softmax")])
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    dtypes = []
    for blob in (converter.float_tflite(model), converter.post_training_int8(model, x)):
        graph = flatbuffer.read(blob).subgraphs[0]
        ends = [graph.tensors[i] for i in (*graph.inputs, *graph.outputs)]
        dtypes.append([flatbuffer.tensor_dtype(tensor).name for tensor in ends])
    assert dtypes == [["float32", "float32"], ["int8", "int8"]]
