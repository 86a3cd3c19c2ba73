"""The recipe of `finetune`: its rate, its stages, what it takes and refuses."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import kqat
from kqat.base.errors import ModelError
from kqat.training.finetuning import recommended_rate
from tests.kqat.training.schedules.models import EachStep, X, Y, network, quantized, wrapper


def rate(model: Any) -> float:
    return float(model.optimizer.learning_rate)


def test_the_rate_rises_and_falls_over_all_steps() -> None:
    seen = EachStep(rate)
    qat = kqat.quantize_model(network(), calibration_data=X)
    options = {"batch_size": 16, "verbose": 0}
    traced = []

    def loss(y: Any, z: Any) -> Any:
        traced.append(z)
        return keras.losses.mean_squared_error(y, z)

    history = kqat.finetune(
        qat, (X, Y), 5, loss=loss, learning_rate=0.01, callbacks=[seen], **options
    )
    # A step that makes the optimizer's variables would be traced a second time.
    assert len(traced) == 1
    share = (np.arange(20) + 0.5) / 20
    falling = 0.01 * (0.5 + 0.5 * np.cos(np.pi * (share - 0.1) / 0.9))
    expected = np.where(share < 0.1, 0.01 * share / 0.1, falling)
    np.testing.assert_allclose(seen.seen, expected, rtol=1e-5)
    assert history.history["loss"][-1] < history.history["loss"][0]
    # Statistics and ranges move to the end: frozen ones lost accuracy.
    assert not wrapper(qat, "hidden").freeze_statistics
    assert not any(la.is_frozen for la in qat.layers if isinstance(la, kqat.ActivationQuantizer))


@pytest.mark.parametrize(
    "rate", [keras.optimizers.schedules.CosineDecay(0.1, 8), lambda: 0.1], ids=["schedule", "own"]
)
def test_an_optimizer_with_a_rate_of_its_own_is_refused(rate: Any) -> None:
    qat = quantized()
    qat.compile(keras.optimizers.SGD(rate), "mse")
    with pytest.raises(ModelError, match=r"rate is a number.*Received: SGD with a schedule"):
        qat.fit(X, Y, verbose=0, callbacks=kqat.finetune_callbacks(1))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("int8", 3e-4),
        ("w4a8", 3e-4),
        ("w3a8", 1e-3),
        ("ternary", 2e-3),
        ("binary", 2e-3),
        ({"head": "ternary", "*": "w4a8"}, 3e-4),
        ({"head": "w4a8", "*": "ternary"}, 2e-3),
    ],
    ids=str,
)
def test_the_rate_is_that_of_most_weights(policy: Any, expected: float) -> None:
    qat = kqat.quantize_model(network(), policy, calibration_data=X)
    assert recommended_rate(qat) == expected
    distiller = kqat.Distiller(qat, network(), kind="values")
    (callback, *_) = kqat.finetune_callbacks(2)
    assert isinstance(callback, kqat.WarmUpCosine)
    callback.set_model(distiller)
    callback.set_params({"epochs": 2, "steps": 10})
    callback.on_train_begin()
    assert callback.rate(0.1) == pytest.approx(expected)


@pytest.mark.slow
def test_a_teacher_is_learned_from_and_stays_as_it_was() -> None:
    keras.utils.set_random_seed(0)
    chain = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(4, name="head")]
    teacher = keras.Sequential([keras.Input((6,)), *chain])
    chain[1].trainable = False
    flags = [layer.trainable for layer in teacher.layers]
    before = teacher.get_weights()
    qat = kqat.quantize_model(teacher, "ternary", calibration_data=X)
    start = float(np.mean(np.square(qat.predict(X, verbose=0) - teacher.predict(X, verbose=0))))
    # Labels that say nothing: what is learned is the teacher's.
    kqat.finetune(
        qat, (X, np.zeros_like(Y)), 8, loss=lambda y, z: 0.0 * z, teacher=teacher, kind="values",
        learning_rate=0.01, batch_size=8, verbose=0, metrics=["mae"],
    )  # fmt: skip
    end = float(np.mean(np.square(qat.predict(X, verbose=0) - teacher.predict(X, verbose=0))))
    assert end < 0.5 * start
    assert [layer.trainable for layer in teacher.layers] == flags
    for ours, theirs in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"teacher": network}, {"kind": "logits"}], ids=["a teacher", "a kind"]
)
def test_a_teacher_without_a_kind_is_refused(options: Any) -> None:
    given = {key: value() if callable(value) else value for key, value in options.items()}
    with pytest.raises(ModelError, match=r"Expected a teacher and the kind .* Use teacher=model"):
        kqat.finetune(quantized(), (X, Y), **given)


@pytest.mark.slow
def test_the_loss_and_metrics_of_before_are_kept() -> None:
    qat = quantized()
    qat.compile("sgd", "mae", metrics=["mse"])
    history = kqat.finetune(qat, (X, Y), 1, verbose=0).history
    assert isinstance(qat.optimizer, keras.optimizers.Adam)
    assert set(history) >= {"loss", "mse"}
    expected = float(np.mean(np.abs(qat.predict(X, verbose=0) - Y)))
    assert qat.evaluate(X, Y, verbose=0)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_datasets_and_validation_go_through_to_fit() -> None:
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    history = kqat.finetune(
        quantized(), data, 2, loss="mse", validation_data=(X, Y), verbose=0, shuffle=False
    ).history
    assert len(history["val_loss"]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras says it of a generator.
def test_steps_that_are_not_known_change_the_rate_by_epochs() -> None:
    seen = EachStep(rate)
    batches = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
    kqat.finetune(
        quantized(), (b for b in batches), 1, loss="mse", callbacks=[seen], verbose=0,
        learning_rate=0.01, shuffle=False,
    )  # fmt: skip
    assert len(set(seen.seen)) == 1


@pytest.mark.parametrize(("epochs", "freeze_at", "first"), [
    (1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (4, 0.0, 0), (4, 1.0, 4),
])  # fmt: skip
def test_the_stages_of_the_recipe(epochs: int, freeze_at: float, first: int) -> None:
    _, statistics, ranges = kqat.finetune_callbacks(epochs, freeze_at=freeze_at)
    assert isinstance(statistics, kqat.FreezeBatchNorm) and statistics.epoch == first
    assert isinstance(ranges, kqat.FreezeObservers) and ranges.epoch == first
    assert len(kqat.finetune_callbacks(epochs)) == 1


@pytest.mark.parametrize(("options", "match"), [
    ({"epochs": 0}, "one epoch or more. Received: epochs=0"),
    ({"epochs": 1.5}, "one epoch or more. Received: epochs=1.5"),
    ({"learning_rate": 0.0}, "a rate above zero. Received: 0.0"),
    ({"warm_up": 1.0}, r"inside \[0, 1\). Received: warm_up=1.0"),
    ({"freeze_at": 1.5}, r"inside \[0, 1\], or None. Received: freeze_at=1.5"),
])  # fmt: skip
def test_numbers_that_are_none_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        kqat.finetune_callbacks(**{"epochs": 2, **options})


def test_models_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ModelError, match=r"Expected a QAT model. Received: 'net', which is float"):
        kqat.finetune(network(), (X, Y), loss="mse")
    qat = kqat.quantize_model(network(), calibration_data=X)
    with pytest.raises(ModelError, match=r"Expected a loss for 'net', which is not compiled"):
        kqat.finetune(qat, (X, Y))
