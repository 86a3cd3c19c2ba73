"""**Tables**: runtimes and their kernels, targets and the operators they run fast, and activations
that can replace slow ones.
"""

from kqat.devices import edge_tpu_shapes
from kqat.devices.edge_tpu_shapes import shape_limit, too_many_axes, version_limit
from kqat.devices.kernels import (
    APPROXIMATE,
    INT8_FIXED,
    INT16,
    INT16_FIXED,
    LITERT,
    MOST_AXES,
    NEVER_PACKED,
    PACKED,
    PACKED_BITS,
    PACKS_AS,
    RUNTIMES,
    STAND_INS,
    TABLE_OPS,
    FixedScale,
    most_axes,
    moves_integers,
    ops_at,
    runtimes_with,
)
from kqat.devices.replacements import NEAREST
from kqat.devices.targets import (
    TARGETS,
    Misfit,
    Replacement,
    Target,
    TargetWarning,
    misfit,
    misfit_lines,
    stored_bits,
    target_named,
)

__all__ = [
    "APPROXIMATE",
    "INT8_FIXED",
    "INT16",
    "INT16_FIXED",
    "LITERT",
    "MOST_AXES",
    "NEAREST",
    "NEVER_PACKED",
    "PACKED",
    "PACKED_BITS",
    "PACKS_AS",
    "RUNTIMES",
    "STAND_INS",
    "TABLE_OPS",
    "TARGETS",
    "FixedScale",
    "Misfit",
    "Replacement",
    "Target",
    "TargetWarning",
    "edge_tpu_shapes",
    "misfit",
    "misfit_lines",
    "most_axes",
    "moves_integers",
    "ops_at",
    "runtimes_with",
    "shape_limit",
    "stored_bits",
    "target_named",
    "too_many_axes",
    "version_limit",
]
