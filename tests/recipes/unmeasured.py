"""Runs of a recipe for their files alone."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from recipes import running


def file_of(recipe: Any, options: list[str], path: Path) -> bytes:
    """The file `path` that a recipe writes by `main`, which measures no file in this run.

    Most of what a run of one step takes are its measurements. A measured run that gives an equal
    file shows that they do not change it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "measure_float", lambda name, *_: running.Row(name=name, accuracy=0))
        patch.setattr(
            running,
            "measure_integer",
            lambda name, *_, **__: (running.Row(name=name, accuracy=0), Mock()),
        )
        recipe.main([*options, "--out", str(path.parent)])
    return path.read_bytes()
