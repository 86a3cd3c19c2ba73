"""QAT model to bytes: freeze, lower, quantize, give it the asked-for inputs and outputs."""

import os
from collections.abc import Mapping
from typing import Any

import keras
from ai_edge_litert import schema_py_generated as schema

from kqat.errors import ExportError
from kqat.freezing import FrozenModel, freeze
from kqat.saving import write_file
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT
from tflite_export.lowering import lower
from tflite_export.markers import new_operator
from tflite_export.packing import quantization
from tflite_export.quantizing import quantize
from tflite_export.sharing import share_constants
from tflite_export.targets import check_target, computed, runtimes_of

IO_TYPES = {"int8": "INT8", "uint8": "UINT8", "float32": "FLOAT32"}
IoType = str | Mapping[str, str]


def convert(
    qat: keras.Model | FrozenModel,
    *,
    inference_input_type: IoType = "int8",
    inference_output_type: IoType = "int8",
    target: str | None = None,
    batch_size: int = 1,
) -> bytes:
    """The full-integer `.tflite` of a QAT model, as bytes.

    Scales, zero points and integer weights are the trained ones; nothing is calibrated. Inputs
    and outputs keep the Keras model's order and names, in the subgraph and in the signature.

    Args:
        qat: a model from `kqat.quantize_model`, calibrated or trained; it is left alone.
        inference_input_type: `"int8"`, `"uint8"` or `"float32"`, for all inputs, or a mapping
            from input names; what counts, as tokens do, is `"int32"` in any case.
        inference_output_type: the same for outputs.
        target: a name from `tflite_export.targets.TARGETS`; its runtime must have the int8 kernels
            (operators that the plan leaves float are not checked).
        batch_size: samples per invocation.

    Raises:
        ModelError, FreezeError: if `qat` is no QAT model, or has seen no data.
        TargetError: if the target lacks a kernel, before anything is converted.
        ExportError: if an input or output cannot have the type asked for.
        LoweringError: if the converter fails.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ExportError(f"Expected a batch size of at least 1. Received: {batch_size!r}.")
    frozen = qat if isinstance(qat, FrozenModel) else freeze(qat)
    inputs = dict(zip(frozen.input_names, frozen.model.inputs, strict=True))
    outputs = dict(zip(frozen.output_names, frozen.model.outputs, strict=True))
    input_types = _types(inference_input_type, inputs, "inference_input_type")
    output_types = _types(inference_output_type, outputs, "inference_output_type")
    if target is not None:
        check_target(frozen, target)
    marked = lower(frozen, batch_size, computed(frozen, target))
    model = quantize(marked, frozen, runtimes_of(target))
    _Interface(model, frozen).apply(input_types, output_types)
    share_constants(model)
    return flatbuffer.write(flatbuffer.compact(model))


def save(blob: bytes, path: str | os.PathLike[str]) -> None:
    """Writes a file that `convert` made to `path`, whole or not at all.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    write_file(path, blob)


def _types(asked: IoType, tensors: Mapping[str, Any], argument: str) -> list[str]:
    names = list(tensors)
    counts = {name for name in names if not keras.backend.is_float_dtype(tensors[name].dtype)}
    if isinstance(asked, str):
        # What counts stays as it is: it has no scale.
        asked = {name: "int32" if name in counts else asked for name in names}
    if set(asked) != set(names):
        raise ExportError(f"Expected {argument} for {list(names)}. Received: {sorted(asked)}.")
    for name in names:
        if (asked[name] == "int32") != (name in counts):
            raise ExportError(
                f"Expected int32 for what counts, as {sorted(counts)}, and for nothing else. "
                f"Received: {argument}={asked[name]!r} for '{name}'."
            )
        if asked[name] not in (*IO_TYPES, "int32"):
            raise ExportError(
                f"Expected {argument} to be one of {sorted(IO_TYPES)}. "
                f"Received: {asked[name]!r} for '{name}'."
            )
    return [asked[name] for name in names]


class _Interface:
    """Orders, names and types the inputs and outputs of an integer model, in place."""

    def __init__(self, model: ModelT, frozen: FrozenModel):
        self.model = model
        self.graph = model.subgraphs[0]
        self.frozen = frozen
        signature = model.signatureDefs[0]
        self.signature = signature
        self.inputs = self._in_order(signature.inputs, "input")
        self.outputs = self._in_order(signature.outputs, "output")

    def _in_order(self, entries: list, kind: str) -> list[int]:
        by_name = {_text(entry.name): int(entry.tensorIndex) for entry in entries}
        return [by_name[f"{kind}_{i}"] for i in range(len(by_name))]

    def apply(self, input_types: list[str], output_types: list[str]) -> None:
        graph, names = self.graph, self.frozen
        graph.inputs = [
            self._typed(t, io_type, name, "input")
            for t, io_type, name in zip(self.inputs, input_types, names.input_names, strict=True)
        ]
        graph.outputs = [
            self._typed(t, io_type, name, "output")
            for t, io_type, name in zip(self.outputs, output_types, names.output_names, strict=True)
        ]
        self.signature.inputs = self._entries(graph.inputs, names.input_names)
        self.signature.outputs = self._entries(graph.outputs, names.output_names)
        self.signature.signatureKey = b"serving_default"
        self.model.description = b"kqat"
        # The converter's own account of how it optimized is not true of this file.
        self.model.metadata = [
            entry for entry in self.model.metadata or [] if entry.name == b"min_runtime_version"
        ]

    def _entries(self, tensors: list[int], names: tuple[str, ...]) -> list:
        entries = []
        for tensor, name in zip(tensors, names, strict=True):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name.encode(), tensor
            entries.append(entry)
        return entries

    def _typed(self, index: int, io_type: str, name: str, kind: str) -> int:
        tensor = self.graph.tensors[index]
        wanted = getattr(schema.TensorType, IO_TYPES.get(io_type, "INT32"))
        if tensor.type == wanted or io_type == "int32":
            # An input that is an output too keeps its name; the signature has both.
            if kind == "input" or index not in self.inputs:
                tensor.name = name.encode()
            return index
        if tensor.type == schema.TensorType.FLOAT32:
            raise ExportError(
                f"Expected {kind} '{name}' to be an integer. Received: a float, as the plan leaves "
                f"the layer there float. Use inference_{kind}_type='float32' (or a mapping)."
            )
        return self._converted(index, io_type, name, kind)

    def _converted(self, index: int, io_type: str, name: str, kind: str) -> int:
        inner = self.graph.tensors[index]
        outer = schema.TensorT()
        outer.name, outer.shape, outer.buffer = name.encode(), inner.shape, 0
        outer.shapeSignature = inner.shapeSignature
        outer.type = getattr(schema.TensorType, IO_TYPES[io_type])
        if io_type == "uint8":
            zero = int(inner.quantization.zeroPoint[0]) + 128
            outer.quantization = quantization(inner.quantization.scale, [zero], 0)
        self.graph.tensors.append(outer)
        new = len(self.graph.tensors) - 1
        if kind == "input":
            operator = new_operator(self.model, "QUANTIZE", [new], [index])
            self.graph.operators.insert(0, operator)
        else:
            float_out = io_type == "float32"
            op, version = ("DEQUANTIZE", 2) if float_out else ("QUANTIZE", 1)
            self.graph.operators.append(new_operator(self.model, op, [index], [new], version))
        return new


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
