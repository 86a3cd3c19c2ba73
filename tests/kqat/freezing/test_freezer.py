"""Trained is shipped: integers, scales and zero points of a frozen model; and the way back."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat import ActivationQuantizer, FrozenModel, QuantizeConfig, QuantizeWrapper, QuantSpec
from kqat.base.errors import FreezeError, ModelError
from kqat.freezing.freezer import freeze
from kqat.freezing.stripper import strip
from kqat.graph.tracer import trace
from kqat.grids.ranges.fixed import Fixed
from kqat.parts.markers import is_marker
from tests.kqat import reference

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6, 6, 3)).astype(np.float32)
Y = RNG.normal(size=(32, 3)).astype(np.float32)
PER_TENSOR = QuantizeConfig(weights=QuantSpec(symmetric=True, narrow_range=True))


def conv(name: str, filters: int = 4, **options: Any) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", name=name, **options)


def norm(name: str) -> layers.Layer:
    return layers.BatchNormalization(name=name, momentum=0.5)


def float_model() -> keras.Model:
    x = keras.Input((6, 6, 3), name="image")
    y = layers.ReLU(name="relu")(norm("norm1")(conv("conv1", use_bias=False)(x)))
    z = norm("norm2")(layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y))
    y = layers.ReLU(name="sum_relu")(layers.Add(name="sum")([y, z]))
    y = layers.AveragePooling2D(2, name="pool")(layers.Dropout(0.1, name="drop")(y))
    y = layers.Flatten(name="flat")(norm("alone")(y))
    return keras.Model(x, layers.Dense(3, name="head")(y), name="model")


@pytest.fixture(scope="module", params=["int8", PER_TENSOR], ids=["per channel", "per tensor"])
def trained(request: pytest.FixtureRequest) -> keras.Model:
    keras.utils.set_random_seed(0)
    qat = kqat.quantize_model(float_model(), request.param, calibration_data=X)
    for layer in qat.layers:
        if isinstance(layer, QuantizeWrapper) and layer.normalization is not None:
            layer.normalization.gamma.assign([0.5, -1.5, 1.0, 2.0])
    qat.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
    qat.fit(X, Y, batch_size=16, verbose=0)
    return qat


def run_rounded(frozen: FrozenModel, x: np.ndarray) -> Any:
    """The frozen model with every site rounded to its integers."""

    def call(node: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_marker(node.layer, "site"):
            return node.layer(*args, **kwargs)
        site, values = frozen.sites[node.layer.index], np.asarray(args[0])
        if site.name == "pool":  # Kernels of AVERAGE_POOL_2D round halves away from integer zero.
            integers = values / site.scale + site.zero_point
            integers = np.rint(integers + np.copysign(2.0**-12, integers))
            values = (integers - site.zero_point) * site.scale
        return keras.ops.convert_to_tensor(site.reals(site.integers(values)))

    return trace(frozen.model).run([x], call)


def test_shipped_integers_are_the_trained_ones(trained: keras.Model) -> None:
    """From the float weights of the trained model, by the reference."""
    weights = {weight.name: weight for weight in freeze(trained).weights}
    for name in ("conv1", "depthwise", "head"):
        wrapper = trained.get_layer(f"quant_{name}")
        kernel, spec = wrapper.layer.kernel.numpy(), wrapper.weight_specs["kernel"]
        sign = np.ones(1)
        if wrapper.normalization is not None:
            sign = np.sign(wrapper.fold_factor().numpy())
        if spec.axis is None and wrapper.normalization is not None:
            kernel, sign = kernel * wrapper.fold_factor().numpy(), np.ones(1)
        scale = reference.weight_scale(kernel, spec.axis or (), 8)
        integers = reference.quantize_weight(kernel, scale, 8) * sign
        np.testing.assert_array_equal(weights[f"{name}/kernel"].integers, integers)
        # And what training computed with is those integers times that scale.
        rounded = reference.fake_quantize_weight(kernel, scale, 8)
        np.testing.assert_array_equal(wrapper.on_grid("kernel"), rounded)
    assert set(weights) == {"conv1/kernel", "depthwise/kernel", "alone/scale", "head/kernel"}


def test_shipped_scales_are_the_trained_ones(trained: keras.Model) -> None:
    sites = {site.name: site for site in freeze(trained).sites}
    for layer in trained.layers:
        if isinstance(layer, ActivationQuantizer):
            site = sites[layer.name.removesuffix("_quantizer")]
            scale, zero_point = reference.nudge(*np.float32(layer.range()), 8, False)
            assert (site.scale, site.zero_point, site.bits) == (scale, zero_point, 8)
    shapes = {name: site.shape for name, site in sites.items()}
    assert shapes == {
        "image": (6, 6, 3),
        "relu": (6, 6, 4),
        "norm2": (6, 6, 4),
        "sum_relu": (6, 6, 4),
        "pool": (3, 3, 4),
        "alone": (3, 3, 4),
        "flat": (36,),
        "head": (3,),
    }
    assert (sites["pool"].scale, sites["flat"].scale) == (
        sites["sum_relu"].scale,
        sites["alone"].scale,
    )


def test_the_frozen_model_computes_what_the_trained_one_infers(trained: keras.Model) -> None:
    frozen = freeze(trained)
    expected, found = np.asarray(trained(X)), run_rounded(frozen, X)
    steps = np.abs(expected - found) / frozen.sites[-1].scale
    # Folding rounds in float32 elsewhere than BatchNormalization does, so a value close to the
    # middle between two integers may fall to either side; each then moves the sums behind it.
    assert np.mean(np.rint(steps) != 0) <= 0.02
    assert np.rint(steps).max() <= 1


def test_the_frozen_model_has_no_layer_that_only_trains(trained: keras.Model) -> None:
    kinds = {type(layer).__name__ for layer in freeze(trained).model.layers}
    assert (
        kinds & {"Dropout", "BatchNormalization", "ActivationQuantizer", "QuantizeWrapper"} == set()
    )


def test_freezing_leaves_the_model_alone(trained: keras.Model) -> None:
    before = trained.get_weights(), np.asarray(trained(X))
    first, second = freeze(trained), freeze(trained)
    np.testing.assert_equal((trained.get_weights(), np.asarray(trained(X))), before)
    assert first.sites == second.sites
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(a.values, b.values)


def test_stripping_gives_the_float_function_of_the_trained_weights(trained: keras.Model) -> None:
    plain = strip(trained)
    assert [layer.name for layer in plain.layers] == [layer.name for layer in float_model().layers]
    assert (plain.name, plain.output_names) == ("model", ["head"])
    twin = float_model()
    for layer in trained.layers:
        if isinstance(layer, QuantizeWrapper):
            for part in filter(None, (layer.layer, layer.normalization)):
                twin.get_layer(part.name).set_weights(part.get_weights())
    np.testing.assert_array_equal(plain(X), twin(X))
    assert {id(v) for v in plain.variables} & {id(v) for v in trained.variables} == set()


def untrained(build: Callable[[Any], Any], policy: Any = "int8") -> tuple[keras.Model, keras.Model]:
    x = keras.Input((6, 6, 3), name="image")
    model = keras.Model(x, build(x), name="model")
    return model, kqat.quantize_model(model, policy, calibration_data=X)


def two_outputs(x: Any) -> Any:
    y = conv("conv", activation="relu")(x)
    shared = conv("shared")
    z = layers.Identity(name="z")(x)
    return {"b": shared(y), "a": layers.ReLU(6.0, name="clip")(shared(shared(y))), "z": z}


def islands(x: Any) -> Any:
    y = layers.Activation("swish", name="float1")(conv("conv")(x))
    y = layers.MultiHeadAttention(2, 4, name="float2")(y, y)
    return keras.ops.sort(layers.Add(name="sum")([y, conv("conv2")(y)]))


def joined_clamps(x: Any) -> Any:
    both = [layers.ReLU(name=f"relu{i}")(conv(f"conv{i}")(x)) for i in (1, 2)]
    return layers.Concatenate(name="join")(both)


STRIPPED = {
    "two outputs": (two_outputs, "int8"),
    "islands": (islands, {"float*": None, "sort": None}),
    "joined clamps": (joined_clamps, "int8"),
    "only a clamp": (lambda x: layers.ReLU(name="relu")(x), "int8"),
}


@pytest.mark.parametrize(("build", "policy"), STRIPPED.values(), ids=STRIPPED)
def test_an_untrained_model_strips_to_the_same_function(build: Any, policy: Any) -> None:
    model, qat = untrained(build, policy)
    plain = strip(qat)
    expected, found = model(X), plain(X)
    assert keras.tree.map_structure(type, found) == keras.tree.map_structure(type, expected)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert trace(plain).output_names == trace(qat).output_names
    again = kqat.quantize_model(plain, policy, calibration_data=X)
    for a, b in zip(keras.tree.flatten(again(X)), keras.tree.flatten(qat(X)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_islands_stand_between_fences() -> None:
    _, qat = untrained(islands, {"float*": None, "sort": None})
    nodes = trace(freeze(qat).model).nodes
    fences = [node for node in nodes if is_marker(node.layer, "fence")]
    # Out of `conv`, back in behind the attention, and out of the sum.
    assert len(fences) == 3


def test_a_model_that_has_seen_nothing_is_refused() -> None:
    with pytest.warns(kqat.RangeWarning, match="'model' start from its first training batches"):
        qat = kqat.quantize_model(float_model())
    with pytest.raises(
        FreezeError, match=r"quantizer 'image_quantizer', which has seen none. Give"
    ):
        freeze(qat)


@pytest.mark.parametrize("function", [freeze, strip])
def test_a_float_model_is_refused(function: Any) -> None:
    with pytest.raises(
        ModelError, match=r"Expected a QAT model. Received: 'model', which is float"
    ):
        function(float_model())


BROKEN = {
    **{name: f"'{name}' of layer 'conv'" for name in ("kernel", "bias")},
    **{name: f"'{name}' of layer 'norm'" for name in ("beta", "moving_variance")},
    "high": r"the range of 'image'.* kqat.calibrate\(model, data\) finds the ranges anew",
}


@pytest.mark.parametrize("variable", BROKEN)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_weight_is_refused_by_name(variable: str, value: float) -> None:
    _, qat = untrained(lambda x: norm("norm")(conv("conv")(x)))
    broken = next(v for v in qat.weights if v.path.endswith(variable))
    broken.assign(np.full(broken.shape, value))
    with pytest.raises(FreezeError, match=f"'model' with NaN or infinity in {BROKEN[variable]}"):
        freeze(qat)


@pytest.mark.parametrize(
    ("statistics", "epsilon"),
    [
        ({"gamma": 3e38, "moving_variance": 0.0}, 1e-3),
        ({"gamma": 100.0, "moving_mean": 3e38}, 1e-3),
        ({"moving_variance": 0.0}, 0.0),
        ({"moving_variance": 0.0, "gamma": 0.0}, 0.0),
    ],
    ids=["weights", "bias", "no variance", "a dead channel without variance"],
)
def test_a_fold_that_overflows_is_refused_by_name(
    statistics: dict[str, float], epsilon: float
) -> None:
    _, folded = untrained(lambda x: norm("norm")(conv("conv")(x)))
    _, alone = untrained(lambda x: norm("norm")(layers.ReLU(name="relu")(conv("conv")(x))))
    for qat, inner, name in (
        (folded, folded.get_layer("quant_conv").normalization, "conv"),
        (alone, alone.get_layer("quant_norm").layer, "norm"),
    ):
        inner.epsilon = epsilon
        for variable, value in statistics.items():
            getattr(inner, variable).assign(np.full(4, value))
        with pytest.raises(FreezeError, match=rf"'{name}', whose weights or bias do not.*epsilon"):
            freeze(qat)


def test_scales_that_were_taken_apart_are_refused() -> None:
    x = keras.Input((3,))
    parts = [
        ActivationQuantizer(QuantSpec(), Fixed(-1.0, high), name=f"q{high}")(x)
        for high in (1.0, 2.0)
    ]
    qat = keras.Model(x, layers.Concatenate(name="join")(parts))
    with pytest.raises(FreezeError, match="one scale for all inputs of 'join'"):
        freeze(qat)


@pytest.mark.filterwarnings("ignore:.*`quantize` method")
def test_a_qat_model_that_keras_quantized_is_refused_by_name() -> None:
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Dense(3, activation="relu")(x)))
    qat = kqat.quantize_model(model, calibration_data=RNG.normal(size=(8, 4)).astype(np.float32))
    qat.quantize("int8")
    with pytest.raises(ModelError, match=r"Keras quantized 'quant_\w+', by quantize\('int8'\)"):
        freeze(qat)
