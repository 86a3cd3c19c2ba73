"""MEAN of int8 rows as FULLY_CONNECTED with equal weights, which all runtimes round alike."""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.devices import RUNTIMES, STAND_INS
from tflite_export import flatbuffer
from tflite_export.flatbuffer import OperatorT, operator_code
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import kernel_version, quantization

_STAND_IN = STAND_INS["MEAN"]
_LARGEST = 127
# The first version with `keep_num_dims`.
_KEEPS_AXES = 5
# 127 times a sum of so many int8 values less their zero point fits an int32.
_MOST_VALUES = 2**31 // (_LARGEST * 255)


def multiply_rows(draft: Draft) -> None:
    """Makes a FULLY_CONNECTED of each int8 MEAN over the last axis, where TFLite Micro must run it.

    See `kqat.devices.STAND_INS` for the reason: in a normalization a step of the variance is many
    of the output. Accelerators, each a runtime of its own here, keep MEAN.
    """
    if "tflite_micro" not in draft.runtimes or draft.runtimes - RUNTIMES:
        return
    for operator in draft.integer_operators:
        if draft.op_name(operator) == "MEAN" and draft.bits(operator) == 8:
            values = _row(draft, operator)
            if values:
                _as_dense(draft, operator, values)


def _row(draft: Draft, operator: OperatorT) -> int:
    """How many values each mean is of, where FULLY_CONNECTED can compute them; else 0."""
    given, axes = (int(t) for t in operator.inputs[:2])
    shape = flatbuffer.tensor_shape(draft.graph.tensors[given])
    reduced = flatbuffer.tensor_data(draft.model, draft.graph.tensors[axes])
    options: Any = operator.builtinOptions
    if reduced is None or not options.keepDims or len(shape) < 2:
        return 0
    if {int(axis) % len(shape) for axis in reduced.ravel()} != {len(shape) - 1}:
        return 0
    return shape[-1] if shape[-1] < _MOST_VALUES else 0


def _as_dense(draft: Draft, operator: OperatorT, values: int) -> None:
    """Changes the operator in place."""
    site = draft.sites[int(operator.outputs[0])]
    weights = flatbuffer.add_tensor(
        draft.model,
        (1, values),
        schema.TensorType.INT8,
        name=f"{site.name}/weights",
        grid=quantization([np.float32(1.0 / (_LARGEST * values))], [0], 0),
        data=np.full((1, values), _LARGEST, np.int8),
    )
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    builtin = getattr(schema.BuiltinOperator, _STAND_IN)
    version = max(kernel_version(_STAND_IN, 8), _KEEPS_AXES)
    operator.inputs = [int(operator.inputs[0]), weights, -1]
    operator.opcodeIndex = operator_code(draft.model, builtin, version)
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = options
