"""Quantization-aware training for Keras 3 that ends in a full-integer `.tflite`.

    qat = kqat.quantize_model(model, calibration_data=x[:512])
    qat.compile(optimizer, loss)
    qat.fit(x, y, epochs=3)
    blob = tflite_export.convert(qat)

`kqat` trains; the package `tflite_export` ships.

The public names stand in `__init__.pyi`, for type checkers and for `lazy_face`, which imports each
when it is first used: Keras and TensorFlow take seconds, and not every command needs them. The
layers of a saved QAT model are known to Keras all the same, from when both packages are imported.
"""

from kqat.base import lazy_face, register_with_keras

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = lazy_face(__name__, __file__)

# Everything that saved models may name: these import all that registers classes with Keras.
register_with_keras(__name__, ("kqat.training", "kqat.annotate"))
