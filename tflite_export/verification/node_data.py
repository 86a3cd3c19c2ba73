"""A report as node data of Model Explorer, the viewer of `.tflite` files: one number per operator.

Each file holds one measure. Its keys are names of output tensors, by which the viewer finds nodes.
The format is that of `node_data_builder.py` of github.com/google-ai-edge/model-explorer
(`GraphNodeData`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from kqat.base import json_text

_LOW, _HIGH = "#f7fbff", "#3a6ea5"
# Measure -> what it is of a layer (`None` is left out), and whether few is bad.
MEASURES: Mapping[str, tuple[Callable[[Any], float | None], bool]] = {
    "sqnr_db": (lambda layer: layer.sqnr_db, True),
    "clipped_percent": (
        lambda layer: None if layer.clipped_share is None else 100 * layer.clipped_share,
        False,
    ),
    "lockstep_steps": (
        lambda layer: max(layer.max_steps.values()) if layer.max_steps else None,
        False,
    ),
    "macs": (lambda layer: layer.macs or None, False),
    "constant_bytes": (lambda layer: layer.constant_bytes or None, False),
}


def node_data(report: Any) -> dict[str, str]:
    """Measure -> JSON text, of a `tflite_export.Report`; one that no layer has is left out."""
    found = {}
    for measure, (value_of, few_is_bad) in MEASURES.items():
        values = {layer.name: value_of(layer) for layer in report.layers}
        results = {name: {"value": x} for name, x in values.items() if x is not None}
        colors = ("#c2571a", _LOW) if few_is_bad else (_LOW, _HIGH)
        gradient = [
            {"stop": stop, "bgColor": color} for stop, color in zip((0, 1), colors, strict=True)
        ]
        if results:
            found[measure] = json_text({"results": results, "gradient": gradient}, indent=1)
    return found
