"""Arm's compiler in a child: what it accepts, what it leaves to the CPU, how it fails."""

from typing import Any

import pytest
from keras import layers as L

import tflite_export
from kqat.base.errors import ExportError, RuntimeUnavailableError
from tests.tflite_export.small_models import quantized
from tflite_export import flatbuffer
from tflite_export.devices import vela

pytest.importorskip("ethosu", reason="needs the extra ethos-u")


@pytest.fixture(scope="module")
def blob() -> bytes:
    """A convolution, and a function that ships as a table."""

    def call(x: Any) -> Any:
        return L.Activation("mish", name="odd")(L.Conv2D(4, 3)(x))

    return tflite_export.convert(quantized((8, 8, 3), call)[0])


def test_the_u55_leaves_a_table_to_the_cpu(blob: bytes) -> None:
    found = vela.estimate(blob, "ethos_u55")
    assert found.accelerator == "ethos-u55-128"
    assert [(f.operator, f.tensor) for f in found.fallbacks] == [
        ("CAST", "odd/wide"),
        ("GATHER", "odd"),
    ]
    assert all(f.reason == "Unsupported opType" for f in found.fallbacks)
    assert (found.operators, found.npu_share) == (4, 0.5)
    assert found.cycles > 0 and found.sram_bytes > 0 and found.flash_bytes > 0


def test_the_u85_runs_all(blob: bytes) -> None:
    found = vela.estimate(blob, "ethos_u85")
    assert (found.fallbacks, found.npu_share) == ((), 1.0)


def test_vela_cannot_take_the_caller_along(blob: bytes) -> None:
    with pytest.raises(ExportError, match=r"one of.*'ethos_u55'.*Received: target='ethos_u99'"):
        vela.estimate(blob, "ethos_u99")
    with pytest.raises(RuntimeUnavailableError, match=r"within 0\.01 s\. Received: a timeout"):
        vela.estimate(blob, "ethos_u55", timeout_seconds=0.01)
    model = flatbuffer.read(blob)
    model.subgraphs[0].tensors[model.subgraphs[0].outputs[0]].shape = [0, 0, 0, 0]
    try:
        vela.estimate(flatbuffer.write(model), "ethos_u55")
    except RuntimeUnavailableError as error:
        assert "Expected Vela to compile the file for ethos-u55-128" in str(error)


def test_its_absence_is_reported(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install \"kqat\[ethos-u\]\""):
        vela.estimate(blob, "ethos_u55")
