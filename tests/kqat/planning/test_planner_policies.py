"""How a policy's rules reach layers, inputs and weights; what is reported, and what refused."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat import PolicyWarning, QuantizeConfig, QuantSpec
from kqat.base.errors import PolicyError
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.minmax import MinMax
from kqat.grids.ranges.moving_average import MovingAverage
from kqat.planning.plan import Group, LayerPlan, Plan

W4 = QuantSpec(bits=4, symmetric=True, narrow_range=True, axis="channel")
MINMAX = QuantizeConfig(activation_range=MinMax())
# As many samples, and as mixed, as calibration asks for: it warns of nothing.
IMAGES = np.random.default_rng(0).normal(size=(128, 6, 6, 3)).astype(np.float32)


def image_plan(build: Callable[[Any], Any], policy: Any = "int8") -> Plan:
    x = keras.Input((6, 6, 3), name="image")
    return kqat.plan(keras.Model(x, build(x), name="model"), policy)


def conv(name: str, **options: Any) -> layers.Layer:
    return layers.Conv2D(3, 3, padding="same", use_bias=False, name=name, **options)


def layer(plan: Plan, name: str) -> LayerPlan:
    return next(entry for entry in plan.layers if entry.name == name)


def groups(plan: Plan) -> dict[str, Group]:
    return {group.name.removesuffix("_quantizer"): group for group in plan.groups}


def test_rules_name_layers_classes_and_inputs() -> None:
    policy = {
        "image": QuantizeConfig(activation_range=Fixed(-2.0, 2.0)),
        "a*": MINMAX,
        layers.Dense: QuantizeConfig(weights=W4),
    }
    plan = image_plan(lambda x: layers.Dense(2, name="dense")(conv("b")(conv("a1")(x))), policy)
    found = {name: group.range_method for name, group in groups(plan).items()}
    assert found == {
        "image": Fixed(-2.0, 2.0),
        "a1": MinMax(),
        "b": MovingAverage(),
        "dense": MovingAverage(),
    }
    assert layer(plan, "dense").weights == {"kernel": dataclasses.replace(W4, axis=(-1,))}
    assert layer(plan, "b").weights["kernel"].bits == 8


def test_an_input_takes_after_its_first_reader() -> None:
    plan = image_plan(lambda x: conv("conv")(x), {"conv": MINMAX})
    assert groups(plan)["image"].range_method == MinMax()


def test_a_rule_for_a_layer_serves_its_parts_and_later_calls() -> None:
    def build(x: Any) -> Any:
        shared = conv("conv", activation="relu")
        return shared(shared(x))

    plan = image_plan(build, {"conv": MINMAX})
    assert {group.range_method for group in plan.groups} == {MinMax()}
    assert {entry.origin for entry in plan.layers} == {"conv"}


def two_layers() -> keras.Model:
    x = keras.Input((6, 6, 3), name="image")
    inner = keras.Model(y := keras.Input((6, 6, 3)), conv("deep")(y), name="stem")
    return keras.Model(x, conv("conv")(inner(x)), name="model")


def test_rules_that_decide_nothing_are_reported() -> None:
    policy = {"conv*": None, "conv": MINMAX, layers.Dense: None}
    plan = kqat.plan(two_layers(), policy)
    assert plan.unused_rules == ("conv", str(layers.Dense))
    assert "rule decides nothing: conv" in str(plan)
    with pytest.warns(PolicyWarning) as caught:
        kqat.quantize_model(two_layers(), policy, calibration_data=IMAGES)
    messages = [str(w.message) for w in caught]
    assert messages[0].startswith("The policy's rule 'conv' decides nothing about 'model'")
    assert len(messages) == 2
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ({"cnov": None}, "'model'. Received: 'cnov', which .* mean 'conv'.*stem_deep, conv, image"),
        ({"conv": "w4a8", "conf*": None}, "Received: 'conf[*]'.*Did you mean 'conv'"),
        ({"deep": None}, "Did you mean 'stem_deep'"),
        ({"stem": None}, "Did you mean 'stem_[*]'"),
        ({"image": None}, "a config for 'image', an input of 'model'. Received: None"),
    ],
)
def test_names_that_match_nothing_are_refused(policy: Any, match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        kqat.plan(two_layers(), policy)
    with pytest.raises(PolicyError, match=match):
        kqat.sensitivity(two_layers(), IMAGES, policy=policy)


def test_a_long_list_of_names_is_cut() -> None:
    x = y = keras.Input((6, 6, 3), name="image")
    for index in range(20):
        y = conv(f"block{index}")(y)
    with pytest.raises(PolicyError, match=r"block11 and 9 more\.$"):
        kqat.plan(keras.Model(x, y), {"head": None})


def test_a_policy_whose_rules_all_match_warns_of_nothing() -> None:
    x = keras.Input((6, 6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = keras.Model(x, conv("a")(x))
        kqat.quantize_model(model, {"a": MINMAX}, calibration_data=IMAGES)


def test_two_grids_in_one_group_are_refused() -> None:
    def build(x: Any) -> Any:
        return layers.Concatenate(name="join")([conv("a")(x), conv("b")(x)])

    wide = QuantizeConfig(activation_range=Fixed(-4.0, 4.0))
    with pytest.raises(PolicyError, match=r"one activation grid for 'a' and 'b'.*Fixed.*Moving"):
        image_plan(build, {"a": wide})


def test_two_configs_for_one_layer_are_refused() -> None:
    def build(x: Any) -> Any:
        shared = conv("conv")
        return shared(shared(x))

    with pytest.raises(PolicyError, match=r"calls 'conv' and 'conv_call2' of one layer.*None"):
        image_plan(build, {"conv_call2": None})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, r"weights \['kernel'\] of layer 'conv' of type Conv2D. Received: \[\].*give None"),
        ({"bias": W4}, r"weights \['kernel'\] of layer 'conv'.*Received: \['bias'\]"),
        (
            {"kernel": dataclasses.replace(W4, axis=0)},
            r"scales of 'kernel' of layer 'conv'.*along axes \(-1,\).*axes \(0,\)",
        ),
    ],
    ids=["no weights", "another variable", "another axis"],
)
def test_weight_grids_that_no_kernel_has_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        image_plan(lambda x: conv("conv")(x), QuantizeConfig(weights=weights))


@pytest.mark.parametrize("axis", [3, -1, (3,), "channel"], ids=str)
def test_the_channel_axis_may_be_said_in_any_way(axis: Any) -> None:
    config = QuantizeConfig(weights={"kernel": dataclasses.replace(W4, axis=axis)})
    plan = image_plan(lambda x: conv("conv")(x), config)
    assert layer(plan, "conv").weights["kernel"].axis == (-1,)


@pytest.mark.parametrize(
    ("build", "axes"),
    [
        (lambda x: layers.DepthwiseConv2D(3, name="layer")(x), (-2, -1)),
        (lambda x: layers.Conv2DTranspose(3, 3, name="layer")(x), (-2,)),
        (lambda x: layers.Dense(3, name="layer")(x), (-1,)),
        (lambda x: layers.Conv1D(3, 3, name="layer")(layers.Reshape((6, 18))(x)), (-1,)),
    ],
    ids=["depthwise", "transpose", "dense", "1-D"],
)
def test_channel_axes_follow_the_layer_type(build: Callable[[Any], Any], axes: Any) -> None:
    assert layer(image_plan(build), "layer").weights["kernel"].axis == axes


def test_a_given_range_is_that_of_the_layers_own_output() -> None:
    """Not of the input before it, nor of the sum inside it."""
    policy = {"conv": QuantizeConfig(activation_range=Fixed(0.0, 4.0))}
    plan = image_plan(
        lambda x: layers.Dense(2, name="after")(conv("conv", activation="elu")(x)), policy
    )
    found = {name: group.range_method for name, group in groups(plan).items()}
    assert found == {
        "image": MovingAverage(),
        "conv": MovingAverage(),
        "conv_elu": Fixed(0.0, 4.0),
        "after": MovingAverage(),
    }


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda x: layers.ReLU()(conv("inside")(x)), "inside"),
        (lambda x: layers.MaxPooling2D(name="pool")(conv("conv")(x)), "pool"),
        (lambda x: layers.Softmax(name="kernel")(layers.Flatten()(x)), "kernel"),
    ],
)
def test_a_given_range_that_decides_nothing_is_refused(build: Any, name: str) -> None:
    policy = {name: QuantizeConfig(activation_range=Fixed(-1.0, 1.0))}
    with pytest.raises(PolicyError, match=rf"Fixed\(low=-1.0, high=1.0\) for '{name}', whose"):
        image_plan(build, policy)


def test_a_given_range_for_all_decides_where_it_can() -> None:
    config = QuantizeConfig(activation_range=Fixed(-1.0, 1.0))
    plan = image_plan(lambda x: layers.ReLU(name="relu")(conv("conv")(x)), config)
    assert groups(plan)["relu"].range_method == Fixed(-1.0, 1.0)
