"""Arm's compiler in a child: what it accepts, what it leaves to the CPU, how it fails."""

import subprocess
from pathlib import Path
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


def test_only_vela_s_own_line_is_the_reason(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log line may stand right behind a reason, and stderr holds whatever libraries write."""
    stdout = (
        "TfLiteReader: Built-in options type 'CastOptions' is not yet implemented.\n\n"
        "Warning (supported operators) operator: CAST, ofm: 'odd/wide'\n"
        "Reason: kernel width: 40 out of range\n"
        "Kernel constraints:\n  - IF padding=VALID:\n"
        "Network summary for model\n"
        "Warning (supported operators) operator: GATHER, ofm: 'odd'\n"
        "Reason: Unsupported opType\n"
    )
    run = vela.run_python

    def said(arguments: Any, **options: Any) -> Any:
        child = run(arguments, **options)
        child.stdout, child.stderr = stdout.encode(), b"Reason: none of Vela's\n"
        return child

    monkeypatch.setattr(vela, "run_python", said)
    found = vela.estimate(blob, "ethos_u55")
    assert {f.tensor: f.reason for f in found.fallbacks} == {
        "odd/wide": "kernel width: 40 out of range",
        "odd": "Unsupported opType",
    }


SUMMARY = """\
system_config,memory_mode,cycles_total,inferences_per_second,sram_memory_used,dram_memory_used,\
on_chip_flash_memory_used,off_chip_flash_memory_used
a,b,700.4,10.5,0.703125,2.5,0.25,1.0
"""


def test_memory_is_told_in_bytes(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vela's table of figures is in KiB: 0.703125 of them are 720 bytes."""

    def compiled(arguments: Any, *, folder: Path, **options: Any) -> Any:
        (folder / "out").mkdir()
        (folder / "out/model_vela.tflite").write_bytes(blob)
        (folder / "out/model_summary_a.csv").write_text(SUMMARY)
        # Not where Vela says why.
        words = b"Warning (supported operators) operator: GATHER, ofm: 'odd'\nReason: none\n"
        return subprocess.CompletedProcess(arguments, 0, b"", words)

    monkeypatch.setattr(vela, "run_python", compiled)
    found = vela.estimate(blob, "ethos_u55")
    assert (found.sram_bytes, found.dram_bytes, found.flash_bytes) == (720, 2560, 256 + 1024)
    assert (found.cycles, found.inferences_per_second) == (700, 10.5)
    assert [f.reason for f in found.fallbacks] == ["not said"] * 4


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
