"""Compiles a `.tflite` for an Arm Ethos-U NPU with Arm's compiler Vela, and reads its estimates.

Vela runs in a child process, so a file that hangs or crashes it does not harm the caller. Its
estimates are for the system that its own configuration file describes, not for a board.
Source: https://pypi.org/project/ethos-u-vela/
"""

import csv
import dataclasses
import importlib.util
import io
import re
import subprocess
import tempfile
import textwrap
from pathlib import Path

from kqat.base import ExportError, RuntimeUnavailableError
from tflite_export.flatbuffer import inspect
from tflite_export.runtimes import run_python

# Target -> Vela's name of the NPU in its usual size (multiply-accumulates per cycle).
ACCELERATORS = {
    "ethos_u55": "ethos-u55-128",
    "ethos_u65": "ethos-u65-256",
    "ethos_u85": "ethos-u85-256",
}
TIMEOUT_SECONDS = 300.0
_NPU_OPERATOR = "ethos-u"
# Vela writes a line that names the operator, a line with the reason, and then, for some, the
# constraint in full. Whatever follows the reason's own line is not read: other parts of Vela write
# to the same stream, in an order that depends on how busy the machine is.
_REFUSAL = re.compile(
    r"^Warning \(supported operators\) operator: \S+, ofm: '(.*)'\r?\nReason: (.*?)\s*$",
    re.MULTILINE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fallback:
    """An operator that the NPU leaves to the CPU.

    Attributes:
        operator, tensor: its name, and the name of the tensor that it writes.
        reason: the reason that Vela gives, or "not said".
    """

    operator: str
    tensor: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpuEstimate:
    """Vela's estimates for one file.

    Attributes:
        accelerator, system, memory_mode: the configuration that Vela compiled for.
        cycles: estimated NPU cycles of one inference.
        inferences_per_second: at Vela's clock frequency.
        sram_bytes, dram_bytes: memory for activations.
        flash_bytes: weights and commands, on chip and off chip.
        compiled_bytes: size of the compiled file.
        operators: number of operators in the given file.
        fallbacks: the operators that run on the CPU.
    """

    accelerator: str
    system: str
    memory_mode: str
    cycles: int
    inferences_per_second: float
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int
    compiled_bytes: int
    operators: int
    fallbacks: tuple[Fallback, ...]

    @property
    def npu_share(self) -> float:
        """Share of the file's operators that run on the NPU, 0..1."""
        return 1.0 - len(self.fallbacks) / max(self.operators, 1)


def estimate(blob: bytes, target: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> NpuEstimate:
    """Compiles a file for `target`, a key of `ACCELERATORS`.

    Raises:
        RuntimeUnavailableError: if Vela is not installed, fails, or takes too long.
        ExportError: if the file cannot be read, or there is no such NPU.
    """
    if target not in ACCELERATORS:
        raise ExportError(f"Expected one of {sorted(ACCELERATORS)}. Received: target={target!r}.")
    before = inspect(blob)
    if importlib.util.find_spec("ethosu") is None:
        raise RuntimeUnavailableError(
            "Expected Vela to be installed. Received: no module 'ethosu'. "
            'Use `pip install "kqat[ethos-u]"`.'
        )
    with tempfile.TemporaryDirectory() as folder:
        child = _compile(bytes(blob), ACCELERATORS[target], Path(folder), timeout_seconds)
        compiled = Path(folder, "out", "model_vela.tflite")
        summaries = list(Path(folder, "out").glob("model_summary_*.csv"))
        if not compiled.exists() or len(summaries) != 1:
            raise _failure(ACCELERATORS[target], child)
        (row,) = csv.DictReader(io.StringIO(summaries[0].read_text()))
        result = compiled.read_bytes()
    return NpuEstimate(
        accelerator=ACCELERATORS[target],
        system=row["system_config"],
        memory_mode=row["memory_mode"],
        cycles=round(float(row["cycles_total"])),
        inferences_per_second=float(row["inferences_per_second"]),
        sram_bytes=_bytes(row, "sram"),
        dram_bytes=_bytes(row, "dram"),
        flash_bytes=_bytes(row, "on_chip_flash") + _bytes(row, "off_chip_flash"),
        compiled_bytes=len(result),
        operators=len(before.operators),
        fallbacks=_fallbacks(result, child.stdout.decode(errors="replace")),
    )


def _bytes(row: dict[str, str], memory: str) -> int:
    """The bytes of one kind of memory; Vela writes KiB."""
    return round(1024 * float(row[f"{memory}_memory_used"]))


def _compile(
    blob: bytes, accelerator: str, folder: Path, timeout_seconds: float
) -> subprocess.CompletedProcess[bytes]:
    (folder / "model.tflite").write_bytes(blob)
    command = ["-m", "ethosu.vela", "model.tflite", "--output-dir", "out"]
    try:
        child = run_python(
            [*command, "--accelerator-config", accelerator],
            folder=folder,
            timeout_seconds=timeout_seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(
            f"Expected Vela to compile the file within {timeout_seconds:g} s. Received: a timeout. "
            "Use a smaller model or a larger timeout_seconds."
        ) from error
    if child.returncode != 0:
        raise _failure(accelerator, child)
    return child


def _failure(
    accelerator: str, child: subprocess.CompletedProcess[bytes]
) -> RuntimeUnavailableError:
    words = b"\n".join((child.stdout, child.stderr)).decode(errors="replace")
    last = [line for line in words.splitlines() if line.strip() and "Warning: No " not in line]
    return RuntimeUnavailableError(
        f"Expected Vela to compile the file for {accelerator}. Received: "
        f"{textwrap.shorten(' '.join(last[-8:]), 600)!r}. Use operators and types that Vela knows."
    )


def _fallbacks(compiled: bytes, words: str) -> tuple[Fallback, ...]:
    """The operators that remain in the compiled file, with the reasons that Vela wrote."""
    reasons = dict(_REFUSAL.findall(words))
    left = [operator for operator in inspect(compiled).operators if operator.name != _NPU_OPERATOR]
    return tuple(
        Fallback(
            operator=operator.name,
            tensor=operator.outputs[0].name if operator.outputs else "",
            reason=reasons.get(operator.outputs[0].name if operator.outputs else "", "not said"),
        )
        for operator in left
    )
