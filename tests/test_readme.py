"""The README's Python runs as it stands, and its words are true."""

import re
import warnings
from pathlib import Path

import keras
import pytest

import kqat

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
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
    root = Path(__file__).resolve().parents[1]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
