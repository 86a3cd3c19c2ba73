"""Widths that fall: what each epoch trains with, and that the planned grid is what ships."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import kqat
from kqat.base.errors import ModelError, TrainerWarning
from tests.kqat.training.schedules.models import EachStep, X, fit, quantized, wrapper


def widths(model: keras.Model) -> tuple[int, int]:
    """Of the grid, and of the integers that there are."""
    one = wrapper(model)
    integers = np.rint(np.asarray(one.on_grid("kernel") / one.scale("kernel")))
    return one.weight_specs["kernel"].bits, int(np.abs(integers).max())


@pytest.mark.slow
def test_each_stage_has_its_width_and_the_plan_is_what_ships() -> None:
    qat, seen = _eager(learning_rate=0.01), EachStep(widths)
    fit(qat, kqat.FallingBits((8, 6)), seen, epochs=3)
    assert [bits for bits, _ in seen.seen[::4]] == [8, 6, 4]
    assert [most > 31 for _, most in seen.seen[::4]] == [True, False, False]
    assert [most > 7 for _, most in seen.seen[::4]] == [True, True, False]
    assert {weight.bits for weight in kqat.freeze(qat).weights} == {4}


@pytest.mark.slow
def test_validation_sees_the_width_of_the_stage_and_then_the_planned_one() -> None:
    qat = quantized(rate=0.0)
    history = fit(qat, kqat.FallingBits((8,)), epochs=2, validation_data=(X, X[:, :4])).history
    coarse = qat.evaluate(X, X[:, :4], verbose=0)
    assert history["val_loss"][0] != history["val_loss"][1] == pytest.approx(coarse)


@pytest.mark.slow
def test_a_fit_that_ends_before_puts_the_planned_grids_back() -> None:
    qat = quantized()
    fit(qat, kqat.FallingBits((8,), epochs=5), epochs=1)
    assert widths(qat)[0] == 4 and widths(qat)[1] <= 7


@pytest.mark.slow
def test_wider_weights_keep_their_grid() -> None:
    qat, seen = quantized({"hidden": "w4a8", "*": "int8"}), EachStep(widths)
    fit(qat, kqat.FallingBits((6,)), seen, epochs=1)
    assert {bits for bits, _ in seen.seen} == {8}


@pytest.mark.parametrize(("bits", "options", "match"), [
    ((6, 8), {}, r"that fall. Received: bits=\(6, 8\)"),
    ((), {}, r"Received: bits=\(\)"),
    ((16, 8), {}, r"from 8 to 2 bits"),
    ((8,), {"epochs": 0}, r"one epoch or more. Received: epochs=0"),
])  # fmt: skip
def test_widths_that_do_not_fall_are_refused(bits: Any, options: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        kqat.FallingBits(bits, **options)


@pytest.mark.parametrize(("config", "match"), [
    ("ternary", r"Received: 'kernel' of '.*': Expected a grid of 2 bits"),
    (
        kqat.QuantizeConfig(
            weights=kqat.QuantSpec(bits=2, symmetric=True, narrow_range=True), weight_step="ttq"
        ),
        r"same numbers on every grid. Received: LearnedTernary",
    ),
])  # fmt: skip
def test_a_method_for_one_width_is_refused_before_training(config: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        fit(quantized(config), kqat.FallingBits((8,)), epochs=1)


class _Stop(keras.callbacks.Callback):
    """Ctrl-C at the beginning of an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.epoch:
            raise KeyboardInterrupt


def _eager(**options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    qat = quantized()
    qat.compile(keras.optimizers.Adam(**options), "mse", run_eagerly=True)
    return qat


def _fit_whole(qat: keras.Model, *callbacks: Any, epochs: int = 4) -> None:
    fit(qat, kqat.FallingBits((8,), epochs=2), *callbacks, epochs=epochs, batch_size=64)


@pytest.mark.parametrize(
    ("stop", "same_process"),
    [(2, False), *(pytest.param(1, same, marks=pytest.mark.slow) for same in (False, True))],
)
def test_an_interrupted_fit_goes_on_as_if_it_had_not_been(
    stop: int, same_process: bool, tmp_path: Path
) -> None:
    """From a backup: in a stage its steps stay, at its end those of the next one start."""
    whole, qat = _eager(), _eager()
    _fit_whole(whole)
    with pytest.raises(KeyboardInterrupt):
        _fit_whole(qat, keras.callbacks.BackupAndRestore(tmp_path), _Stop(stop))
    again = qat if same_process else _eager()
    _fit_whole(again, keras.callbacks.BackupAndRestore(tmp_path))
    assert widths(again)[0] == 4
    for own, other in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.slow
def test_what_was_interrupted_in_a_stage_says_that_it_would_ship(tmp_path: Path) -> None:
    qat = _eager()
    with pytest.raises(KeyboardInterrupt):
        _fit_whole(qat, _Stop(1))
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    for model in (qat, loaded):
        with pytest.warns(TrainerWarning, match=r"8 bits, planned with 4, in 'hidden' \(and 1"):
            frozen = kqat.freeze(model)
        assert {w.bits for w in frozen.weights if w.name == "head/kernel"} == {8}
    falls = kqat.FallingBits((8,))
    loaded.compile("sgd", "mse", run_eagerly=True)
    fit(loaded, falls, epochs=2, batch_size=64)
    assert {w.bits for w in kqat.freeze(loaded).weights if w.name == "head/kernel"} == {4}


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_of_a_wide_stage_that_come_back_have_steps_of_the_planned_grid(first: bool) -> None:
    qat = _eager(learning_rate=0.01)
    best = keras.callbacks.EarlyStopping(
        "loss", mode="max", restore_best_weights=True
    )  # The first.
    falls = kqat.FallingBits((8,))
    fit(qat, *((falls, best) if first else (best, falls)), epochs=2, batch_size=64)
    one = wrapper(qat)
    start = one.weight_step.step(one.folded("kernel"), one.weight_specs["kernel"])
    np.testing.assert_array_equal(one.scale("kernel"), start)
    (weight,) = (w for w in kqat.freeze(qat).weights if w.name == "head/kernel")
    np.testing.assert_array_equal(np.ravel(weight.scale), np.ravel(start))


def test_averages_of_steps_are_of_one_stage() -> None:
    """A mean of steps of 8 bits and of 4 would clip most weights."""
    qat = _eager(learning_rate=0.0, use_ema=True, ema_momentum=0.9)
    start = np.asarray(wrapper(qat).scale("kernel"))
    fit(qat, kqat.FallingBits((8,)), epochs=2, batch_size=64)
    np.testing.assert_allclose(wrapper(qat).scale("kernel"), start, rtol=1e-6)


@pytest.mark.slow
def test_steps_of_another_width_start_anew_where_training_begins(tmp_path: Path) -> None:
    """Weights of 8 bits as the beginning of those of 4: steps of zero gradient trained nothing."""
    wide, qat = (
        quantized(
            kqat.QuantizeConfig(
                weights=kqat.QuantSpec(
                    bits=bits, symmetric=True, narrow_range=True, axis="channel"
                ),
                weight_step="lsq",
            ),
            rate=1e-4,
        )
        for bits in (8, 4)
    )
    wide.save_weights(tmp_path / "wide.weights.h5")
    qat.load_weights(tmp_path / "wide.weights.h5")
    one = wrapper(qat)
    start = np.asarray(one.weight_step.step(one.folded("kernel"), one.weight_specs["kernel"]))
    np.testing.assert_array_equal(one.scale("kernel"), start)
    fit(qat, epochs=1)
    assert np.all(np.asarray(one.scale("kernel")) != start)
    np.testing.assert_allclose(one.steps["kernel"], one.scale("kernel"))
    np.testing.assert_allclose(one.scale("kernel"), start, atol=1e-3)
