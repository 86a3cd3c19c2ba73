"""What a kernel's output or input is multiplied by ships in its weights, offsets in its bias."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import kqat
import tflite_export
from kqat.config import QuantizePolicy
from kqat.graph import trace
from kqat.planning import Role, make_plan
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6, 6, 4)).astype(np.float32)
GAMMA = np.float32([0.1, -0.5, 0.0, 2.0])
ALIKE = np.float32([1.0, -0.5, 0.0, 1.5])


@keras.saving.register_keras_serializable("tests")
class LayerScale(L.Layer):
    """A trained factor for each channel, as ConvNeXt has one in each block."""

    def build(self, shape: Any) -> None:
        self.gamma = self.add_weight(name="gamma", shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.gamma


def normalized(x: Any) -> Any:
    return L.BatchNormalization()(L.Conv2D(4, 3, use_bias=False)(x)) * -2.5


def residual(x: Any) -> Any:
    y = L.Conv2D(4, 1)(L.Conv2D(8, 3, padding="same", activation="relu")(x))
    return L.ReLU()(x + y * 0.17)


KINDS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "dense": (lambda x: x + L.Dense(4)(x) * 0.35, ["FULLY_CONNECTED", "ADD"]),
    "residual": (residual, ["CONV_2D", "CONV_2D", "ADD"]),
    "normalized": (normalized, ["CONV_2D"]),
    "by channel": (lambda x: L.Conv2D(4, 3)(x) * GAMMA, ["CONV_2D"]),
    "trained": (lambda x: x + LayerScale()(L.Dense(4)(x)), ["FULLY_CONNECTED", "ADD"]),
    "depthwise": (
        lambda x: L.ReLU()(
            L.DepthwiseConv2D(3, depth_multiplier=2)(x) * np.concatenate([GAMMA, -GAMMA])
        ),
        ["DEPTHWISE_CONV_2D"],
    ),
    "transposed": (lambda x: L.Conv2DTranspose(4, 3)(x) * GAMMA, ["TRANSPOSE_CONV"]),
    # Something else reads what is multiplied. The two have one grid, on which a factor of 0.5 or
    # 0.3 makes ties, which LiteRT rounds away from zero.
    "read twice": (
        lambda x: (lambda y: L.Concatenate()([y, y * 0.307]))(L.Conv2D(4, 3)(x)),
        ["CONV_2D", "MUL", "CONCATENATION"],
    ),
    "no kernel": (
        lambda x: L.MaxPooling2D(2)(L.Conv2D(4, 3)(x)) * 0.5,
        ["CONV_2D", "MAX_POOL_2D", "MUL"],
    ),
}


def chained(x: Any) -> Any:
    y = L.Identity()((x - GAMMA) / np.float32([0.5, 1.0, 1.5, 1.0]))
    return L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, use_bias=False)(y)))


# What stands before a kernel, and is computed by it.
KINDS |= {
    "moved": (lambda x: L.Dense(4)(L.Flatten()(x * 0.35)), ["FULLY_CONNECTED"]),
    "chained": (chained, ["CONV_2D"]),
    "padded": (
        lambda x: L.DepthwiseConv2D(3, padding="same")(x * ALIKE) * 0.5,
        ["DEPTHWISE_CONV_2D"],
    ),
    "read by two": (
        lambda x: (lambda y: L.Add()([L.Conv2D(4, 1, padding="same")(y), L.Dense(4)(y)]))(
            L.BatchNormalization(scale=False)(x)
        ),
        ["CONV_2D", "FULLY_CONNECTED", "ADD"],
    ),
    # Zeros that are padded are zeros behind the offset.
    "offset and padding": (
        lambda x: L.Conv2D(4, 3, padding="same")(L.BatchNormalization()(x)),
        ["DEPTHWISE_CONV_2D", "CONV_2D"],
    ),
    # One scale for the weights of all inputs of an output would drown some.
    "unlike": (
        lambda x: L.Conv2D(4, 3)(x * np.float32([1.0, 1.0, 1.0, 9.0])),
        ["DEPTHWISE_CONV_2D", "CONV_2D"],
    ),
}


BEFORE = {"moved", "chained", "padded", "read by two"}
# The plans of these are looked at below.
SLOW = {"moved", "padded", "read by two", "offset and padding", "unlike"}


def slow_one(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind


def model_of(call: Callable[[Any], Any]) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input(X.shape[1:], name="x")
    model = keras.Model(x, call(x))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name in ("bias", "beta", "gamma", "moving_mean"):
            weight.assign(rng.uniform(-1.0, 1.0, weight.shape))
    return model


@pytest.mark.parametrize(
    "policy",
    ["int8", *(pytest.param(p, marks=pytest.mark.slow) for p in ("w4a8", "int16x8"))],
)
@pytest.mark.parametrize("kind", [slow_one(kind) for kind in KINDS])
def test_every_runtime_computes_what_was_trained(kind: str, policy: str) -> None:
    call, expected = KINDS[kind]
    model = model_of(call)
    qat = kqat.quantize_model(model, policy, calibration_data=X)
    want, got = (np.asarray(m(X, training=False), np.float64) for m in (model, qat))
    noise = np.mean((got - want) ** 2) / np.mean(want**2)
    # Measured: 23.3 dB and more of 4 bits, 34.0 of 8, 48.6 of 16; the rest is room for weights that
    # other versions draw.
    assert -10 * np.log10(noise) > (15.0 if policy == "w4a8" else 33.0)
    # Two steps: a trace costs more. One kind is trained as users do it.
    qat.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=kind != "chained")
    qat.fit(X, np.zeros((64, *qat.output.shape[1:])), epochs=1, verbose=0)
    blob = tflite_export.convert(qat)
    if policy == "w4a8" and kind in BEFORE:  # Steps of four bits are learned, those of the weights.
        assert operators(flatbuffer.read(blob))[-len(expected) :] == expected
    else:
        assert operators(flatbuffer.read(blob)) == expected
    report = tflite_export.verify(qat, blob, X, samples=4)
    for part in report.runtimes:
        assert part.problem is None and part.is_right and part.unmatched == (), part
        assert part.exact is None or part.exact.is_exact, part
    # What ships is what was trained, bias and all: of 8 bits each value, but for a tie of float32
    # sums, whose order depends on the processor: on one without AVX-512, 0.499995 of a step of
    # "transposed" is rounded up, 1 value of 2,048. LiteRT rounds sums of 4-bit weights twice, and
    # to 16 bits by multipliers of 16 bits, whether a model has factors or not: there each of two
    # kernels in a row may be a step off.
    device = kqat.integer_model(qat, runtime="litert")
    trained, shipped = (np.asarray(m(X[:8], training=False), np.float64) for m in (qat, device))
    steps = np.abs(trained - shipped) / tflite_export.inspect(blob).outputs[0].scale
    if policy == "int8":
        assert steps.max() < 1.01 and np.count_nonzero(steps > 0.01) <= 1
    else:
        assert steps.max() < 2.01


def behind(x: Any) -> Any:
    return LayerScale(name="scale")(L.Conv2D(4, 3, name="conv")(x))


def before(x: Any) -> Any:
    return L.Conv2D(4, 3, name="conv")(L.BatchNormalization(name="scale")(x))


@pytest.mark.parametrize("call", [behind, before])
def test_training_goes_on_in_the_models_own_numbers(
    call: Callable[[Any], Any], tmp_path: Any
) -> None:
    """What is computed by a kernel is a layer of its own there, with the statistics of a batch."""
    model = model_of(call)
    if call is before:
        model.get_layer("scale").gamma.assign([1.0, -0.5, 0.0, 1.5])
    qat = kqat.quantize_model(model, calibration_data=X)
    kernel = next(v for v in qat.trainable_variables if v.name == "kernel")
    np.testing.assert_array_equal(kernel, model.get_layer("conv").kernel)
    names = [v.name for v in model.trainable_variables]
    assert [v.name for v in qat.trainable_variables] == names
    for one, exact in zip(gradients(qat), gradients(model), strict=True):
        assert np.linalg.norm(one - exact) < 0.03 * np.linalg.norm(exact)
    (plan,) = (layer for layer in kqat.plan(model).layers if layer.role is Role.FACTOR)
    assert plan.into == "conv" and plan.ops == ()
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    assert tflite_export.convert(loaded) == tflite_export.convert(qat)


def gradients(model: keras.Model) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        y = model(X, training=True)
        loss = tf.reduce_mean(y * tf.cos(y))
    return [np.asarray(g) for g in tape.gradient(loss, model.trainable_weights)]


def test_what_a_kernel_cannot_take_up_stays_before_it() -> None:
    def before_kernel(call: Callable[[Any], Any], policy: Any = "int8", **options: Any) -> bool:
        model = model_of(call)
        plan = make_plan(trace(model), QuantizePolicy.of(policy), "m", **options)
        return any(layer.scaled_by for layer in plan.layers)

    def by_channel(x: Any) -> Any:
        return L.Conv2D(4, 3)(x * ALIKE)

    def without_bias(x: Any) -> Any:
        return L.Conv2D(4, 3, use_bias=False)(L.BatchNormalization()(x))

    ranged = kqat.QuantizeConfig(activation_range=kqat.Fixed(-2.0, 2.0))
    for kind in ("moved", "read by two", "offset and padding", "unlike"):
        assert before_kernel(KINDS[kind][0]) is (kind not in ("offset and padding", "unlike"))
    assert before_kernel(by_channel)
    assert not before_kernel(by_channel, keeps_clusters=True)  # It would make more of them.
    assert not before_kernel(without_bias)  # Nothing there takes an offset up.
    assert not before_kernel(by_channel, {"multiply*": ranged})  # A range of a value in a kernel.
    assert not before_kernel(lambda x: L.Conv2D(4, 3, groups=2)(x * ALIKE))
    learned = kqat.QuantizeConfig(weight_step="lsq")  # An optimizer moves it by so much.
    assert not before_kernel(KINDS["moved"][0], learned)


def test_statistics_that_are_to_come_are_not_folded_before_them() -> None:
    """Features of unlike sizes would leave the large ones no integers."""
    x = keras.Input((4,))
    norm = L.BatchNormalization()
    model = keras.Model(x, L.Dense(3)(norm(x)))

    def is_folded() -> bool:
        return any(layer.role is Role.FACTOR for layer in kqat.plan(model).layers)

    assert not is_folded()
    norm.trainable = False  # They stay as they are.
    assert is_folded()
    norm.trainable = True
    norm.moving_variance.assign([1.0, 2.0, 1.0, 1.0])
    assert is_folded()
    norm.moving_variance.assign([1.0, 1e6, 1.0, 1.0])
    assert not is_folded()


def test_one_scale_for_all_weights_takes_one_number_only() -> None:
    single = kqat.QuantizeConfig(weights=kqat.QuantSpec(symmetric=True))
    for factor, expected in ((0.5, ["CONV_2D"]), (GAMMA, ["CONV_2D", "DEPTHWISE_CONV_2D"])):
        qat = kqat.quantize_model(
            model_of(lambda x, by=factor: L.Conv2D(4, 3)(x) * by), single, calibration_data=X
        )
        assert operators(flatbuffer.read(tflite_export.convert(qat))) == expected


def test_scales_that_were_trained_as_powers_of_two_ship_as_such() -> None:
    config = kqat.QuantizeConfig(weights=kqat.QuantSpec(symmetric=True, axis=-1, power_of_two=True))
    for asked in (config, kqat.QuantizeConfig(weight_step="tqt")):
        qat = kqat.quantize_model(
            model_of(lambda x: L.Conv2D(4, 3)(x) * 0.3), asked, calibration_data=X
        )
        (kernel, *_) = kqat.freeze(qat).weights
        assert np.all(np.log2(kernel.scale) % 1.0 == 0.0)
        assert operators(flatbuffer.read(tflite_export.convert(qat))) == ["CONV_2D", "MUL"]


def test_clusters_are_not_turned_over() -> None:
    """A factor below zero for some channels would make twice as many integers of them."""
    few = kqat.cluster(model_of(lambda x: LayerScale()(L.Conv2D(4, 3, name="conv")(x))), 4)
    few.layers[-1].gamma.assign(GAMMA)
    for preserve, expected in (("clusters", ["CONV_2D", "DEPTHWISE_CONV_2D"]), (None, ["CONV_2D"])):
        qat = kqat.quantize_model(few, calibration_data=X, preserve=preserve)
        kernel = next(w for w in kqat.freeze(qat).weights if w.name == "conv/kernel")
        assert preserve is None or np.unique(kernel.integers).size == 4
        assert operators(flatbuffer.read(tflite_export.convert(qat))) == expected
