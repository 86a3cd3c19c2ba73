"""**Table**: which runtime has which kernels, for 8-bit and 16-bit activations and packed weights.

`benchmarks/op_probe.py` found out by running each operator on each runtime.
"""

import dataclasses
import math
from collections.abc import Sequence

LITERT = frozenset({"litert_reference", "litert_builtin", "litert"})


RUNTIMES = LITERT | {"tflite_micro"}


# The operators that a lookup table ships as: for 8-bit activations, and for 16-bit ones, which need
# int32 arithmetic after the lookup.
TABLE_OPS = ("CAST", "ADD", "GATHER")


WIDE_TABLE_OPS = (*TABLE_OPS, "SUB", "MUL", "DIV")


# Operator -> the runtimes that have its int8 kernel; operators not listed run on all runtimes.
KERNELS: dict[str, frozenset[str]] = {
    "ELU": RUNTIMES - {"litert_reference"},
    "GELU": LITERT,
    "EXP": LITERT,
    "REDUCE_PROD": LITERT,
    "TOPK_V2": LITERT,
}


@dataclasses.dataclass(frozen=True)
class FixedScale:
    """The one grid on which a kernel can write its output."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value of the grid."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale


# Operator -> the output grid that its int8 kernel demands. All their int16 kernels demand the same
# grid (TFLite quantization specification).
INT8_FIXED: dict[str, FixedScale] = {
    "SOFTMAX": FixedScale(1 / 256, -128),
    "LOGISTIC": FixedScale(1 / 256, -128),
    "TANH": FixedScale(1 / 128, 0),
    "LOG_SOFTMAX": FixedScale(16 / 256, 127),
    "L2_NORMALIZATION": FixedScale(1 / 128, 0),
}
INT16_FIXED = FixedScale(2.0**-15, 0, bits=16)


@dataclasses.dataclass(frozen=True)
class Int16Kernel:
    """Where an operator's kernel for int16 activations differs from its int8 kernel.

    Weights stay int8, the bias is int64, and every zero point is 0.

    Args:
        version: lowest version of the operator that computes on int16.
        runtimes: the runtimes that have the int16 kernel.
        fixed_scale: scale of the output, if the kernel demands one.
        packed: the runtimes whose kernel also takes weights of four bits, packed two a byte.
        input_scale_below: with inputs of this scale or more the kernel's products overflow.
    """

    version: int
    runtimes: frozenset[str] = RUNTIMES
    fixed_scale: float | None = None
    packed: frozenset[str] = frozenset()
    input_scale_below: float = math.inf


# LOGISTIC and TANH multiply by 4096 * 3 and SOFTMAX differences by 65535 / 10, in 32 bits (the
# copies of `kqat.kernels` overflow as the kernels do: at 5.3 and at 5).
_SCALE_OF_OVERFLOW = 5.0
# The operators with an int16 kernel. Versions are from TensorFlow's `lite/tools/versioning/
# op_version.cc`. LOG_SOFTMAX has no int16 kernel on any runtime, and PRELU has none that takes int8
# slopes. ELU, HARD_SWISH, GELU and EXP lack one on some runtimes and ship as lookup tables.
INT16: dict[str, Int16Kernel] = {
    "CONV_2D": Int16Kernel(3, packed=LITERT),
    # Not packed: LiteRT's kernel reads packed weights as if they were bytes.
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
    "SOFTMAX": Int16Kernel(3, fixed_scale=INT16_FIXED.scale, input_scale_below=_SCALE_OF_OVERFLOW),
    "LOGISTIC": Int16Kernel(3, fixed_scale=INT16_FIXED.scale, input_scale_below=_SCALE_OF_OVERFLOW),
    "TANH": Int16Kernel(3, fixed_scale=INT16_FIXED.scale, input_scale_below=_SCALE_OF_OVERFLOW),
    "MAX_POOL_2D": Int16Kernel(3),
    "AVERAGE_POOL_2D": Int16Kernel(3),
    "REDUCE_MAX": Int16Kernel(3, LITERT),
    "MAXIMUM": Int16Kernel(4),
    "MINIMUM": Int16Kernel(4),
    "CONCATENATION": Int16Kernel(3),
    "RESHAPE": Int16Kernel(1),
    "TRANSPOSE": Int16Kernel(5),
    "PAD": Int16Kernel(3),
    "PADV2": Int16Kernel(3),
    "MIRROR_PAD": Int16Kernel(3, LITERT),
    "STRIDED_SLICE": Int16Kernel(2),
    "RESIZE_BILINEAR": Int16Kernel(4, LITERT),
    "RESIZE_NEAREST_NEIGHBOR": Int16Kernel(4),
    "UNPACK": Int16Kernel(4),
    "PACK": Int16Kernel(3),
    "SELECT_V2": Int16Kernel(1),
    "GATHER": Int16Kernel(4, LITERT),
    "REDUCE_MIN": Int16Kernel(3, LITERT),
    "TOPK_V2": Int16Kernel(3, LITERT),
    "QUANTIZE": Int16Kernel(2),
    "DEQUANTIZE": Int16Kernel(3),
}


# Operator -> the most axes that its int8 kernel takes, on LiteRT and on TFLite Micro. All others
# take at least six, the most that `benchmarks/rank_probe.py` tried. For PRELU and L2_NORMALIZATION
# the converter makes no operators with more than four axes.
MOST_AXES: dict[str, tuple[int, int]] = {
    "PRELU": (4, 4),
    "STRIDED_SLICE": (5, 4),
    "TRANSPOSE": (6, 5),
    "PAD": (5, 5),
    "PADV2": (5, 5),
    "L2_NORMALIZATION": (6, 4),
    "SELECT_V2": (4, 4),  # LiteRT does not load the version for five
    "BATCH_MATMUL": (5, 5),  # the converter makes none of more
}

COMPARISONS = ("EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL")
# Operator -> the most axes, with the batch axis, over which its kernels broadcast. For more the
# converter makes other operators, which repeat a value first (BROADCAST_TO).
MOST_BROADCAST_AXES: dict[str, int] = {
    **dict.fromkeys(COMPARISONS, 4),
    "SQUARED_DIFFERENCE": 4,
    "MAXIMUM": 5,
    "MINIMUM": 5,
    "SELECT_V2": 5,
}


def most_axes(op: str, runtime: str) -> float:
    """The most axes, with the batch axis, that the operator's int8 kernel takes."""
    return MOST_AXES.get(op, (math.inf, math.inf))[runtime not in LITERT]


# Operators whose kernel of TFLite Micro takes quantities alone: what they move there is no integer
# without a scale, and no truth value (each says so where the file is loaded).
OF_QUANTITIES = frozenset(("GATHER", "TRANSPOSE", "MIRROR_PAD"))


def moves_integers(op: str, runtime: str) -> bool:
    """Whether the operator's kernel takes integers without a scale, and truth values."""
    return runtime in LITERT or op not in OF_QUANTITIES


# (Operator, bits) -> the steps by which its kernel may be off, if more than one. These kernels
# interpolate in tables of 513 entries, and SOFTMAX also rounds differences of its inputs to
# 10/65535. TANH and LOGISTIC are off by 3 and 2 steps of 1/32768 on some grids (the test of
# `kqat.kernels` walks all inputs), SOFTMAX by 10 (measured, `benchmarks/op_probe.py`).
APPROXIMATE: dict[tuple[str, int], int] = {
    ("TANH", 16): 3,
    ("LOGISTIC", 16): 2,
    ("SOFTMAX", 16): 10,
}


# (Operator, bits) -> the steps of its output by which the sum that its kernel divides by may be too
# large, for each number that it sums. SOFTMAX of 16 bits rounds each exp to 1/32768 and takes none
# below exp(-10), 1.5 times that.
SUMMED_TOO_MUCH: dict[tuple[str, int], int] = {("SOFTMAX", 16): 2}


def lost_in_sums(op: str, bits: int, summed: int) -> float:
    """The share of a value that is lost at most where its kernel sums so many numbers.

    It is lost where all but one of them are far below the largest.
    """
    excess = SUMMED_TOO_MUCH.get((op, bits), 0) * summed * INT16_FIXED.scale
    return excess / (1.0 + excess)


# These operators compute on booleans and indexes, so they run whatever the activations' width.
# Comparisons of 16 bits are of int32, behind a CAST.
INDEX_OPS = frozenset({"CAST", "LOGICAL_AND", "LOGICAL_OR", "LOGICAL_NOT", *COMPARISONS})


def runtimes_with(op: str, bits: int) -> frozenset[str]:
    """The runtimes that have the operator's kernel for activations of `bits` bits."""
    if bits == 8 or op in INDEX_OPS:
        return KERNELS.get(op, RUNTIMES)
    return INT16[op].runtimes if op in INT16 else frozenset()


# Bits of packed weights -> operator -> (runtimes with a kernel for per-channel scales, runtimes
# with one for a single scale). LiteRT's convolution kernels refuse weights of two bits, and TFLite
# Micro does not know that type.
PACKED: dict[int, dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    2: {"FULLY_CONNECTED": (LITERT, LITERT)},
    4: {
        "CONV_2D": (RUNTIMES, RUNTIMES),
        "DEPTHWISE_CONV_2D": (RUNTIMES, RUNTIMES),
        "FULLY_CONNECTED": (LITERT, RUNTIMES),
    },
}


PACKED_BITS = max(PACKED)


# Operators with weights that no runtime takes packed: their weights ship as int8.
NEVER_PACKED = ("UNIDIRECTIONAL_SEQUENCE_LSTM",)


# Operator -> another operator that computes the same and has kernels for packed weights.
PACKS_AS = {"FULLY_CONNECTED": "CONV_2D"}


# Operator -> the int8 operator that takes its place where TFLite Micro must run the file. TFLite's
# LEAKY_RELU multiplies by the slope and rounds, shifts, and rounds again: 12 % of its results are
# one step off. PRELU multiplies by the slope's integer before it rounds, so that its second
# rounding changes nothing, in the same time and memory. XNNPACK has no int8 PRELU, and is a
# hundred times as fast with LEAKY_RELU: so that stays in a file that TFLite Micro need not run.
# MEAN rounds to a fraction of a step first, of a power of two near the number of values: 13 to 25 %
# of the means of rows are a step off. FULLY_CONNECTED with weights of 127 has a fraction 127 times
# as fine. XNNPACK's MEAN rounds once, and accelerators have conditions on either.
STAND_INS = {"LEAKY_RELU": "PRELU", "MEAN": "FULLY_CONNECTED"}


# Operator -> the scale above which its kernels take their input. At smaller ones they make a
# multiplier of zero, and TFLite ends the process.
LEAST_INPUT_SCALES: dict[str, float] = dict.fromkeys(("SOFTMAX", "LOG_SOFTMAX"), 2.0**-26)


def input_scales(op: str, bits: int) -> tuple[float, float]:
    """The scales between which an operator takes inputs of `bits` bits, these two left out."""
    below = INT16[op].input_scale_below if bits == 16 and op in INT16 else math.inf
    return LEAST_INPUT_SCALES.get(op, 0.0), below


# Operators whose kernels round halves of a step away from the integer zero, on every runtime: most
# values behind a ReLU are integers below zero, so that half of a pair's means come out lower.
HALVES_AWAY = ("AVERAGE_POOL_2D",)


def ops_at(ops: Sequence[str], bits: int, axes: int) -> tuple[str, ...]:
    """The operators of a row that a layer may become, for activations of `bits` bits.

    Stand-ins compute on int8 only. `axes` is the most axes of its values, the batch's among them.
    """
    left_out = {
        stand_in
        for op, stand_in in STAND_INS.items()
        if op in ops and (bits != 8 or any(axes > most for most in MOST_AXES.get(stand_in, ())))
    }
    return tuple(op for op in ops if op not in left_out)
