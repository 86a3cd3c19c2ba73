"""`array_of`: what NumPy reads of a variable, by a shorter way."""

import keras
import numpy as np
import pytest

from kqat.base import array_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_it_is_what_numpy_reads(dtype: str) -> None:
    variable = keras.Variable(np.arange(6).reshape(2, 3) % 2, dtype=dtype, trainable=False)
    found = array_of(variable)
    assert (found.dtype, found.shape) == (np.asarray(variable).dtype, (2, 3))
    np.testing.assert_array_equal(found, np.asarray(variable))


def test_what_was_read_stays_while_the_variable_changes() -> None:
    variable = keras.Variable(np.zeros(3, np.float32))
    before = array_of(variable)
    variable.value.assign_add(np.ones(3, np.float32))  # In place, as an optimizer's step.
    variable.assign(variable + 1.0)
    np.testing.assert_array_equal(before, np.zeros(3))
    np.testing.assert_array_equal(array_of(variable), np.full(3, 2.0))


def test_a_stateless_scope_replaces_it() -> None:
    variable = keras.Variable(np.zeros(2, np.float32))
    with keras.StatelessScope(state_mapping=[(variable, keras.ops.ones(2))]):
        np.testing.assert_array_equal(array_of(variable), np.ones(2))
