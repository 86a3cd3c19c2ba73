"""The cost of each layer of a verified file, and how well its values use their grid."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from kqat.grids import Site
from tflite_export import flatbuffer
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


def producers(model: ModelT) -> dict[int, int]:
    """Index of a tensor of subgraph 0 -> position of the operator that computes it.

    A RESHAPE of an unnamed tensor counts as part of the operator before it.
    """
    graph = model.subgraphs[0]
    found: dict[int, int] = {}
    for position, operator in enumerate(graph.operators):
        source = int(operator.inputs[0]) if len(operator.inputs) else -1
        moves = flatbuffer.op_name(model, operator) == "RESHAPE" and source in found
        if moves and not flatbuffer.tensor_name(graph.tensors[source]):
            position = found[source]
        found |= dict.fromkeys(map(int, operator.outputs), position)
    return found


def layer_reports(
    inspection: Inspection,
    uses: Sequence[GridUse],
    producers: dict[int, int],
    runtimes: Sequence[RuntimeReport],
) -> tuple[LayerReport, ...]:
    """One row for each site that was found in the file, in the order of computation.

    Args:
        inspection: the file's inspection.
        uses: how the sites use their grids, on one runtime.
        producers: index of a tensor of subgraph 0 -> position in `inspection.operators` of the
            operator that computes it.
        runtimes: the lockstep results of each runtime.
    """
    steps = {part.runtime: {site.name: site.max_steps for site in part.sites} for part in runtimes}
    rows = []
    for use in uses:
        position = producers.get(use.tensor)
        operator = None if position is None else inspection.operators[position]
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
                macs=operator.macs if operator else 0,
                constant_bytes=operator.constant_bytes if operator else 0,
            )
        )
    return tuple(rows)


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
