"""The table of operators is what runs here; a runtime that gains or breaks a kernel shows."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from packaging.version import Version

from benchmarks import op_probe
from benchmarks.forked_children import forked_children
from benchmarks.op_probe import MODELS, PACKAGES, SHIPS_AS_ANOTHER, TABLE, Cell, probe, read_table
from kqat.devices.kernels import INT16, KERNELS, runtimes_with
from tflite_export.kernels.op_table import OP_TABLE
from tflite_export.runtimes.execution import RUNTIMES, supports

# A kernel that is missing somewhere: for int8, for int16.
SAMPLE = ("GELU", "REDUCE_MAX")


def found(cells: list[Cell]) -> dict[tuple[str, ...], str]:
    return {cell.key: cell.result for cell in cells}


def test_every_operator_has_its_cells() -> None:
    assert set(MODELS) | set(SHIPS_AS_ANOTHER) == set(OP_TABLE)
    cells = read_table()
    assert {cell.operator for cell in cells} == set(MODELS)
    wide = {cell.operator for cell in cells if cell.activations == "int16"}
    assert wide | set(SHIPS_AS_ANOTHER) & set(INT16) == set(INT16)
    assert {cell.runtime for cell in cells} == set(RUNTIMES)
    assert len({cell.key for cell in cells}) == len(cells)


def test_the_table_is_of_the_newest_packages() -> None:
    versions = json.loads(TABLE.read_text())["versions"]
    here = {name: importlib.metadata.version(name) for name in PACKAGES}
    if Version(here["tensorflow"]) < Version(versions["tensorflow"]):
        pytest.skip(f"it was written with TensorFlow {versions['tensorflow']}")
    assert versions == here, "python -m benchmarks.op_probe --write"


def test_what_computes_wrongly_is_known() -> None:
    """`--only PRELU` reproduces it."""
    wrong = {cell.key[:-1] for cell in read_table() if cell.result == "wrong"}
    assert wrong == {
        *(("PRELU", "int8", f"int{bits}", "per tensor") for bits in (2, 4)),
        ("DEPTHWISE_CONV_2D", "int16", "int4", "per tensor"),
        ("DEPTHWISE_CONV_2D", "int16", "int4", "per axis"),
    }
    # These kernels read packed weights as bytes, so they are never packed.
    assert not OP_TABLE["PRELU"].packed
    assert not INT16["DEPTHWISE_CONV_2D"].packed


def test_the_op_table_says_what_was_seen() -> None:
    for cell in read_table():
        rule = OP_TABLE[cell.operator]
        if cell.activations == "int16":
            wide = INT16[cell.operator]
            has = cell.runtime in (wide.packed if cell.weights == "int4" else wide.runtimes)
            # Nothing is left out that works.
            assert has == (cell.result == "works"), cell
            continue
        if cell.weights in ("", "int8"):
            has = cell.runtime in runtimes_with(cell.operator, 8)
        else:
            bits, per_tensor = int(cell.weights.removeprefix("int")), cell.scales == "per tensor"
            has = rule.packs(bits, per_tensor, frozenset({cell.runtime}))
        # The table of rules may be more careful than the runtimes, never less.
        assert cell.result == "works" or not has, cell
        if cell.weights == "" and cell.operator in KERNELS:
            assert has == (cell.result != "refuses"), cell


@pytest.mark.skipif(not supports("tflite_micro"), reason="needs the extra tflm")
@pytest.mark.parametrize("operator", SAMPLE)
def test_a_sample_is_as_the_table_says(operator: str) -> None:
    with forked_children():
        cells = list(probe(operator))
    assert found(cells) == {
        key: result for key, result in found(read_table()).items() if key[0] == operator
    }


@pytest.mark.slow
def test_all_is_as_the_table_says(tmp_path: Path) -> None:
    cells, kept = op_probe.main(["--out", str(tmp_path)]), read_table()
    assert found(cells) == found(kept)
    # Whatever runs was compared, and no integer differs but where it is known to.
    assert [cell.key for cell in cells if cell.differing is None and cell.result != "refuses"] == []
    known = {cell.key for cell in kept if cell.differing}
    assert [cell.key for cell in cells if cell.differing and cell.key not in known] == []
    assert read_table(tmp_path / "op_probe.json")
