"""LEAKY_RELU of int8 as PRELU of one slope, whose kernel rounds the product once."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.devices import MOST_AXES, STAND_INS
from tflite_export import flatbuffer
from tflite_export.flatbuffer import OperatorT, operator_code
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import kernel_version, quantization

_LARGEST = 127


def multiply_slopes(draft: Draft) -> None:
    """Makes a PRELU of each int8 LEAKY_RELU, where TFLite Micro must run the file.

    See `kqat.devices.STAND_INS` for the reason. More axes than PRELU takes stay with LEAKY_RELU.
    """
    if "tflite_micro" not in draft.runtimes:
        return
    most = min(MOST_AXES["PRELU"])
    for operator in draft.integer_operators:
        axes = len(flatbuffer.tensor_shape(draft.graph.tensors[int(operator.outputs[0])]))
        if draft.op_name(operator) == "LEAKY_RELU" and draft.bits(operator) == 8 and axes <= most:
            _as_prelu(draft, operator, axes)


def _as_prelu(draft: Draft, operator: OperatorT, axes: int) -> None:
    """Changes the operator in place; a slope of zero has no grid, and stays."""
    slope = np.float32(operator.builtinOptions.alpha)
    scale = np.abs(slope) / np.float32(_LARGEST)
    if scale == 0:
        return
    integer = np.full((1,) * max(axes - 1, 1), np.sign(slope) * _LARGEST, np.int8)
    site = draft.sites[int(operator.outputs[0])]
    added = flatbuffer.add_tensor(
        draft.model,
        integer.shape,
        schema.TensorType.INT8,
        name=f"{site.name}/slope",
        grid=quantization([scale], [0], 0),
        data=integer,
    )
    stand_in = STAND_INS["LEAKY_RELU"]
    builtin = getattr(schema.BuiltinOperator, stand_in)
    operator.inputs = [int(operator.inputs[0]), added]
    operator.opcodeIndex = operator_code(draft.model, builtin, kernel_version(stand_in, 8))
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.NONE, None
