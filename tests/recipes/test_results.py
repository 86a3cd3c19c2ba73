"""RESULTS.md is what the kept results say, and nothing else."""

import importlib
import json
import subprocess
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


def test_runs_of_several_seeds_are_one_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = (path for path in KEPT if path.stem == "mobilenetv2_cifar10")
    first = json.loads(path.read_text())
    second = json.loads(path.read_text())
    second["options"]["seed"], second["date"], second["commit"] = 1, "2026-11-29", "abc1234+"
    second["command"] = second["command"].replace("--seed 0", "--seed 1")
    qat, sparse = "QAT int8", "FP32, half pruned"
    for run, accuracy in ((first, 0.70), (second, 0.72)):
        run["rows"][qat]["accuracy"], run["rows"][sparse]["accuracy"] = accuracy, 0.69
    del second["rows"]["QAT ternary"]
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for run, name in ((first, "mobilenetv2_cifar10"), (second, "mobilenetv2_cifar10_seed1")):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    page = results.page()
    assert page.count("\n## ") == 1
    assert first["command"] in page
    assert second["command"] in page
    assert f"| {qat} | 71.00 % (70.00–72.00, n = 2) | +2.00 (+1.00 to +3.00) |" in page
    assert page.count("| QAT ternary |") == 2  # The first run's two tables.
    assert "Measured by 2026-11-24, before commit a2e0207, seed 0.\n" in page
    changed = "on commit abc1234 with uncommitted changes, seed 1.\n"
    assert f"Measured on 2026-11-29, {changed}" in page


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_results_say_when_they_were_measured(path: Path) -> None:
    kept = json.loads(path.read_text())
    assert kept.get("commit") or kept["first_commit"]


def test_results_without_a_commit_get_the_first_that_has_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *own, *words], check=True, capture_output=True)

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    git("init", "-q")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path, command, rows in ((old, "a", 1), (old, "a", 2), (old, "renamed", 2)):
        path.write_text(json.dumps({"command": command, "rows": rows}))
        git("add", "-A")
        git("commit", "-qm", f"{command} {rows}", "--date=2026-01-02T00:00:00")
    git("mv", "old.json", "new.json")
    git("commit", "-qm", "moved")
    results.stamp(new)
    wanted = subprocess.run(
        ["git", "-C", str(tmp_path), "log", "--format=%h", "--grep=a 2"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    first = json.loads(new.read_text())["first_commit"]
    assert first == {"commit": wanted.stdout.strip(), "date": "2026-01-02"}
