"""Integer constants: which frozen weight the bytes of a converted constant are."""

import numpy as np
import pytest

from kqat.base.errors import LoweringError
from kqat.freezing.frozen_weight import FrozenWeight
from tflite_export.flatbuffer.tree import TensorT
from tflite_export.integer_pass.constants import _FrozenWeights


def weight(name: str, integers: np.ndarray, scales: int) -> FrozenWeight:
    return FrozenWeight(
        name=name,
        integers=integers.astype(np.int8),
        scale=np.full((1,) * (integers.ndim - 1) + (scales,), 0.5, np.float32),
        bits=8,
        per_channel=scales > 1,
    )


def tensor() -> TensorT:
    found = TensorT()
    found.name = b"odd"
    return found


def test_minus_zero_is_the_zero_of_training() -> None:
    """The converter may fold a negative factor into a weight that is zero."""
    frozen = _FrozenWeights((weight("a", np.array([[0, 3]]), 1),))
    found = frozen.find(np.array([[-0.0, 1.5]], np.float32), tensor(), 2)
    assert found.name == "a"


def test_kernels_of_zeros_are_told_apart_by_their_channels() -> None:
    frozen = _FrozenWeights((weight("a", np.zeros((3, 4)), 4), weight("b", np.zeros((4, 3)), 3)))
    zeros = np.zeros((3, 4), np.float32)
    assert frozen.find(zeros, tensor(), 4).name == "a"
    assert frozen.find(zeros.reshape(4, 3), tensor(), 3).name == "b"
    with pytest.raises(LoweringError, match=r"'odd' of shape \(6, 2\), which the converter change"):
        frozen.find(zeros.reshape(6, 2), tensor(), 2)
