"""Fills ranges from a few batches, so that training starts at post-training quality."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from kqat.errors import CalibrationError
from kqat.layers import ActivationQuantizer
from kqat.tracing import Graph, Node, trace

BATCH_SIZE = 32


def calibrate(model: keras.Model, data: Any) -> None:
    """Lets the quantizers of a QAT model observe `data`; weights do not move.

    Weights are rounded meanwhile and activations are not, so one bad early range cannot spoil
    the later ones.

    Args:
        model: a QAT model.
        data: an array of shape `(samples, …)`; a list or dict of such arrays for many inputs; or
            an iterable of batches (a `tf.data.Dataset`, a generator), each a tensor, a list or
            dict of tensors, or a tuple `(inputs, targets…)`.

    Raises:
        CalibrationError: if data are empty, misshapen or not finite, naming the input.
    """
    graph = trace(model)
    batches = 0
    for batch in _batches(data, graph):
        _check(batch, graph)
        graph.run([keras.ops.convert_to_tensor(x) for x in batch], _observe)
        batches += 1
    if not batches:
        raise CalibrationError(
            "Expected at least one sample of calibration data. Received: none. Give some hundred "
            "typical inputs."
        )


def _observe(node: Node, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(node.layer, ActivationQuantizer):
        return node.layer(*args, **kwargs)
    x = args[0]
    if kwargs.get("observe", True):
        node.layer.observe(x, kwargs.get("site", 0))
    return node.layer.clamped(x)


def _batches(data: Any, graph: Graph) -> Iterator[list[np.ndarray]]:
    arrays = _as_arrays(data, graph)
    if arrays is None:
        for batch in data:
            one = batch[0] if isinstance(batch, tuple) else batch
            found = _as_arrays(one, graph)
            if found is None:
                raise CalibrationError(
                    f"Expected batches of arrays. Received: a batch of type {type(one).__name__}."
                )
            yield found
        return
    sizes = {len(x) if x.ndim else 0 for x in arrays}
    if len(sizes) != 1:
        raise CalibrationError(
            f"Expected as many samples for every input. Received: {sorted(sizes)} samples."
        )
    for start in range(0, sizes.pop(), BATCH_SIZE):
        yield [x[start : start + BATCH_SIZE] for x in arrays]


def _as_arrays(data: Any, graph: Graph) -> list[np.ndarray] | None:
    """One array per model input, or `None` where `data` is an iterable of batches."""
    if isinstance(data, Mapping):
        missing = set(graph.input_names) ^ set(data)
        if missing:
            raise CalibrationError(
                f"Expected calibration data for the inputs {list(graph.input_names)}. "
                f"Received: {sorted(data)}."
            )
        return [np.asarray(data[name]) for name in graph.input_names]
    if isinstance(data, list):
        if len(data) != len(graph.inputs):
            raise CalibrationError(
                f"Expected a list of {len(graph.inputs)} arrays, one per input "
                f"{list(graph.input_names)}. Received: {len(data)}."
            )
        return [np.asarray(x) for x in data]
    if hasattr(data, "__array__") and hasattr(data, "shape"):
        if len(graph.inputs) != 1:
            raise CalibrationError(
                f"Expected a list or dict of arrays for the inputs {list(graph.input_names)}. "
                "Received: one array."
            )
        return [np.asarray(data)]
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"Expected an array, a list or dict of arrays, or an iterable of batches as "
            f"calibration data. Received: {type(data).__name__}."
        )
    return None


def _check(batch: list[np.ndarray], graph: Graph) -> None:
    for x, ref, name in zip(batch, graph.inputs, graph.input_names, strict=True):
        if x.shape[1:] != ref.shape[1:] or x.ndim != len(ref.shape):
            expected = ("samples", *ref.shape[1:])
            raise CalibrationError(
                f"Expected calibration data of shape {expected} for input '{name}'. "
                f"Received: {x.shape}."
            )
        if not np.issubdtype(x.dtype, np.number):
            raise CalibrationError(
                f"Expected numbers for input '{name}'. Received: dtype {x.dtype}."
            )
        if not np.all(np.isfinite(x)):
            raise CalibrationError(
                f"Expected finite calibration data for input '{name}'. Received: NaN or infinity "
                f"in {np.count_nonzero(~np.isfinite(x))} of {x.size} values. Clean the data."
            )


