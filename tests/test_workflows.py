"""What the workflows of .github name exists: extras, modules, targets, files, and versions."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="comes with the extra docs")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SETUP = (ROOT / "setup.py").read_text()


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_names_exists(path: Path) -> None:
    extras = [*re.findall(r'^    "([\w-]+)": \[', SETUP, re.M), "dev", "zoo"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = "\n".join(step.get("run", "") for step in _steps(path))
    for named in re.findall(r"'?\.\[([\w,-]+)\]", commands):
        assert {*named.split(",")} <= {*extras}
    for module in re.findall(r"python -m ([\w.]+)", commands):
        assert module == "build" or importlib.util.find_spec(module) is not None
    for target in re.findall(r"^\s*make ([\w-]+)", commands, re.M):
        assert target in targets
    for folder in re.findall(r"(?:pytest|cmake -S) ([\w./]+)", commands):
        assert (ROOT / folder).exists()
    if re.search(r"^\s*pytest ", commands, re.M):
        # tests/conftest.py imports recipes, and recipes these.
        assert re.search(r"\.\[[\w,-]*(recipes|dev)", commands)


def test_the_versions_are_those_that_the_package_and_the_page_name() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/versions.yml").read_text())["jobs"]["smoke"]
    matrix = job["strategy"]["matrix"]
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', SETUP)
    assert matrix["python"] == named
    oldest = next(row["python"] for row in matrix["include"] if row["packages"] == "oldest")
    assert f'python_requires=">={oldest}"' in SETUP
    assert oldest == named[0]
    script = (ROOT / "benchmarks/versions.py").read_text()
    packages = {*matrix["packages"], *(row["packages"] for row in matrix["include"])}
    assert all(f'"{choice}"' in script for choice in packages)
    page = (ROOT / "docs/versions.md").read_text()
    shown = re.findall(r"^\| (3\.\d+)\.\d+ \|", page, re.M)
    assert {*shown} == {*named}
    bounds = dict(re.findall(r'"(tensorflow|keras|numpy)>=([\d.]+)"', SETUP))
    assert f"TensorFlow {bounds['tensorflow']}, Keras {bounds['keras']}" in page
    assert f"NumPy {bounds['numpy']}" in page
