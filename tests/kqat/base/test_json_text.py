"""JSON text that every parser reads."""

import json
from typing import Any

import numpy as np
import pytest

from kqat.base import json_text


def test_what_is_not_finite_is_null() -> None:
    given = {
        "sqnr": float("nan"),
        "layers": [{"low": np.float32("-inf"), "high": np.float32(0.5)}, (np.int64(3), "NaN")],
        "range": np.array([1.0, np.inf]),
        "is_full_integer": True,
    }
    wanted = {
        "sqnr": None,
        "layers": [{"low": None, "high": 0.5}, [3, "NaN"]],
        "range": [1.0, None],
        "is_full_integer": True,
    }

    def refuse(word: str) -> Any:
        pytest.fail(f"{word} is no JSON")

    assert json.loads(json_text(given, indent=1), parse_constant=refuse) == wanted
