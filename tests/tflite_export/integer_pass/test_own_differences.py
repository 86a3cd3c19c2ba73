"""A value less itself on a grid that SUB cannot compute: how recurrences begin."""

import keras
import pytest
from keras import layers as L

import kqat
import tflite_export
from tests.tflite_export.small_models import functional, operators
from tflite_export import flatbuffer


@pytest.mark.parametrize(
    ("policy", "most"), [("int16x8", 3e4), pytest.param("int8", 1e6, marks=pytest.mark.slow)]
)
def test_a_recurrence_begins_with_zeros_on_every_runtime(policy: str, most: float) -> None:
    """TFLite Micro ends the process at a SUB whose output is so much finer than its input."""
    keras.utils.set_random_seed(0)
    model = functional((2, 3), L.SimpleRNN(2))
    x = keras.random.uniform((16, 2, 3), -most, most)
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    blob = tflite_export.convert(qat)
    names = operators(flatbuffer.read(blob))
    assert names[names.index("SUB") + 1] == "QUANTIZE"
    report = tflite_export.verify(qat, blob, x, runtimes=tflite_export.RUNTIMES)
    for part in report.runtimes:
        assert part.problem is None and part.is_right, report
        assert part.exact is not None and part.exact.is_exact, report
