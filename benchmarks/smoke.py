"""The whole road on three small networks, with what a user's environment has and nothing else.

`python smoke.py` in any folder: quantize, fit, save, load, convert, verify on the runtimes that are
installed, inspect, and write C++. It imports kqat, tflite_export, Keras and NumPy only, and leaves
nothing behind. The last line is "smoke test passed"; any fault ends it with a traceback.
"""

import os
import platform
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import kqat
import tflite_export


def image_classifier() -> Any:
    x = keras.Input((16, 16, 3), name="image")
    y = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    y = keras.layers.BatchNormalization()(y)
    y = keras.layers.ReLU(6.0)(y)
    y = keras.layers.Add()([y, keras.layers.DepthwiseConv2D(3, padding="same")(y)])
    y = keras.layers.GlobalAveragePooling2D()(y)
    return keras.Model(x, keras.layers.Dense(4, activation="softmax")(y), name="images")


def transformer() -> Any:
    x = keras.Input((8, 16), name="frames")
    y = keras.layers.MultiHeadAttention(2, 8)(x, x)
    y = keras.layers.LayerNormalization()(keras.layers.Add()([x, y]))
    z = keras.layers.Dense(16)(keras.layers.Dense(32, activation="gelu")(y))
    y = keras.layers.GlobalAveragePooling1D()(keras.layers.Add()([y, z]))
    return keras.Model(x, keras.layers.Dense(4, activation="softmax")(y), name="attention")


def recurrent() -> Any:
    x = keras.Input((8, 6), name="samples")
    y = keras.layers.LSTM(8)(x)
    return keras.Model(x, keras.layers.Dense(4, activation="softmax")(y), name="recurrence")


def check(model: Any, runtimes: tuple[str, ...], folder: Path) -> None:
    """Takes one network the whole road."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, *model.inputs[0].shape[1:])).astype(np.float32)
    y = rng.integers(4, size=64)
    qat = kqat.quantize_model(model, calibration_data=x)
    qat.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    qat.fit(x, y, epochs=1, verbose=0, callbacks=[kqat.FreezeObservers(1)])
    path = folder / "qat.keras"
    qat.save(path)
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(
        qat.predict(x, verbose=0), loaded.predict(x, verbose=0), err_msg="saved and loaded"
    )
    blob = tflite_export.convert(loaded, target="tflite_micro")
    found = tflite_export.inspect(blob)
    assert found.float_operators == 0, f"{model.name}: {found.float_operators} float operators"
    report = tflite_export.verify(loaded, blob, x, runtimes=runtimes, samples=16)
    for part in report.runtimes:
        assert part.problem is None, f"{model.name}: {part.runtime}: {part.problem}"
        assert part.is_right, f"{model.name}: {part}"
    print(f"{model.name}: {len(blob):,} bytes, {len(found.operators)} operators, {runtimes} right")


def main() -> None:
    from importlib.metadata import packages_distributions, version

    # By module: nightlies bring the modules `tensorflow` and `keras` under other names.
    found = [
        packages_distributions()[m][0] for m in ("tensorflow", "keras", "numpy", "ai_edge_litert")
    ]
    print(f"Python {platform.python_version()},", ", ".join(f"{n} {version(n)}" for n in found))
    runtimes = tuple(r for r in tflite_export.RUNTIMES if r != "tflite_micro" or has_tflm())
    with tempfile.TemporaryDirectory() as folder:
        for build in (image_classifier, transformer, recurrent):
            check(build(), runtimes, Path(folder))
    print("smoke test passed")


def has_tflm() -> bool:
    import importlib.util

    return importlib.util.find_spec("tflite_micro") is not None


if __name__ == "__main__":
    main()
