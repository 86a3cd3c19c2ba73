"""From a trained QAT model to a verified full-integer `.tflite`.

blob = tflite_export.convert(qat)
print(tflite_export.verify(qat, blob, x_test))
tflite_export.save(blob, "model.tflite")
"""

from tflite_export.exporting import convert, save
from tflite_export.report import OutputAgreement, Report, RuntimeReport, SiteDifference
from tflite_export.runtimes import RUNTIMES
from tflite_export.targets import TARGETS
from tflite_export.verification import verify

__all__ = [
    "RUNTIMES",
    "TARGETS",
    "OutputAgreement",
    "Report",
    "RuntimeReport",
    "SiteDifference",
    "convert",
    "save",
    "verify",
]
