"""Straight pieces and exceptions: in whole numbers, and never more than one step off."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kqat.base.errors import LoweringError
from tflite_export.integer_pass.piecewise_linear import (
    COUNTS,
    INTEGERS,
    MOST_ROWS,
    MOST_SLOPE,
    Pieces,
    fit,
)

X = np.arange(-(2**15), 2**15)


def steps_of(function: Callable[[Any], Any], reach: float) -> np.ndarray:
    """The function's values for the integers of a grid up to `reach`, on a grid that holds them."""
    real = X * (reach / 2**15)
    values = np.asarray(function(real), np.float64)
    return values / (np.abs(values).max() / (2**15 - 1))


def check(pieces: Pieces, steps: np.ndarray) -> None:
    found, inside = pieces.evaluate(X), np.clip(steps, -(2**15), 2**15 - 1)
    assert np.abs(found - inside).max() == pieces.error_steps <= 1.0
    # What int16 holds, bytes hold and int32 arithmetic holds.
    assert found.min() >= -(2**15) and found.max() < 2**15
    assert 0 <= pieces.base.min() and pieces.base.max() < 2**24
    assert np.abs(pieces.slope).max() <= MOST_SLOPE
    assert pieces.rows.max() < len(pieces.exceptions) <= MOST_ROWS + 1
    assert -(2**15) <= pieces.exceptions.min() and pieces.exceptions.max() < 2**15
    ends = pieces.base + pieces.slope * (pieces.points - 1)
    assert 0 <= ends.min() and ends.max() < 2**24


@pytest.mark.parametrize(
    ("function", "reach", "pieces", "exceptions"),
    [
        (lambda x: x, 1.0, 512, 0),
        (lambda x: -x, 1.0, 512, 0),
        (np.zeros_like, 1.0, 512, 0),
        (np.exp, 1.0, 512, 0),
        (np.exp, 6.0, 1024, 0),
        (lambda x: x * np.tanh(np.log1p(np.exp(x))), 6.0, 512, 0),
        (lambda x: np.clip(x / 6 + 0.5, 0, 1), 6.0, 512, 0),
        (lambda x: np.sin(3 * x), 6.0, 4096, 0),
        # Two kinks, a jump, the largest jump, a pole.
        (lambda x: np.clip(x / 6 + 0.5, 0, 1), 30.0, 512, 2),
        (lambda x: np.where(x > 0.3, 1.0, x), 1.0, 512, 1),
        (lambda x: np.where(x > 0.3, 1.0, -1.0), 1.0, 512, 1),
        (lambda x: 1 / np.maximum(x, 0.1), 6.0, 1024, 32),
    ],
)  # fmt: skip
def test_no_value_is_more_than_one_step_off(
    function: Callable[[Any], Any], reach: float, pieces: int, exceptions: int
) -> None:
    steps = steps_of(function, reach) if function is not np.zeros_like else np.zeros(INTEGERS)
    found = fit(steps, "layer")
    check(found, steps)
    assert (len(found.base), len(found.exceptions) - 1) == (pieces, exceptions)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(-(2**15), 2**15 - 1), min_size=2, max_size=40),
    st.floats(0.5, 3.0),
)
def test_any_function_of_levels(levels: list[int], gain: float) -> None:
    position = np.linspace(0, len(levels) - 1, INTEGERS)
    steps = np.asarray(levels)[np.rint(position).astype(int)] * gain
    check(fit(steps, "layer"), np.clip(steps, -(2**15), 2**15 - 1))


def test_not_a_number_is_zero_and_too_large_ends_the_grid() -> None:
    steps = np.where(X < 0, np.nan, np.where(X > 100, np.inf, 7.0))
    found = fit(steps, "layer").evaluate(X)
    assert set(found[X < 0]) == {0} and set(found[X > 100]) == {2**15 - 1}


def test_a_function_that_jumps_everywhere_is_refused_by_name() -> None:
    noise = np.random.default_rng(0).normal(scale=9999, size=INTEGERS)
    message = (
        f"at most {MOST_ROWS} of {COUNTS[-1]} places.*Received: 'noisy', .* jump at "
        f"{COUNTS[-1]}. Give its layer 'int8'"
    )
    with pytest.raises(LoweringError, match=message):
        fit(noise, "noisy")
