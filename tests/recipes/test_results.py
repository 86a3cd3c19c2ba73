"""RESULTS.md is what the kept results say, and nothing else."""

import importlib
import json
from pathlib import Path

import pytest

from recipes import results

KEPT = sorted(results.FOLDER.glob("*.json"))


def test_the_page_is_what_the_results_say() -> None:
    assert results.PAGE.read_text() == results.page()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_results_are_of_real_data(path: Path) -> None:
    kept = json.loads(path.read_text())
    assert not kept["options"]["smoke"]
    module = kept["command"].split()[2]
    assert module in (f"recipes.{kept['recipe']}", f"benchmarks.{kept['recipe']}")
    assert "tensorflow" in kept["machine"]["packages"]
    for table in importlib.import_module(module).tables(kept):
        assert {len(row) for row in table.rows} == {len(table.header)}


def _write(folder: Path, **options: object) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps({"recipe": "digits", "options": options}))
    return path


def test_results_are_kept_by_recipe_network_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "kept")
    results.keep(_write(tmp_path, smoke=False, seed=0))
    results.keep(_write(tmp_path, smoke=False, seed=3, network="conv1d"))
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"digits.json", "digits_conv1d_seed3.json"}


def test_made_up_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Expected results of real data"):
        results.keep(_write(tmp_path, smoke=True, seed=0))
