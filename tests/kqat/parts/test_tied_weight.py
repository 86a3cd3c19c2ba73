"""One weight, and what calls compute of it."""

import numpy as np
import pytest
from keras import ops, regularizers

from kqat.parts import TiedWeight, reads_rows

W = np.arange(12, dtype=np.float32).reshape(4, 3)
BIAS = np.float32([1.0, 2.0, 3.0, 4.0])


@pytest.fixture
def layer() -> TiedWeight:
    layer = TiedWeight(W.shape, [4], kernel_regularizer=regularizers.L2(0.1))
    layer.build(None)
    layer.set_weights([W, BIAS])
    return layer


@pytest.mark.parametrize(
    ("use", "x", "bias", "expected"),
    [
        ("rows", np.int32([[3, 0]]), None, W[[[3, 0]]]),
        ("product", np.ones((2, 4), np.float32), None, np.ones((2, 4)) @ W),
        ("transposed", np.ones((2, 5, 3), np.float32), 0, np.ones((2, 5, 3)) @ W.T + BIAS),
        ("sum", np.ones((2, 4, 3), np.float32), None, np.ones((2, 4, 3)) + W),
        ("factor", np.full((2, 4, 3), 2.0, np.float32), None, np.full((2, 4, 3), 2.0) * W),
    ],
)
def test_each_use(
    layer: TiedWeight, use: str, x: np.ndarray, bias: int | None, expected: np.ndarray
) -> None:
    result = layer(ops.convert_to_tensor(x), use=use, bias=bias)
    np.testing.assert_allclose(result, expected)
    spec = layer.compute_output_spec(ops.convert_to_tensor(x), use=use, bias=bias)
    assert tuple(spec.shape) == expected.shape
    assert reads_rows(layer, {"use": use}) == (use == "rows")


def test_it_is_made_anew_of_its_config(layer: TiedWeight) -> None:
    again = TiedWeight.from_config(layer.get_config())
    assert (again.shape, again.biases) == ([4, 3], [4])
    np.testing.assert_allclose(again.kernel_regularizer.l2, 0.1)
