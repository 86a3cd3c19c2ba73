"""The recipes' networks, against the pretrained models and Keras's own MobileNetV2."""

import keras
import numpy as np
import pytest
import tf_keras

from recipes import data
from recipes.models import conv1d_audio, digits_cnn, ds_cnn, mobilenet_v2, resnet8
from recipes.models.mobilenet_v2 import FAST_STRIDES, STRIDES

FORM = (
    "filters", "kernel_size", "strides", "padding", "use_bias", "activation", "epsilon", "momentum",
    "pool_size", "units",
)  # fmt: skip


@pytest.mark.usefixtures("shared")
def test_resnet8_is_the_pretrained_network() -> None:
    pretrained = data.pretrained("mlperf_tiny/ic")
    model = resnet8()
    assert [_form(layer) for layer in model.layers] == [_form(x) for x in pretrained.layers]
    model.set_weights(pretrained.get_weights())
    x = data.cifar10_lossless()[0][:16]
    # The same operations on the same weights: equal to the bit.
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), pretrained.predict(x, verbose=0), strict=True
    )


@pytest.mark.parametrize(
    ("model", "parameters", "outputs"),
    [
        (resnet8, 78666, (None, 10)),
        (ds_cnn, 24908, (None, 12)),
        (digits_cnn, 11674, (None, 10)),
        (conv1d_audio, 34922, (None, 10)),
    ],
)
def test_sizes(model: type, parameters: int, outputs: tuple[int | None, int]) -> None:
    built = model()
    assert (built.count_params(), built.output_shape) == (parameters, outputs)


@pytest.mark.parametrize("model", [resnet8, ds_cnn, digits_cnn, mobilenet_v2])
def test_other_inputs_and_classes(model: type) -> None:
    built = model((24, 16, 2), classes=3)
    assert (built.input_shape, built.output_shape) == ((None, 24, 16, 2), (None, 3))


@pytest.mark.parametrize(
    "width", [0.35, *(pytest.param(w, marks=pytest.mark.slow) for w in (0.5, 1.0, 1.4))]
)
def test_mobilenet_v2_has_the_weights_of_keras_applications(width: float) -> None:
    # Strides hold no weights, so the paper's network of the same width is the reference.
    reference = keras.applications.MobileNetV2(
        (32, 32, 3), alpha=width, weights=None, classes=10, classifier_activation="softmax"
    )
    model = mobilenet_v2(width=width)
    assert [w.shape for w in model.weights] == [w.shape for w in reference.weights]


def test_mobilenet_v2_pools_over_four_by_four() -> None:
    for strides in (STRIDES, FAST_STRIDES):
        pooling = mobilenet_v2(strides=strides).layers[-2]
        assert isinstance(pooling, keras.layers.GlobalAveragePooling2D)
        assert pooling.input.shape == (None, 4, 4, 1280)


@pytest.mark.slow
@pytest.mark.parametrize("strides", [STRIDES, FAST_STRIDES])
def test_mobilenet_v2_computes_the_same_in_either_keras(strides: tuple[int, ...]) -> None:
    new, old = (mobilenet_v2(strides=strides, framework=f) for f in (keras, tf_keras))
    generator = np.random.default_rng(0)
    weights = [w + generator.uniform(0.0, 0.1, w.shape) for w in new.get_weights()]
    new.set_weights(weights)
    old.set_weights(weights)
    x = generator.uniform(-1.0, 1.0, (2, 32, 32, 3)).astype(np.float32)
    # BatchNormalization multiplies in another order in Keras 2: some ulps of float32 per layer.
    np.testing.assert_allclose(new(x), old(x), rtol=1e-3, atol=1e-6)


def test_digits_cnn_has_what_its_recipe_shows() -> None:
    layers = digits_cnn().layers
    kinds = {type(layer).__name__ for layer in layers}
    assert {"Conv2D", "DepthwiseConv2D", "BatchNormalization", "Add", "Dense"} <= kinds
    ceilings = {layer.max_value for layer in layers if isinstance(layer, keras.layers.ReLU)}
    assert ceilings == {None, 6.0}


def _form(layer: keras.layers.Layer) -> dict[str, object]:
    """What decides a layer's output beside its weights."""
    config = layer.get_config()
    return {"class": type(layer).__name__, **{key: config.get(key) for key in FORM}}
