"""Methods of recovery used together, and each on widths that it is not for."""

import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.grids import STEP_METHODS, named_range, named_step
from tests.kqat.training.schedules.models import X, Y, fit, network, quantized, wrapper
from tests.tflite_export.file_weights import file_integers

KINDS = ("sparsity", "clusters")


def grid(bits: int) -> kqat.QuantSpec:
    return kqat.QuantSpec(bits=bits, symmetric=True, narrow_range=bits > 1, axis="channel")


def config(bits: int, step: str, **options: Any) -> kqat.QuantizeConfig:
    return kqat.QuantizeConfig(weights=grid(bits), weight_step=step, **options)


def few(clusters: int = 6, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    return kqat.cluster(kqat.prune(network(), 0.5, **options), clusters)


def preserving(policy: Any, model: keras.Model) -> keras.Model:
    qat = kqat.quantize_model(model, policy, calibration_data=X, preserve=KINDS)
    qat.compile(keras.optimizers.AdamW(0.01, weight_decay=0.01), "mse")
    return qat


def check_kept(qat: keras.Model, model: keras.Model, clusters: int) -> None:
    """Zeros and the number of values, of the file's integers."""
    integers = file_integers(tflite_export.convert(qat))
    for found, name in zip(integers, ("hidden", "head"), strict=True):
        zero = np.moveaxis(np.asarray(model.get_layer(name).kernel), -1, 0).reshape(-1) == 0
        assert zero.mean() >= 0.5
        assert not found[zero].any()
        assert 2 < np.unique(found).size <= clusters


def steps_off(qat: keras.Model) -> int:
    report = tflite_export.verify(qat, tflite_export.convert(qat), X, samples=16)
    return max(part.max_steps for part in report.runtimes if part.problem is None)


@pytest.mark.slow
def test_bits_fall_and_zeros_and_clusters_stay() -> None:
    model = few()
    qat = preserving(config(4, "lsq"), model)
    fit(qat, kqat.FallingBits((8,)), epochs=2)
    assert {weight.bits for weight in kqat.freeze(qat).weights} == {4}
    check_kept(qat, model, 6)


@pytest.mark.slow
def test_a_student_keeps_zeros_and_clusters() -> None:
    model = few()
    qat = preserving(config(4, "lsq"), model)
    before = wrapper(qat).layer.get_weights()[0]
    distiller = kqat.Distiller(qat, network(), kind="values")
    distiller.compile(keras.optimizers.Adam(0.01), "mse")
    fit(distiller, kqat.FallingBits((8,)), *kqat.finetune_callbacks(2))
    assert not np.array_equal(before, wrapper(qat).layer.get_weights()[0])
    check_kept(qat, model, 6)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "channel"])
def test_what_is_pruned_in_patterns_is_clustered_then_quantized(pattern: str) -> None:
    keras.utils.set_random_seed(0)
    layout = [keras.Input((8,)), layers.Dense(8, "relu", name="hidden"), layers.Dense(4)]
    pruned = kqat.prune(keras.Sequential(layout), 0.5, pattern=pattern, only="hidden")
    model = kqat.cluster(pruned, 6)
    x = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    qat = kqat.quantize_model(model, "w4a8", calibration_data=x, preserve=KINDS)
    qat.compile(keras.optimizers.AdamW(0.01, weight_decay=0.01), "mse")
    qat.fit(x, x[:, :4], epochs=2, verbose=0)
    integers = kqat.freeze(qat).weights[0].integers
    zero = np.asarray(pruned.get_layer("hidden").kernel) == 0
    assert not integers[zero].any() and np.unique(integers).size <= 6
    if pattern == "2:4":
        assert ((integers != 0).reshape(2, 4, 8).sum(axis=1) <= 2).all()
    else:
        assert (~integers.any(axis=0)).sum() == 4


@pytest.mark.parametrize("bits", [2, 8])
def test_scaled_channels_stay_ternary(bits: int) -> None:
    qat = kqat.quantize_model(network(), config(bits, "ttq"), calibration_data=X)
    for algorithm in (kqat.algorithms.awq, kqat.algorithms.equalize):
        scaled = algorithm(qat, X)
        integers = [weight.integers for weight in kqat.freeze(scaled).weights]
        columns = [column for one in integers for column in one.T]
        assert max(np.unique(column).size for column in columns) <= 3
        assert steps_off(scaled) <= 1


@pytest.mark.parametrize("name", ["adaround", "gptq"])
def test_rounding_refuses_three_values_on_a_wide_grid(name: str) -> None:
    algorithm = getattr(kqat.algorithms, name)
    qat = kqat.quantize_model(network(), config(8, "ttq"), calibration_data=X)
    with pytest.raises(kqat.SpecError, match=rf"for {name}.*'hidden' with three values.*bits=2"):
        algorithm(qat, X)
    narrow = kqat.quantize_model(network(), config(2, "ttq"), calibration_data=X)
    for weight in kqat.freeze(algorithm(narrow, X)).weights:
        assert set(np.unique(weight.integers)) <= {-1, 0, 1}


@pytest.mark.parametrize("name", ["adaround", "gptq"])
def test_powers_of_two_stay_powers_when_rounded_weights_train(name: str) -> None:
    qat = kqat.quantize_model(network(), config(4, "tqt"), calibration_data=X)
    rounded = getattr(kqat.algorithms, name)(qat, X)
    rounded.compile(keras.optimizers.Adam(0.01), "mse")
    fit(rounded, epochs=1)
    for weight in kqat.freeze(rounded).weights:
        powers = np.log2(np.asarray(weight.scale, np.float64))
        np.testing.assert_array_equal(powers, np.rint(powers))


@pytest.mark.slow
def test_all_schedules_at_once_with_learned_steps_and_ranges(tmp_path: Path) -> None:
    qat = quantized(config(4, "lsq", activation_range="lsq_plus"))
    callbacks = [
        kqat.QuantizeAfter(2),
        kqat.StochasticRounding(1),
        kqat.DampenOscillations(),
        kqat.FreezeOscillations(),
        kqat.FallingBits((6,)),
        kqat.ReestimateBatchNorm(X),
        *kqat.finetune_callbacks(2),
    ]
    history = fit(qat, *callbacks).history
    assert np.isfinite(history["loss"]).all()
    assert steps_off(qat) <= 1
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    assert tflite_export.convert(loaded) == tflite_export.convert(qat)


WIDTHS = {"max_abs": (2, 8), "lsq": (2, 8), "mse": (2, 8), "tqt": (2, 8), "ternary": (2, 2),
          "ttq": (2, 8), "binary": (1, 1)}  # fmt: skip


@pytest.mark.parametrize("name", STEP_METHODS)
def test_a_step_method_on_a_width_that_it_is_not_for_is_refused_by_name(name: str) -> None:
    least, most = WIDTHS[name]
    for bits in range(1, 9):
        if least <= bits <= most:
            config(bits, name)
            continue
        with pytest.raises(kqat.KqatError) as found:
            config(bits, name)
        said = str(found.value)
        assert type(named_step(name)).__name__ in said and f"bits={bits}" in said
        # What is advised works.
        config(min(max(bits, least), most), name)
        other = "binary" if "kqat.Binary()" in said else "lsq"
        config(bits, other)


@pytest.mark.parametrize("name", ["lsq_plus", "pact", "tqt"])
def test_learned_ranges_take_both_widths_of_activations(name: str) -> None:
    for spec in (kqat.QuantSpec(bits=8), kqat.QuantSpec(bits=16, symmetric=True)):
        kqat.QuantizeConfig(activation=spec, activation_range=name)
    with pytest.raises(kqat.PolicyError, match="8 bits or 16 bits"):
        kqat.QuantizeConfig(activation=kqat.QuantSpec(bits=4), activation_range=named_range(name))


PAIRS = [
    (step, ranges)
    for step, ranges in itertools.product(STEP_METHODS, ("moving_average", "lsq_plus", "pact"))
    if (step, ranges) in {("lsq", "pact"), ("ttq", "lsq_plus"), ("binary", "lsq_plus"),
                          ("ternary", "pact"), ("tqt", "moving_average"), ("mse", "pact")}
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ranges"), PAIRS)
def test_pairs_of_methods_train_and_load(step: str, ranges: str, tmp_path: Path) -> None:
    bits = min(4, WIDTHS[step][1])
    qat = quantized(config(bits, step, activation_range=ranges))
    fit(qat, epochs=1)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded(X), qat(X))
    assert tflite_export.convert(loaded) == tflite_export.convert(qat)
    loaded.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    loaded.fit(X, Y, epochs=1, verbose=0)


def test_bits_that_cannot_fall_are_refused() -> None:
    with pytest.raises(kqat.ModelError, match=r"narrower than 8 bits.*Received: 8 bits"):
        fit(quantized("int8"), kqat.FallingBits((8, 6)), epochs=1)
