"""What tests draw does not depend on the tests before them."""

import numpy as np
import pytest

_random = np.random.default_rng(0)


@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_generator_of_a_module_begins_anew(turn: str) -> None:
    assert _random.integers(2**31) == np.random.default_rng(0).integers(2**31), turn
