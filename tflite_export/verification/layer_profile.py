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
    rows: list[tuple[float, LayerReport]] = []
    counted: set[int] = set()  # two sites may share one tensor, whose work counts once
    place = -1.0
    for use in uses:
        positions = work.get(use.tensor, ())
        own, others = _own_work([(p, inspection.operators[p]) for p in positions])
        operator = _main(own)
        costs = [] if use.tensor in counted else own
        if use.tensor not in counted:
            rows += [(float(p), _static(other)) for p, other in others]
        counted.add(use.tensor)
        place = max([place, *map(float, positions)])
        name = use.site.name
        row = LayerReport(
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
        rows.append((place, row))
    named = {position for positions in work.values() for position in positions}
    rows += [
        (float(p), _static(operator))
        for p, operator in enumerate(inspection.operators)
        if p not in named and (operator.macs or operator.constant_bytes) and operator.outputs
    ]
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))


def _own_work(
    operators: Sequence[tuple[int, OperatorInfo]],
) -> tuple[list[OperatorInfo], list[tuple[int, OperatorInfo]]]:
    """The operators of a row, and those before them that do the work of other layers.

    A layer that stays float, or a value that was not found, has no row of its own: what multiplies
    there must not count for the layer behind it. Of the operators of a row that multiply, the last
    one is the row's where what follows only moves its result, converts it or adds a bias. Any that
    multiplies before is a layer of its own, as is what it reads.
    """
    multiplying = [index for index, (_, each) in enumerate(operators) if each.macs]
    first = 0
    if multiplying:
        last = multiplying[-1]
        ends_in_it = all(_goes_with(each) for _, each in operators[last + 1 :])
        before = multiplying[:-1] if ends_in_it else multiplying
        first = before[-1] + 1 if before else 0
    others = [(p, each) for p, each in operators[:first] if each.macs or each.constant_bytes]
    return [each for _, each in operators[first:]], others


# What may follow a convolution or a matrix product as a part of the same layer.
_MOVES = frozenset(
    "BATCH_TO_SPACE_ND CAST DEQUANTIZE EXPAND_DIMS PAD PADV2 QUANTIZE RELU RELU6 RELU_N1_TO_1 "
    "RESHAPE SLICE SPACE_TO_BATCH_ND SQUEEZE STRIDED_SLICE TRANSPOSE".split()
)


def _goes_with(operator: OperatorInfo) -> bool:
    """Whether it may follow a product inside of one layer; an addition, with a constant only."""
    affine = operator.name in ("ADD", "SUB", "MUL") and operator.constant_bytes > 0
    return operator.name in _MOVES or affine


def _main(operators: Sequence[OperatorInfo]) -> OperatorInfo | None:
    """The operator that names a row: that with the most work; of none, the last that computes."""
    if not operators:
        return None
    computing = [each for each in operators if each.name != "RESHAPE"] or operators
    return max(reversed(computing), key=lambda each: each.macs)


def static_reports(inspection: Inspection) -> tuple[LayerReport, ...]:
    """One row for each operator of a file that was not run in lockstep."""
    return tuple(_static(operator) for operator in inspection.operators if operator.outputs)


def _static(operator: OperatorInfo) -> LayerReport:
    """What is known of an operator without running it; it has outputs."""
    output = operator.outputs[0]
    return LayerReport(
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


def _weight_bits(operator: OperatorInfo | None) -> int | None:
    return None if operator is None else _bits(operator.weight_dtype)


def _bits(dtype: str | None) -> int | None:
    """The bits of an integer type: 4 for "int4"."""
    digits = "".join(c for c in dtype or "" if c.isdigit())
    return int(digits) if digits else None
