"""Integer weights, biases and other constants of the integer operators, and their packing.

Integer weights are those that training used. Only the bias is made here, on the grid of input
scale times weight scale that the TFLite quantization specification demands: int32, or int64 where
activations have 16 bits.
"""

import numpy as np

from kqat.base import LoweringError
from kqat.devices import INT16, PACKED_BITS, PACKS_AS
from kqat.freezing import FrozenConstant, FrozenWeight
from tflite_export import flatbuffer
from tflite_export.flatbuffer import OperatorT, TensorT
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import (
    ACTIVATION_DTYPES,
    OP_TABLE,
    PACKED_TYPES,
    TENSOR_TYPES,
    OpRule,
    Weights,
    constant_on_grid,
    fit_bias,
    pack,
    quantization,
)


def quantize_constants(draft: Draft) -> None:
    """Replaces the float constants of the integer operators by integers.

    Raises:
        LoweringError: if weights are computed, or are not those of the frozen model.
    """
    frozen = _FrozenWeights(draft.frozen.weights, draft.frozen.constants)
    for operator in draft.integer_operators:
        rule = draft.rule(operator)
        _quantize_operands(draft, frozen, operator, rule)
        if rule.has_trained_weights:
            draft.weights.append((operator, _quantize_weights(draft, frozen, operator, rule)))


def pack_weights(draft: Draft) -> None:
    """Packs weights of few bits into the fewest bits that all the runtimes take.

    A weight that GATHER reads too stays as it is: its rows are values of eight bits, and the file
    has it once.
    """
    tables = _tables(draft)
    for operator, weights in draft.weights:
        if weights.bits > PACKED_BITS or weights.integers.tobytes() in tables:
            continue
        name, rule = draft.op_name(operator), draft.rule(operator)
        if (name, draft.bits(operator)) in draft.whole_bytes:
            continue
        single = weights.scale.size == 1
        bits = _packed_bits(draft, operator, weights)
        if bits is not None:
            tensor = draft.graph.tensors[int(operator.inputs[rule.weights])]
            tensor.type = PACKED_TYPES[bits]
            draft.model.buffers[tensor.buffer].data = pack(weights.integers, bits)
        elif name in PACKS_AS and draft.bits(operator) == 8:
            if OP_TABLE[PACKS_AS[name]].packs(PACKED_BITS, single, draft.runtimes):
                draft.unpacked.append(operator)


def _tables(draft: Draft) -> set[bytes]:
    """The integers of the tables of which GATHER reads rows."""
    found = set()
    for operator in draft.integer_operators:
        if draft.op_name(operator) == "GATHER":
            tensor = draft.graph.tensors[int(operator.inputs[0])]
            data = flatbuffer.tensor_data(draft.model, tensor)
            if data is not None:
                found.add(data.tobytes())
    return found


def _packed_bits(draft: Draft, operator: OperatorT, weights: Weights) -> int | None:
    """The fewest bits that hold the weights and that all the runtimes read."""
    name, rule = draft.op_name(operator), draft.rule(operator)
    for bits in PACKED_TYPES:
        if draft.bits(operator) == 16:
            packs = bits == PACKED_BITS and draft.runtimes <= INT16[name].packed
        else:
            packs = rule.packs(bits, weights.scale.size == 1, draft.runtimes)
        if weights.bits <= bits and packs:
            return bits
    return None


class _FrozenWeights:
    """The frozen model's weights, found by their values: the converter keeps no names."""

    def __init__(
        self, weights: tuple[FrozenWeight, ...], constants: tuple[FrozenConstant, ...] = ()
    ):
        self.grids = {constant.values.tobytes(): constant.grid for constant in constants}
        self.by_bytes: dict[bytes, list[FrozenWeight]] = {}
        for weight in weights:
            self.by_bytes.setdefault(weight.values.tobytes(), []).append(weight)

    def name_of(self, data: np.ndarray) -> str | None:
        """The name of the weight of these bytes, which the converter forgot; `None` for none."""
        found = self.by_bytes.get((data + np.float32(0)).tobytes(), ())
        return found[0].name if data.size > 1 and found else None

    def find(self, keras_order: np.ndarray, tensor: TensorT, channels: int) -> FrozenWeight:
        """The frozen weight of these very bytes, with one scale or one per channel.

        Equal bytes are equal weights, but all-zero kernels of other shapes have them too.
        """
        key = (np.ascontiguousarray(keras_order) + np.float32(0)).tobytes()
        for weight in self.by_bytes.get(key, ()):
            if weight.scale.size in (1, channels):
                return weight
        raise LoweringError(
            f"Expected the frozen model's weights. Received: "
            f"'{flatbuffer.tensor_name(tensor)}' of shape {keras_order.shape}, which the "
            "converter changed."
        )


def _quantize_operands(
    draft: Draft, frozen: _FrozenWeights, operator: OperatorT, rule: OpRule
) -> None:
    """Quantizes constants that stand in an activation's place, as in MUL by a constant."""
    for position in rule.activation_positions(len(operator.inputs)):
        tensor = draft.graph.tensors[int(operator.inputs[position])]
        data = flatbuffer.tensor_data(draft.model, tensor)
        if data is None or data.dtype != np.float32:
            continue
        own = frozen.grids.get(data.tobytes())
        if rule.scales == "own" and own is not None:
            integers, scale, zero = constant_on_grid(data, own)
        elif rule.scales == "own":
            weight = frozen.find(data, tensor, 1)
            integers, scale, zero = weight.integers.reshape(data.shape), weight.scale, 0
        else:
            # As GATHER's table: what is handed on has the output's grid.
            site = draft.sites.get(int(operator.outputs[0]))
            integers, scale, zero = constant_on_grid(data, site)
        integers = integers.astype(ACTIVATION_DTYPES[draft.bits(operator)])
        index = _add(draft, tensor, integers, np.reshape(scale, -1), 0, zero)
        operator.inputs[position] = index
        if (name := frozen.name_of(data)) is not None:
            draft.graph.tensors[index].name = name.encode()


def _quantize_weights(
    draft: Draft, frozen: _FrozenWeights, operator: OperatorT, rule: OpRule
) -> Weights:
    """Gives an operator its integer weights, which are returned, and the bias that fits them."""
    assert rule.weights is not None, "rule.has_trained_weights"
    tensors = draft.graph.tensors
    tensor = tensors[int(operator.inputs[rule.weights])]
    data = _values(draft, tensor)
    order = rule.keras_order or tuple(range(data.ndim))
    channels = data.shape[rule.channel_axis] if data.ndim else 1
    weight = frozen.find(data.transpose(order), tensor, channels)
    weights = Weights.in_file(weight, data.shape, order, rule.channel_axis)
    position = _bias(operator, rule)
    if position is not None:
        like = tensors[int(operator.inputs[position])]
        site = draft.sites[draft.activations(operator, rule)[0]]
        output = draft.sites.get(int(operator.outputs[0]), site)
        floats = _values(draft, like)
        weights, bias = fit_bias(weights, floats, site.scale, site.bits, output.scale)
        operator.inputs[position] = _add(draft, like, bias.integers, bias.scale, 0)
        # The operator tells whose bias it is; the converter's name lists all that it fused.
        tensors[int(operator.inputs[position])].name = None
    index = _add(draft, tensor, weights.integers, weights.scale, weights.axis)
    tensors[index].name = weight.name.encode()
    operator.inputs[rule.weights] = index
    return weights


def _bias(operator: OperatorT, rule: OpRule) -> int | None:
    """The input that is the bias, where the operator has one."""
    given = rule.bias is not None and len(operator.inputs) > rule.bias
    return rule.bias if given and operator.inputs[rule.bias] >= 0 else None


def _values(draft: Draft, tensor: TensorT) -> np.ndarray:
    data = flatbuffer.tensor_data(draft.model, tensor)
    if data is None:
        raise LoweringError(
            f"Expected constant weights. Received: '{flatbuffer.tensor_name(tensor)}', which "
            "is computed."
        )
    return data


def _add(
    draft: Draft,
    like: TensorT,
    data: np.ndarray,
    scale: np.ndarray,
    axis: int,
    zero_point: int = 0,
) -> int:
    """A new constant; the old one may serve another operator with another scale."""
    grid = quantization(scale, np.full(len(scale), zero_point), axis)
    kind = TENSOR_TYPES[data.dtype]
    return flatbuffer.add_tensor(
        draft.model, like.shape, kind, name=like.name, grid=grid, data=data
    )
