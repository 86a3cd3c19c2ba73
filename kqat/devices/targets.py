"""**Table**: each target's runtime, and the operators that its accelerator runs.

The plan reads it before training, the exporter before conversion, and the report for the file.
Sources: TFLite Micro's folder `kernels/cmsis_nn` (2026-08); `vela --supported-ops-report` of Vela
5.2.0; Coral's "TensorFlow models on the Edge TPU" (https://coral.ai/docs/edgetpu/models-intro/).
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from kqat.base import TargetError
from kqat.devices.kernels import (
    INDEX_OPS,
    INT16,
    PACKED,
    PACKED_BITS,
    PACKS_AS,
    RUNTIMES,
    TABLE_OPS,
    WIDE_TABLE_OPS,
    runtimes_with,
)

_CMSIS_NN = frozenset(
    "ADD AVERAGE_POOL_2D BATCH_MATMUL CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED MAXIMUM "
    "MAX_POOL_2D MINIMUM MUL PAD SOFTMAX SVDF TRANSPOSE TRANSPOSE_CONV "
    "UNIDIRECTIONAL_SEQUENCE_LSTM".split()
)
# The operators for which that folder calls an int16 function of CMSIS-NN.
_CMSIS_NN_INT16 = frozenset(
    "ADD AVERAGE_POOL_2D BATCH_MATMUL CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED MAX_POOL_2D MUL "
    "SOFTMAX".split()
)
_ETHOS_U55 = frozenset(
    "ABS ADD ARG_MAX AVERAGE_POOL_2D BATCH_MATMUL CONCATENATION CONV_2D DEPTHWISE_CONV_2D ELU EXP "
    "EXPAND_DIMS FULLY_CONNECTED GELU HARD_SWISH LEAKY_RELU LOG LOGISTIC MAXIMUM MAX_POOL_2D MEAN "
    "MINIMUM MIRROR_PAD MUL NEG PACK PAD PADV2 PRELU QUANTIZE REDUCE_MAX REDUCE_MIN RELU RELU6 "
    "RELU_0_TO_1 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 RSQRT "
    "SLICE SOFTMAX SPLIT SPLIT_V SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM TANH TILE "
    "TRANSPOSE TRANSPOSE_CONV UNIDIRECTIONAL_SEQUENCE_LSTM UNPACK".split()
)
_ETHOS_U85 = _ETHOS_U55 | frozenset(
    "ASSIGN_VARIABLE CAST DIV EQUAL GATHER GREATER GREATER_EQUAL LESS LESS_EQUAL LOGICAL_AND "
    "LOGICAL_NOT LOGICAL_OR NOT_EQUAL READ_VARIABLE REDUCE_ALL REDUCE_ANY SCATTER_ND SELECT "
    "SELECT_V2".split()
)
# Operators for which Vela's report says "IFM … must be Int8". For the U85 it does not say so of
# BATCH_MATMUL.
_ETHOS_INT8_ONLY = frozenset({"ELU", "GELU"})
_ETHOS_U55_INT8_ONLY = _ETHOS_INT8_ONLY | {"BATCH_MATMUL"}
_EDGE_TPU = frozenset(
    "ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D EXPAND_DIMS FULLY_CONNECTED "
    "L2_NORMALIZATION LOGISTIC LSTM MAXIMUM MAX_POOL_2D MEAN MINIMUM MUL PACK PAD PRELU QUANTIZE "
    "REDUCE_MAX REDUCE_MIN RELU RELU6 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR "
    "RESIZE_NEAREST_NEIGHBOR RSQRT SLICE SOFTMAX SPACE_TO_DEPTH SPLIT SQUARED_DIFFERENCE SQUEEZE "
    "STRIDED_SLICE SUB SUM TANH TRANSPOSE TRANSPOSE_CONV".split()
)


class TargetWarning(UserWarning):
    """Some layers will not run on the target's accelerator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    Attributes:
        name, description: what it is.
        runtime: the runtime that runs the file, or the operators that the accelerator does not.
        accelerator: hardware or a library that is faster than the runtime's kernels; "" for none.
        accelerated: the operators that the accelerator runs.
        accelerated_int16: those that it also runs with activations of 16 bits.
        packs_weights: whether weights of fewer than eight bits may be packed.
        notes_only: whether an operator that is not accelerated is a note only, and no warning.
        slow_packed: the operators whose kernel for packed weights was measured to be slower than
            that for int8 weights (`benchmarks/packing.py`), on activations of 8 bits. Their weights
            ship as int8 where nobody asks for packed ones.
    """

    name: str
    description: str
    runtime: str
    accelerator: str = ""
    accelerated: frozenset[str] = frozenset()
    accelerated_int16: frozenset[str] = frozenset()
    packs_weights: bool = True
    notes_only: bool = False
    slow_packed: frozenset[str] = frozenset()

    def accelerates(self, op: str, bits: int = 8) -> bool:
        """Whether the accelerator runs the operator for activations of `bits` bits."""
        if bits == 8 or op in INDEX_OPS:
            return op in self.accelerated
        return op in self.accelerated_int16 & INT16.keys()

    def runs(self, op: str, bits: int = 8) -> bool:
        """Whether the accelerator or the runtime has the operator for integers of `bits` bits."""
        return self.accelerates(op, bits) or self.runtime in runtimes_with(op, bits)

    def is_fast(self, op: str, bits: int = 8) -> bool:
        """Whether the accelerator runs the operator; without one, whether the runtime does."""
        return self.accelerates(op, bits) if self.accelerator else self.runs(op, bits)

    def packs(self, op: str, per_tensor: bool, bits: int = 8) -> bool:
        """Whether the operator takes packed weights on this target.

        `per_tensor` says whether they have a single scale; `bits` is the width of the activations.
        """
        if bits == 16:
            takes = [self.runtime in INT16[op].packed] if op in INT16 else []
        else:
            kinds = [PACKED[PACKED_BITS].get(o) for o in (op, PACKS_AS.get(op, op))]
            takes = [self.runtime in kind[per_tensor] for kind in kinds if kind is not None]
        return self.packs_weights and any(takes)

    @property
    def decodes_weights(self) -> bool:
        """Whether weights may ship encoded: the runtime decodes them, and no NPU has to."""
        return self.packs_weights and self.runtime == "tflite_micro"

    def unfit(self, ops: Collection[str], table: bool, bits: int = 8) -> dict[str, bool]:
        """The operators of a layer that are not fast -> whether the device runs them at all.

        Args:
            ops: the operators that the layer may become.
            table: whether it may become a lookup table instead.
            bits: width of its activations.
        """
        slow = {op: self.runs(op, bits) for op in ops if not self.is_fast(op, bits)}
        if table and (slow or not ops):
            # The operators of a table compute on int8 and int32, whatever the activations' width.
            parts = TABLE_OPS if bits == 8 else WIDE_TABLE_OPS
            return {op: self.runs(op) for op in parts if not self.is_fast(op)}
        return slow


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="litert",
            description="phones and single-board computers, LiteRT with XNNPACK",
            runtime="litert",
            # XNNPACK runs only FULLY_CONNECTED packed; the others fall back to reference kernels.
            slow_packed=frozenset({"CONV_2D", "DEPTHWISE_CONV_2D"}),
        ),
        Target(
            name="tflite_micro",
            description="microcontrollers, TensorFlow Lite Micro",
            runtime="tflite_micro",
        ),
        Target(
            name="cmsis_nn",
            description="Arm Cortex-M, TensorFlow Lite Micro with CMSIS-NN",
            runtime="tflite_micro",
            accelerator="CMSIS-NN",
            accelerated=_CMSIS_NN,
            accelerated_int16=_CMSIS_NN_INT16,
            notes_only=True,
        ),
        *(
            Target(
                name=name,
                description=f"Arm {title} NPU beside TensorFlow Lite Micro, compiled by Vela",
                runtime="tflite_micro",
                accelerator="the NPU",
                accelerated=ops,
                accelerated_int16=ops - int8_only,
                packs_weights=False,
            )
            for name, title, ops, int8_only in (
                ("ethos_u55", "Ethos-U55", _ETHOS_U55, _ETHOS_U55_INT8_ONLY),
                ("ethos_u65", "Ethos-U65", _ETHOS_U55, _ETHOS_U55_INT8_ONLY),
                ("ethos_u85", "Ethos-U85", _ETHOS_U85, _ETHOS_INT8_ONLY),
            )
        ),
        Target(
            name="edge_tpu",
            description="Coral Edge TPU beside LiteRT",
            runtime="litert",
            accelerator="the Edge TPU",
            accelerated=_EDGE_TPU,
            packs_weights=False,
        ),
    )
}


def stored_bits(
    ops: Collection[str],
    bits: int,
    per_tensor: bool,
    activation_bits: int = 8,
    target: Target | None = None,
) -> int:
    """The bits that each weight takes in the file where nobody says how it is packed.

    Args:
        ops: the operators that the layer may become.
        bits: width of the weights' grid.
        per_tensor: whether they have a single scale.
        activation_bits: width of the activations.
        target: the device; without one, every target's runtime must have the kernel.
    """
    if target is not None and not target.packs_weights:
        return 8
    runtimes = RUNTIMES if target is None else frozenset({target.runtime})
    slow = frozenset() if target is None or activation_bits == 16 else target.slow_packed
    for width, table in sorted(PACKED.items()):
        for op in ops if bits <= width else ():
            if op not in PACKED[PACKED_BITS] or op in slow:
                continue
            if activation_bits == 16:
                takes = width == PACKED_BITS and op in INT16 and runtimes <= INT16[op].packed
            else:
                kinds = (kind for kind in (op, PACKS_AS.get(op, op)) if kind in table)
                takes = any(runtimes <= table[kind][per_tensor] for kind in kinds)
            if takes:
                return width
    return 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misfit:
    """A layer that does not fit a target.

    Attributes:
        layer: its name.
        operators: the operators of the layer that do not fit.
        blocking: whether nothing on the device runs them; if not, they are only slow or large.
        reason: why it does not fit.
        replacement: the activation that can replace the layer's, `None` if none is known.
        remedy: what to do, in words.
    """

    layer: str
    operators: tuple[str, ...]
    blocking: bool
    reason: str
    replacement: str | None
    remedy: str

    def __str__(self) -> str:
        return f"layer '{self.layer}' ({', '.join(self.operators)}) {self.reason}: {self.remedy}"


def misfit_lines(misfits: Sequence[Misfit]) -> list[str]:
    """Reports about layers in sentences, one for all that do not fit in the same way."""
    alike: dict[tuple[str, str], list[Misfit]] = {}
    for one in misfits:
        alike.setdefault((one.reason, one.remedy), []).append(one)
    lines = []
    for (reason, remedy), same in alike.items():
        if len(same) == 1:
            lines.append(str(same[0]))
            continue
        names = ", ".join(f"'{one.layer}' ({', '.join(one.operators)})" for one in same)
        lines.append(f"layers {names}: each {reason}: {remedy}")
    return lines


def check_runs(misfits: Sequence[Misfit], name: str) -> None:
    """Raises TargetError where nothing on device `name` runs one of the layers."""
    lacking = [
        f"layer '{one.layer}' needs {', '.join(one.operators)} ({one.remedy})"
        for one in misfits
        if one.blocking
    ]
    if lacking:
        raise TargetError(
            f"Expected operators for which target '{name}' has integer kernels. Received: "
            f"{'; '.join(lacking)}. Replace these layers, give them another width in the policy, "
            "or choose another target."
        )


@dataclasses.dataclass(frozen=True)
class Replacement:
    """An activation function that may replace a layer's, and the operators that it needs.

    Attributes:
        function: Keras's name of the function.
        ops: the operators that it becomes.
        table: whether it may become a lookup table instead.
    """

    function: str
    ops: tuple[str, ...]
    table: bool


def misfit(
    layer: str,
    ops: Mapping[str, bool],
    function: str | None,
    replacements: Sequence[Replacement],
    target: Target,
    bits: int = 8,
) -> Misfit:
    """The report about a layer with operators that do not fit the target.

    Args:
        layer: its name.
        ops: operator that is not accelerated -> whether the device runs it at all.
        function: the layer's activation, if it has one.
        replacements: similar functions, the most similar first; the first that fits is taken.
        target: the device.
        bits: width of the layer's activations.
    """
    fitting = (r.function for r in replacements if not target.unfit(r.ops, r.table, bits))
    replacement = next(fitting, None)
    if replacement is not None:
        remedy = f"use {replacement} for {function}, as kqat.adapt does, and train on"
    elif bits > 8 and set(ops) == {"QUANTIZE"}:
        remedy = "give the layers on both sides of it one width"
    elif bits > 8 and all(target.is_fast(op) for op in ops):
        remedy = "give it 'int8' in the policy: the target has the int8 kernel"
    elif target.accelerator:
        remedy = "use other layers if that is too slow"
    else:
        remedy = "use another layer, or leave it float"
    blocking = not all(ops.values())
    width = f" on int{bits}" if bits > 8 else ""
    lacking = "does not run there" if blocking else f"runs, but not on {target.accelerator}"
    return Misfit(
        layer=layer,
        operators=tuple(sorted(ops)),
        blocking=blocking,
        reason=lacking + width,
        replacement=replacement,
        remedy=remedy,
    )


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: if there is no target of that name.
    """
    if name not in TARGETS:
        raise TargetError(f"Expected one of the targets {sorted(TARGETS)}. Received: {name!r}.")
    return TARGETS[name]
