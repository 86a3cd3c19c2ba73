"""The types that a plan gives the ends of a file are those of the file."""

import keras
import numpy as np
from keras import layers as L

import kqat
import tflite_export
from kqat.planning import end_types


def test_a_plan_knows_the_types_of_the_files_ends() -> None:
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    ids = keras.Input((8,), dtype="int32", name="ids")
    pixels = keras.Input((8,), dtype="uint8", name="pixels")
    wide = L.Dense(3, name="wide")(b)
    read = L.Dense(8, name="read")(L.Dropout(0.1, name="drop")(a))
    found = L.Embedding(9, 4, name="table")(ids)
    outputs = [
        L.Softmax(name="soft")(read),
        L.Reshape((3, 1), name="shape")(wide),
        L.Dense(2, name="free")(read),
        L.Flatten(name="flat")(found),
        L.Dense(2, name="grey")(L.Rescaling(1 / 255)(pixels)),
        keras.ops.argmax(found, axis=-1),
    ]
    model = keras.Model([a, b, ids, pixels], outputs)
    policy = {"b": "int16x8", "wide": "int16x8", "shape": "int16x8", "free": None, "drop": None}
    plan = kqat.plan(model, policy)
    rng = np.random.default_rng(0)
    data = [*rng.normal(size=(2, 4, 8)).astype(np.float32), rng.integers(0, 9, (4, 8))]
    data = [*data[:2], data[2].astype(np.int32), data[2].astype(np.uint8)]
    qat = kqat.quantize_model(model, policy, calibration_data=data)
    file = tflite_export.inspect(tflite_export.convert(qat))
    for types, tensors in zip(end_types(plan), (file.inputs, file.outputs), strict=True):
        assert [*types.values()] == [tensor.dtype for tensor in tensors]
    assert {*types.values()} == {"int8", "int16", "int32", "float32"}
