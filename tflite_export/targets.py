"""What a device accepts: the runtime that it runs, and so the kernels that it has."""

import dataclasses

from kqat.errors import TargetError
from kqat.freezing import FrozenModel
from kqat.marking import Marker, Tabulated, is_marker
from kqat.registry import rule_for
from kqat.tracing import Ref, trace
from tflite_export.op_table import missing_kernels


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device: its name, its runtime, and what it is."""

    name: str
    runtime: str
    description: str


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("litert", "litert", "phones and single-board computers, LiteRT with XNNPACK"),
        Target("tflite_micro", "tflite_micro", "microcontrollers, TensorFlow Lite Micro"),
    )
}


def runtimes_of(target: str | None) -> frozenset[str]:
    """The runtimes that a file for `target` must run on: without a target, all targets'."""
    chosen = [TARGETS[target]] if target else TARGETS.values()
    return frozenset(t.runtime for t in chosen)


def check_target(frozen: FrozenModel, name: str) -> None:
    """Names every layer whose operators the target's runtime lacks; nothing is converted.

    Raises:
        TargetError: if there is such a layer, or no such target.
    """
    if name not in TARGETS:
        raise TargetError(f"Expected one of the targets {sorted(TARGETS)}. Received: {name!r}.")
    runtime = TARGETS[name].runtime
    lacking = []
    integers: set[Ref] = set()
    for node in trace(frozen.model).nodes:
        if isinstance(node.layer, Marker | Tabulated):
            if not is_marker(node.layer, "fence"):
                integers.update(node.outputs)
            continue
        if not node.inputs or not all(ref.counts or ref in integers for ref in node.inputs):
            continue
        # A layer may stand between two markers with others, all of them integer.
        integers.update(node.outputs)
        missing = missing_kernels(rule_for(node.layer).ops, runtime)
        if missing:
            lacking.append(f"layer '{node.name}' needs {', '.join(missing)}")
    if lacking:
        raise TargetError(
            f"Expected operators that target '{name}' has int8 kernels for. Received: "
            f"{'; '.join(lacking)}. Replace these layers, or choose another target."
        )


def computed(frozen: FrozenModel, target: str | None) -> frozenset[int]:
    """The tables that the target need not look up: its runtime has the function's own kernel.

    Without a target, the kernel must be on every target's runtime.
    """
    own = []
    for table in frozen.tables:
        ops = rule_for(table.layer).ops
        if ops and not any(missing_kernels(ops, runtime) for runtime in runtimes_of(target)):
            own.append(table.index)
    return frozenset(own)
