"""Fixed output grids: the ranges of the TFLite quantization specification."""

import pytest

from kqat.devices.kernels import INT8_FIXED, INT16_FIXED


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        ("SOFTMAX", 0.0, 255 / 256),
        ("LOGISTIC", 0.0, 255 / 256),
        ("TANH", -1.0, 127 / 128),
        ("LOG_SOFTMAX", -255 / 16, 0.0),
        ("L2_NORMALIZATION", -1.0, 127 / 128),
    ],
)
def test_int8_ranges(op: str, low: float, high: float) -> None:
    assert INT8_FIXED[op].range == (low, high)


def test_the_int16_range() -> None:
    assert INT16_FIXED.range == (-1.0, 32767 / 32768)
