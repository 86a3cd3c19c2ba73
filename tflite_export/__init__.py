"""From a trained QAT model to a verified full-integer `.tflite`.

blob = tflite_export.convert(qat)
print(tflite_export.verify(qat, blob, x_test))
tflite_export.save(blob, "model.tflite")

The public names stand in `__init__.pyi`; each is imported when it is first used.
"""

from kqat.base import lazy_face

__all__, __getattr__, __dir__ = lazy_face(__name__, __file__)
