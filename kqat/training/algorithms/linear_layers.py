"""Layers as matrix products, and their inputs layer by layer: what weight rounding algorithms read.

A convolution is a product of its input's patches and its kernel as a matrix; a convolution of
groups, or a depthwise one, is one such product per group.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from kqat.base import ModelError, SpecError
from kqat.graph import Graph, Ref, fill, trace
from kqat.grids import Binary, LearnedStep, LearnedTernary, TrainedThreshold
from kqat.training import calibration
from kqat.training.build import check_quantized
from kqat.training.finite_numbers import check_finite
from kqat.training.method_choice import mean_of
from kqat.training.unrounded import call_unrounded
from kqat.training.weight_wrapper import QuantizeWrapper

_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
LINEAR = (layers.Dense, layers.Conv1D, layers.Conv2D, *_DEPTHWISE)
# No more samples than this are run at once; they are spread evenly over the data.
SAMPLES = 256
# No more positions of a value than this are patches of its statistics.
ROWS = 16384


def is_linear(layer: Any) -> bool:
    """Whether a layer of a QAT model is one of `LINEAR` with a kernel on a grid."""
    return (
        isinstance(layer, QuantizeWrapper)
        and type(layer.layer) in LINEAR
        and list(layer.weight_specs) == ["kernel"]
        and getattr(layer.layer, "data_format", "channels_last") == "channels_last"
    )


def to_matrices(layer: Any, kernel: Any) -> np.ndarray:
    """An array of the kernel's shape as `(groups, inputs, outputs)`."""
    kernel = np.asarray(kernel)
    if isinstance(layer, layers.Dense):
        return kernel[None]
    groups = kernel.shape[-2] if isinstance(layer, _DEPTHWISE) else int(layer.groups)
    rows = kernel.size // (kernel.shape[-1] * (groups if isinstance(layer, _DEPTHWISE) else 1))
    return np.moveaxis(kernel.reshape(rows, groups, -1), 1, 0)


def to_kernel(layer: Any, matrices: np.ndarray) -> np.ndarray:
    """The inverse of `to_matrices`."""
    return np.moveaxis(matrices, 0, 1).reshape(layer.kernel.shape)


def patches(layer: Any, x: np.ndarray) -> np.ndarray:
    """What the matrices of `layer` multiply: `(groups, rows, inputs)`, of an input `x`.

    At most `ROWS` positions, evenly spread.
    """
    if isinstance(layer, layers.Dense):
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: -(-len(rows) // ROWS)][None]
    size, stride, dilation = (
        tuple(np.broadcast_to(v, x.ndim - 2))
        for v in (layer.kernel_size, layer.strides, layer.dilation_rate)
    )
    spans = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    padding = [_padding(layer.padding, n, span, s)
               for n, span, s in zip(x.shape[1:-1], spans, stride, strict=True)]  # fmt: skip
    padded = np.pad(x, [(0, 0), *padding, (0, 0)])
    axes = tuple(range(1, x.ndim - 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axes)
    kept: tuple[Any, ...] = (slice(None), *(slice(None, None, s) for s in stride))
    taps: tuple[Any, ...] = (..., *(slice(None, None, d) for d in dilation))
    windows = windows[kept][taps]
    positions = windows.shape[: x.ndim - 1]
    chosen = np.arange(0, np.prod(positions), -(-int(np.prod(positions)) // ROWS))
    found = windows[np.unravel_index(chosen, positions)]  # (rows, channels, *size)
    found = np.moveaxis(found, 1, -1).reshape(len(chosen), int(np.prod(size)), -1)
    groups = found.shape[-1] if isinstance(layer, _DEPTHWISE) else int(layer.groups)
    found = found.reshape(len(chosen), found.shape[1], groups, -1)
    return np.moveaxis(found, 2, 0).reshape(groups, len(chosen), -1)


def _padding(kind: str, length: int, span: int, stride: int) -> tuple[int, int]:
    if kind == "valid":
        return 0, 0
    if kind == "causal":
        return span - 1, 0
    needed = max((-(-length // stride) - 1) * stride + span - length, 0)
    return needed // 2, needed - needed // 2


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """One layer for an algorithm that chooses the integers of its weights.

    All arrays are float64; the first axis are the groups.

    Attributes:
        weights: what is to be rounded, `(groups, inputs, outputs)`, folded where it ships so.
        scale: the step of each weight, of that shape.
        limit: the largest integer.
        gram: mean of `x^T x` over the rows of the input as the device computes it,
            `(groups, inputs, inputs)`.
        cross: mean of `x^T x'`, with `x'` the input that nothing before it rounded.
    """

    weights: np.ndarray
    scale: np.ndarray
    limit: int
    gram: np.ndarray
    cross: np.ndarray

    @functools.cached_property
    def wanted(self) -> np.ndarray:
        """`cross @ weights`, which iterative algorithms read in every step."""
        return self.cross @ self.weights

    def nearest(self) -> np.ndarray:
        """The nearest integers, as training has them."""
        return nearest_integers(self.weights / self.scale, self.limit)

    def error(self, integers: np.ndarray) -> np.ndarray:
        """Mean squared error of each output, `(groups, outputs)`, up to a constant.

        Of `x w` with the weights of these integers, against `x' w'` without any rounding.
        """
        weights = integers * self.scale
        quadratic = np.sum(weights * (self.gram @ weights), axis=1)
        return quadratic - 2.0 * np.sum(weights * self.wanted, axis=1)


def nearest_integers(ratio: np.ndarray, limit: int) -> np.ndarray:
    """The integers in `[-limit, limit]` nearest to weights in steps, half away from zero."""
    return np.clip(np.sign(ratio) * np.floor(np.abs(ratio) + 0.5), -limit, limit)


def with_chosen_integers(
    qat: keras.Model, data: Any, choose: Callable[[LinearProblem], np.ndarray], method: str
) -> keras.Model:
    """A copy of a QAT model whose linear layers have the integers that `choose` finds.

    Layers are taken in the order in which they run, each on the input that the rounded layers
    before it give. The copy has learned steps, which start where the given ones are, so that the
    chosen integers stay what they are until it is trained. Ranges stay as they are.

    Args:
        qat: a QAT model; it is not changed.
        data: as for `kqat.calibrate`.
        choose: a problem -> integers of the shape of its weights.
        method: its name, for messages.

    Raises:
        ModelError: if `qat` is not a QAT model, or has no layer for it.
        SpecError: if a layer's weights have one bit only, or three values on a wider grid than
            that of two bits.
        CalibrationError: if the data do not fit the model.
    """
    for layer in linear_layers(qat, method):
        if isinstance(layer.weight_step, Binary):
            raise SpecError(
                f"Expected weights of at least two bits for {method}, which chooses between two "
                f"neighbouring integers. Received: binary weights in '{layer.layer.name}'. Give "
                "that layer another preset, such as 'ternary'."
            )
        bits = layer.weight_specs["kernel"].bits
        if isinstance(layer.weight_step, LearnedTernary) and bits > 2:
            raise SpecError(
                f"Expected weights that may take any integer of their grid, or three values on a "
                f"grid of two bits, for {method}. Received: '{layer.layer.name}' with three values "
                f"of {bits} bits. Give LearnedTernary a grid of bits=2, or train it as it is."
            )
        if layer.preserve:
            raise SpecError(
                f"Expected weights that may take any integer for {method}. Received: "
                f"'{layer.layer.name}', whose zeros or clusters are preserved. Quantize the model "
                "without preserve, or train it as it is."
            )
    copy = copied(qat, learned=True)
    graph = trace(copy)

    def visit(wrapper: QuantizeWrapper, exact: Any, rounded: Any) -> None:
        x, y = (patches(wrapper.layer, _floats(v)) for v in (rounded, exact))
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        turned = np.swapaxes(x, 1, 2) / x.shape[1]
        kernel: Any = wrapper.layer.kernel
        # In units of the kernel as it is, before what folds in.
        scale = np.asarray(wrapper.scale("kernel")) / np.asarray(wrapper.fold("kernel"))
        scale = np.broadcast_to(scale, kernel.shape)
        problem = LinearProblem(
            weights=to_matrices(wrapper.layer, np.asarray(kernel, np.float64)),
            scale=to_matrices(wrapper.layer, np.asarray(scale, np.float64)),
            limit=wrapper.weight_specs["kernel"].qmax,
            gram=turned @ x,
            cross=turned @ y,
        )
        integers = to_kernel(wrapper.layer, choose(problem))
        kernel.assign((integers * scale).astype(np.float32))

    layer_by_layer(graph, samples(data, graph), visit, corrects=True)
    return copy


def linear_layers(qat: Any, method: str) -> list[QuantizeWrapper]:
    """The linear layers of a QAT model.

    Raises:
        ModelError: if `qat` is not a QAT model, or has none.
    """
    trace(qat)  # raises if `qat` is not a model
    check_quantized(qat, f"for {method}")
    check_finite(qat, ModelError, ranges=False, purpose=f"for {method}")
    found = [layer for layer in qat.layers if is_linear(layer)]
    if not found:
        raise ModelError(
            f"Expected a Dense, Conv or DepthwiseConv layer of one or two dimensions for {method}. "
            f"Received: '{qat.name}', which has none with weights on a grid. Go on without it."
        )
    return found


def copied(qat: keras.Model, *, learned: bool = False, biased: bool = False) -> keras.Model:
    """A copy of a QAT model.

    Args:
        qat: a QAT model.
        learned: whether the linear layers get learned steps, which start where the steps are.
        biased: whether linear layers that have neither bias nor BatchNormalization get a bias, of
            zeros.
    """

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if is_linear(layer):
            if learned:
                config["weight_step"] = {"name": "lsq", **vars(LearnedStep())}
                if isinstance(layer.weight_step, TrainedThreshold):
                    # Its scales are powers of two, and stay such ones in training.
                    config["weights"]["kernel"]["power_of_two"] = True
            if biased and not _has_bias(layer):
                config["layer"]["config"]["use_bias"] = True
        return type(layer).from_config(config)

    copy = keras.models.clone_model(qat, clone_function=clone)
    for layer in qat.layers:
        twin = copy.get_layer(layer.name)
        if not is_linear(layer):
            twin.set_weights(layer.get_weights())
            continue
        values = layer.layer.get_weights()
        if len(values) < len(twin.layer.weights):
            values.append(np.zeros(twin.layer.bias.shape, np.float32))
        twin.take_over(values, *(norm.get_weights() for norm in layer.normalizations))
        for name, step in twin.steps.items():
            step.assign(layer.scale(name))
    return copy


def _has_bias(wrapper: Any) -> bool:
    return bool(wrapper.layer.use_bias) or wrapper.normalization is not None


def samples(data: Any, graph: Graph) -> list[Any]:
    """At most `SAMPLES` of the data, evenly spread, as one tensor per input.

    Raises:
        CalibrationError: if the data do not fit the model, or there are none.
    """
    return calibration.as_tensors(calibration.some_samples(data, graph, SAMPLES), graph)


def layer_by_layer(
    graph: Graph,
    tensors: Sequence[Any],
    visit: Callable[[QuantizeWrapper, Any, Any], None],
    *,
    corrects: bool = False,
) -> None:
    """Shows each linear layer its input before it computes; `visit` may change its weights.

    Args:
        graph: of a QAT model.
        tensors: one per input.
        visit: called once for each layer that is called once, as `visit(wrapper, exact, rounded)`:
            its input where nothing is rounded, with the weights as they were before any visit, and
            its input as the device computes it, with the layers before it as they are now.
        corrects: whether the mean of its output is then moved to that where nothing is rounded, as
            calibration does it.
    """
    exact: dict[Ref, Any] = dict(zip(graph.inputs, tensors, strict=True))
    rounded = dict(exact)
    calls = graph.calls()
    readings = {ref: len(nodes) for ref, nodes in graph.consumers().items()}
    for ref in graph.outputs:
        readings[ref] += 1
    for node in graph.nodes:
        args, kwargs = fill((node.args, node.kwargs), exact.__getitem__)
        made = call_unrounded(node, *args, **kwargs)
        given, options = fill((node.args, node.kwargs), rounded.__getitem__)
        if is_linear(node.layer) and calls[id(node.layer)] == 1:
            visit(node.layer, args[0], given[0])
            if corrects and node.layer.takes_correction:
                _correct(node.layer, made, node.layer(*given, **options))
        got = node.layer(*given, **options)
        exact.update(zip(node.outputs, keras.tree.flatten(made), strict=True))
        rounded.update(zip(node.outputs, keras.tree.flatten(got), strict=True))
        for ref in node.inputs:
            readings[ref] -= 1
            if not readings[ref]:
                del exact[ref], rounded[ref]


def _correct(wrapper: QuantizeWrapper, exact: Any, got: Any) -> None:
    wanted, found = mean_of(wrapper, exact), mean_of(wrapper, got)
    assert wrapper.correction is not None
    if wanted is not None and found is not None:
        before = np.asarray(wrapper.correction.value)
        wrapper.correction.assign(before + (wanted - found).astype(np.float32))


def _floats(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(ops.stop_gradient(x), "float32")))
