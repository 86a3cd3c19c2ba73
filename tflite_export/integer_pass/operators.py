"""Integer operators: whether their grids fit their kernels, and the kernels' codes and versions."""

from ai_edge_litert import schema_py_generated as schema

from kqat.base import LoweringError
from kqat.devices import INT16, input_scales
from tflite_export.flatbuffer import OperatorT, operator_code
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import PACKED_TYPES, OpRule, fixed_output, kernel_version
from tflite_export.lowering import same_grid

# Where two precisions meet: any grid fits.
_BETWEEN_PRECISIONS = ("QUANTIZE", "DEQUANTIZE")


def check_operators(draft: Draft) -> None:
    """Checks the grids around every integer operator.

    Raises:
        LoweringError: if an operator is not in the op table, a tensor that it reads or writes was
            not marked, or its kernel demands another grid.
    """
    for operator in draft.integer_operators:
        rule, name = draft.rule(operator), draft.op_name(operator)
        if name not in _BETWEEN_PRECISIONS:
            _check_marked(draft, operator, rule)
            _check_input_scales(draft, operator, rule)
            if rule.scales != "none":
                _check_output(draft, operator, rule)
        if name == "RELU6" and rule.ships_as == "RELU":
            _check_range_ends_at_six(draft, operator)


def set_codes(draft: Draft) -> None:
    """Gives every integer operator the code and the version that its integer kernel needs.

    Raises:
        LoweringError: if an operator has no kernel for activations of 16 bits.
    """
    tensors = draft.graph.tensors
    for operator in draft.integer_operators:
        rule = draft.rule(operator)
        code = draft.model.operatorCodes[operator.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        if rule.ships_as is not None:
            builtin = getattr(schema.BuiltinOperator, rule.ships_as)
        versions = [code.version, rule.version]
        if draft.bits(operator) == 16:
            versions.append(_int16_version(draft, operator))
        types = {tensors[int(t)].type for t in operator.inputs}
        versions += [rule.packing(b).version for b, kind in PACKED_TYPES.items() if kind in types]
        operator.opcodeIndex = operator_code(draft.model, builtin, max(versions))


def _int16_version(draft: Draft, operator: OperatorT) -> int:
    name = draft.rule(operator).ships_as or draft.op_name(operator)
    if name not in INT16:
        raise LoweringError(
            f"Expected operators with int16 kernels. Received: {name}, which writes "
            f"'{draft.tensor_name(operator.outputs[0])}'. Give its layer 'int8' in the policy."
        )
    # By default, int16 kernels of ADD and SUB take scales that are powers of two.
    if hasattr(operator.builtinOptions, "potScaleInt16"):
        operator.builtinOptions.potScaleInt16 = False
    return kernel_version(name, 16)


def _around(draft: Draft, operator: OperatorT, rule: OpRule) -> list[int]:
    """The activations that an operator reads, and what it writes where that has a scale."""
    written = [] if rule.scales == "none" else [int(operator.outputs[0])]
    return [*draft.activations(operator, rule), *written]


def _check_marked(draft: Draft, operator: OperatorT, rule: OpRule) -> None:
    for tensor in _around(draft, operator, rule):
        if tensor not in draft.sites:
            raise LoweringError(
                f"Expected a marked tensor. Received: '{draft.tensor_name(tensor)}', which "
                f"{draft.op_name(operator)} reads or writes, without a marker: the converter split "
                "a layer in a way that the registry does not know. Leave the layer float and "
                "report this."
            )


def _check_input_scales(draft: Draft, operator: OperatorT, rule: OpRule) -> None:
    name = draft.op_name(operator)
    for site in (draft.sites[tensor] for tensor in draft.activations(operator, rule)):
        below = min(rule.input_scale_below, input_scales(name, site.bits)[1])
        if site.scale >= below:
            raise LoweringError(
                f"Expected a scale below {below} into {name}. Received: "
                f"{site.scale} for '{site.name}'. Scale it down."
            )
        if site.scale <= rule.least_input_scale:
            raise LoweringError(
                f"Expected a scale above {rule.least_input_scale:.3g} into {name}. Received: "
                f"{float(site.scale):.3g} for '{site.name}', whose values hardly differ: the "
                "model is untrained, or dead there. Train it, or scale the values up."
            )


def _check_output(draft: Draft, operator: OperatorT, rule: OpRule) -> None:
    name, tensors = draft.op_name(operator), _around(draft, operator, rule)
    sites, output = [draft.sites[t] for t in tensors], draft.sites[int(operator.outputs[0])]
    if any(site.bits != output.bits for site in sites):
        raise LoweringError(
            f"Expected integers of one width around {name}. Received: "
            f"{[(draft.tensor_name(t), s.bits) for t, s in zip(tensors, sites, strict=True)]}."
        )
    if rule.scales == "same" and not all(same_grid(site, output) for site in sites):
        scales = [float(site.scale) for site in sites]
        raise LoweringError(
            f"Expected one scale around {name}. Received: "
            f"{[(draft.tensor_name(t), s) for t, s in zip(tensors, scales, strict=True)]}."
        )
    fixed = fixed_output(name, output.bits)
    if fixed is not None and fixed != (float(output.scale), output.zero_point):
        raise LoweringError(
            f"Expected scale and zero point {fixed} from {name}. Received: "
            f"{(float(output.scale), output.zero_point)} for '{output.name}'."
        )


def _check_range_ends_at_six(draft: Draft, operator: OperatorT) -> None:
    """Raises where RELU in the place of RELU6 would not clamp at 6."""
    site = draft.sites[int(operator.outputs[0])]
    top = (2 ** (site.bits - 1) - 1 - site.zero_point) * float(site.scale)
    if top > 6.0 + float(site.scale) / 2:
        raise LoweringError(
            f"Expected a range that ends at 6 behind RELU6. Received: {top:.3g} for "
            f"'{site.name}'. Quantize the float model anew."
        )
