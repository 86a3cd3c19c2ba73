"""The cost of each layer of a verified file, and how well its values use their grid."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from kqat.grids import Site
from tflite_export.flatbuffer import Inspection, ModelT, OperatorInfo
from tflite_export.verification.report import LayerReport, RuntimeReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridUse:
    """How well one site's values use its grid; `sqnr_db` is `None` if rounding lost nothing."""

    site: Site
    tensor: int
    clipped_share: float
    grid_share: float
    sqnr_db: float | None


def grid_use(site: Site, tensor: int, real: np.ndarray, actual: np.ndarray) -> GridUse:
    """Compares a layer's real values with the integers that a runtime computed.

    Args:
        site: the grid.
        tensor: index of the file's tensor that holds the integers.
        real: the values in float arithmetic, before rounding; any shape.
        actual: the integers, in the same shape.
    """
    levels = 2**site.bits
    lowest = -levels // 2
    rounded = np.floor(real / site.scale + np.float32(0.5)) + site.zero_point
    outside = (rounded < lowest) | (rounded > lowest + levels - 1)
    exact = real.astype(np.float64)
    noise = float(np.sum(np.square(exact - site.reals(actual))))
    signal = float(np.sum(np.square(exact)))
    return GridUse(
        site=site,
        tensor=tensor,
        clipped_share=float(np.mean(outside)),
        grid_share=len(np.unique(actual)) / levels,
        sqnr_db=10 * math.log10(signal / noise) if noise and signal else None,
    )


def work_of(model: ModelT, tensors: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The operators of subgraph 0 that do the work of each of `tensors`, the rows of a report.

    A layer may ship as several operators: a Conv1D as RESHAPE, CONV_2D and RESHAPE. An operator
    whose output is not a row belongs to the first row that is computed from it. If there is none,
    it belongs to the row that it reads. So each operator belongs to one row.

    Returns:
        Index of a tensor -> positions of its operators, in the order in which they run.
    """
    graph = model.subgraphs[0]
    results = [[int(t) for t in operator.outputs] for operator in graph.operators]
    owners: list[int | None] = [next((t for t in r if t in tensors), None) for r in results]
    readers: dict[int, list[int]] = {}
    for position, operator in enumerate(graph.operators):
        for tensor in map(int, operator.inputs):
            readers.setdefault(tensor, []).append(position)
    for position in reversed(range(len(owners))):
        if owners[position] is None:
            behind = (p for t in results[position] for p in readers.get(t, ()))
            owners[position] = next((owners[p] for p in behind if owners[p] is not None), None)
    made_by = {t: position for position, result in enumerate(results) for t in result}
    for position, operator in enumerate(graph.operators):
        if owners[position] is None:
            inputs = [int(t) for t in operator.inputs]
            before = [t if t in tensors else owners[made_by[t]] for t in inputs if t in made_by]
            before += [t for t in inputs if t in tensors]
            owners[position] = next((t for t in before if t is not None), None)
    work: dict[int, tuple[int, ...]] = {}
    for position, owner in enumerate(owners):
        if owner is not None:
            work[owner] = (*work.get(owner, ()), position)
    return work


def layer_reports(
    inspection: Inspection,
    uses: Sequence[GridUse],
    work: Mapping[int, tuple[int, ...]],
    runtimes: Sequence[RuntimeReport],
) -> tuple[LayerReport, ...]:
    """One row for each site that was found in the file, in the order of computation.

    Args:
        inspection: the file's inspection.
        uses: how the sites use their grids, on one runtime.
        work: from `work_of`, with positions in `inspection.operators`.
        runtimes: the lockstep results of each runtime.
    """
    steps = {part.runtime: {site.name: site.max_steps for site in part.sites} for part in runtimes}
    rows = []
    counted: set[int] = set()  # two sites may share one tensor, whose work counts once
    for use in uses:
        operators = [inspection.operators[p] for p in work.get(use.tensor, ())]
        operator = _main(operators)
        costs = [] if use.tensor in counted else operators
        counted.add(use.tensor)
        name = use.site.name
        rows.append(
            LayerReport(
                name=name,
                operator="input" if operator is None else operator.name,
                shape=use.site.shape,
                bits=use.site.bits,
                weight_bits=_weight_bits(operator),
                scale=float(use.site.scale),
                zero_point=use.site.zero_point,
                clipped_share=use.clipped_share,
                grid_share=use.grid_share,
                sqnr_db=use.sqnr_db,
                max_steps={r: found[name] for r, found in steps.items() if name in found},
                macs=sum(each.macs for each in costs),
                constant_bytes=sum(each.constant_bytes for each in costs),
            )
        )
    return tuple(rows)


def _main(operators: Sequence[OperatorInfo]) -> OperatorInfo | None:
    """The operator that names a row: that with the most work; of none, the last that computes."""
    if not operators:
        return None
    computing = [each for each in operators if each.name != "RESHAPE"] or operators
    return max(reversed(computing), key=lambda each: each.macs)


def static_reports(inspection: Inspection) -> tuple[LayerReport, ...]:
    """One row for each operator of a file that was not run in lockstep."""
    rows = []
    for operator in inspection.operators:
        if not operator.outputs:
            continue
        output = operator.outputs[0]
        rows.append(
            LayerReport(
                name=output.name,
                operator=operator.name,
                shape=output.shape[1:],
                bits=_bits(output.dtype),
                weight_bits=_weight_bits(operator),
                scale=output.scale,
                zero_point=output.zero_point,
                clipped_share=None,
                grid_share=None,
                sqnr_db=None,
                max_steps={},
                macs=operator.macs,
                constant_bytes=operator.constant_bytes,
            )
        )
    return tuple(rows)


def _weight_bits(operator: OperatorInfo | None) -> int | None:
    return None if operator is None else _bits(operator.weight_dtype)


def _bits(dtype: str | None) -> int | None:
    """The bits of an integer type: 4 for "int4"."""
    digits = "".join(c for c in dtype or "" if c.isdigit())
    return int(digits) if digits else None
