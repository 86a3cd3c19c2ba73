"""annotate and apply: the marked layers are quantized, the rest stays float."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat import ActivationQuantizer, QuantizeConfig, QuantizeWrapper, QuantSpec
from kqat.annotate import QuantizeAnnotate, quantize_annotate_layer, quantize_apply
from kqat.base.errors import ModelError, PolicyError
from kqat.grids.ranges.fixed import Fixed

# Of most models here some layers stay float; the warning has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Layers of .* stay float:kqat.PolicyWarning")
IMAGES = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype(np.float32)
W4 = QuantizeConfig(weights=QuantSpec(bits=4, symmetric=True, narrow_range=True, axis="channel"))


def conv(name: str, **options: Any) -> layers.Layer:
    return layers.Conv2D(3, 3, padding="same", name=name, **options)


def annotated() -> keras.Model:
    """Two of four layers, one of them called twice and with a name that is a pattern."""
    x = keras.Input((6, 6, 3), name="image")
    twice = quantize_annotate_layer(conv("conv.ab"), W4)
    y = layers.BatchNormalization(name="norm")(conv("plain")(twice(twice(x))))
    y = layers.GlobalAveragePooling2D(name="mean")(y)
    return keras.Model(x, quantize_annotate_layer(layers.Dense(2, name="head"))(y), name="model")


def test_an_annotated_layer_computes_what_the_layer_computes() -> None:
    layer = layers.BatchNormalization(name="norm")
    marked = quantize_annotate_layer(layer)
    assert (marked.name, marked.config) == ("annotate_norm", QuantizeConfig())
    np.testing.assert_array_equal(marked(IMAGES), layer(IMAGES))
    before = layer.moving_mean.numpy()
    marked(IMAGES + 1.0, training=True)
    assert np.all(layer.moving_mean.numpy() != before)


def test_layers_are_annotated_by_cloning_as_in_tfmot() -> None:
    """Layers whose calls take a mask too: Keras hands it to the clones by name."""
    x = keras.Input((6, 6, 3), name="image")
    y = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(conv("conv")(x)))
    y = layers.Add(name="sum")([y, layers.Softmax(name="softmax")(y)])
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten(name="flat")(y)))
    marked = keras.models.clone_model(model, clone_function=quantize_annotate_layer)
    marked.set_weights(model.get_weights())
    qat = quantize_apply(marked, calibration_data=IMAGES)
    whole = kqat.quantize_model(model, calibration_data=IMAGES)
    np.testing.assert_array_equal(qat(IMAGES), whole(IMAGES))


@pytest.mark.slow
def test_an_annotated_layer_reads_and_hands_on_a_mask() -> None:
    """Padded steps are left out, as they are without annotations."""
    tokens = np.random.default_rng(0).integers(1, 9, (16, 5))
    tokens[:, 3:] = 0

    def model(mark: Any) -> keras.Model:
        keras.utils.set_random_seed(0)
        x = keras.Input((5,), dtype="int32", name="tokens")
        y = mark(layers.Embedding(9, 4, mask_zero=True, name="embed"))(x)
        y = mark(layers.Dense(4, name="dense"))(y)
        y = mark(layers.LSTM(3, return_sequences=True, name="lstm"))(y)
        y = mark(layers.GlobalAveragePooling1D(name="mean"))(y)
        return keras.Model(x, y, name="model")

    plain, marked = model(lambda layer: layer), model(quantize_annotate_layer)
    np.testing.assert_array_equal(plain(tokens), marked(tokens))
    qat = quantize_apply(marked, calibration_data=tokens)
    whole = kqat.quantize_model(plain, calibration_data=tokens)
    np.testing.assert_array_equal(qat(tokens), whole(tokens))


@pytest.mark.filterwarnings("error", "ignore:Layers of 'model' stay float:kqat.PolicyWarning")
def test_only_annotated_layers_are_quantized() -> None:
    model = annotated()
    images = np.random.default_rng(0).normal(size=(128, 6, 6, 3))  # 16 would be told to be few.
    qat = quantize_apply(model, calibration_data=images)
    wrapped = {w.layer.name: w for w in qat.layers if isinstance(w, QuantizeWrapper)}
    assert set(wrapped) == {"conv.ab", "head"}
    assert wrapped["conv.ab"].weight_specs["kernel"].bits == 4
    assert wrapped["head"].weight_specs["kernel"].bits == 8
    kept = [layer.name for layer in qat.layers if layer.name in ("plain", "norm", "mean")]
    assert kept == ["plain", "norm", "mean"]
    assert (qat.name, qat.output_names) == ("model", ["head"])


@pytest.mark.filterwarnings("error")
def test_layers_that_stay_float_are_told() -> None:
    images = np.random.default_rng(0).normal(size=(128, 6, 6, 3))
    with pytest.warns(kqat.PolicyWarning) as caught:
        quantize_apply(annotated(), calibration_data=images)
    (told,) = caught
    assert str(told.message) == (
        "Layers of 'model' stay float, as they are not annotated: plain, norm, mean. The file will "
        "have float operators for them; kqat.quantize_model quantizes the whole model."
    )
    assert told.filename == __file__
    whole = [quantize_annotate_layer(layer) for layer in (conv("a"), conv("b"))]
    quantize_apply(keras.Sequential([keras.Input((6, 6, 3)), *whole]), calibration_data=images)


def test_applying_leaves_the_annotated_model_alone() -> None:
    model = annotated()
    before = model(IMAGES).numpy()
    qat = quantize_apply(model, calibration_data=IMAGES)
    for variable in qat.weights:
        variable.assign(variable + 1.0)
    np.testing.assert_array_equal(model(IMAGES), before)
    quantize_apply(model, calibration_data=IMAGES)


def test_layers_of_nested_models_may_be_annotated() -> None:
    def block(name: str) -> keras.Model:
        chain = [quantize_annotate_layer(conv("conv")), conv("plain")]
        return keras.Sequential([keras.Input((6, 6, 3)), *chain], name=name)

    model = keras.Sequential([keras.Input((6, 6, 3)), block("one"), block("two")])
    qat = quantize_apply(model, calibration_data=IMAGES)
    names = [layer.name for layer in qat.layers if isinstance(layer, QuantizeWrapper)]
    assert names == ["quant_one_conv", "quant_two_conv"]


def test_a_layer_of_many_inputs_may_be_annotated() -> None:
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    config = QuantizeConfig(activation_range=Fixed(-1.0, 1.0))
    total = quantize_annotate_layer(layers.Add(name="sum"), config)([a, b])
    rows = np.ones((8, 4), np.float32)
    qat = quantize_apply(keras.Model([a, b], total), calibration_data=[rows, 2 * rows])
    ranges = {q.name: q.range() for q in qat.layers if isinstance(q, ActivationQuantizer)}
    assert ranges == {
        "a_quantizer": (0.0, 1.0),
        "b_quantizer": (0.0, 2.0),
        "sum_quantizer": (-1.0, 1.0),
    }


def test_wishes_are_saved_with_the_model(tmp_path: Path) -> None:
    model = annotated()
    model.save(tmp_path / "annotated.keras")
    loaded = keras.models.load_model(tmp_path / "annotated.keras")
    wishes = [layer.config for layer in loaded.layers if isinstance(layer, QuantizeAnnotate)]
    assert wishes == [W4, QuantizeConfig()]
    np.testing.assert_array_equal(loaded(IMAGES), model(IMAGES))


class Foreign:
    """Speaks tfmot's protocol."""

    def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
        return []

    def get_output_quantizers(self, layer: Any) -> list[Any]:
        return []


def test_a_tfmot_wish_cannot_be_saved(tmp_path: Path) -> None:
    layer = quantize_annotate_layer(layers.Dense(2, name="dense"), Foreign())
    model = keras.Sequential([keras.Input((4,)), layer])
    with pytest.raises(PolicyError, match=r"Received: Foreign for layer 'dense'. Save the model"):
        model.save(tmp_path / "annotated.keras")


def test_a_model_without_wishes_is_refused() -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)], name="model")
    with pytest.raises(ModelError, match=r"annotated layers. Received: 'model', which has none"):
        quantize_apply(model, calibration_data=IMAGES)


NO_WISH = {
    "a model": (lambda: (keras.Sequential([layers.Dense(2)]), "int8"), "layers of a model one by"),
    "no layer": (lambda: ("dense", "int8"), r"Keras layer to annotate. Received: str"),
    "Keras 2": (
        lambda: (pytest.importorskip("tf_keras").layers.Dense(2), "int8"),
        r"Received: the Keras 2 \(tf_keras\) layer Dense. Make it with keras.layers.Dense",
    ),
    "no config": (lambda: (layers.Dense(2), None), "Do not annotate a layer that stays float"),
    "no preset": (lambda: (layers.Dense(2), "int9"), r"one of the presets.*'int9'"),
    "a number": (lambda: (layers.Dense(2), 8), r"a preset's name.*Received: 8"),
}


@pytest.mark.parametrize(("make", "message"), NO_WISH.values(), ids=NO_WISH)
def test_what_is_no_wish_is_refused(make: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        quantize_annotate_layer(*make())


@pytest.mark.parametrize("call", [kqat.quantize_model, kqat.plan])
def test_annotations_are_not_passed_over(call: Any) -> None:
    """They were, in silence: the layer shipped at the model's own width."""
    x = keras.Input((4,))
    y = kqat.quantize_annotate_layer(layers.Dense(3, name="marked"), quantize_config="w4a8")(x)
    with pytest.raises(kqat.ModelError, match=r"'marked' is annotated.*quantize_apply"):
        call(keras.Model(x, layers.Dense(2)(y)))


def test_a_layer_of_two_arguments_is_refused_by_name() -> None:
    """Keras took the second tensor for `training`, and ended in an error of Python."""
    x = keras.Input((5, 4))
    attention = layers.MultiHeadAttention(2, 2, name="attention")
    with pytest.raises(PolicyError, match=r"'attention' of type MultiHeadAttention.*argument 2.*"):
        quantize_annotate_layer(attention)(x, x)
    with pytest.raises(PolicyError, match=r"'lstm' of type LSTM.*Received: initial_state= too"):
        quantize_annotate_layer(layers.LSTM(4, name="lstm"))(x, initial_state=[x[:, 0]] * 2)
    # The remedy that the error names.
    model = keras.Model(x, layers.MultiHeadAttention(2, 2, name="attention")(x, x))
    policy = kqat.QuantizePolicy(default=None, rules={"attention": "int8"})
    assert not kqat.plan(model, policy).float_layers()


def test_a_class_of_configs_is_no_config() -> None:
    with pytest.raises(kqat.PolicyError, match=r"the class QuantizeConfig.*QuantizeConfig\(\)"):
        kqat.quantize_annotate_layer(layers.Dense(3), kqat.QuantizeConfig)


class Default8BitQuantizeScheme:
    """Stands for tfmot's class of that name."""

    def __init__(self, disable_per_axis: bool = False) -> None:
        vars(self)["_disable_per_axis"] = disable_per_axis


class Default8BitPrunePreserveQuantizeScheme:
    """Stands for tfmot's class of that name."""

    def get_quantize_registry(self) -> None:
        """By this a scheme is known."""


def test_zeros_of_annotated_layers_are_kept() -> None:
    marked = annotated()
    dense = next(x.layer for x in marked.layers if isinstance(x, QuantizeAnnotate))
    dense.kernel.assign(
        np.where(np.arange(np.size(dense.kernel)) % 2, dense.kernel.numpy().ravel(), 0.0).reshape(
            dense.kernel.shape
        )
    )
    qat = quantize_apply(marked, preserve="sparsity", calibration_data=IMAGES)
    kept = [one for one in qat.layers if isinstance(one, QuantizeWrapper) and one.preserve]
    assert any(preserve.sparsity for one in kept for preserve in one.preserve.values())


def test_the_default_scheme_of_tfmot_is_taken() -> None:
    qat = quantize_apply(annotated(), Default8BitQuantizeScheme(), calibration_data=IMAGES)
    assert any(isinstance(layer, QuantizeWrapper) for layer in qat.layers)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Default8BitQuantizeScheme(True), r"Received: .*\(disable_per_axis=True\)"),
        ("int8", "Received: 'int8'"),
        ({"bits": 4}, "Received: {'bits': 4}"),
        (
            Default8BitPrunePreserveQuantizeScheme(),
            r"Received: Default8BitPrunePreserveQuantizeScheme\(\)\. .* preserve='sparsity'",
        ),
    ],
)
def test_other_schemes_are_refused(scheme: Any, message: str) -> None:
    """They got Python's own TypeError, as there was no such argument."""
    with pytest.raises(PolicyError, match=message):
        quantize_apply(annotated(), scheme=scheme)
