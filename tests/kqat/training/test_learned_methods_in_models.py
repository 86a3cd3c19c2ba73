"""Each method of steps, ranges and gradients in a model: trained, saved, shipped, verified."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.base.errors import PolicyError
from kqat.grids.spec import QuantSpec
from tests.kqat.step_cases import normal
from tflite_export import flatbuffer

IMAGES = normal((64, 8, 8, 3))
TARGETS = np.tanh(normal((64, 4), 2))


def network() -> keras.Model:
    """A folded normalization with a ReLU, a residual addition, a pooling, logits of both signs."""
    x = image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.BatchNormalization(name="norm", momentum=0.8)(x)
    x = skip = layers.ReLU(name="relu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Add(name="add")([x, skip])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(4, name="head")(x), name="net")
    norm = model.get_layer("norm")
    norm.gamma.assign([1.0, -2.0, 0.5, -0.25, 3.0, 1.5])
    return model


def weights(bits: int = 4, **options: Any) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=True, narrow_range=True, axis="channel", **options)


CONFIGS: dict[str, kqat.QuantizeConfig] = {
    "lsq+": kqat.QuantizeConfig(weights=weights(), weight_step="lsq", activation_range="lsq_plus"),
    "pact": kqat.QuantizeConfig(activation_range="pact"),
    "tqt": kqat.QuantizeConfig(weights=weights(), weight_step="tqt", activation_range="tqt"),
    "ttq 2": kqat.QuantizeConfig(weights=weights(2), weight_step="ttq"),
    "ttq 8": kqat.QuantizeConfig(weights=weights(8), weight_step="ttq"),
    "powers": kqat.QuantizeConfig(
        weights=weights(power_of_two=True),
        weight_step="lsq",
        activation=QuantSpec(symmetric=True, power_of_two=True),
    ),
    "identity": kqat.QuantizeConfig(weight_gradient="identity", activation_gradient="identity"),
    "clipped": kqat.QuantizeConfig(weight_gradient="clipped", activation_gradient="clipped"),
    "ewgs": kqat.QuantizeConfig(weight_gradient="ewgs", activation_gradient="ewgs"),
    "noise": kqat.QuantizeConfig(weight_gradient="noise", activation_gradient="noise"),
    "int16": kqat.QuantizeConfig(
        activation=QuantSpec(bits=16, symmetric=True), activation_range="lsq_plus"
    ),
}


def quantized(config: Any) -> keras.Model:
    qat = kqat.quantize_model(network(), config, calibration_data=IMAGES)
    qat.compile(keras.optimizers.Adam(0.01), "mse")
    return qat


def file_of(qat: keras.Model) -> Any:
    return tflite_export.convert(qat)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss_and_the_file_has_what_was_trained(
    name: str, tmp_path: Path
) -> None:
    qat = quantized(CONFIGS[name])
    before = {v.path: v.numpy() for v in qat.trainable_variables}
    # Evaluated eagerly, as a trace costs more than a batch; trained as users do.
    qat.run_eagerly = True
    first = qat.evaluate(IMAGES, TARGETS, batch_size=64, verbose=0)
    qat.run_eagerly = False
    qat.fit(IMAGES, TARGETS, batch_size=16, epochs=4, verbose=0)
    assert qat.evaluate(IMAGES, TARGETS, batch_size=64, verbose=0) < first
    still = [v.path for v in qat.trainable_variables if np.array_equal(before[v.path], v.numpy())]
    assert still == []
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded(IMAGES), qat(IMAGES))
    blob = file_of(qat)
    assert blob == file_of(loaded)
    check_numbers(blob, kqat.freeze(qat))
    report = tflite_export.verify(qat, blob, IMAGES[:16], runtimes=("litert_reference",))
    assert report.is_full_integer and report.on("litert_reference").is_right, str(report)


def check_numbers(blob: bytes, frozen: kqat.FrozenModel) -> None:
    """Every scale and zero point in the file is a trained one, bit for bit."""
    sites = {(np.float32(s.scale).tobytes(), s.zero_point) for s in frozen.sites}
    kernels = {w.scale.reshape(-1).astype(np.float32).tobytes() for w in frozen.weights}
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    found = set()
    for operator in graph.operators:
        for index in operator.outputs:
            grid = graph.tensors[int(index)].quantization
            assert (np.float32(grid.scale).tobytes(), int(grid.zeroPoint[0])) in sites
        if flatbuffer.op_name(model, operator) in (
            "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED",
        ):  # fmt: skip
            scale = graph.tensors[int(operator.inputs[1])].quantization.scale
            found.add(np.float32(scale).tobytes())
    assert found == kernels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tqt", "powers"])
def test_scales_in_the_file_are_powers_of_two(name: str) -> None:
    """Those of the layer into which a normalization folds too."""
    qat = quantized(CONFIGS[name])
    qat.fit(IMAGES, TARGETS, batch_size=16, verbose=0)
    frozen = kqat.freeze(qat)
    scales = np.concatenate([w.scale.reshape(-1) for w in frozen.weights])
    scales = np.append(scales, [s.scale for s in frozen.sites])
    np.testing.assert_array_equal(np.frexp(scales)[0], 0.5)
    check_numbers(file_of(qat), frozen)


@pytest.mark.slow
def test_ttq_has_two_magnitudes_in_a_channel_of_the_file() -> None:
    qat = quantized(CONFIGS["ttq 8"])
    qat.fit(IMAGES, TARGETS, batch_size=16, epochs=2, verbose=0)
    (head,) = (w for w in kqat.freeze(qat).weights if w.name == "head/kernel")
    for channel in head.integers.T:
        # A magnitude that no weight has may be the larger one, which fills the grid.
        assert 127 in np.abs(channel) or not (channel.min() < 0 < channel.max())
        assert len(np.unique(channel[channel > 0])) <= 1 >= len(np.unique(channel[channel < 0]))
    magnitudes = {tuple(np.unique(np.abs(channel))) for channel in head.integers.T}
    assert any(len(some) > 2 or 0 not in some for some in magnitudes)
    assert any(127 in some for some in magnitudes)


@pytest.mark.parametrize("method", ["lsq_plus", "pact", "tqt"])
def test_learned_ranges_start_where_observed_ones_do(method: str) -> None:
    model = network()
    learned, observed = (
        kqat.quantize_model(model, config, calibration_data=IMAGES)
        for config in (kqat.QuantizeConfig(activation_range=method), "int8")
    )
    for a, b in zip(ranges(learned), ranges(observed), strict=True):
        if method == "tqt":
            assert a[1] >= b[1] * 0.99 and a[1] <= max(-b[0], b[1]) * 2.01
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5)


def ranges(qat: keras.Model) -> list[tuple[float, float]]:
    return [la.range() for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)]


@pytest.mark.slow
def test_without_calibration_the_first_batch_is_the_start() -> None:
    with pytest.warns(kqat.RangeWarning, match="No calibration data"):
        qat = kqat.quantize_model(network(), CONFIGS["lsq+"])
    qat.compile(keras.optimizers.Adam(0.01), "mse")
    qat.fit(IMAGES, TARGETS, batch_size=16, epochs=3, verbose=0)
    check_numbers(file_of(qat), kqat.freeze(qat))


def recurrent(steps: int = 5) -> keras.Model:
    x = keras.Input((steps, 3))
    return keras.Model(x, layers.Dense(4, name="head")(layers.LSTM(4, name="lstm")(x)))


@pytest.mark.slow
def test_estimators_and_schedules_reach_the_inside_of_a_recurrence() -> None:
    # Training unrolls the steps, and tracing them is what costs: all is run eagerly but what moves
    # inside one fit, as the weight of the penalty does.
    x, y = normal((32, 2, 3)), TARGETS[:32]
    model = recurrent(steps=2)

    def losses(config: Any, *callbacks: Any, eagerly: bool = True) -> list[float]:
        keras.utils.set_random_seed(0)
        qat = kqat.quantize_model(model, config, calibration_data=x)
        qat.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=eagerly)
        fitted = qat.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=list(callbacks))
        return list(fitted.history["loss"])

    exact = losses({"*": "int8"})
    noise = kqat.QuantizeConfig(activation_gradient="noise")
    halved = kqat.QuantizeConfig(weight_gradient=nothing, activation_gradient=nothing)
    assert losses({"lstm*": noise, "*": "int8"}) != exact
    # No gradient passes into the LSTM: what it computes stays.
    assert losses({"lstm*": halved, "*": "int8"}) != exact
    plain = losses({"*": "w4a8"})
    assert losses({"*": "w4a8"}, kqat.QuantizeAfter(100)) != plain
    assert losses({"*": "w4a8"}, kqat.StochasticRounding()) != plain
    traced = losses({"*": "w4a8"}, kqat.DampenOscillations(1.0), eagerly=False)
    assert traced[1] > plain[1] + 1e-3  # More than another order of sums.


@keras.saving.register_keras_serializable("tests")
def nothing(upstream: Any, x: Any, rounded: Any, low: Any, high: Any) -> Any:
    return upstream * 0.0


def test_inside_a_recurrence_learned_ranges_are_refused() -> None:
    model = recurrent()
    with pytest.raises(PolicyError, match=r"inside a recurrent layer. Received: LearnedRange\(\)"):
        kqat.plan(model, kqat.QuantizeConfig(activation_range="lsq_plus"))
    kqat.plan(model, {"head": kqat.QuantizeConfig(activation_range="lsq_plus"), "*": "int8"})


def test_methods_that_meet_in_one_scale_have_to_agree() -> None:
    policy = {"relu": kqat.QuantizeConfig(activation_gradient="ewgs"), "*": "int8"}
    kqat.plan(network(), policy)
    x = keras.Input((8,))
    y = [layers.Dense(4, name=name)(x) for name in "ab"]
    model = keras.Model(x, layers.Concatenate()(y))
    policy = {"a": kqat.QuantizeConfig(activation_gradient="ewgs"), "*": "int8"}
    with pytest.raises(PolicyError, match=r"Expected one activation grid for 'a' and 'b'"):
        kqat.plan(model, policy)


def test_the_plan_names_methods_and_gradients() -> None:
    plan = kqat.plan(network(), CONFIGS["ewgs"])
    assert '"gradient": {\n    "name": "ewgs"' in plan.to_json()
    assert "int4/ch tqt" in str(kqat.plan(network(), CONFIGS["tqt"]))
