"""QAT model to bytes: freeze, lower, quantize, give it the asked-for inputs and outputs."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from kqat.base import ExportError, TargetError, write_file
from kqat.devices import TARGETS
from kqat.freezing import FrozenModel, freeze
from tflite_export import flatbuffer
from tflite_export.devices import check_limits, check_target, computed, runtimes_of
from tflite_export.flatbuffer import ModelT, TensorT, new_operator, share_constants
from tflite_export.integer_pass import quantize
from tflite_export.kernels import LARGEST_MULTIPLIER, OP_TABLE, least_output_scale, quantization
from tflite_export.lowering import lower
from tflite_export.weight_storage import METHODS, halve_weights
from tflite_export.weight_storage import compress as compress_weights

# Offsets in a flatbuffer are signed 32-bit integers.
LARGEST_BYTES = 2**31
IO_TYPES = {"int8": "INT8", "int16": "INT16", "uint8": "UINT8", "float32": "FLOAT32"}
# What `convert` is asked for -> the encodings that it tries.
COMPRESS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "lookup": ("lookup", "prune"),
    "smallest": METHODS,
}
IoType = str | None | Mapping[str, str | None]


def convert(
    qat: keras.Model | FrozenModel,
    *,
    inference_input_type: IoType = None,
    inference_output_type: IoType = None,
    target: str | None = None,
    batch_size: int = 1,
    compress: str | None = None,
    float_weights: str = "float32",
    weights: str | None = None,
) -> bytes:
    """The full-integer `.tflite` of a QAT model, as bytes.

    Scales, zero points and integer weights are the trained ones; nothing is calibrated. Inputs
    and outputs keep the Keras model's order and names, in the subgraph and in the signature.

    Args:
        qat: a model from `kqat.quantize_model`, calibrated or trained; it is left alone.
        inference_input_type: `"int8"`, `"uint8"`, `"int16"` or `"float32"`, for all inputs, or a
            mapping from input names; `tf.int8` and `numpy.int8` serve as well. `None` is what the
            plan makes of the input: int8, int16 where its width is 16 bits, float32 where the
            layers that read it stay float. Inputs that hold indexes, such as token ids, are
            `"int32"` in any case. A `keras.Input` of dtype uint8 takes its bytes, `"uint8"` by
            default; as `"int8"` they are 128 less, which saves an operator.
        inference_output_type: the same for outputs.
        target: a name from `tflite_export.TARGETS`; something on the device must run the int8
            operators (those that the plan leaves float are not checked). A `kqat.TargetWarning`
            names the layers that an accelerator leaves to the CPU. `"litert"` also means speed on
            XNNPACK: LeakyReLU stays LEAKY_RELU, and is PRELU in all files for TFLite Micro.
        batch_size: samples per invocation.
        compress: for `target="tflite_micro"` and `"cmsis_nn"`: encodes weights where that makes
            the file smaller; the operator TFLM_DECODE decodes them into the arena each time that
            they are read. `"lookup"` takes indices into tables of values and bit masks of zeros,
            which decode fast; `"smallest"` takes prefix codes too, bit by bit, where these are
            smaller. Such a file does not run on LiteRT.
        float_weights: `"float16"` rounds the weights of layers that the plan leaves float, by
            `2**-11` of their size at most, and halves their bytes; for `target="litert"`.
        weights: how weights of four bits or fewer are stored: `"packed"`, two or four a byte,
            wherever the target has the kernel; `"unpacked"`, one a byte. `None` packs them where
            that costs no time: for `"litert"` those of FULLY_CONNECTED only, as its packed
            convolutions are several times as slow as int8 ones (`benchmarks/packing.py`); for
            other targets wherever there is a kernel.

    Raises:
        ModelError, FreezeError: if `qat` is no QAT model, or has seen no data.
        TargetError: if the target lacks a kernel, before anything is converted.
        ExportError: if an input or output cannot have the type asked for, the weights are too
            large for a flatbuffer, or LiteRT does not load the file.
        LoweringError: if the converter fails.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ExportError(f"Expected a batch size of at least 1. Received: {batch_size!r}.")
    check_compress(compress, target)
    _check_float_weights(float_weights, target)
    whole_bytes = _whole_bytes(weights, target)
    frozen = qat if isinstance(qat, FrozenModel) else freeze(qat)
    inputs = dict(zip(frozen.input_names, frozen.model.inputs, strict=True))
    outputs = dict(zip(frozen.output_names, frozen.model.outputs, strict=True))
    takes_bytes = {name for name, tensor in inputs.items() if tensor.dtype == "uint8"}
    input_types = _types(inference_input_type, inputs, "inference_input_type", takes_bytes)
    for name in takes_bytes - frozen.byte_inputs:
        input_types[frozen.input_names.index(name)] = "uint8"  # for layers left float
    output_types = _types(inference_output_type, outputs, "inference_output_type", set())
    _check_size(frozen)
    if target is not None:
        check_target(frozen, target)
        check_edge_tpu(target, (*input_types, *output_types), batch_size)
    blob = assemble(
        frozen,
        input_types,
        output_types,
        runtimes=runtimes_of(target),
        tables_computed=computed(frozen, target),
        batch_size=batch_size,
        methods=COMPRESS[compress],
        halves=float_weights == "float16",
        whole_bytes=whole_bytes,
    )
    check_limits(blob, target)
    if not COMPRESS[compress]:  # LiteRT does not know the operator that decodes.
        _check_loads(blob, frozen.model.name)
    return blob


def assemble(
    frozen: FrozenModel,
    input_types: Sequence[str | None],
    output_types: Sequence[str | None],
    *,
    runtimes: frozenset[str],
    tables_computed: frozenset[int],
    batch_size: int = 1,
    methods: Collection[str] = (),
    halves: bool = False,
    whole_bytes: frozenset[tuple[str, int]] = frozenset(),
) -> bytes:
    """The file of a frozen model, by decisions that were made already.

    Args:
        frozen: the model.
        input_types, output_types: as those of `convert`, one for each end.
        runtimes: those that must have a kernel for packed weights; with none, all are packed.
        tables_computed: the tables whose function an operator computes.
        batch_size: samples per invocation.
        methods: the encodings of weights, of `codec.METHODS`; with any, for TFLite Micro alone.
        halves: whether float weights are stored in float16.
        whole_bytes: as of `integer_pass.quantize`.

    Raises:
        ExportError, LoweringError: as `convert`.
    """
    marked = lower(frozen, batch_size, tables_computed)
    model = quantize(marked, frozen, runtimes, whole_bytes)
    _check_multipliers(model)
    _check_lifted(model)
    _Interface(model, frozen).apply(list(input_types), list(output_types))
    share_constants(model)
    if methods:
        compress_weights(model, methods)
    if halves:
        halve_weights(model)
    return flatbuffer.write(flatbuffer.compact(model))


def _check_size(frozen: FrozenModel) -> None:
    size_bytes = sum(4 * math.prod(weight.shape) for weight in frozen.model.weights)
    if size_bytes >= LARGEST_BYTES:
        raise ExportError(
            f"Expected weights below {LARGEST_BYTES:,} bytes in float32, as the converter's "
            f"flatbuffer has 32-bit offsets. Received: {size_bytes:,} bytes in model "
            f"'{frozen.model.name}'. Use a smaller model, or export it in parts."
        )


def _check_multipliers(model: ModelT) -> None:
    """Raises where one step of a sum of int8 products is `LARGEST_MULTIPLIER` output steps or more.

    No kernel can multiply by that: XNNPACK refuses the file, and others saturate.
    """
    graph = model.subgraphs[0]
    for operator in graph.operators:
        rule = OP_TABLE.get(flatbuffer.op_name(model, operator))
        if rule is None or rule.weights is None or rule.bias is None:
            continue
        (source, *_), output = rule.activations or (0,), graph.tensors[int(operator.outputs[0])]
        weights = graph.tensors[int(operator.inputs[rule.weights])]
        if output.type != schema.TensorType.INT8:
            continue
        read = (graph.tensors[int(operator.inputs[source])], weights)
        step = math.prod(float(np.max(tensor.quantization.scale)) for tensor in read)
        scale = float(output.quantization.scale[0])
        if step / scale >= LARGEST_MULTIPLIER:
            raise ExportError(
                f"Expected less than {LARGEST_MULTIPLIER} steps of the output "
                f"'{flatbuffer.tensor_name(output)}' in one step of what is summed for it, input "
                f"scale times the scale of the weights '{flatbuffer.tensor_name(weights)}'. "
                f"Received: {step / scale:.3g}, with weights of steps up to "
                f"{float(np.max(weights.quantization.scale)):.3g} and an output scale of "
                f"{scale:.3g}. Where the weights are that large, training diverged: go back to a "
                "checkpoint. Where the outputs hardly differ, as behind a ReLU that never fires, "
                "train the layer again, take it out, or leave it float by the policy."
            )


def _check_lifted(model: ModelT) -> None:
    """Raises where the result of lifted values would have to be lifted further.

    ADD, SUB and SQUARED_DIFFERENCE lift both inputs by some bits and multiply the result down to
    the output's scale. Where that would be a factor of one or more, TFLite Micro's kernels end the
    process and LiteRT's compute other values. The factor is of twice the larger scale of an input.
    """
    graph = model.subgraphs[0]
    for operator in graph.operators:
        name = flatbuffer.op_name(model, operator)
        output = graph.tensors[int(operator.outputs[0])]
        width = {schema.TensorType.INT8: 8, schema.TensorType.INT16: 16}.get(output.type, 0)
        if name not in OP_TABLE or width not in OP_TABLE[name].lifts:
            continue
        most = max(graph.tensors[int(i)].quantization.scale[0] for i in operator.inputs)
        step = least_output_scale(name, width, most)
        scale = float(output.quantization.scale[0])
        if step >= scale:
            raise ExportError(
                f"Expected a scale above {step:.3g} for '{flatbuffer.tensor_name(output)}', the "
                f"least that {name} can compute from inputs of a scale of {most:.3g}. "
                f"Received: {scale:.3g}. Give it a wider range by the policy, or none, which "
                "follows the data."
            )


def _check_loads(blob: bytes, name: str) -> None:
    """Raises where LiteRT does not take the file: an error of ours, which no user should meet."""
    try:
        Interpreter(model_content=blob, num_threads=1).allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"Expected LiteRT to load the file of '{name}'. Received from it: "
            f"'{' '.join(str(error).split())[:300]}'. This is a fault of kqat: please report it "
            "with the model. Until it is mended, leave the layer at fault float by the policy."
        ) from error


def check_compress(compress: str | None, target: str | None) -> None:
    """Raises where an encoding of weights is none, or no runtime of the target decodes it."""
    if compress not in COMPRESS:
        raise ExportError(
            f"Expected compress to be one of {[name for name in COMPRESS if name]} or None. "
            f"Received: {compress!r}."
        )
    decoding = sorted(name for name, device in TARGETS.items() if device.decodes_weights)
    if compress is not None and target not in decoding:
        raise TargetError(
            f"Expected a target of {decoding} with compress={compress!r}: only TFLite Micro has "
            f"the operator TFLM_DECODE. Received: target={target!r}. Name one, or leave compress "
            "out."
        )


def _whole_bytes(weights: str | None, target: str | None) -> frozenset[tuple[str, int]]:
    """The operators, by width of activations, whose weights of few bits are stored as int8."""
    if weights not in (None, "packed", "unpacked"):
        raise ExportError(
            f"Expected weights to be 'packed', 'unpacked' or None. Received: {weights!r}."
        )
    device = TARGETS.get(target or "")
    if weights == "packed" and device is not None and not device.packs_weights:
        packing = sorted(name for name, one in TARGETS.items() if one.packs_weights)
        raise TargetError(
            f"Expected a target of {packing} with weights='packed': others have no kernel for "
            f"packed weights. Received: target={target!r}. Leave weights out."
        )
    if weights == "unpacked":
        return frozenset((op, bits) for op in OP_TABLE for bits in (8, 16))
    slow = frozenset() if device is None or weights == "packed" else device.slow_packed
    return frozenset((op, 8) for op in slow)


def _check_float_weights(float_weights: str, target: str | None) -> None:
    if float_weights not in ("float32", "float16"):
        raise ExportError(
            f"Expected float_weights to be 'float32' or 'float16'. Received: {float_weights!r}."
        )
    if float_weights == "float16" and target != "litert":
        raise TargetError(
            "Expected target='litert' with float_weights='float16': no other runtime widens it. "
            f"Received: target={target!r}. Name it, or leave float_weights out."
        )


def check_edge_tpu(target: str, io_types: tuple[str | None, ...], batch_size: int) -> None:
    """Raises where the Edge TPU takes no such inputs, outputs or batches."""
    # https://coral.ai/docs/edgetpu/models-intro/: quantized ends, a batch of one.
    if target == "edge_tpu" and (batch_size != 1 or {"float32", "int16"} & {*io_types}):
        raise TargetError(
            "Expected a batch of 1 and int8 or uint8 inputs and outputs for target 'edge_tpu'. "
            f"Received: batch_size={batch_size}, types {sorted(map(str, set(io_types)))}. Leave "
            "both arguments out."
        )


def save(blob: bytes, path: str | os.PathLike[str]) -> None:
    """Writes a file that `convert` made to `path`, whole or not at all.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    write_file(path, blob)


def _types(
    asked: IoType, tensors: Mapping[str, Any], argument: str, takes_bytes: set[str]
) -> list[str | None]:
    """The type asked for of each tensor; `takes_bytes` names the uint8 inputs among them."""
    names = list(tensors)
    indexes = {name for name in names if not keras.backend.is_float_dtype(tensors[name].dtype)}
    indexes -= takes_bytes
    if isinstance(asked, Mapping):
        asked = {name: _type_name(one) for name, one in asked.items()}
    else:
        # Indexes stay as they are: they have no scale.
        one = _type_name(asked)
        asked = {name: "int32" if name in indexes else one for name in names}
    if set(asked) != set(names):
        raise ExportError(
            f"Expected {argument} for {list(names)}. Received: {sorted(asked)}. Name each of them."
        )
    for name in names:
        if (asked[name] == "int32") != (name in indexes):
            raise ExportError(
                f"Expected int32 for what holds indexes, {sorted(indexes)}, and for nothing else. "
                f"Received: {argument}={asked[name]!r} for '{name}'. Give one type for all others, "
                "or a mapping from names to types."
            )
        if asked[name] is not None and asked[name] not in [*IO_TYPES, "int32"]:
            raise ExportError(
                f"Expected {argument} to be one of {sorted(IO_TYPES)} or None. "
                f"Received: {asked[name]!r} for '{name}'."
            )
        if name in takes_bytes and asked[name] not in ("uint8", "int8", None):
            raise _no_bytes(name, argument, asked[name])
    return [asked[name] or ("uint8" if name in takes_bytes else None) for name in names]


def check_end(kind: str, name: str, own: str, asked: str | None) -> None:
    """Raises where one operator does not make the type asked for of the one that the plan gives.

    Args:
        kind: `"input"` or `"output"`.
        name: of that.
        own: its type by the plan.
        asked: `None` is any.

    Raises:
        ExportError: saying which types it can have.
    """
    if asked in (None, own):
        return
    if own == "uint8":
        if asked != "int8":
            raise _no_bytes(name, f"inference_{kind}_type", asked)
    elif own == "float32":
        raise ExportError(
            f"Expected {kind} '{name}' to be an integer. Received: a float, as the plan leaves "
            f"the layer there float. Use inference_{kind}_type='float32' (or a mapping)."
        )
    elif asked != "float32" and (own, asked) != ("int8", "uint8"):
        raise ExportError(
            f"Expected {kind} '{name}' to have the width that the plan gives it, {own}. "
            f"Received: inference_{kind}_type={asked!r}. Use '{own}' or 'float32', or a "
            "policy that gives it another width."
        )


def _no_bytes(name: str, argument: str, asked: Any) -> ExportError:
    return ExportError(
        f"Expected {argument} to be 'uint8' or 'int8' for '{name}', whose keras.Input has "
        f"dtype uint8. Received: {asked!r}. Give a mapping from input names to "
        "types, or make it a float input."
    )


def _type_name(asked: Any) -> Any:
    """A type's name; scripts for TensorFlow's converter give `tf.int8`, or NumPy's."""
    if asked is None or isinstance(asked, str):
        return asked
    return getattr(asked, "name", None) or getattr(asked, "__name__", asked)


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

    def apply(self, input_types: list[str | None], output_types: list[str | None]) -> None:
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

    def _settle_unread(self, tensor: TensorT, index: int) -> None:
        """Makes int8 of an input that no operator reads, which has no range."""
        if any(index in map(int, operator.inputs) for operator in self.graph.operators):
            return
        if index not in map(int, self.graph.outputs):
            tensor.type = schema.TensorType.INT8
            tensor.quantization = quantization([1.0], [0], 0)

    def _typed(self, index: int, io_type: str | None, name: str, kind: str) -> int:
        tensor = self.graph.tensors[index]
        if kind == "input" and tensor.type == schema.TensorType.FLOAT32 and io_type != "float32":
            self._settle_unread(tensor, index)
        if io_type is None:
            kinds = schema.TensorType
            fits = tensor.type in (kinds.INT8, kinds.INT16, kinds.FLOAT32)
        else:
            wanted = getattr(schema.TensorType, IO_TYPES.get(io_type, "INT32"))
            fits = tensor.type == wanted or io_type == "int32"
        if fits:
            # An input that is an output too keeps its name; the signature has both.
            if kind == "input" or index not in self.inputs:
                tensor.name = name.encode()
            return index
        assert io_type is not None, "every integer fits None"
        check_end(kind, name, str(flatbuffer.tensor_dtype(tensor)), io_type)
        return self._converted(index, io_type, name, kind)

    def _converted(self, index: int, io_type: str, name: str, kind: str) -> int:
        inner = self.graph.tensors[index]
        outer, grid = getattr(schema.TensorType, IO_TYPES[io_type]), None
        if io_type == "uint8":
            zero = int(inner.quantization.zeroPoint[0]) + 128
            grid = quantization(inner.quantization.scale, [zero], 0)
        new = flatbuffer.add_tensor(self.model, inner.shape, outer, name=name, grid=grid)
        self.graph.tensors[new].shapeSignature = inner.shapeSignature
        wide = inner.type == schema.TensorType.INT16
        if kind == "input":
            operator = new_operator(self.model, "QUANTIZE", [new], [index], 2 if wide else 1)
            self.graph.operators.insert(0, operator)
        else:
            float_out = io_type == "float32"
            op, version = ("DEQUANTIZE", 3 if wide else 2) if float_out else ("QUANTIZE", 1)
            self.graph.operators.append(new_operator(self.model, op, [index], [new], version))
        return new


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
