"""The integer pass: marked float flatbuffer to full-integer flatbuffer.

Nothing is measured or guessed here: scales and zero points are those of the frozen model's sites,
integer weights those that training used. Only the bias is made, on the grid of input scale times
weight scale that the TFLite quantization specification demands: int32, or int64 where activations
have 16 bits.
"""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.base import LoweringError
from kqat.devices import INT16, PACKED_BITS, PACKS_AS, RUNTIMES
from kqat.freezing import FrozenModel, FrozenWeight
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, TensorT, operator_code
from tflite_export.integer_pass.clamps import fuse_clamps, split_clamps
from tflite_export.integer_pass.dense_as_conv import convolve
from tflite_export.integer_pass.drop_reshapes import drop_flattening
from tflite_export.integer_pass.fused_lstm import insert_lstms
from tflite_export.integer_pass.shared_products import split_shared_products
from tflite_export.integer_pass.tables import insert_tables
from tflite_export.integer_pass.tensor_names import name_tensors
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
from tflite_export.lowering import Labels, same_grid, take_markers


def quantize(marked: ModelT, frozen: FrozenModel, runtimes: frozenset[str] = RUNTIMES) -> ModelT:
    """The integer model of a marked float one, which is consumed.

    Tensors bear the names of their sites.

    Args:
        marked: from `lowering.lower`.
        frozen: what it was lowered from.
        runtimes: those that must run it. Weights of four bits or fewer are packed two a byte
            where all of them have the kernel, and stored as int8 where one does not.

    Raises:
        LoweringError: if an operator is not in `OP_TABLE`, a tensor that an integer operator
            reads or writes was not marked, or weights are not those of the frozen model.
    """
    labels = take_markers(marked, frozen.sites)
    split_shared_products(marked, labels)
    fuse_clamps(marked, labels)
    split_clamps(marked)
    integer_pass = _IntegerPass(marked, frozen, labels, runtimes)
    integer_pass.spread_scales()
    integer_pass.find_floats()
    for operator in integer_pass.graph.operators:
        integer_pass.convert(operator)
    insert_tables(marked, labels, frozen.tables, runtimes)
    insert_lstms(marked, labels, frozen.lstms)
    integer_pass.convert_tensors()
    name_tensors(marked, labels)
    drop_flattening(marked, labels)
    convolve(marked, integer_pass.unpacked)
    return marked


class _IntegerPass:
    """The working state of `quantize`."""

    def __init__(
        self, model: ModelT, frozen: FrozenModel, labels: Labels, runtimes: frozenset[str]
    ):
        self.model = model
        self.graph = model.subgraphs[0]
        self.labels = labels
        self.runtimes = runtimes
        self.weights: dict[bytes, list[FrozenWeight]] = {}
        for weight in frozen.weights:
            self.weights.setdefault(weight.values.tobytes(), []).append(weight)
        # The FULLY_CONNECTED whose weights of four bits only a convolution takes packed.
        self.unpacked: list[OperatorT] = []
        # Identities of the operators that are no integer operators, or not yet.
        self.untouched = {id(placeholder) for placeholder, _ in labels.tables}

    def _rule(self, operator: OperatorT) -> OpRule:
        name = flatbuffer.op_name(self.model, operator)
        if name not in OP_TABLE:
            raise LoweringError(
                f"Expected operators of the op table. Received: {name}, which writes "
                f"'{self._name(operator.outputs[0])}'. Leave the layer float, or add a row."
            )
        return OP_TABLE[name]

    def _name(self, tensor: int) -> str:
        return flatbuffer.tensor_name(self.graph.tensors[tensor])

    def _is_constant(self, tensor: int) -> bool:
        return flatbuffer.tensor_data(self.model, self.graph.tensors[tensor]) is not None

    def _activations(self, operator: OperatorT, rule: OpRule) -> list[int]:
        """The non-constant inputs that carry activations."""
        chosen = range(len(operator.inputs)) if rule.activations is None else rule.activations
        inputs = [int(operator.inputs[i]) for i in chosen]
        return [t for t in inputs if t >= 0 and self._is_quantity(t) and not self._is_constant(t)]

    def _is_unmarked(self, tensor: int) -> bool:
        return self._is_quantity(tensor) and tensor not in self.labels.sites

    def _is_quantity(self, tensor: int) -> bool:
        """Whether it was a float: no index, shape or truth value."""
        return self.graph.tensors[tensor].type == schema.TensorType.FLOAT32

    def _is_float(self, operator: OperatorT) -> bool:
        return any(int(t) in self.labels.floats for t in operator.inputs)

    def spread_scales(self) -> None:
        """Gives unmarked tensors the grid that same-scale operators hand on, both ways."""
        sites = self.labels.sites
        changed = True
        while changed:
            changed = False
            for operator in self.graph.operators:
                rule = OP_TABLE.get(flatbuffer.op_name(self.model, operator))
                if rule is None or rule.scales != "same" or self._is_float(operator):
                    continue
                tensors = [*self._activations(operator, rule), *map(int, operator.outputs)]
                known = [sites[t] for t in tensors if t in sites]
                for tensor in tensors:
                    if known and tensor not in sites:
                        sites[tensor] = known[0]
                        changed = True

    def find_floats(self) -> None:
        """Tells the operators that compute on floats: those that a float reaches."""
        floats = self.labels.floats
        floats.update(t for t in map(int, self.graph.inputs) if self._is_unmarked(t))
        for operator in self.graph.operators:
            name = flatbuffer.op_name(self.model, operator)
            if not any(self._is_quantity(int(t)) for t in [*operator.inputs, *operator.outputs]):
                self.untouched.add(id(operator))
            if name != "QUANTIZE" and self._is_float(operator):
                self.untouched.add(id(operator))
                floats.update(int(t) for t in operator.outputs)

    def convert(self, operator: OperatorT) -> None:
        """Makes one operator an integer one: version, weights, bias; checks its scales."""
        if id(operator) in self.untouched:
            return
        rule = self._rule(operator)
        name = flatbuffer.op_name(self.model, operator)
        if name not in ("QUANTIZE", "DEQUANTIZE"):
            self._check_labels(operator, rule, name)
        self._check_six(operator, rule, name)
        self._constants(operator, rule)
        self._weights_and_bias(operator, rule)
        self._drop_vast_clamp(operator)
        code = self.model.operatorCodes[operator.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        if rule.ships_as is not None:
            builtin = getattr(schema.BuiltinOperator, rule.ships_as)
        version = max(code.version, rule.version)
        if self._bits(operator) == 16:
            version = max(version, self._int16_version(operator, name))
        types = {self.graph.tensors[int(t)].type for t in operator.inputs}
        packed = [rule.packing(bits) for bits, kind in PACKED_TYPES.items() if kind in types]
        version = max([version, *(kernels.version for kernels in packed)])
        operator.opcodeIndex = operator_code(self.model, builtin, version)

    def _bits(self, operator: OperatorT) -> int:
        """Width of the activations on which an integer operator computes."""
        tensors, sites = [*operator.inputs, *operator.outputs], self.labels.sites
        return max((sites[int(t)].bits for t in tensors if int(t) in sites), default=8)

    def _int16_version(self, operator: OperatorT, name: str) -> int:
        if name not in INT16:
            raise LoweringError(
                f"Expected operators with int16 kernels. Received: {name}, which writes "
                f"'{self._name(operator.outputs[0])}'. Give its layer 'int8' in the policy."
            )
        # By default, int16 kernels of ADD and SUB take scales that are powers of two.
        if hasattr(operator.builtinOptions, "potScaleInt16"):
            operator.builtinOptions.potScaleInt16 = False
        return INT16[name].version

    def _check_six(self, operator: OperatorT, rule: OpRule, name: str) -> None:
        """Raises where RELU in the place of RELU6 would not clamp at 6."""
        if name == "RELU6" and rule.ships_as == "RELU":
            site = self.labels.sites[int(operator.outputs[0])]
            top = (2 ** (site.bits - 1) - 1 - site.zero_point) * float(site.scale)
            if top > 6.0 + float(site.scale) / 2:
                raise LoweringError(
                    f"Expected a range that ends at 6 behind RELU6. Received: {top:.3g} for "
                    f"'{site.name}'. Quantize the float model anew."
                )

    def _drop_vast_clamp(self, operator: OperatorT) -> None:
        """RELU for a fused RELU6 whose 6 is no int32 on the output's grid: kernels refuse that.

        The output's range ends below 6, so the two are the same.
        """
        options, kinds = operator.builtinOptions, schema.ActivationFunctionType
        if getattr(options, "fusedActivationFunction", None) == kinds.RELU6:
            scale = float(self.labels.sites[int(operator.outputs[0])].scale)
            if 6.0 / scale >= 2.0**31:
                options.fusedActivationFunction = kinds.RELU

    def _check_labels(self, operator: OperatorT, rule: OpRule, name: str) -> None:
        sites = self.labels.sites
        read = self._activations(operator, rule)
        written = [] if rule.scales == "none" else [int(operator.outputs[0])]
        tensors = [*read, *written]
        for tensor in tensors:
            if tensor not in sites:
                raise LoweringError(
                    f"Expected a marked tensor. Received: '{self._name(tensor)}', which {name} "
                    "reads or writes, without a marker: the converter split a layer in a way that "
                    "the registry does not know. Leave the layer float and report this."
                )
        for tensor in read:
            if sites[tensor].scale >= rule.input_scale_below:
                raise LoweringError(
                    f"Expected a scale below {rule.input_scale_below} into {name}. Received: "
                    f"{sites[tensor].scale} for '{sites[tensor].name}'. Scale it down."
                )
            if sites[tensor].scale <= rule.least_input_scale:
                raise LoweringError(
                    f"Expected a scale above {rule.least_input_scale:.3g} into {name}. Received: "
                    f"{float(sites[tensor].scale):.3g} for '{sites[tensor].name}', whose values "
                    "hardly differ: the model is untrained, or dead there. Train it, or scale "
                    "the values up."
                )
        if not written:
            return
        output = sites[written[0]]
        if any(sites[t].bits != output.bits for t in tensors):
            raise LoweringError(
                f"Expected integers of one width around {name}. Received: "
                f"{[(self._name(t), sites[t].bits) for t in tensors]}."
            )
        fixed = rule.fixed
        if output.bits == 16 and name in INT16 and (scale := INT16[name].fixed_scale):
            fixed = (scale, 0)
        if rule.scales == "same" and not all(same_grid(sites[t], output) for t in tensors):
            raise LoweringError(
                f"Expected one scale around {name}. Received: "
                f"{[(self._name(t), float(sites[t].scale)) for t in tensors]}."
            )
        if fixed is not None and fixed != (float(output.scale), output.zero_point):
            raise LoweringError(
                f"Expected scale and zero point {fixed} from {name}. Received: "
                f"{(float(output.scale), output.zero_point)} for '{output.name}'."
            )

    def _constants(self, operator: OperatorT, rule: OpRule) -> None:
        """Quantizes constants that stand in an activation's place, as in MUL by a constant."""
        chosen = range(len(operator.inputs)) if rule.activations is None else rule.activations
        for position in chosen:
            tensor = self.graph.tensors[int(operator.inputs[position])]
            data = flatbuffer.tensor_data(self.model, tensor)
            if data is None or data.dtype != np.float32:
                continue
            if rule.scales == "own":
                frozen = self._frozen(data, tensor, 1)
                integers, scale, zero = frozen.integers.reshape(data.shape), frozen.scale, 0
            else:
                # As GATHER's table: what is handed on has the output's grid.
                site = self.labels.sites.get(int(operator.outputs[0]))
                integers, scale, zero = constant_on_grid(data, site)
            integers = integers.astype(ACTIVATION_DTYPES[self._bits(operator)])
            index = self._add(tensor, integers, np.reshape(scale, -1), 0, zero)
            operator.inputs[position] = index

    def _frozen(self, keras_order: np.ndarray, tensor: TensorT, channels: int) -> FrozenWeight:
        """The frozen weight of these very bytes, with one scale or one per channel.

        Equal bytes are equal weights, but all-zero kernels of other shapes have them too.
        """
        key = (np.ascontiguousarray(keras_order) + np.float32(0)).tobytes()
        for weight in self.weights.get(key, ()):
            if weight.scale.size in (1, channels):
                return weight
        raise LoweringError(
            f"Expected the frozen model's weights. Received: "
            f"'{flatbuffer.tensor_name(tensor)}' of shape {keras_order.shape}, which the "
            "converter changed."
        )

    def _weights_and_bias(self, operator: OperatorT, rule: OpRule) -> None:
        if rule.weights is None:
            return
        tensor = self.graph.tensors[int(operator.inputs[rule.weights])]
        data = self._constant(tensor)
        order = rule.keras_order or tuple(range(data.ndim))
        channels = data.shape[rule.channel_axis] if data.ndim else 1
        frozen = self._frozen(data.transpose(order), tensor, channels)
        weights = Weights.in_file(frozen, data.shape, order, rule.channel_axis)
        position = -1
        if rule.bias is not None and len(operator.inputs) > rule.bias:
            position = int(operator.inputs[rule.bias])
        if position >= 0:
            like = self.graph.tensors[position]
            source = self._activations(operator, rule)[0]
            site = self.labels.sites[source]
            weights, bias = fit_bias(weights, self._constant(like), site.scale, site.bits)
            operator.inputs[rule.bias] = self._add(like, bias.integers, bias.scale, 0)
            # The operator tells whose bias it is; the converter's name lists all that it fused.
            self.graph.tensors[int(operator.inputs[rule.bias])].name = None
        index = self._add(tensor, weights.integers, weights.scale, weights.axis)
        self.graph.tensors[index].name = frozen.name.encode()
        operator.inputs[rule.weights] = index
        self._pack(operator, rule, weights)

    def _pack(self, operator: OperatorT, rule: OpRule, weights: Weights) -> None:
        """Packs integers that fit fewer bits, into the fewest that all the runtimes take."""
        if weights.bits > PACKED_BITS:
            return
        name, single = flatbuffer.op_name(self.model, operator), weights.scale.size == 1
        for bits, kind in PACKED_TYPES.items():
            wide = self._bits(operator) == 16
            packs = self.runtimes <= INT16[name].packed if wide and bits == PACKED_BITS else False
            packs = packs if wide else rule.packs(bits, single, self.runtimes)
            if weights.bits <= bits and packs:
                tensor = self.graph.tensors[int(operator.inputs[rule.weights])]
                tensor.type = kind
                self.model.buffers[tensor.buffer].data = pack(weights.integers, bits)
                return
        other = PACKS_AS.get(name)
        packs = other is not None and OP_TABLE[other].packs(PACKED_BITS, single, self.runtimes)
        if packs and self._bits(operator) == 8:
            self.unpacked.append(operator)

    def _constant(self, tensor: TensorT) -> np.ndarray:
        data = flatbuffer.tensor_data(self.model, tensor)
        if data is None:
            raise LoweringError(
                f"Expected constant weights. Received: '{flatbuffer.tensor_name(tensor)}', which "
                "is computed."
            )
        return data

    def _add(
        self, like: TensorT, data: np.ndarray, scale: np.ndarray, axis: int, zero_point: int = 0
    ) -> int:
        """A new constant; the old one may serve another operator with another scale."""
        grid = quantization(scale, np.full(len(scale), zero_point), axis)
        kind = TENSOR_TYPES[data.dtype]
        return flatbuffer.add_tensor(
            self.model, like.shape, kind, name=like.name, grid=grid, data=data
        )

    def convert_tensors(self) -> None:
        """Gives every labelled tensor its type, scale and zero point."""
        for index, site in self.labels.sites.items():
            tensor = self.graph.tensors[index]
            tensor.type = TENSOR_TYPES[ACTIVATION_DTYPES[site.bits]]
            tensor.quantization = quantization([site.scale], [site.zero_point], 0)
