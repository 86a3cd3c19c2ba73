"""The grid of a bias, against exact arithmetic on fractions."""

from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from kqat.grids.bias import bias_steps, least_bias_step, on_bias_grid

BIASES = st.floats(-100.0, 100.0, width=32)
STEPS = st.floats(2.0**-12, 2.0**4, width=32)


@given(BIASES, STEPS)
def test_the_bias_is_the_nearest_whole_number_of_steps(bias: float, step: float) -> None:
    found = float(on_bias_grid(ops.convert_to_tensor([bias]), np.float32(step))[0])
    # Two float32 roundings of the quotient, of at most 19 bits, and one of the product.
    slack = Fraction(1, 2**4) * Fraction(step)
    assert abs(Fraction(found) - Fraction(bias)) <= Fraction(step) / 2 + slack
    count = Fraction(found) / Fraction(step)
    assert abs(count - round(count)) <= abs(count) * Fraction(1, 2**23)


def test_the_file_has_the_same_steps() -> None:
    draw = np.random.default_rng(0)
    bias, step = draw.normal(size=200).astype(np.float32), np.float32(2.0**-8)
    trained = np.asarray(on_bias_grid(ops.convert_to_tensor(bias), step))
    np.testing.assert_array_equal(trained, bias_steps(trained.astype(np.float64), step) * step)


@pytest.mark.parametrize("step", [0.0, 2.0**-40])
def test_a_grid_finer_than_float32_leaves_the_bias(step: float) -> None:
    bias = ops.convert_to_tensor(np.float32([0.3, -7.0, 0.0]))
    np.testing.assert_array_equal(on_bias_grid(bias, np.float32(step)), bias)


def test_the_finest_step_holds_the_bias_in_30_and_46_bits() -> None:
    bias = np.float32([2.0, -8.0])
    np.testing.assert_array_equal(least_bias_step(bias, 8), [2.0**-29, 2.0**-27])
    np.testing.assert_array_equal(least_bias_step(bias, 16), [2.0**-45, 2.0**-43])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="uses its gradients")
def test_the_gradient_passes_straight_through() -> None:
    import tensorflow as tf

    bias = tf.Variable([0.3, 0.4])
    with tf.GradientTape() as tape:
        loss = ops.sum(on_bias_grid(ops.convert_to_tensor(bias), np.float32([1.0, 0.0])))
    np.testing.assert_array_equal(tape.gradient(loss, bias), [1.0, 1.0])
