"""The pages and figures that code writes are those of today's code."""

import re
from pathlib import Path

import matplotlib
import pytest

from docs import figures, tables
from kqat.config import PRESETS
from kqat.devices import TARGETS
from tests.newer_keras import needs_tensorflow
from tflite_export.kernels import OP_TABLE


def test_the_tables_are_up_to_date() -> None:
    for name, text in tables.pages().items():
        assert (tables.FOLDER / name).read_text() == text, "python -m docs.tables"


def test_every_row_of_the_tables_is_there() -> None:
    found = tables.pages()
    for page, names in {
        "presets.md": PRESETS,
        "targets.md": TARGETS,
        "operators.md": OP_TABLE,
    }.items():
        assert set(names) <= set(re.findall(r"^\| `(\w+)`", found[page], re.MULTILINE))
    for text in found.values():
        for row in (line for line in text.splitlines() if line.startswith("|")):
            columns = len(re.findall(r"(?<!\\)\|", row))
            assert columns in {4, 5, 6, 7}, row


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_can_be_drawn_and_is_kept(name: str, tmp_path: Path) -> None:
    drawn, kept = (
        figures.draw(name, tmp_path).read_text(),
        (figures.FOLDER / f"{name}.svg").read_text(),
    )
    assert drawn.startswith("<?xml")
    needs_tensorflow("2.21", "a figure of the same numbers to the last digit")
    # Another release of Matplotlib draws other bytes of the same figure.
    if f"matplotlib {matplotlib.__version__}<" in kept.replace("\n", ""):
        assert drawn == kept, "python -m docs.figures"
