"""Outputs from end to end: a file's against the Keras model's, or another runtime's."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from kqat.freezing import FrozenModel, Marker, Node
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT
from tflite_export.runtimes import has_grid, real
from tflite_export.verification.report import OutputAgreement
from tflite_export.verification.site_tensors import SiteTensors


def model_outputs(qat: keras.Model | FrozenModel, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the model computes, one array (samples, …) for each output.

    Args:
        qat: the QAT model, as a user evaluates it. Of a frozen one, whose trained model is not at
            hand, what it computes in float arithmetic with every site rounded.
        inputs: as the float model takes them.
    """
    tensors = [keras.ops.convert_to_tensor(x) for x in inputs]
    if isinstance(qat, FrozenModel):
        outputs = qat.graph.run(tensors, _rounded(qat))
    else:
        outputs = qat(keras.tree.pack_sequence_as(qat.input, tensors), training=False)
    return [np.asarray(y) for y in keras.tree.flatten(outputs)]


def agreement_with_model(
    frozen: FrozenModel,
    expected: Sequence[np.ndarray],
    tensors: SiteTensors,
    model: ModelT,
    outputs: Sequence[np.ndarray],
) -> tuple[OutputAgreement, ...]:
    """The model's outputs against those that a runtime computed.

    Args:
        frozen: the model.
        expected: its `model_outputs`.
        tensors: of the file.
        model: the file's tree.
        outputs: what the runtime computed, one array (samples, …) for each output.
    """
    graph, rows = model.subgraphs[0], []
    for name, wanted, found, index in zip(
        frozen.output_names, expected, outputs, graph.outputs, strict=True
    ):
        value = real(found, graph.tensors[int(index)])
        if value.size != wanted.size:
            continue  # a damaged file, whose lockstep says more
        value = value.reshape(wanted.shape)
        step = tensors.output_step(int(index), wanted)
        difference = value.astype(np.float32) - wanted.astype(np.float32)
        rows.append(_agreement(name, np.abs(np.rint(difference / step)), wanted, value))
    return tuple(rows)


# Steps of a difference that is no number.
_FAR = 2**31 - 1


def agreement_of_runtimes(
    model: ModelT, first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> tuple[OutputAgreement, ...]:
    """The outputs of a file on one runtime against those on another.

    Args:
        model: the file's tree.
        first, second: one array (samples, …) for each output.
    """
    graph, rows = model.subgraphs[0], []
    for index, expected, found in zip(graph.outputs, first, second, strict=True):
        tensor = graph.tensors[index]
        values = (expected, found)
        if has_grid(tensor):
            values = real(expected, tensor), real(found, tensor)
        if expected.dtype.kind != "f" and has_grid(tensor):
            steps = np.abs(found.astype(np.int64) - expected.astype(np.int64))
        else:
            a, b = (np.asarray(x, np.float64) for x in (expected, found))
            # Logarithms of random inputs are no numbers: equal on both, they differ by nothing.
            finite = a[np.isfinite(a)]
            spread = float(np.ptp(finite)) / 255 if finite.size else 1.0
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            with np.errstate(invalid="ignore"):
                steps = np.where(same, 0.0, np.abs(np.rint((b - a) / (spread or 1.0))))
        rows.append(_agreement(flatbuffer.tensor_name(tensor), steps, *values))
    return tuple(rows)


def _agreement(
    name: str, steps: np.ndarray, expected: np.ndarray, found: np.ndarray
) -> OutputAgreement:
    """What is told of one output; classes are compared where each sample is a vector of them."""
    # What is a number on one side only is as far off as can be told.
    steps = np.where(np.isfinite(steps), steps.astype(np.float64), _FAR)
    has_classes = found.ndim == 2 and found.shape[1] > 1
    top1 = float(np.mean(found.argmax(-1) == expected.argmax(-1))) if has_classes else None
    return OutputAgreement(
        name=name,
        max_steps=int(steps.max(initial=0)),
        equal_fraction=float(np.mean(steps == 0)),
        top1_agreement=top1,
    )


def _rounded(frozen: FrozenModel) -> Callable[..., Any]:
    """What calls the nodes of the frozen graph, with every site rounded.

    A fused LSTM too, whose lockstep is with the runtime's own arithmetic: here it shows if that
    computes something else than what was trained.
    """

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(node.layer, Marker):
            return node.layer(*args, **kwargs)
        if node.layer.kind != "site":
            return args[0]
        site = frozen.sites[node.layer.index]
        return keras.ops.convert_to_tensor(site.reals(site.integers(np.asarray(args[0]))))

    return call
