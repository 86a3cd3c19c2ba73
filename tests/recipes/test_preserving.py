"""Pruned and clustered files: what the recipe asserts, and its table."""

import json
from pathlib import Path

import pytest

from recipes import preserving


@pytest.mark.slow
def test_zeros_and_clusters_are_in_the_files(tmp_path: Path) -> None:
    results = preserving.main(["--smoke", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = results["rows"]
    assert list(rows) == list(preserving.ROWS)
    assert rows["half pruned"]["least_zero_share"] >= 0.49 > rows["dense"]["least_zero_share"]
    assert rows["16 clusters"]["most_values"] <= 16 < rows["dense"]["most_values"]
    both = rows["half pruned, 16 clusters"]
    assert both["most_values"] <= 16 and both["least_zero_share"] >= 0.49
    for row in rows.values():
        assert row["lockstep"] <= 1
        assert row["smallest_bytes"] <= row["lookup_bytes"] <= row["file_bytes"]
    assert both["smallest_bytes"] < 0.6 * rows["dense"]["file_bytes"]
    (table,) = preserving.tables(results)
    assert [row[0] for row in table.rows] == list(preserving.ROWS)
