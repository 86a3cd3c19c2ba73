"""The one table of TFLite operators: what their integer kernels demand, where their weights are.

A new operator is one row. The integer pass, the checks of grids, the encoders of weights, the
inspection of files, the C++ resolver and `benchmarks/op_probe.py` all read it here.

Sources: the TFLite 8-bit quantization specification
(https://ai.google.dev/edge/litert/models/quantization_spec); versions from TensorFlow's
`lite/tools/versioning/op_version.cc`. `kqat.devices` says which runtime has a kernel, and where
int16 kernels differ.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from kqat.devices import (
    COMPARISONS,
    INT8_FIXED,
    INT16,
    LEAST_INPUT_SCALES,
    PACKED,
    runtimes_with,
)

Shape = tuple[int, ...]
# The multiply-accumulates of one invocation, by the shapes of all inputs and of the first output.
Macs = Callable[[Sequence[Shape], Shape], int]


# One step of a sum of products must be less than so many steps of the output, as XNNPACK takes no
# larger multiplier (`src/operators/convolution-nhwc.c`).
LARGEST_MULTIPLIER = 256


@dataclasses.dataclass(frozen=True)
class Lift:
    """How a kernel brings two inputs of unlike scales to one, to multiply the result down.

    Args:
        bits: by which it shifts an input to the left.
        power: of the lifted input in the result.
    """

    bits: int
    power: int = 1


@dataclasses.dataclass(frozen=True)
class Packing:
    """The kernels of one operator that take weights of fewer than eight bits.

    Args:
        version: lowest version of the operator that takes them.
        per_axis: the runtimes with a kernel for one scale per channel.
        per_tensor: the runtimes with a kernel for one scale.
    """

    version: int = 1
    per_axis: frozenset[str] = frozenset()
    per_tensor: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpRule:
    """One row of the table.

    Args:
        scales: `"own"`: the output has any scale; `"same"`: that of the inputs; `"fixed"`: that
            of `fixed`; `"none"`: it has none, being an index or a truth value.
        version: lowest version of the operator that computes on int8.
        activations: inputs that carry activations (or constants in their place); `None`: all.
        weights: input that carries weights, or `None`.
        is_made_by_the_pass: whether the pass makes the weights itself (`fused_lstm`), so that the
            converter's file has none.
        keras_order: axes of the weights in the file, in the order that the Keras variable has.
        channel_axis: axis of the weights in the file along which scales may differ.
        bias: input that carries the bias, int32 of scale input × weights, or `None`.
        ships_as: the operator that takes this one's place in the file.
        fixed: `(scale, zero_point)` of the output where the kernel fixes it.
        packed: bits -> the kernels that take weights of so many.
        least_input_scale: the input's scale must exceed it, or the kernel ends the process.
        input_scale_below: the inputs' scales must lie below it, for the same reason.
        lifts: bits of the values -> how the kernel lifts its inputs, where it does.
        macs: the multiply-accumulates of one invocation, or `None` for an operator that multiplies
            no matrix. It is asked about files of any writer: shapes may be of any rank.
        elementwise: whether each number of the output is computed of one number of each input,
            whose numbers are repeated where it has fewer.
        resolver_method: the method of TFLite Micro's `MicroMutableOpResolver` that registers the
            operator, where its name is not `Add` and the operator's in camel case.
    """

    scales: Literal["own", "same", "fixed", "none"]
    version: int = 1
    activations: tuple[int, ...] | None = None
    weights: int | None = None
    is_made_by_the_pass: bool = False
    keras_order: tuple[int, ...] = ()
    channel_axis: int = 0
    bias: int | None = None
    ships_as: str | None = None
    fixed: tuple[float, int] | None = None
    packed: Mapping[int, Packing] = dataclasses.field(default_factory=dict)
    least_input_scale: float = 0.0
    input_scale_below: float = math.inf
    lifts: Mapping[int, Lift] = dataclasses.field(default_factory=dict)
    macs: Macs | None = None
    elementwise: bool = False
    resolver_method: str | None = None

    @property
    def has_trained_weights(self) -> bool:
        """Whether the converter hands on weights that training used, for the pass to quantize."""
        return self.weights is not None and not self.is_made_by_the_pass

    @property
    def parameters(self) -> tuple[int, ...]:
        """The inputs that carry weights and the bias."""
        return tuple(i for i in (self.weights, self.bias) if i is not None)

    def activation_positions(self, inputs: int) -> tuple[int, ...]:
        """The inputs that carry activations, of an operator that has so many inputs."""
        return tuple(range(inputs)) if self.activations is None else self.activations

    def packing(self, bits: int) -> Packing:
        """The kernels that take weights of so many bits."""
        return self.packed.get(bits, Packing())

    def packs(self, bits: int, per_tensor: bool, runtimes: frozenset[str]) -> bool:
        """Whether all of `runtimes` take such weights, with one scale or one per channel."""
        packing = self.packing(bits)
        return runtimes <= (packing.per_tensor if per_tensor else packing.per_axis)


def _per_output(first: int, last: int | None = None) -> Macs:
    """Each value of the output takes as many as the weights have along these axes."""
    return lambda inputs, result: math.prod(result) * math.prod(inputs[1][first:last])


def _dense_macs(inputs: Sequence[Shape], result: Shape) -> int:
    return math.prod(result) * inputs[1][-1] if inputs[1] else 0


def _transpose_conv_macs(inputs: Sequence[Shape], result: Shape) -> int:
    """Each value of the input is multiplied by a kernel of its channel."""
    del result
    return math.prod(inputs[2]) * math.prod(inputs[1][:3]) if len(inputs) > 2 and inputs[1] else 0


def _matmul_macs(inputs: Sequence[Shape], result: Shape) -> int:
    return math.prod(result) * inputs[0][-1] if inputs[0] else 0


def _lstm_macs(inputs: Sequence[Shape], result: Shape) -> int:
    """Four gates read the input and the state; input 5 is the first recurrent kernel."""
    if len(inputs) <= 5 or not inputs[1] or not inputs[5]:
        return 0
    return math.prod(result) * 4 * (inputs[1][-1] + inputs[5][-1])


def _conv(version: int, order: tuple[int, ...], axis: int, **options: Any) -> OpRule:
    return OpRule(
        scales="own",
        version=version,
        activations=(0,),
        weights=1,
        keras_order=order,
        channel_axis=axis,
        bias=2,
        **options,
    )


def _packed(op: str, versions: dict[int, int]) -> dict[int, Packing]:
    return {bits: Packing(version, *PACKED[bits][op]) for bits, version in versions.items()}


def _own(version: int = 2, **options: Any) -> OpRule:
    return OpRule(scales="own", version=version, **options)


def _each(version: int = 2, **options: Any) -> OpRule:
    return _own(version, elementwise=True, **options)


def _same(version: int = 2, first: bool = True, **options: Any) -> OpRule:
    return OpRule(scales="same", version=version, activations=(0,) if first else None, **options)


def _fixed(op: str, **options: Any) -> OpRule:
    least = LEAST_INPUT_SCALES.get(op, 0.0)
    grid = INT8_FIXED[op].scale, INT8_FIXED[op].zero_point
    return OpRule(scales="fixed", version=2, fixed=grid, least_input_scale=least, **options)


def _none(version: int, **options: Any) -> OpRule:
    return OpRule(scales="none", version=version, **options)


OP_TABLE: dict[str, OpRule] = {
    "CONV_2D": _conv(3, (1, 2, 3, 0), 0, packed=_packed("CONV_2D", {4: 7}), macs=_per_output(1)),
    # LiteRT's reference resolver computes on four bits but registers no version 7.
    "DEPTHWISE_CONV_2D": _conv(
        3,
        (0, 1, 2, 3),
        3,
        packed=_packed("DEPTHWISE_CONV_2D", {4: 1}),
        macs=_per_output(1, 3),
    ),
    "FULLY_CONNECTED": _conv(
        4, (1, 0), 0, packed=_packed("FULLY_CONNECTED", {4: 10, 2: 14}), macs=_dense_macs
    ),
    "TRANSPOSE_CONV": OpRule(
        scales="own",
        version=2,
        activations=(2,),
        weights=1,
        keras_order=(1, 2, 0, 3),
        bias=3,
        macs=_transpose_conv_macs,
    ),
    # TFLite's ADD of int8 lifts by 20 bits; XNNPACK's takes a step of an input below 256 steps of
    # the output.
    "ADD": _each(lifts={8: Lift(9), 16: Lift(15)}),
    "SUB": _each(lifts={8: Lift(20), 16: Lift(15)}),
    "MUL": _each(),
    "SQUARED_DIFFERENCE": _each(lifts={8: Lift(7, power=2)}),
    "RELU": _each(),
    # TFLite Micro's RELU6 does not rescale. RELU does, and clamps to the output's range, which
    # ends at 6.
    "RELU6": _each(ships_as="RELU"),
    "LEAKY_RELU": _each(),
    "PRELU": OpRule(scales="own", activations=(0,), weights=1, keras_order=(), elementwise=True),
    "ELU": _each(1),
    "HARD_SWISH": _each(1),
    "GELU": _each(1),
    "EXP": _each(1),
    "BATCH_MATMUL": _own(macs=_matmul_macs, resolver_method="AddBatchMatMul"),
    "MEAN": _own(activations=(0,)),
    "SOFTMAX": _fixed("SOFTMAX"),
    "LOGISTIC": _fixed("LOGISTIC", elementwise=True),
    "TANH": _fixed("TANH", elementwise=True),
    "LOG_SOFTMAX": _fixed("LOG_SOFTMAX"),
    "L2_NORMALIZATION": _fixed("L2_NORMALIZATION"),
    "MAX_POOL_2D": _same(),
    "AVERAGE_POOL_2D": _same(),
    "REDUCE_MAX": _same(),
    "MAXIMUM": _same(first=False, elementwise=True),
    "MINIMUM": _same(first=False, elementwise=True),
    "CONCATENATION": _same(first=False),
    "RESHAPE": _same(1),
    "DEPTH_TO_SPACE": _same(1),
    "SPACE_TO_DEPTH": _same(1),
    "TRANSPOSE": _same(),
    "PAD": _same(),
    # The number around is a constant in an activation's place.
    "PADV2": OpRule(scales="same", version=2, activations=(0, 2), resolver_method="AddPadV2"),
    "MIRROR_PAD": _same(),
    "STRIDED_SLICE": _same(),
    "UNPACK": _same(1),
    "PACK": _same(1, first=False),
    "RESIZE_BILINEAR": _same(),
    "RESIZE_NEAREST_NEIGHBOR": _same(),
    # The table of an Embedding is a constant in the activation's place.
    "GATHER": _same(),
    "SELECT_V2": OpRule(scales="same", version=1, activations=(1, 2), elementwise=True),
    "SELECT": OpRule(scales="same", version=1, activations=(1, 2), ships_as="SELECT_V2"),
    "REDUCE_MIN": _same(),
    "REDUCE_PROD": _own(activations=(0,)),
    # What it writes besides, the indexes, has no scale.
    "TOPK_V2": _same(),
    "ARG_MAX": _none(2, activations=(0,)),
    "ARG_MIN": _none(2, activations=(0,)),
    "CAST": _none(1, elementwise=True),  # truth values to indexes
    "DIV": _none(1, elementwise=True),  # of indexes, towards zero; all others are of quantities
    **{f"LOGICAL_{name}": _none(1, elementwise=True) for name in ("AND", "OR", "NOT")},
    # Multipliers of the int8 kernels are below one
    # (https://github.com/tensorflow/tensorflow/blob/master/tensorflow/lite/kernels/comparisons.cc).
    **{name: _none(2, input_scale_below=1.0, elementwise=True) for name in COMPARISONS},
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _own(
        1,
        activations=(0,),
        weights=1,
        is_made_by_the_pass=True,
        macs=_lstm_macs,
        resolver_method="AddUnidirectionalSequenceLSTM",
    ),
    "QUANTIZE": _each(1),
    "DEQUANTIZE": _each(2),
}


def fixed_output(op: str, bits: int) -> tuple[float, int] | None:
    """Scale and zero point that the kernel for activations of `bits` bits gives its output."""
    if bits == 16 and op in INT16 and (scale := INT16[op].fixed_scale) is not None:
        return scale, 0
    return OP_TABLE[op].fixed


def kernel_version(op: str, bits: int) -> int:
    """Lowest version of the operator that computes on activations of `bits` bits."""
    return INT16[op].version if bits == 16 else OP_TABLE[op].version


def multiply_accumulates(op: str, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Multiply-accumulates of one invocation; 0 for an operator that multiplies no matrix.

    Args:
        op: the operator.
        inputs: shapes of all inputs, `()` of one that is left out.
        outputs: shapes of the outputs.

    An operator whose inputs are not those of a right file counts as 0.
    """
    macs = OP_TABLE[op].macs if op in OP_TABLE else None
    return macs(inputs, outputs[0]) if macs and outputs and len(inputs) >= 2 else 0


def missing_kernels(ops: tuple[str, ...], runtime: str, bits: int = 8) -> tuple[str, ...]:
    """The operators of `ops` whose kernel for activations of `bits` bits `runtime` lacks."""
    return tuple(op for op in ops if op not in OP_TABLE or runtime not in runtimes_with(op, bits))


def least_output_scale(operator: str, bits: int, largest: float) -> float:
    """The scale that an output has to lie above; zero where any scale will do.

    Args:
        operator: its name.
        bits: of its values.
        largest: of the scales of its inputs.
    """
    lift = OP_TABLE[operator].lifts.get(bits) if operator in OP_TABLE else None
    return 0.0 if lift is None else float(2.0 * largest / 2.0**lift.bits) ** lift.power
