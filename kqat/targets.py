"""The one table of devices: the runtime on each, and the operators that its fast path has.

A plan asks it before training, an export before conversion, a report about the file. Sources:
TFLite Micro's folder `kernels/cmsis_nn` (2026-08); `vela --supported-ops-report` of Vela 5.2.0;
Coral's "TensorFlow models on the Edge TPU" (https://coral.ai/docs/edgetpu/models-intro/). Which
runtime lacks a kernel was seen by running each operator (`benchmarks/op_probe.py`).
"""

import dataclasses
from collections.abc import Collection

from kqat.errors import TargetError

LITERT = frozenset({"litert_reference", "litert_builtin", "litert"})
RUNTIMES = LITERT | {"tflite_micro"}
# The operators that a table ships as: at 8 bits, and at 16, where int32 arithmetic follows.
TABLE_OPS = ("CAST", "ADD", "GATHER")
WIDE_TABLE_OPS = (*TABLE_OPS, "SUB", "MUL", "DIV")

# Operators without an int8 kernel somewhere -> the runtimes that have one; all others run on all.
KERNELS: dict[str, frozenset[str]] = {
    "ELU": RUNTIMES - {"litert_reference"},
    "GELU": LITERT,
    "EXP": LITERT,
    "REDUCE_PROD": LITERT,
}


@dataclasses.dataclass(frozen=True)
class Int16Kernel:
    """Where an operator's kernel for int16 activations differs from its int8 kernel.

    Weights stay int8, the bias is int64, and every zero point is 0.

    Args:
        version: lowest version of the operator that computes on int16.
        runtimes: the runtimes that have the int16 kernel.
        fixed_scale: scale of the output where the kernel fixes it.
        packed: the runtimes whose kernel also takes weights of four bits, packed two a byte.
    """

    version: int
    runtimes: frozenset[str] = RUNTIMES
    fixed_scale: float | None = None
    packed: frozenset[str] = frozenset()


# The operators with an int16 kernel; versions from TensorFlow's `lite/tools/versioning/
# op_version.cc`. LOG_SOFTMAX has none on any runtime, PRELU none that takes slopes of eight bits;
# ELU, HARD_SWISH, GELU and EXP are not on all, and ship as tables.
INT16: dict[str, Int16Kernel] = {
    "CONV_2D": Int16Kernel(3, packed=LITERT),
    # LiteRT's reads packed weights as bytes.
    "DEPTHWISE_CONV_2D": Int16Kernel(3),
    "FULLY_CONNECTED": Int16Kernel(4, packed=LITERT),
    "TRANSPOSE_CONV": Int16Kernel(3),
    "ADD": Int16Kernel(3),
    "SUB": Int16Kernel(5),
    "MUL": Int16Kernel(4),
    "RELU": Int16Kernel(3),
    "RELU6": Int16Kernel(3),
    "LEAKY_RELU": Int16Kernel(2),
    "BATCH_MATMUL": Int16Kernel(3),
    "MEAN": Int16Kernel(3),
    "SOFTMAX": Int16Kernel(3, fixed_scale=2.0**-15),
    "LOGISTIC": Int16Kernel(3, fixed_scale=2.0**-15),
    "TANH": Int16Kernel(3, fixed_scale=2.0**-15),
    "MAX_POOL_2D": Int16Kernel(3),
    "AVERAGE_POOL_2D": Int16Kernel(3),
    "REDUCE_MAX": Int16Kernel(3, LITERT),
    "MAXIMUM": Int16Kernel(4),
    "MINIMUM": Int16Kernel(4),
    "CONCATENATION": Int16Kernel(3),
    "RESHAPE": Int16Kernel(1),
    "TRANSPOSE": Int16Kernel(5),
    "PAD": Int16Kernel(3),
    "STRIDED_SLICE": Int16Kernel(2),
    "RESIZE_BILINEAR": Int16Kernel(4, LITERT),
    "RESIZE_NEAREST_NEIGHBOR": Int16Kernel(4),
    "UNPACK": Int16Kernel(4),
    "PACK": Int16Kernel(3),
    "GATHER": Int16Kernel(4, LITERT),
    "REDUCE_MIN": Int16Kernel(3, LITERT),
    "QUANTIZE": Int16Kernel(2),
    "DEQUANTIZE": Int16Kernel(3),
}


# Among activations of any width, these compute on truth values and indexes.
INDEX_OPS = frozenset({"CAST", "LOGICAL_AND", "LOGICAL_OR", "LOGICAL_NOT"})


def runtimes_with(op: str, bits: int) -> frozenset[str]:
    """The runtimes that have the operator's kernel for activations of `bits` bits."""
    if bits == 8 or op in INDEX_OPS:
        return KERNELS.get(op, RUNTIMES)
    return INT16[op].runtimes if op in INT16 else frozenset()


# Bits -> operators whose kernels take weights of so many, packed into whole bytes -> the runtimes
# that have them for one scale per axis, and for one per tensor. LiteRT's kernels of convolutions
# refuse two bits, and TFLite Micro knows no such type.
PACKED: dict[int, dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    2: {"FULLY_CONNECTED": (LITERT, LITERT)},
    4: {
        "CONV_2D": (RUNTIMES, RUNTIMES),
        "DEPTHWISE_CONV_2D": (RUNTIMES, RUNTIMES),
        "FULLY_CONNECTED": (LITERT, RUNTIMES),
    },
}
PACKED_BITS = max(PACKED)
# Operators with weights of which no runtime has a kernel for fewer bits than eight.
NEVER_PACKED = ("UNIDIRECTIONAL_SEQUENCE_LSTM",)
# An operator -> another that computes the same and packs what it does not.
PACKS_AS = {"FULLY_CONNECTED": "CONV_2D"}

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

# Function -> those nearest to it, best first; `adapt` takes the first that the target's fast path
# has. Distances are by eye: the network is to be trained on after a change.
NEAREST: dict[str, tuple[str, ...]] = {
    "silu": ("hard_silu", "relu6"),
    "mish": ("hard_silu", "relu6"),
    "hard_silu": ("relu6",),
    "gelu": ("relu6",),
    "elu": ("leaky_relu", "relu"),
    "celu": ("leaky_relu", "relu"),
    "selu": ("leaky_relu", "relu"),
    "leaky_relu": ("relu",),
    "softplus": ("relu",),
    "squareplus": ("relu",),
    "sparse_plus": ("relu",),
    "softsign": ("tanh",),
    "hard_tanh": ("tanh",),
    "hard_sigmoid": ("sigmoid",),
    "sparse_sigmoid": ("sigmoid",),
}


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
        return self.accelerates(op, bits) or self.runtime in kernels(op, bits)

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


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: if there is none.
    """
    if name not in TARGETS:
        raise TargetError(f"Expected one of the targets {sorted(TARGETS)}. Received: {name!r}.")
    return TARGETS[name]
