"""Checks a frozen model against a target before conversion, and the file after it."""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kqat.base import RuntimeUnavailableError
from kqat.devices import (
    TARGETS,
    Misfit,
    Target,
    TargetWarning,
    check_runs,
    misfit,
    target_named,
)
from tflite_export import flatbuffer
from tflite_export.devices import edge_tpu_file
from tflite_export.devices.vela import ACCELERATORS, NpuEstimate, estimate
from tflite_export.flatbuffer import Inspection, OperatorInfo
from tflite_export.kernels import missing_kernels

if TYPE_CHECKING:  # It imports Keras, which nobody needs who reads a file.
    from kqat.freezing import FrozenModel


def runtimes_of(target: str | None) -> frozenset[str]:
    """The runtimes that a file for `target` must run on; without a target, those of all targets.

    A device that takes no packed weights counts as a runtime of its own without kernels for them.
    """
    if target is None:
        return frozenset(t.runtime for t in TARGETS.values())
    device = TARGETS[target]
    return frozenset({device.runtime} if device.packs_weights else {device.runtime, device.name})


def check_target(frozen: "FrozenModel", name: str) -> None:
    """Raises for layers that the target cannot run, and warns of those it runs slowly.

    All layers that an accelerator leaves to the CPU are named in one `kqat.TargetWarning`.

    Raises:
        TargetError: if nothing on the device runs some layer, or if there is no such target.
    """
    target = target_named(name)
    found = list(_misfits(frozen, target))
    check_runs(found, name)
    slow = [str(m) for m in found]
    if slow and not target.notes_only:
        warnings.warn(f"Target '{name}': {'; '.join(slow)}.", TargetWarning, stacklevel=3)


def check_limits(blob: bytes, target: str | None) -> None:
    """Names the operators that the Edge TPU leaves to the CPU, in one `kqat.TargetWarning`."""
    if target == "edge_tpu" and (limits := list(edge_tpu_file.limits(flatbuffer.read(blob)))):
        message = f"Target 'edge_tpu' leaves to the CPU: {'; '.join(limits)}."
        warnings.warn(message, TargetWarning, stacklevel=3)


def computed(frozen: "FrozenModel", target: str | None) -> frozenset[int]:
    """The elementwise functions that ship as their own operators and not as lookup tables.

    These are the functions for which the target has a kernel. Without a target, every target's
    runtime must have it.
    """
    runtimes = {t.runtime for t in TARGETS.values()} if target is None else set()
    own = []
    for node in frozen.graph.nodes:
        ops = frozen.facts(node).own_kernel
        if target is not None:
            has = bool(ops) and _computes(TARGETS[target], ops)
        else:
            has = bool(ops) and not any(missing_kernels(ops, runtime) for runtime in runtimes)
        if has:
            own.append(node.layer.index)
    return frozenset(own)


def check_file(
    blob: bytes, inspection: Inspection, target: str | None
) -> tuple[NpuEstimate | None, tuple[str, ...]]:
    """Vela's estimate, if the target is an Ethos-U, and notes on what does not fit the target.

    Raises:
        TargetError: if there is no such target.
    """
    if target is None:
        return None, ()
    device = target_named(target)
    if target in ACCELERATORS:
        try:
            return estimate(blob, target), ()
        except RuntimeUnavailableError as error:
            return None, (str(error),)
    limits = edge_tpu_file.limits(flatbuffer.read(blob)) if target == "edge_tpu" else ()
    notes = [f"edge_tpu: {limit}" for limit in limits]
    slow: dict[str, int] = {}
    for operator in inspection.operators:
        if device.accelerator and not device.is_fast(operator.name):
            slow[operator.name] = slow.get(operator.name, 0) + 1
    if slow:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(slow.items()))
        notes.append(f"{target}: not on {device.accelerator}, but on the CPU: {kinds}")
    if target == "cmsis_nn":
        notes += _cmsis_nn_notes(inspection)
    return None, tuple(notes)


def _computes(target: Target, ops: tuple[str, ...]) -> bool:
    """Whether the function's own operators run better on the target than a lookup table."""
    if all(target.is_fast(op) for op in ops):
        return True
    return all(target.runs(op) for op in ops) and bool(target.unfit((), table=True))


def _misfits(frozen: "FrozenModel", target: Target) -> Iterator[Misfit]:
    from kqat.freezing import Tabulated

    for node in frozen.graph.nodes:
        facts = frozen.facts(node)
        if facts.bits is None:
            continue
        unfit = target.unfit(facts.ops, isinstance(node.layer, Tabulated), facts.bits)
        if unfit:
            yield misfit(facts.label, unfit, facts.function, facts.replacements, target, facts.bits)


def _cmsis_nn_notes(inspection: Inspection) -> Iterator[str]:
    """Notes on shapes for which CMSIS-NN uses plain loops (`arm_depthwise_conv_wrapper_s8`)."""
    for operator in inspection.operators:
        if operator.name == "DEPTHWISE_CONV_2D" and _multiplies_channels(operator):
            yield (
                f"cmsis_nn: '{operator.outputs[0].name}' has more output than input channels; the "
                "fast depthwise kernel takes a depth_multiplier of 1"
            )


def _multiplies_channels(operator: OperatorInfo) -> bool:
    shapes = [tensor.shape for tensor in (operator.inputs[0], operator.outputs[0])]
    return bool(shapes[0] and shapes[1]) and shapes[0][-1] != shapes[1][-1]
