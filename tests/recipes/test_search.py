"""The search's table: what was measured, and what is a sum."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipes import search


def test_the_table_says_what_each_policy_takes() -> None:
    def row(name: str, used: float, cost: float, **more: Any) -> dict[str, Any]:
        return {"name": name, "used": used, "cost": cost, "presets": {"int8": 2}, **more}

    measured = {"accuracy": 0.9, "sqnr_db": 20.0}
    rows = [row("found", 600.0, 0.25, **measured), row("mixed", 800.4, 0.1), row("int8", 1e3, 0.01)]
    results = {
        "test_images": 100,
        "float_accuracy": 0.91,
        "measures": {"cycles": {"budget": 650.0, "rows": rows}},
    }
    (table,) = search.tables(results)
    assert table.title.startswith("ResNet-8 within 650 cycles on ethos_u55, 100 test images")
    assert table.rows == [
        ("found", "2 int8", "600", "60.00 %", "0.25", "90.00 %", "20.0"),
        ("mixed", "2 int8", "800", "80.04 %", "0.1", "-", "-"),
        ("int8", "2 int8", "1,000", "100.00 %", "0.01", "-", "-"),
    ]


@pytest.mark.slow
def test_a_policy_is_found_and_drawn(tmp_path: Path) -> None:
    results = search.main(["--smoke", "--out", str(tmp_path), "--measures", "flash"])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    found = results["measures"]["flash"]
    by_name = {row["name"]: row for row in found["rows"]}
    assert by_name["found"]["used"] <= found["budget"] <= 0.6 * by_name["int8"]["used"]
    assert "<svg" in (tmp_path / "flash.svg").read_text()
