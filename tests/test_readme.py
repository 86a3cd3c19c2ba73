"""The README's Python runs as it stands, and its words are true."""

import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import keras
import pytest

import kqat
from tests import traced_once

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(traced_once.OWNER, "compile", traced_once.compile)
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        # An unfitted copy of a model in a notebook is no fault of the reader's.
        warnings.simplefilter("default")
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)
    assert {"qat.keras", "model.tflite"} <= {path.name for path in tmp_path.iterdir()}


def test_named_layers_are_supported() -> None:
    text = README.split("## What it supports")[1].split("##")[0]
    known = (getattr(keras.layers, word, None) for word in re.findall(r"\w+", text))
    named = {layer.__name__ for layer in known if layer}
    assert named >= {"Dense", "Embedding", "LSTM", "MultiHeadAttention", "BatchNormalization"}
    assert named - set(kqat.supported_layers()) == set()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_link_on_pypi_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no files beside the text, and the project has no address that links could have."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    text = given["long_description"]
    assert "](" not in text and "![" not in text
    assert "| a trained Keras model | Quick start, Calibration data |" in text
    assert text.count("```") == README.count("```")
    assert not {"url", "download_url", "project_urls"} & set(given)


def test_the_table_of_results_is_that_of_the_kept_results() -> None:
    results = (ROOT / "recipes/RESULTS.md").read_text()
    sections = {part.split("\n")[0]: part for part in results.split("\n    python -m ")[1:]}
    rows = re.findall(r"^\| .*`(recipes\.[^`]+)` \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for line in README.splitlines():
        command = re.search(r"`(recipes\.[^`]+)` \|$", line)
        if not command:
            continue
        module, *options = command[1].split()
        found = [
            text
            for head, text in sections.items()
            if head.split()[0] == module and " ".join(options) in head
        ]
        assert len(found) == 1, command[1]
        # Every accuracy of the row stands in the accuracies of that command.
        accuracies = set(re.findall(r"(\d+\.\d\d) %", found[0]))
        assert set(re.findall(r"\d+\.\d\d", line)) <= accuracies, line
