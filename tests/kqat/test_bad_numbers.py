"""Numbers that break careless arithmetic: nothing at all, too much, NaN; and what ships then."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat import ActivationQuantizer
from kqat.base.errors import CalibrationError, ExportError, FreezeError, ModelError
from kqat.freezing.freezer import freeze
from tflite_export import flatbuffer
from tflite_export.runtimes import execution

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(16, 6, 6, 3)).astype(np.float32)


def conv(name: str = "conv", filters: int = 4, **options: Any) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", name=name, **options)


def model_of(*chain: layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((6, 6, 3), name="image"), *chain], name="model")


def assign(model: keras.Model, layer: str, **values: Any) -> keras.Model:
    for name, value in values.items():
        variable = getattr(model.get_layer(layer), name)
        variable.assign(np.broadcast_to(np.float32(value), variable.shape))
    return model


def ship(qat: keras.Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """What LiteRT's reference kernels and Keras compute, and the output step."""
    frozen = freeze(qat)
    feed, site = frozen.sites[0].integers(x).astype(np.int8), frozen.sites[-1]
    result = execution.run(tflite_export.convert(frozen), [feed], runtime="litert_reference")
    return site.reals(result.outputs[0]), np.asarray(qat(x)), site.scale


# What is zero


def test_a_constant_activation_ships_and_stays_zero() -> None:
    model = assign(
        model_of(conv("dead"), layers.ReLU(name="relu"), conv("after", use_bias=False)),
        "dead",
        kernel=0.0,
        bias=-1.0,
    )
    qat = kqat.quantize_model(model, calibration_data=IMAGES)
    assert qat.get_layer("relu_quantizer").range() == (0.0, 1.0)
    shipped, trained, _ = ship(qat, IMAGES)
    assert not shipped.any()
    assert not trained.any()


def test_constant_data_ship() -> None:
    model = assign(model_of(conv()), "conv", bias=[1.0, -0.7, 0.5, 0.0])  # No tie of its grid.
    zeros = np.zeros_like(IMAGES)
    qat = kqat.quantize_model(model, calibration_data=zeros)
    shipped, trained, _ = ship(qat, zeros)
    # The output is the bias, on both roads rounded once to the same grid.
    np.testing.assert_array_equal(shipped, trained)


def dead_channel() -> keras.Model:
    model = model_of(conv(use_bias=False))
    kernel = model.get_layer("conv").kernel.numpy()
    kernel[..., 1] = 0.0
    return assign(model, "conv", kernel=kernel)


def dead_norm() -> keras.Model:
    """No gamma; no variance; almost none; and a gamma that is almost zero."""
    model = model_of(conv(), layers.BatchNormalization(name="norm"))
    variance = {"moving_variance": [1.0, 0.0, 1e-30, 1.0], "moving_mean": [0.5, 0.1, -0.1, 0.0]}
    return assign(
        model, "norm", gamma=[0.0, 0.01, -0.01, 1e-30], beta=[1.0, -1.0, 0.0, 2.0], **variance
    )


def lone_dead_norm() -> keras.Model:
    model = model_of(layers.BatchNormalization(name="norm"))
    variance = {"moving_variance": [1.0, 0.0, 1.0], "beta": [1.007, 0.1, 0.0]}
    return assign(model, "norm", gamma=[0.0, 0.1, -1.0], **variance)


def large_bias() -> keras.Model:
    """In steps of input times weights, the first two are beyond int32."""
    return assign(model_of(conv()), "conv", kernel=1e-9, bias=[1e3, -1e3, 5.0, 0.0])


def large_bias_dense() -> keras.Model:
    chain = layers.Flatten(name="flat"), layers.Dense(3, name="dense")
    return assign(model_of(*chain), "dense", kernel=1e-12, bias=[1.0, -1.0, 0.0])


def large_bias_after_fold() -> keras.Model:
    """A channel whose gamma all but vanished: its weights are tiny beside beta."""
    model = model_of(conv(), layers.BatchNormalization(name="norm"))
    return assign(model, "norm", gamma=[1.0, 1e-9, 1.0, 1e-12], beta=[0.0, 3.0, 1.0, -2.0])


def zero_kernel() -> keras.Model:
    """All of the output is bias, of which a step of 1 x the input's would spoil much."""
    model = model_of(conv("zero"), conv("after"))
    return assign(model, "zero", kernel=0.0, bias=[1.0, 2.0, -1.0, 0.0])


DEGENERATE = [
    (dead_channel, 8),
    (zero_kernel, 8),
    (dead_norm, 8),
    (dead_norm, 4),
    (lone_dead_norm, 8),
    (large_bias, 8),
    (large_bias_dense, 8),
    (large_bias_after_fold, 8),
    (large_bias_after_fold, 4),
]


@pytest.mark.parametrize(("make", "bits"), DEGENERATE)
def test_degenerate_weights_ship_within_a_step(make: Callable[[], keras.Model], bits: int) -> None:
    spec = kqat.QuantSpec(bits=bits, symmetric=True, narrow_range=True, axis="channel")
    qat = kqat.quantize_model(make(), kqat.QuantizeConfig(weights=spec), calibration_data=IMAGES)
    shipped, trained, step = ship(qat, IMAGES)
    assert np.isfinite(shipped).all()
    # The one step by which kernels that round twice may differ; after two layers as well, for the
    # first of the two has a constant output.
    assert np.rint(np.abs(shipped - trained) / step).max() <= 1


# What is not a number


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_batch_in_training_does_not_poison_ranges(value: float) -> None:
    model = model_of(conv(), layers.ReLU(name="relu"), conv("after"))
    qat = kqat.quantize_model(model, calibration_data=IMAGES)
    quantizers = [layer for layer in qat.layers if isinstance(layer, ActivationQuantizer)]
    before = [layer.range() for layer in quantizers]
    batch = IMAGES.copy()
    batch[3, 2, 2, 1] = value
    qat(batch, training=True)
    after = [layer.range() for layer in quantizers]
    # Only the input sees the infinity; behind it all is finite, for it was clipped to the range.
    assert np.isfinite(after).all()
    assert after[0] == before[0]
    qat(IMAGES, training=True)
    assert np.isfinite([layer.range() for layer in quantizers]).all()


def test_weights_that_diverged_do_not_ship() -> None:
    qat = kqat.quantize_model(model_of(conv()), calibration_data=IMAGES)
    qat.compile(keras.optimizers.SGD(1e30), "mse", run_eagerly=True)
    # The square of such an error is no float32, nor is its gradient.
    for _ in range(3):
        qat.train_on_batch(IMAGES, np.full((16, 6, 6, 4), 1e38))
    broken = r"'kernel' of layer 'conv' \(108 of 108 numbers\), .* go back to a checkpoint"
    with pytest.raises(FreezeError, match=f"'model' with NaN or infinity in {broken}"):
        tflite_export.convert(qat)
    with pytest.raises(ModelError, match=f"finite weights and ranges to diagnose.*{broken}"):
        kqat.diagnose(model_of(conv()), qat, IMAGES)
    with pytest.raises(CalibrationError, match=f"finite weights to calibrate.*{broken}"):
        kqat.calibrate(qat, IMAGES)
    with pytest.raises(ModelError, match=f"finite weights for adaround.*{broken}"):
        kqat.algorithms.adaround(qat, IMAGES)


def test_weights_that_all_but_diverged_are_named() -> None:
    """They are finite, but their integers are beyond what a kernel multiplies."""
    qat = kqat.quantize_model(model_of(conv(), layers.ReLU(name="relu")), calibration_data=IMAGES)
    kernel = qat.get_layer("quant_conv").layer.kernel
    kernel.assign(np.full(kernel.shape, 1e30))
    words = "of the output 'relu' .*of the weights 'conv/kernel'.*up to 7.87e[+]27.*diverged"
    with pytest.raises(ExportError, match=words):
        tflite_export.convert(qat)


def test_averages_of_no_step_do_not_ship() -> None:
    """An optimizer that averages and takes no step leaves zeros, as `fit` ends."""
    qat = kqat.quantize_model(model_of(conv()), calibration_data=IMAGES)
    for variable in qat.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    assert tflite_export.convert(qat), "zeros alone are no fault"
    optimizer = keras.optimizers.SGD(use_ema=True)
    optimizer.build(qat.trainable_variables)
    optimizer.finalize_variable_values(qat.trainable_variables)
    qat.compile(optimizer, "mse")
    with pytest.raises(FreezeError, match=r"zeros in all 2 trained variables. .*use_ema=True"):
        tflite_export.convert(qat)


# Converting


def test_a_second_conversion_gives_the_same_file() -> None:
    qat = kqat.quantize_model(model_of(conv()), calibration_data=IMAGES)
    first = tflite_export.convert(qat)
    assert tflite_export.convert(qat) == first
    qat.get_layer("quant_conv").layer.bias.assign(np.ones(4))
    assert tflite_export.convert(qat) != first


def test_a_float_model_is_not_converted() -> None:
    with pytest.raises(ModelError, match=r"QAT model. Received: 'model', which is float"):
        tflite_export.convert(model_of(conv()))


def test_a_model_that_has_seen_nothing_is_not_converted() -> None:
    with pytest.warns(kqat.RangeWarning):
        qat = kqat.quantize_model(model_of(conv()))
    with pytest.raises(FreezeError, match="quantizer 'image_quantizer', which has seen none"):
        tflite_export.convert(qat)


@keras.saving.register_keras_serializable("tests")
class Unknown(keras.layers.Layer):
    """A layer that no table knows, of operators that LiteRT has for floats."""

    def call(self, x: Any) -> Any:
        return keras.ops.square(x) * keras.ops.sigmoid(x)


def test_an_unknown_layer_left_float_ships_as_floats() -> None:
    model = model_of(conv("a"), Unknown(name="unknown"), conv("b"))
    qat = kqat.quantize_model(model, {"unknown": None}, calibration_data=IMAGES)
    read = flatbuffer.read(tflite_export.convert(qat))
    names = [flatbuffer.op_name(read, op) for op in read.subgraphs[0].operators]
    assert [n for n in names if n in ("CONV_2D", "QUANTIZE", "DEQUANTIZE")] == [
        "CONV_2D",
        "DEQUANTIZE",
        "QUANTIZE",
        "CONV_2D",
    ]
    shipped, trained, step = ship(qat, IMAGES)
    # A step of `a` is squared in the island, which `b` sums over 36 products: what counts is
    # that all but a few elements are the same, and none is far.
    steps = np.rint(np.abs(shipped - trained) / step)
    assert steps.max() <= 2
    assert np.mean(steps > 0) < 0.05
