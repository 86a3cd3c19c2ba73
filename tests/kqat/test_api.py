"""`plan` and `quantize_model` as a whole, and QAT models that are saved and trained on."""

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat import (
    ActivationQuantizer,
    FreezeObservers,
    QuantizeConfig,
    QuantizePolicy,
    QuantizeWrapper,
    QuantSpec,
    RangeWarning,
)
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.minmax import MinMax

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6, 6, 3)).astype(np.float32)
Y = RNG.integers(0, 3, 64)


def float_model() -> keras.Model:
    x = keras.Input((6, 6, 3), name="image")
    y = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(x)
    y = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(y))
    z = layers.DepthwiseConv2D(3, padding="same", activation="relu6", name="depthwise")(y)
    y = layers.Concatenate(name="join")([layers.PReLU(name="prelu")(y), z])
    y = layers.Dropout(0.2, seed=1, name="drop")(layers.BatchNormalization(name="alone")(y))
    y = layers.GlobalAveragePooling2D(name="mean")(y)
    y = layers.Dense(3, name="logits")(layers.Activation("gelu", name="float")(y))
    return keras.Model(x, layers.Softmax(name="softmax")(y), name="model")


POLICY = {"float": None, "depthwise": QuantizeConfig(weights=QuantSpec(bits=4, symmetric=True))}


def quantized() -> keras.Model:
    qat = kqat.quantize_model(float_model(), POLICY, calibration_data=X)
    qat.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", run_eagerly=True)
    return qat


def fit(qat: keras.Model) -> None:
    qat.fit(X[:32], Y[:32], batch_size=16, shuffle=False, verbose=0)


def quantizers(qat: keras.Model) -> dict[str, ActivationQuantizer]:
    return {layer.name: layer for layer in qat.layers if isinstance(layer, ActivationQuantizer)}


def test_the_model_is_what_the_plan_says() -> None:
    model = float_model()
    plan = kqat.plan(model, POLICY)
    qat = kqat.quantize_model(model, POLICY, calibration_data=X)
    found = quantizers(qat)
    assert set(found) == {group.name for group in plan.groups}
    for group in plan.groups:
        layer = found[group.name]
        assert (layer.spec, layer.range_method, layer.clamp, layer.sites) == (
            group.spec,
            group.range_method,
            group.clamp,
            group.sites,
        )
        assert layer.is_calibrated()
    wrapped = {layer.name: layer for layer in qat.layers if isinstance(layer, QuantizeWrapper)}
    for entry in plan.layers:
        if entry.weights:
            assert wrapped[f"quant_{entry.name}"].weight_specs == entry.weights


@pytest.mark.slow
def test_what_no_config_of_a_layer_says_is_kept_or_told() -> None:
    """`keras.RematScope`, which copies lose, was lost without a word."""
    x = keras.Input((4,), name="x")
    with keras.RematScope("full"):
        y = layers.Dense(4, name="again")(x)
    with keras.RematScope("list_of_layers", layer_names=["third"]):
        y = layers.Dense(4, name="third")(layers.Dense(4, name="once", autocast=False)(y))
    model = keras.Model(x, layers.Dense(2, name="head")(y), name="model")
    model.get_layer("once").supports_jit = False
    data = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    words = "'model' has layers under keras.RematScope, 'again', 'third', which compute"
    with pytest.warns(kqat.TrainerWarning, match=words) as told:
        qat = kqat.quantize_model(model, calibration_data=data)
    once = qat.get_layer("quant_once").layer
    assert (once.autocast, once.supports_jit) == (False, False)
    with pytest.warns(kqat.TrainerWarning, match=words) as of_adapt:
        kqat.adapt(model, "edge_tpu")
    assert {warning.filename for warning in [*told, *of_adapt]} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", kqat.TrainerWarning)
        kqat.quantize_model(
            keras.Sequential([keras.Input((4,)), layers.Dense(2)]), calibration_data=data
        )


def test_the_users_model_is_left_alone() -> None:
    model = float_model()
    before = model.to_json(), model.get_weights(), model(X).numpy()
    qat = quantized_from(model)
    fit(qat)
    assert model.to_json() == before[0]
    np.testing.assert_equal(model.get_weights(), before[1])
    np.testing.assert_array_equal(model(X), before[2])


def quantized_from(model: keras.Model) -> keras.Model:
    qat = kqat.quantize_model(model, POLICY, calibration_data=X)
    qat.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return qat


def test_a_calibrated_model_is_close_to_the_float_one() -> None:
    model = float_model()
    qat = kqat.quantize_model(model, calibration_data=X)
    # A softmax counts in steps of 1/256; its own rounding alone differs by a quarter on average.
    assert np.abs(qat(X) - model(X)).mean() <= 1 / 256


@pytest.mark.parametrize(
    "policy",
    [
        "int8",
        QuantizeConfig(),
        QuantizePolicy(),
        {},
        {layers.Layer: "int8"},
        QuantizePolicy(default=None, rules=(("*", QuantizeConfig()),)),
    ],
    ids=["preset", "config", "policy", "no rules", "class", "rules alone"],
)
def test_one_wish_may_be_written_in_many_ways(policy: Any) -> None:
    model = float_model()
    assert kqat.plan(model, policy).layers == kqat.plan(model).layers
    assert kqat.plan(model, policy).groups == kqat.plan(model).groups


def test_without_data_ranges_start_from_the_first_batches() -> None:
    model = float_model()
    with pytest.warns(RangeWarning, match=r"ranges of 'model' start from its first") as caught:
        qat = kqat.quantize_model(model, QuantizeConfig(activation_range=MinMax()))
    assert [w.filename for w in caught] == [__file__]
    observed = [q for q in quantizers(qat).values() if not isinstance(q.range_method, Fixed)]
    assert not any(q.is_calibrated() for q in observed)
    qat(X[:8], training=True)
    assert all(q.is_calibrated() for q in observed)
    image = quantizers(qat)["image_quantizer"]
    assert image.range() == (X[:8].min(), X[:8].max())
    qat(X, training=True)
    assert image.range() == (X.min(), X.max())


def test_ranges_that_are_all_given_need_no_data() -> None:
    given = QuantizeConfig(activation_range=Fixed(-1.0, 1.0))
    x = keras.Input((4,), name="row")
    model = keras.Model(x, layers.Dense(2, name="dense")(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat = kqat.quantize_model(model, {"row": given, "dense": given})
    assert {q.range() for q in quantizers(qat).values()} == {(-1.0, 1.0)}


# Saving


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    keras.utils.set_random_seed(0)
    qat = quantized()
    fit(qat)
    return qat


def ranges(qat: keras.Model) -> dict[str, tuple[float, float]]:
    return {name: layer.range() for name, layer in quantizers(qat).items()}


def test_a_keras_file_brings_everything_back(trained: keras.Model, tmp_path: Path) -> None:
    trained.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded(X), trained(X))
    assert ranges(loaded) == ranges(trained)
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in trained.layers]
    assert loaded.output_names == trained.output_names
    frozen = [kqat.freeze(qat) for qat in (trained, loaded)]
    assert frozen[0].sites == frozen[1].sites
    for a, b in zip(frozen[0].weights, frozen[1].weights, strict=True):
        np.testing.assert_array_equal(a.values, b.values)


def test_a_weights_file_brings_everything_back(trained: keras.Model, tmp_path: Path) -> None:
    trained.save_weights(tmp_path / "qat.weights.h5")
    other = kqat.quantize_model(float_model(), POLICY, calibration_data=X[:1])
    assert ranges(other) != ranges(trained)
    other.load_weights(tmp_path / "qat.weights.h5")
    np.testing.assert_array_equal(other(X), trained(X))
    assert ranges(other) == ranges(trained)


@pytest.mark.slow
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Optimizer state, ranges and statistics included."""
    keras.utils.set_random_seed(0)
    qat = quantized()
    fit(qat)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    loaded.run_eagerly = True
    for mine, saved in zip(loaded.variables, qat.variables, strict=True):
        if "seed" in saved.path:  # Keras itself saves no seed of a Dropout.
            mine.assign(saved)
    kernel = loaded.get_layer("quant_conv").layer.kernel.numpy()
    fit(qat)
    fit(loaded)
    np.testing.assert_equal(loaded.get_weights(), qat.get_weights())
    assert np.any(loaded.get_layer("quant_conv").layer.kernel != kernel)


@pytest.mark.slow
def test_a_compiled_fit_trains_checkpoints_and_freezes(tmp_path: Path) -> None:
    """The road as users walk it, once, in graph mode."""
    qat = kqat.quantize_model(float_model(), POLICY, calibration_data=X)
    qat.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    callbacks = [
        FreezeObservers(2),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.keras", save_best_only=True, monitor="loss"
        ),
    ]
    losses = qat.fit(X, Y, epochs=4, verbose=0, callbacks=callbacks).history["loss"]
    assert losses[-1] < losses[0]
    best = keras.models.load_model(tmp_path / "best.keras")
    assert kqat.freeze(best).sites == kqat.freeze(qat).sites
