"""New operators and operator codes in a model that was read."""

from ai_edge_litert import schema_py_generated as schema

from tflite_export.flatbuffer.tree import ModelT, OperatorT


def new_operator(
    model: ModelT, name: str, inputs: list[int], outputs: list[int], version: int = 1
) -> OperatorT:
    """An operator of subgraph 0 with no options; adds its code to the model where it is new."""
    operator = schema.OperatorT()
    operator.inputs, operator.outputs = inputs, outputs
    operator.opcodeIndex = operator_code(model, getattr(schema.BuiltinOperator, name), version)
    return operator


def operator_code(model: ModelT, builtin: int, version: int, custom: bytes | None = None) -> int:
    """Index of the operator code `builtin` of `version`, added where it is new.

    `custom` is the name of a custom operator.
    """
    for index, code in enumerate(model.operatorCodes):
        own = max(code.builtinCode, code.deprecatedBuiltinCode), code.version, code.customCode
        if own == (builtin, version, custom):
            return index
    code = schema.OperatorCodeT()
    code.builtinCode, code.version, code.customCode = builtin, version, custom
    code.deprecatedBuiltinCode = min(builtin, 127)
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
