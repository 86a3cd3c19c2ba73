"""`keras.ops` nodes and operators on tensors: the same values as layers of the registry."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand
from kqat.registry.operation_table import OPERATIONS
from tests.coverage.operation_cases import FUNCTIONS
from tests.newer_keras import needs_keras

CHANNELS = np.array([0.5, -1.0, 2.0], np.float32)

VOLUMES = hasattr(ops.image, "extract_patches_3d")
MATRIX = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _of_number(name: str) -> Callable[[Any, Any], Any]:
    """The function where it is finite: arccosh above one, all others between zero and one."""
    low = 1.0 if name == "arccosh" else 0.0
    return lambda x, y: getattr(ops, name)(ops.sigmoid(x) * 0.8 + 0.1 + low, *FUNCTIONS[name])


def _compared(name: str) -> Callable[[Any, Any], Any]:
    return lambda x, y: [x * 2.0, getattr(ops, name)(x, y), getattr(ops, name)(x, 0.5)]


# Operation of the table -> a function of two (batch, 4, 6, 3) tensors that uses it.
CASES: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda x, y: (x + y) + 3.0 + CHANNELS,
    "Subtract": lambda x, y: (1.0 - x) - y - CHANNELS,
    "Multiply": lambda x, y: x * y * 2.0 * CHANNELS,
    "Divide": lambda x, y: ops.divide(x, 4.0),
    "TrueDivide": lambda x, y: x / 3.0,
    "Negative": lambda x, y: -x,
    "Square": lambda x, y: ops.square(x),
    "Maximum": lambda x, y: ops.maximum(ops.maximum(x, y), 0.0),
    "Minimum": lambda x, y: ops.minimum(x, y),
    "Clip": lambda x, y: ops.clip(x * 4.0, 0, 6),
    "Relu": lambda x, y: ops.relu(x),
    "Relu6": lambda x, y: ops.relu6(x * 4.0),
    "Sigmoid": lambda x, y: ops.sigmoid(x),
    "Tanh": lambda x, y: ops.tanh(x),
    "Silu": lambda x, y: ops.silu(x),
    "HardSilu": lambda x, y: ops.hard_silu(x),
    "HardSigmoid": lambda x, y: ops.hard_sigmoid(x),
    "HardTanh": lambda x, y: ops.hard_tanh(x),
    "LogSigmoid": lambda x, y: ops.log_sigmoid(x),
    "Selu": lambda x, y: ops.selu(x),
    "Softplus": lambda x, y: ops.softplus(x),
    "Softsign": lambda x, y: ops.softsign(x),
    "Exp": lambda x, y: ops.exp(x),
    "Softmax": lambda x, y: ops.softmax(x),
    "LogSoftmax": lambda x, y: ops.log_softmax(x),
    "LeakyRelu": lambda x, y: ops.leaky_relu(x, 0.3),
    "Mean": lambda x, y: ops.mean(x, axis=(1, 2)),
    "Max": lambda x, y: ops.max(x, axis=(1, 2), keepdims=True),
    "Reshape": lambda x, y: ops.reshape(x, (-1, 24, 3)),
    "Squeeze": lambda x, y: ops.squeeze(ops.max(x, axis=(1, 2), keepdims=True), 1),
    "ExpandDims": lambda x, y: ops.expand_dims(x, 1),
    "Transpose": lambda x, y: ops.transpose(x, (0, 2, 1, 3)),
    "Swapaxes": lambda x, y: ops.swapaxes(x, 1, 2),
    "Concatenate": lambda x, y: ops.concatenate([x, y], axis=1),
    "GetItem": lambda x, y: x[:, 1:4:2, ::3, 0:2],
    "Resize": lambda x, y: ops.image.resize(x, (8, 12), interpolation="nearest"),
    "MaxPool": lambda x, y: ops.max_pool(x, 2),
    "AveragePool": lambda x, y: ops.average_pool(x, 2),
    "Elu": lambda x, y: ops.elu(x) + ops.elu(x, 0.5),
    "Power": lambda x, y: ops.power(x, 2) + ops.power(y, 3.0),
    "Glu": lambda x, y: ops.glu(x, axis=1),
    "Cast": lambda x, y: ops.cast(x, "float32") * 2.0,
    "StopGradient": lambda x, y: ops.stop_gradient(x) * 2.0,
    "Copy": lambda x, y: ops.copy(x) * 2.0,
    "Sum": lambda x, y: ops.sum(x, axis=(1, 3)),
    "Min": lambda x, y: ops.min(x, axis=2),
    "Prod": lambda x, y: ops.prod(x, axis=-1, keepdims=True),
    "Amax": lambda x, y: ops.amax(x, axis=(2, 3)),
    "Amin": lambda x, y: ops.amin(x, axis=1),
    "Var": lambda x, y: ops.var(x, axis=2),
    "Std": lambda x, y: ops.std(x, axis=(1, 2), keepdims=True),
    "Moments": lambda x, y: ops.multiply(*ops.moments(x, axes=(1, 2), keepdims=True)),
    "Average": lambda x, y: ops.average(x, axis=1),
    "Logsumexp": lambda x, y: (
        needs_keras("3.11", "logsumexp over one axis") or ops.logsumexp(x, axis=-1)
    ),
    "Norm": lambda x, y: ops.norm(x, axis=2),
    "CountNonzero": lambda x, y: [x * 2.0, ops.count_nonzero(x > 0.5, axis=(1, 3))],
    "DivideNoNan": lambda x, y: ops.divide_no_nan(x, ops.relu(y - 0.5)),
    "Cumsum": lambda x, y: ops.cumsum(x, axis=1),
    "Argmax": lambda x, y: [x * 2.0, ops.argmax(x, axis=2)],
    "Argmin": lambda x, y: [x * 2.0, ops.argmin(x, axis=1, keepdims=True)],
    "TopK": lambda x, y: [
        *ops.top_k(x, 2),
        ops.top_k(ops.where(x > 0.0, 1.0, 0.0), 3)[1],
        ops.top_k(ops.argmax(x, axis=2), 2)[0],
    ],
    "Sort": lambda x, y: [ops.sort(x), ops.sort(x, axis=1)],
    "Argsort": lambda x, y: [ops.argsort(x, axis=2), ops.argsort(ops.where(x > 0.0, 1.0, 0.0))],
    "Moveaxis": lambda x, y: ops.moveaxis(x, 1, 3),
    "Stack": lambda x, y: ops.stack([x, y], axis=2),
    "Split": lambda x, y: ops.split(x, [1, 4], axis=2),
    "ArraySplit": lambda x, y: ops.array_split(x, 4, axis=2),
    "Hsplit": lambda x, y: ops.hsplit(x, 2),
    "Dsplit": lambda x, y: ops.dsplit(x, 3),
    "Unstack": lambda x, y: ops.unstack(x, axis=3),
    "Flip": lambda x, y: needs_keras("3.14", "flip over axes") or ops.flip(x, axis=(1, 2)),
    "Fliplr": lambda x, y: ops.fliplr(x),
    "Roll": lambda x, y: ops.roll(x, 2, axis=2),
    "Repeat": lambda x, y: ops.repeat(x, 2, axis=1),
    "Tile": lambda x, y: ops.tile(x, (1, 1, 2, 3)),
    "BroadcastTo": lambda x, y: ops.broadcast_to(x[:, :, :1], (8, 4, 6, 3)),
    "Rot90": lambda x, y: [ops.rot90(x, k, axes=(2, 1)) for k in (-1, 0, 1)],
    "Take": lambda x, y: ops.take(x, [[0, 2], [3, -1]], axis=1),
    "TakeAlongAxis": lambda x, y: ops.take_along_axis(x, np.int32([[[[2, 0]]]]), axis=3),
    "ExtractPatches": lambda x, y: [
        ops.image.extract_patches(x, (2, 3), padding="same"),
        # Keras 3.10 has none of volumes.
        *([ops.image.extract_patches_3d(x[:, None], (1, 2, 2))] if VOLUMES else []),
    ],
    "ConvertToTensor": lambda x, y: ops.convert_to_tensor(x) * 2.0,
    "ZerosLike": lambda x, y: x + ops.zeros_like(y),
    "OnesLike": lambda x, y: x + ops.ones_like(y),
    "FullLike": lambda x, y: x * ops.full_like(y, 3.0),
    "OneHot": lambda x, y: [x * 2.0, ops.one_hot(ops.argmax(x, axis=2), 6)],
    "MultiHot": lambda x, y: [x * 2.0, ops.multi_hot(ops.argmax(x[:, :, 0], axis=2), 4)],
    "Pad": lambda x, y: ops.pad(x, [[0, 0], [1, 2], [0, 0], [0, 3]]),
    "DepthToSpace": lambda x, y: ops.depth_to_space(ops.tile(x, (1, 1, 1, 4)), 2),
    "SpaceToDepth": lambda x, y: ops.space_to_depth(x, 2),
    "Tril": lambda x, y: ops.tril(x, 1),
    "Triu": lambda x, y: ops.triu(x),
    "Hstack": lambda x, y: ops.hstack([x, y]),
    "Dstack": lambda x, y: ops.dstack([x, y]),
    "Append": lambda x, y: ops.append(x, y, axis=2),
    "Matmul": lambda x, y: ops.matmul(x, ops.swapaxes(y, 2, 3)) + x @ MATRIX[:, :1],
    "Einsum": lambda x, y: ops.einsum("bijc,bkjc->bik", x, y),
    "Tensordot": lambda x, y: ops.tensordot(x, MATRIX, axes=1),
    "Dot": lambda x, y: ops.dot(x, MATRIX),
    "Inner": lambda x, y: ops.inner(x, MATRIX.T),
    "Conv": lambda x, y: ops.conv(x, np.ones((2, 3, 3, 4), np.float32), 2, "same"),
    "DepthwiseConv": lambda x, y: ops.depthwise_conv(x, np.ones((2, 2, 3, 2), np.float32)),
    "AdaptiveMaxPool": lambda x, y: ops.adaptive_max_pool(x, (2, 3)),
    "AdaptiveAveragePool": lambda x, y: ops.adaptive_average_pool(x, (2, 1)),
    "Normalize": lambda x, y: ops.normalize(x, axis=-1),
    "DotProductAttention": lambda x, y: ops.dot_product_attention(x, y, x),
    "Where": lambda x, y: ops.where(x > y, x, y),
    "All": lambda x, y: ops.where(ops.all(x > -1.0, axis=2, keepdims=True), x, y),
    "Any": lambda x, y: ops.where(ops.any(x > 1.0, axis=2, keepdims=True), x, y),
    "ReLU": lambda x, y: keras.activations.relu(x, negative_slope=0.1),
    "CropImages": lambda x, y: [
        ops.image.crop_images(x, 1, 2, target_height=2, target_width=3),
        ops.image.crop_images(
            x, top_cropping=1, bottom_cropping=1, right_cropping=2, target_width=2
        ),
    ],
    "PadImages": lambda x, y: ops.image.pad_images(
        x, 1, target_height=7, right_padding=2, left_padding=0
    ),
    "RGBToGrayscale": lambda x, y: ops.image.rgb_to_grayscale(x),
    "GaussianBlur": lambda x, y: ops.image.gaussian_blur(x, (3, 5), (1.0, 2.0)),
    "SobelEdges": lambda x, y: ops.image.sobel_edges(x),
    "FFT2": lambda x, y: layers.Lambda(lambda t: ops.fft2((t, ops.zeros_like(t)))[0])(x[:, 0]),
    **{
        _camel(name): _compared(name)
        for name in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
    },
    "LogicalAnd": lambda x, y: [x * 2.0, ops.logical_and(x > 0.0, y > 0.0)],
    "LogicalOr": lambda x, y: [x * 2.0, ops.logical_or(x > 0.0, y > 0.0)],
    "LogicalNot": lambda x, y: [x * 2.0, ops.logical_not(x > 0.0)],
    **{_camel(name): _of_number(name) for name in FUNCTIONS},
}


EQUATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "by element": lambda x, y: ops.einsum("bijc,bijc->bcij", x, y),
    "by element, of other ranks": lambda x, y: ops.einsum("bijc,bjc->bijc", x, y[:, 0]),
    "outer": lambda x, y: ops.einsum("bi,bj->bij", x[:, :, 0, 0], y[:, 0, :, 0]),
    "by a vector": lambda x, y: ops.einsum("bijc,c->bijc", x, MATRIX[:, 0]),
    "of one": lambda x, y: ops.einsum("bijc->bji", x),
    "of three": lambda x, y: ops.einsum("bijc,bkjc,bkl->bil", x, y, x[:, :, :, 0]),
    "of three, by element last": lambda x, y: ops.einsum(
        "bnd,bdl,bn->bnl", x[:, 0], ops.swapaxes(y[:, 1], 1, 2), x[:, 0, :, 1]
    ),
    "of constants and one": lambda x, y: ops.einsum("cd,de,bije->bijc", MATRIX, MATRIX.T, x),
    "behind dots": lambda x, y: ops.einsum("...ic,...jc->...ij", x, y),
    "behind dots, one side summed": lambda x, y: ops.einsum("...rc,...kc->...rc", x, y),
    "behind dots, of other ranks": lambda x, y: ops.einsum("b...c,bc->b...", x, y[:, 0, 0]),
    "behind dots, one repeated": lambda x, y: ops.einsum("...ic,...jc->...ij", x, y[:, :1]),
    "behind dots, by a matrix": lambda x, y: ops.einsum("...c,...cd->...d", x, MATRIX),
    "behind dots, one matrix": lambda x, y: ops.einsum("...ic,...cd->...id", x, MATRIX[None]),
    "behind dots, a matrix for each": lambda x, y: ops.einsum(
        "...ic,...cd->...id", x, np.stack([MATRIX, MATRIX * 2.0, -MATRIX, MATRIX + 1.0])
    ),
    "of three, behind dots": lambda x, y: ops.einsum("...c,...c,c->...", x, y, MATRIX[:, 0]),
    "implicit": lambda x, y: ops.einsum("aij,jk", x[:, 0], MATRIX),
    "a diagonal": lambda x, y: ops.einsum("bijj->bji", x[:, :, :3]),
    "a trace": lambda x, y: ops.einsum("bjij->bi", x[:, :3]),
    "diagonals": lambda x, y: ops.einsum("bijj,bjkj->bik", x[:, :, :3], y[:, :3]),
    "the diagonal of three axes": lambda x, y: ops.einsum("bjjj->bj", x[:, :3, :3]),
    "the trace of a constant": lambda x, y: ops.einsum("bijc,dd->bijc", x, MATRIX[:, :3]),
    "the diagonal of a constant": lambda x, y: ops.einsum("bijc,cc->bij", x, MATRIX[:, :3]),
}


@pytest.mark.parametrize("case", EQUATIONS)
def test_equations_of_any_number_of_operands(case: str) -> None:
    model, data = _model(EQUATIONS[case]), _data()
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    layers = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    for ours, theirs in zip(_flat(layers(data)), _flat(model(data)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def _model(function: Callable[[Any, Any], Any]) -> keras.Model:
    x, y = keras.Input((4, 6, 3), name="x"), keras.Input((4, 6, 3), name="y")
    # Keras 3.10 to 3.13 refuse an input that nothing reads.
    ops.stop_gradient(y)
    return keras.Model([x, y], function(x, y))


def _flat(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(y, np.float32) for y in keras.tree.flatten(outputs)]


def _data() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=(8, 4, 6, 3)).astype(np.float32) for _ in range(2)]


def test_every_operation_of_the_table_has_a_case() -> None:
    # Keras runs conv_transpose inside of a call only: `tests/kqat/graph/test_tracing_of_calls.py`.
    assert {*CASES, "ConvTranspose"} == set(OPERATIONS)


@pytest.mark.parametrize("name", CASES)
def test_layers_compute_what_the_operations_compute(name: str) -> None:
    model, data = _model(CASES[name]), _data()
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    assert all(isinstance(node.layer, keras.layers.Layer) for node in graph.nodes)
    layers = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    # The constants are applied in another order: a few float32 roundings.
    for ours, theirs in zip(_flat(layers(data)), _flat(model(data)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (np.s_[:, 1:3], (2, 6, 3)),
        (np.s_[..., 0], (4, 6)),
        (np.s_[..., ::-1], (4, 6, 3)),
        (np.s_[:, ::-1, ::-2], (4, 3, 3)),
        (np.s_[:, -1, :, 1:], (6, 2)),
        (np.s_[:, None, ::2], (1, 2, 6, 3)),
    ],
)
def test_slices_are_numpys(key: Any, shape: tuple[int, ...]) -> None:
    x, _ = _data()
    inputs = keras.Input((4, 6, 3))
    model = keras.Model(inputs, inputs[key])
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    layers = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    assert layers.output.shape[1:] == shape
    np.testing.assert_array_equal(layers(x), x[key])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: ops.median(x, axis=1), "operation 'median.*' of type Median"),
        (lambda x, y: ops.arctan2(x, y), "No integer kernel computes it of two"),
        (lambda x, y: ops.mean(x), "leave the batch axis alone"),
        (lambda x, y: ops.softmax(x, axis=0), "leave the batch axis alone"),
        (lambda x, y: x + ops.max(y, axis=(1, 2)), "equal rank"),
        (lambda x, y: x * np.ones((8, 4, 6, 3), np.float32), "without the batch axis"),
        (lambda x, y: ops.einsum("bijj->ij", x[:, :, :3]), "a matrix product for each sample"),
        (lambda x, y: ops.einsum("bijc,...c,c->bij", x, y, MATRIX[0]), "a matrix product"),
        (lambda x, y: ops.image.rgb_to_hsv(x), "a hue that jumps from 1 to 0"),
        (lambda x, y: ops.cast(x, "int32"), "A quantity is no index"),
        (lambda x, y: ops.norm(x, ord=1, axis=1), "the Euclidean norm"),
        (lambda x, y: ops.pad(x, [[1, 0], [1, 1], [0, 0], [0, 0]]), "axes other than the batch"),
    ],
)
def test_what_has_no_integer_form_is_named(function: Any, message: str) -> None:
    model = _model(function)
    with pytest.raises(kqat.UnsupportedLayerError, match=re.escape(message).replace(r"\.\*", ".*")):
        kqat.plan(model)
