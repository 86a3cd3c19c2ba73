"""What tests draw and compute does not depend on the tests before them."""

import keras
import numpy as np
import pytest

_random = np.random.default_rng(0)


@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_generator_of_a_module_begins_anew(turn: str) -> None:
    assert _random.integers(2**31) == np.random.default_rng(0).integers(2**31), turn


def test_a_policy_is_set_for_one_test() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")


@pytest.fixture(scope="class")
def policy() -> str:
    """The policy under which a fixture of a wider scope makes its models."""
    return keras.config.dtype_policy().name


class TestBehind:
    """A fixture of a wider scope is made before the function's own, as a module's is."""

    def test_a_fixture_of_a_wider_scope_has_keras_s_own(self, policy: str) -> None:
        assert policy == "float32"
