"""The one table of devices: the runtime on each, and the operators that its fast path has.

A plan asks it before training, an export before conversion, a report about the file. Sources:
TFLite Micro's folder `kernels/cmsis_nn` (2026-08); `vela --supported-ops-report` of Vela 5.2.0;
Coral's "TensorFlow models on the Edge TPU" (https://coral.ai/docs/edgetpu/models-intro/). Which
runtime lacks a kernel was seen by running each operator (`benchmarks/op_probe.py`).
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
    TABLE_OPS,
    WIDE_TABLE_OPS,
    runtimes_with,
)

_CMSIS_NN = frozenset(
    "ADD AVERAGE_POOL_2D BATCH_MATMUL CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED MAXIMUM "
    "MAX_POOL_2D MINIMUM MUL PAD SOFTMAX SVDF TRANSPOSE TRANSPOSE_CONV "
    "UNIDIRECTIONAL_SEQUENCE_LSTM".split()
)
# Those of whose functions that folder calls one for int16.
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
# "IFM … must be Int8" in Vela's report; on the U85 that of BATCH_MATMUL says nothing.
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
    """Some layers will not run on the target's fast path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    Attributes:
        name, description: what it is.
        runtime: what runs the file, or what the accelerator leaves of it.
        accelerator: what is faster than that runtime's own kernels; empty for none.
        accelerated: the operators that it has.
        accelerated_int16: those that it also has for activations of 16 bits.
        packs_weights: whether weights of fewer than eight bits may be packed.
        notes_only: whether an operator off the fast path is merely worth a note.
    """

    name: str
    description: str
    runtime: str
    accelerator: str = ""
    accelerated: frozenset[str] = frozenset()
    accelerated_int16: frozenset[str] = frozenset()
    packs_weights: bool = True
    notes_only: bool = False

    def accelerates(self, op: str, bits: int = 8) -> bool:
        """Whether the accelerator has the operator for activations of `bits` bits."""
        if bits == 8 or op in INDEX_OPS:
            return op in self.accelerated
        return op in self.accelerated_int16 & INT16.keys()

    def runs(self, op: str, bits: int = 8) -> bool:
        """Whether anything on the device runs the operator on integers of `bits` bits."""
        return self.accelerates(op, bits) or self.runtime in runtimes_with(op, bits)

    def is_fast(self, op: str, bits: int = 8) -> bool:
        """Whether the operator runs on the accelerator; where there is none, whether it runs."""
        return self.accelerates(op, bits) if self.accelerator else self.runs(op, bits)

    def packs(self, op: str, per_tensor: bool, bits: int = 8) -> bool:
        """Whether the operator takes packed weights there, with one scale or one per axis.

        `bits` is the width of the activations.
        """
        if bits == 16:
            takes = [self.runtime in INT16[op].packed] if op in INT16 else []
        else:
            kinds = [PACKED[PACKED_BITS].get(o) for o in (op, PACKS_AS.get(op, op))]
            takes = [self.runtime in kind[per_tensor] for kind in kinds if kind is not None]
        return self.packs_weights and any(takes)

    @property
    def decodes_weights(self) -> bool:
        """Whether the runtime may decode weights at run time, and nothing else must know them."""
        return self.packs_weights and self.runtime == "tflite_micro"

    def unfit(self, ops: Collection[str], table: bool, bits: int = 8) -> dict[str, bool]:
        """Those operators of a layer that do not run on the fast path, and whether they run.

        Args:
            ops: what the layer may become.
            table: whether it may become a table instead.
            bits: width of its activations.
        """
        slow = {op: self.runs(op, bits) for op in ops if not self.is_fast(op, bits)}
        if table and (slow or not ops):
            # These compute on bytes and int32, whatever the width.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misfit:
    """A layer that does not fit a target.

    Attributes:
        layer: its name.
        operators: those of it that it is about.
        blocking: whether nothing on the device runs them; else they are slow, or large.
        reason: why it does not fit.
        replacement: the activation to take in the place of its own, `None` where none is known.
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


@dataclasses.dataclass(frozen=True)
class Replacement:
    """An activation function that may take the place of a layer's own, as kernels see it.

    Attributes:
        function: Keras's name of it.
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
    """What to say about a layer some of whose operators do not fit.

    Args:
        layer: its name.
        ops: the operators that are not on the accelerator, and whether anything runs them.
        function: the layer's activation, where it has one.
        replacements: the functions nearest to that, best first; the first that fits is taken.
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
        remedy = "give it 'int8' in the policy, for which the kernel is there"
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
        TargetError: if there is none.
    """
    if name not in TARGETS:
        raise TargetError(f"Expected one of the targets {sorted(TARGETS)}. Received: {name!r}.")
    return TARGETS[name]
