"""Faults that were found once: each case failed, or shipped other numbers, before its mend."""

import fnmatch
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export

Build = Callable[[Any], Any]
IMAGE, VECTOR = (6, 6, 3), (8,)


def _data(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32) * 3


def _relu6_beside_a_wider_value(x: Any) -> Any:
    y = layers.Conv2D(4, 3, kernel_initializer="ones")(x)
    return layers.Concatenate()([y, layers.ReLU(6.0)(y)])


def _adapted_normalization(x: Any) -> Any:
    normalization = layers.Normalization()
    normalization.adapt(_data(IMAGE) * 2 + 3)
    return normalization(x)


def _float_residual(x: Any) -> Any:
    y = layers.Conv2D(4, 3, padding="same", name="float_conv")(x)
    return layers.Add(name="float_add")([y, layers.ReLU(name="float_relu")(y)])


def _split(x: Any) -> Any:
    return layers.Concatenate()(ops.split(x, 3, axis=-1))


def _base(x: Any) -> Any:
    inner = keras.Sequential(
        [keras.Input(VECTOR), layers.Dense(6, activation="relu"), layers.BatchNormalization()]
    )
    return layers.Dense(3)(inner(x, training=False))


FLOAT = ("float*", "split*")

CASES: dict[str, tuple[tuple[int, ...], Build]] = {
    "relu6 beside a wider value": (IMAGE, _relu6_beside_a_wider_value),
    "adapted Normalization": (IMAGE, _adapted_normalization),
    "float clamp whose input is read twice": (
        IMAGE,
        lambda x: layers.Conv2D(3, 1, name="q")(_float_residual(x)),
    ),
    "float tail": (IMAGE, lambda x: _float_residual(layers.Conv2D(3, 1, name="q")(x))),
    "clamp behind pooling": (IMAGE, lambda x: layers.ReLU()(layers.MaxPooling2D(2)(x))),
    "relu6 behind average pooling": (
        IMAGE,
        lambda x: layers.ReLU(6.0)(layers.AveragePooling2D(2)(layers.Conv2D(4, 1)(x))),
    ),
    "clamp behind Concatenate": (
        IMAGE,
        lambda x: layers.ReLU()(layers.Concatenate()([x, layers.Conv2D(4, 1)(x)])),
    ),
    "silu inside Dense": (VECTOR, lambda x: layers.Dense(4, activation="silu")(x)),
    "silu as an operation": (VECTOR, lambda x: ops.silu(x)),
    "gelu inside Dense": (VECTOR, lambda x: layers.Dense(4, activation="gelu")(x)),
    "inner model called with training=False": (VECTOR, _base),
    "float layer with several outputs": (IMAGE, _split),
    "layer called by keyword": (VECTOR, lambda x: layers.Dense(4)(inputs=x)),
    "pooling operation of three axes": ((8, 3), lambda x: ops.max_pool(x, 2)),
    "all-zero kernels of several shapes": (
        IMAGE,
        lambda x: layers.Conv2D(3, 1, kernel_initializer="zeros", bias_initializer="ones")(
            layers.Conv2D(6, 1, kernel_initializer="zeros", bias_initializer="ones")(x)
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ships_what_it_computes(name: str) -> None:
    shape, build = CASES[name]
    inputs = keras.Input(shape, name="x")
    model = keras.Model(inputs, build(inputs))
    x = _data(shape)
    # Most cases have no float layer.
    policy = {k: None for k in FLOAT if fnmatch.filter([n.name for n in model.layers], k)}
    qat = kqat.quantize_model(model, policy, calibration_data=x)
    real = model.predict(x, verbose=0)
    # Eight bits on data that calibrated them: far from this, something else was computed.
    assert np.abs(qat.predict(x, verbose=0) - real).max() <= 0.1 * np.ptp(real) + 1e-6
    blob = tflite_export.convert(
        qat, inference_input_type="float32", inference_output_type="float32"
    )
    for part in tflite_export.verify(qat, blob, x).runtimes:
        assert part.problem is None
        assert part.unmatched == ()
        # One step: kernels round twice where float arithmetic rounds once.
        assert part.max_steps <= 1


def test_a_frozen_layer_keeps_its_weights_and_losses_come_out() -> None:
    inputs = keras.Input(VECTOR)
    dense = layers.Dense(3, activity_regularizer="l2", trainable=False)
    x = _data(VECTOR)
    qat = kqat.quantize_model(keras.Model(inputs, dense(inputs)), calibration_data=x)
    before = [np.array(w) for w in qat.get_weights()]
    qat(x)
    assert len(qat.losses) == 1
    for old, new in zip(before, qat.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("shape", "build", "message"),
    [
        (IMAGE, lambda x: layers.Conv2DTranspose(3, 3, dilation_rate=2)(x), "dilation_rate"),
        (IMAGE, lambda x: ops.image.resize(x, (12, 12), antialias=True), "plain resizing"),
        (IMAGE, lambda x: ops.mean(x), "leave the batch axis alone"),
    ],
)
def test_refused_before_training(shape: Any, build: Build, message: str) -> None:
    inputs = keras.Input(shape)
    with pytest.raises(kqat.UnsupportedLayerError, match=message):
        kqat.plan(keras.Model(inputs, build(inputs)))


def test_relu6_of_its_own_takes_no_range_beyond_six() -> None:
    inputs = keras.Input(VECTOR)
    model = keras.Model(inputs, layers.Activation("relu6", name="r")(inputs))
    config = kqat.QuantizeConfig(activation_range=kqat.Fixed(0.0, 12.0))
    with pytest.raises(kqat.PolicyError, match="ends at 6 or below for 'r'"):
        kqat.plan(model, {"r": config})


def test_an_own_training_step_is_not_lost_silently() -> None:
    class Own(keras.Model):
        def train_step(self, data: Any) -> Any:
            return super().train_step(data)

    inputs = keras.Input(VECTOR)
    model = Own(inputs, layers.Dense(3)(inputs))
    with pytest.warns(kqat.TrainerWarning, match="train_step of its own"):
        kqat.quantize_model(model, calibration_data=_data(VECTOR))


class _Aside(layers.Layer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)
        self.share = keras.metrics.Mean(name="share")

    def call(self, x: Any) -> Any:
        y = ops.relu(self.dense(x))
        self.add_loss(1e-3 * ops.mean(y))
        self.share.update_state(ops.mean(y))
        return y


class _AsideModel(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="own")
        self.inner = _Aside(name="aside")

    def call(self, x: Any) -> Any:
        y = self.inner(x)
        self.add_loss(ops.mean(y))
        return y


def test_what_a_call_does_beside_its_result_is_not_lost_silently() -> None:
    inputs = keras.Input(VECTOR)
    x = np.random.default_rng(0).uniform(-1, 1, (512, *VECTOR)).astype(np.float32)
    outer = _AsideModel()
    outer(x)
    lambdas = layers.Lambda(lambda t: outer.add_loss(ops.mean(t)) or t * ops.max(t, -1, True))
    for model, said in (
        (keras.Model(inputs, _Aside(name="aside")(inputs)), ["metric 'share'"]),
        (outer, ["metric 'share'"]),
        (keras.Model(inputs, lambdas(inputs)), []),
    ):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            qat = kqat.quantize_model(model, calibration_data=x)
        texts = [str(w.message) for w in warned if w.category is kqat.TrainerWarning]
        assert len(texts) == len(said), texts
        assert all(any(part in text for text in texts) for part in said)
        assert np.allclose(np.asarray(qat(x)), np.asarray(model(x)), atol=0.2)
        # The function adds its loss to a layer that is no part of the model: Keras trains it not.
        assert sum(map(float, qat.losses)) == pytest.approx(sum(map(float, model.losses)), rel=0.05)


@pytest.mark.slow
def test_mixed_precision_converts() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input(IMAGE)
    y = layers.Conv2D(4, 3, dilation_rate=2, padding="same")(inputs)
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3)(y)))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(y))
    x = _data(IMAGE)
    qat = kqat.quantize_model(model, calibration_data=x)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x)
    assert report.is_full_integer
    # One step: kernels round twice where float arithmetic rounds once.
    assert all(part.max_steps <= 1 for part in report.runtimes)


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
@pytest.mark.parametrize("scale", [3.9, 4.1, 80.0])
def test_no_kernel_is_asked_for_more_than_it_computes_rightly(kind: str, scale: float) -> None:
    """TFLite Micro's LOGISTIC and TANH cut off at whole steps of a coarse grid, even at zero.

    Seen on EfficientNetB0 with random weights: 0.0 for sigmoid(0.0), 128 steps away.
    """
    x = keras.Input((256,), name="x")
    model = keras.Model(x, layers.Activation(kind)(x))
    given = kqat.QuantizeConfig(activation_range=kqat.Fixed(-128 * scale, 127 * scale))
    data = (np.arange(-128, 128, dtype=np.float32) * np.float32(scale))[np.newaxis]
    qat = kqat.quantize_model(model, {"x": given}, calibration_data=data)
    report = tflite_export.verify(qat, tflite_export.convert(qat), data)
    assert ("GATHER" in report.operators) == (scale > 4.0)
    assert report.is_full_integer
    assert all(part.problem is None and part.max_steps <= 1 for part in report.runtimes)


def test_a_product_of_many_values_is_refused() -> None:
    x = keras.Input((6, 8))
    model = keras.Model(x, ops.prod(x, axis=1))
    with pytest.raises(kqat.UnsupportedLayerError, match=r"a product of 6 values: .*REDUCE_PROD"):
        kqat.plan(model)
