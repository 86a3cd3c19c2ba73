"""AdaRound, GPTQ, bias correction and absorption against independent readings of the papers."""

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kqat
import tflite_export
from kqat.training import QuantizeWrapper, algorithms, call_unrounded
from kqat.training.algorithms import linear_layers
from kqat.training.algorithms.adaround import WEIGHT, learned_integers, objective_gradient
from kqat.training.algorithms.gptq import rounded_in_order
from kqat.training.algorithms.linear_layers import LinearProblem, patches, to_kernel, to_matrices
from tests.tflite_export.file_weights import file_integers

PER_TENSOR = kqat.QuantizeConfig(
    weights=kqat.QuantSpec(bits=3, symmetric=True, narrow_range=True, axis=None)
)
LAYERS: dict[str, Any] = {
    "dense": lambda: layers.Dense(5),
    "conv same, strides": lambda: layers.Conv2D(4, 3, strides=2, padding="same"),
    "conv valid, dilated": lambda: layers.Conv2D(4, 3, dilation_rate=2),
    "conv of groups": lambda: layers.Conv2D(4, (1, 3), groups=2),
    "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
}
LAYERS_1D: dict[str, Any] = {
    "causal": lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2),
    "depthwise": lambda: layers.DepthwiseConv1D(3, strides=2, padding="same"),
}


def network() -> keras.Model:
    chain = [
        layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise"),
        layers.ReLU(name="relu_2"),
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(6, name="head"),
    ]
    return keras.Sequential([keras.Input((10, 10, 3), name="image"), *chain], name="network")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A float network and its QAT model of three bits; samples to find with, and to judge by."""

    model: keras.Model
    qat: keras.Model
    data: np.ndarray
    others: np.ndarray


@pytest.fixture(scope="module")
def setting() -> Setting:
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(size=(160, 10, 10, 3)), axis=1).astype(np.float32)
    x /= x.std()
    model = network()
    norm = model.get_layer("norm")
    # One sign is turned, so that folding has to keep the integers apart from it.
    norm.gamma.assign([1.0, 0.5, -0.7, 1.2, 0.9, 1.1, 0.8, 1.0])
    norm.beta.assign(rng.normal(size=8) * 0.3)
    qat = kqat.quantize_model(model, "w3a8", calibration_data=x[:96])
    return Setting(model, qat, x[:96], x[96:])


def noise(setting: Setting, found: keras.Model) -> float:
    want = setting.model.predict(setting.others, verbose=0)
    return float(np.mean((found.predict(setting.others, verbose=0) - want) ** 2))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(make, (7, 8, 4)) for make in LAYERS.values()]
    + [(make, (9, 2)) for make in LAYERS_1D.values()],
    ids=[*LAYERS, *(f"{name} 1D" for name in LAYERS_1D)],
)
def test_a_layer_is_a_product_of_patches_and_matrices(make: Any, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    layer = make()
    want = np.asarray(layer(x))
    matrices = to_matrices(layer, layer.kernel)
    products = patches(layer, x) @ matrices  # (groups, rows, outputs of a group)
    found = np.moveaxis(products, 0, 1).reshape(want.shape)
    np.testing.assert_allclose(found + np.asarray(layer.bias), want, atol=2e-5)
    np.testing.assert_array_equal(to_kernel(layer, matrices), np.asarray(layer.kernel))


def problem(rows: int = 200, inputs: int = 12, outputs: int = 5) -> LinearProblem:
    """A layer of three bits whose inputs are alike, so that their errors can cancel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs))
    weights = rng.normal(size=(1, inputs, outputs))
    scale = np.broadcast_to(np.abs(weights).max(axis=1, keepdims=True) / 3, weights.shape)
    gram = (x.T @ x / rows)[None]
    return LinearProblem(weights, scale, 3, gram, gram)


def test_gptq_is_optimal_brain_quantization_in_the_order_of_the_inputs() -> None:
    given = problem()
    # Equations 2 and 3 of the paper, with the inverse Hessian shrunk by one input at a time.
    hessian = 2.0 * given.gram[0]
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(12)
    weights, want = given.weights[0].copy(), np.zeros((12, 5))
    for row in range(12):
        inverse = np.linalg.inv(hessian[row:, row:])
        step = given.scale[0, row]
        want[row] = np.clip(np.rint(weights[row] / step), -3, 3)
        error = weights[row] - want[row] * step
        weights[row:] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
    np.testing.assert_array_equal(rounded_in_order(given, 0, 0.01), want)
    assert given.error(want[None]).sum() < given.error(given.nearest()).sum()


@pytest.mark.parametrize("progress", [0.1, 0.6])
def test_the_gradient_of_adaround_is_that_of_the_papers_objective(progress: float) -> None:
    given = problem()
    v = np.random.default_rng(1).normal(size=given.weights.shape)
    below = np.floor(given.weights / given.scale)
    found = objective_gradient(given, below, v, 1.0, progress)
    rows = np.linalg.cholesky(given.gram[0]).T  # any X with this X^T X
    variable = tf.Variable(v)
    with tf.GradientTape() as tape:
        h = tf.clip_by_value(tf.sigmoid(variable) * 1.2 - 0.1, 0.0, 1.0)
        soft = tf.clip_by_value(below + h, -3.0, 3.0) * given.scale
        objective = v.size * tf.reduce_sum((rows @ (soft[0] - given.weights[0])) ** 2)
        if progress > 0.2:
            b = 2.0 + 18.0 * 0.5 * (1.0 + np.cos(np.pi * (progress - 0.2) / 0.8))
            objective += WEIGHT * tf.reduce_sum(1.0 - tf.abs(2.0 * h - 1.0) ** b)
    want = tape.gradient(objective, variable).numpy()
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-9 * np.abs(want).max())


def test_adaround_takes_a_neighbour_and_errs_less() -> None:
    given = problem()
    found = learned_integers(given, 1000)
    away = found - given.weights / given.scale
    assert np.abs(away).max() <= 1.0 + 1e-9
    assert (given.error(found) <= given.error(given.nearest())).all()
    unrounded = given.error(given.weights / given.scale).sum()
    assert given.error(found).sum() - unrounded < 0.6 * (
        given.error(given.nearest()).sum() - unrounded
    )


ROUNDING = {"gptq": algorithms.gptq, "adaround": algorithms.adaround}


@pytest.mark.parametrize("name", ROUNDING)
def test_chosen_integers_are_saved_and_are_those_of_the_file(
    name: str, setting: Setting, tmp_path: Path
) -> None:
    before = [np.array(w) for w in setting.qat.get_weights()]
    found = ROUNDING[name](setting.qat, setting.data)
    for a, b in zip(before, setting.qat.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert noise(setting, found) < 0.7 * noise(setting, setting.qat)
    found.save(tmp_path / "found.keras")
    loaded = keras.models.load_model(tmp_path / "found.keras")
    ours, theirs = kqat.freeze(found).weights, kqat.freeze(setting.qat).weights
    moved = [np.mean(a.integers != b.integers) for a, b in zip(ours, theirs, strict=True)]
    assert min(moved) > 0.0  # of a convolution, a depthwise one and a dense layer
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)
    for weight, integers in zip(ours, file_integers(tflite_export.convert(loaded)), strict=True):
        shipped = weight.integers
        if shipped.shape[-1] > 1:
            shipped = np.moveaxis(shipped, -1, 0)
        np.testing.assert_array_equal(integers, shipped.reshape(-1))


@pytest.mark.parametrize("axis", [None, "channel"])
def test_whatever_integers_are_chosen_are_those_of_the_layer(
    axis: Any, setting: Setting, tmp_path: Path
) -> None:
    spec = kqat.QuantSpec(bits=3, symmetric=True, narrow_range=True, axis=axis)
    # Its step follows the largest weight, which the choice may leave out.
    config = kqat.QuantizeConfig(weights=spec, weight_step=kqat.MaxAbs())
    qat = kqat.quantize_model(setting.model, config, calibration_data=setting.data)
    rng, chosen, problems = np.random.default_rng(0), [], []

    def choose(given: LinearProblem) -> np.ndarray:
        problems.append(given)
        chosen.append(rng.integers(-2, 3, given.weights.shape).astype(np.float64))
        return chosen[-1]

    found = linear_layers.with_chosen_integers(qat, setting.data, choose, "this test")
    found.save(tmp_path / "found.keras")
    loaded = keras.models.load_model(tmp_path / "found.keras")
    for name, integers in zip(("conv", "depthwise", "head"), chosen, strict=True):
        wrapper: Any = loaded.get_layer(f"quant_{name}")
        shipped = np.asarray(wrapper.on_grid("kernel")) / np.asarray(wrapper.scale("kernel"))
        np.testing.assert_allclose(shipped, to_kernel(wrapper.layer, integers), atol=1e-4)
    # The head's inputs are far off by now: its problem is of those, and wants the exact outputs.
    graph = linear_layers.trace(loaded)
    pooled: dict[str, np.ndarray] = {}

    def call(node: Any, *args: Any, **kwargs: Any) -> Any:
        if node.name == "quant_head":
            pooled["rounded"] = np.asarray(args[0], np.float64)
        return node.layer(*args, **kwargs)

    graph.run(linear_layers.samples(setting.data, graph), call)
    value: Any = setting.data
    for layer in setting.model.layers[:-1]:
        value = layer(value)
    exact = np.asarray(value, np.float64)
    by_hand = pooled["rounded"].T @ exact / len(exact)
    np.testing.assert_allclose(problems[2].cross[0], by_hand, rtol=1e-3, atol=1e-5)
    by_hand = pooled["rounded"].T @ pooled["rounded"] / len(exact)
    np.testing.assert_allclose(problems[2].gram[0], by_hand, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_scale_per_tensor_rounds_weights_as_folded(setting: Setting) -> None:
    qat = kqat.quantize_model(setting.model, PER_TENSOR, calibration_data=setting.data)
    found = algorithms.gptq(qat, setting.data)
    assert noise(setting, found) < noise(setting, qat)
    wrapper: Any = found.get_layer("quant_conv")
    integers = np.asarray(wrapper.on_grid("kernel")) / np.asarray(wrapper.scale("kernel"))
    assert np.abs(integers - np.rint(integers)).max() < 1e-4
    assert np.abs(integers).max() <= 3 + 1e-4


@pytest.mark.slow
def test_corrected_biases_give_each_layer_its_mean(setting: Setting) -> None:
    found = algorithms.correct_biases(setting.qat, setting.data)
    plain = linear_layers.copied(setting.qat)  # Without what calibration corrected.
    assert noise(setting, found) < 0.8 * noise(setting, plain)
    graph = linear_layers.trace(found)
    original = {node.name: node for node in linear_layers.trace(setting.qat).nodes}
    tensors = linear_layers.samples(setting.data, graph)
    means: dict[str, list[np.ndarray]] = {}

    def exact(node: Any, *args: Any, **kwargs: Any) -> Any:
        return noted(node, call_unrounded(original[node.name], *args, **kwargs))

    def rounded(node: Any, *args: Any, **kwargs: Any) -> Any:
        return noted(node, node.layer(*args, **kwargs))

    def noted(node: Any, value: Any) -> Any:
        if isinstance(node.layer, QuantizeWrapper) and node.layer.weight_specs:
            array = np.asarray(value, np.float64)
            means.setdefault(node.name, []).append(array.reshape(-1, array.shape[-1]).mean(axis=0))
        return value

    graph.run(tensors, exact)
    graph.run(tensors, rounded)
    assert len(means) == 3
    for want, got in means.values():
        # The new bias is rounded too.
        np.testing.assert_allclose(got, want, atol=5e-3 * np.abs(want).max())
    # The depthwise layer had neither a bias nor a BatchNormalization.
    assert found.get_layer("quant_depthwise").layer.use_bias


def test_absorbed_biases_move_through_the_relu() -> None:
    chain = [
        layers.Conv2D(3, 1, use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.Conv2D(2, 3, name="behind"),
    ]
    model = keras.Sequential([keras.Input((6, 6, 4), name="x"), *chain])
    norm, behind = model.get_layer("norm"), model.get_layer("behind")
    norm.gamma.assign([0.1, 0.2, 1.0])
    norm.beta.assign([2.0, 0.1, 5.0])
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 4)).astype(np.float32)
    conv = model.get_layer("conv")
    norm.moving_variance.assign(np.var(np.asarray(conv(x)), axis=(0, 1, 2)))
    qat = kqat.quantize_model(model, calibration_data=x)
    plain, found = algorithms.equalize(qat, x), algorithms.equalize(qat, x, absorb_biases=True)
    first, second = (m.get_layer("quant_conv").normalization for m in (plain, found))
    high = np.maximum(0.0, np.asarray(first.beta) - 3.0 * np.abs(np.asarray(first.gamma)))
    assert (high > 0).sum() == 2
    np.testing.assert_allclose(np.asarray(second.beta), np.asarray(first.beta) - high, rtol=1e-6)
    kernel = np.asarray(plain.get_layer("quant_behind").layer.kernel)
    added = np.einsum("hwio,i->o", kernel, high)
    found_bias = np.asarray(found.get_layer("quant_behind").layer.bias)
    np.testing.assert_allclose(found_bias, np.asarray(behind.bias) + added, rtol=1e-5)
    # The function stays, and its ranges are narrower.
    want, got = (kqat.strip(m).predict(x, verbose=0) for m in (plain, found))
    np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max())
    relu = [next(n for n in m.layers if n.name.startswith("relu")) for m in (plain, found)]
    assert relu[1].range()[1] < 0.9 * relu[0].range()[1]


def test_padding_keeps_biases_where_they_are() -> None:
    chain = [
        layers.Conv2D(3, 1, use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
        layers.Conv2D(2, 3, padding="same", name="behind"),
    ]
    model = keras.Sequential([keras.Input((6, 6, 4)), *chain])
    model.get_layer("norm").beta.assign([9.0, 9.0, 9.0])
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 4)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    want = algorithms.equalize(qat, x).get_weights()
    got = algorithms.equalize(qat, x, absorb_biases=True).get_weights()
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [*ROUNDING, "correct_biases"])
def test_what_is_asked_for_in_vain_is_refused(name: str, setting: Setting) -> None:
    algorithm = getattr(algorithms, name)
    with pytest.raises(kqat.ModelError, match="Expected a QAT model for"):
        algorithm(setting.model, setting.data)
    with pytest.raises(kqat.CalibrationError, match="shape"):
        algorithm(setting.qat, setting.data[:, :4])
    with pytest.raises(kqat.CalibrationError, match="at least one sample"):
        algorithm(setting.qat, setting.data[:0])
    if name in ROUNDING:
        qat = kqat.quantize_model(setting.model, "binary", calibration_data=setting.data)
        with pytest.raises(kqat.SpecError, match=r"two bits for \w+, .* in 'conv'"):
            algorithm(qat, setting.data)


def test_a_model_without_such_layers_is_refused() -> None:
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    x = np.ones((40, 6), np.float32) * np.arange(6, dtype=np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    with pytest.raises(kqat.ModelError, match="which has none"):
        algorithms.gptq(qat, x)


@pytest.mark.parametrize(
    ("algorithm", "option"),
    [(algorithms.gptq, {"damping": 0.0}), (algorithms.adaround, {"iterations": 0})],
)
def test_options_without_sense_are_refused(
    algorithm: Any, option: dict[str, Any], setting: Setting
) -> None:
    with pytest.raises(kqat.SpecError, match="Received"):
        algorithm(setting.qat, setting.data, **option)
