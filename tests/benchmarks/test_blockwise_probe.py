"""Weights with a scale per block: what runtimes say is what is written down."""

import json

import pytest

from benchmarks import blockwise_probe


@pytest.mark.slow
def test_runtimes_say_what_the_table_says() -> None:
    """A runtime that learns it shows here; then `QuantSpec` can have groups."""
    kept = json.loads(blockwise_probe.TABLE.read_text())["cells"]
    found = blockwise_probe.main([])
    kinds = [
        {name: words.split(":")[0] for name, words in cells.items()} for cells in (kept, found)
    ]
    assert kinds[0] == kinds[1]
    assert not any(kind == "works" for name, kind in kinds[0].items() if name.startswith("int8"))
