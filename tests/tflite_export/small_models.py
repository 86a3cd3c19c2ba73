"""Small QAT models and what their files hold, for the tests of this folder."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import kqat
from tests.coverage.cases import Case, functional, inputs_of
from tflite_export import flatbuffer
from tflite_export.flatbuffer.tree import ModelT, TensorT


def quantized(
    shape: tuple[int, ...], call: Callable[[Any], Any], policy: Any = "int8"
) -> tuple[keras.Model, np.ndarray]:
    """The calibrated QAT model of `functional(shape, call)`, and 64 inputs of it."""
    model = Case(name="net", build=lambda: functional(shape, call), ops={}).model()
    x = inputs_of(model, 64)
    return kqat.quantize_model(model, policy, calibration_data=x), x


def operators(model: ModelT) -> list[str]:
    """The names of the operators of subgraph 0, in order."""
    return [flatbuffer.op_name(model, op) for op in model.subgraphs[0].operators]


def computed(model: ModelT) -> dict[str, TensorT]:
    """The inputs of subgraph 0 and what its operators compute, by name."""
    graph = model.subgraphs[0]
    indices = [*graph.inputs, *(i for op in graph.operators for i in op.outputs)]
    return {flatbuffer.tensor_name(graph.tensors[i]): graph.tensors[i] for i in indices}


def constants(model: ModelT, operator: int) -> list[tuple[TensorT, np.ndarray]]:
    """The constant inputs of an operator, with their values."""
    graph = model.subgraphs[0]
    tensors = [graph.tensors[i] for i in graph.operators[operator].inputs if i >= 0]
    pairs = [(tensor, flatbuffer.tensor_data(model, tensor)) for tensor in tensors]
    return [(tensor, data) for tensor, data in pairs if data is not None]
