"""Every decision of a plan: what fuses, what shares a scale, what stays float, what is refused."""

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
from kqat.errors import PolicyError
from kqat.quantizers import Fixed, MinMax, MovingAverage
from kqat.reporting import Group, LayerPlan, Plan

CONV = {"padding": "same", "use_bias": False}
W4 = QuantSpec(bits=4, symmetric=True, narrow_range=True, axis="channel")
MINMAX = QuantizeConfig(activation_range=MinMax())


def image_plan(build: Callable[[Any], Any], policy: Any = "int8") -> Plan:
    x = keras.Input((6, 6, 3), name="image")
    return kqat.plan(keras.Model(x, build(x), name="model"), policy)


def conv(name: str, filters: int = 3, **options: Any) -> layers.Layer:
    return layers.Conv2D(filters, 3, name=name, **{**CONV, **options})


def norm(name: str = "norm") -> layers.Layer:
    return layers.BatchNormalization(name=name)


def relu(name: str = "relu", top: float | None = None) -> layers.Layer:
    return layers.ReLU(top, name=name)


def roles(plan: Plan) -> dict[str, str]:
    return {layer.name: layer.role for layer in plan.layers}


def layer(plan: Plan, name: str) -> LayerPlan:
    return next(entry for entry in plan.layers if entry.name == name)


def groups(plan: Plan) -> dict[str, Group]:
    return {group.name.removesuffix("_quantizer"): group for group in plan.groups}


def sources(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {name: group.sources for name, group in groups(plan).items()}


# Fusion


def test_conv_norm_relu_is_one_kernel() -> None:
    plan = image_plan(lambda x: relu()(norm()(conv("conv")(x))))
    assert roles(plan) == {"conv": "integer", "norm": "folded", "relu": "clamp"}
    assert layer(plan, "conv").normalization == "norm"
    assert layer(plan, "norm").note == "into conv"
    assert layer(plan, "relu").note == "fused into norm"
    assert layer(plan, "relu").ops == ()
    assert sources(plan) == {"image": ("image",), "relu": ("relu",)}
    assert groups(plan)["relu"].clamp == "relu"


def test_norm_after_an_activation_stands_alone() -> None:
    plan = image_plan(lambda x: norm()(conv("conv", activation="relu")(x)))
    assert roles(plan) == {"conv": "integer", "conv_relu": "clamp", "norm": "integer"}
    assert layer(plan, "norm").ops == ("RESHAPE", "DEPTHWISE_CONV_2D", "MUL")
    assert set(sources(plan)) == {"image", "conv_relu", "norm"}


def read_twice(x: Any) -> Any:
    y = conv("conv")(x)
    return [norm()(y), y]


def also_an_output(x: Any) -> Any:
    y = conv("conv")(x)
    return [norm()(y), layers.Flatten()(y), y]


def conv_called_twice(x: Any) -> Any:
    shared = conv("conv")
    return norm()(shared(shared(x)))


def norm_called_twice(x: Any) -> Any:
    shared = norm()
    return layers.Add(name="add")([shared(conv("conv")(x)), shared(conv("other")(x))])


def after_dropout(x: Any) -> Any:
    return norm()(layers.Dropout(0.1)(conv("conv")(x)))


@pytest.mark.parametrize(
    "build", [read_twice, also_an_output, conv_called_twice, norm_called_twice, after_dropout]
)
def test_norm_does_not_fold_where_the_sum_is_needed_itself(build: Callable[[Any], Any]) -> None:
    plan = image_plan(build)
    assert layer(plan, "conv").normalization is None
    assert layer(plan, "norm").role == "integer"
    assert "conv" in groups(plan)


def test_relu_fuses_only_as_the_one_reader() -> None:
    def build(x: Any) -> Any:
        y = conv("conv")(x)
        return layers.Add(name="add")([relu()(y), y])

    plan = image_plan(build)
    assert layer(plan, "relu").note == "operator of its own"
    assert layer(plan, "relu").ops == ("RELU",)
    assert {"conv", "relu"} <= set(groups(plan))


def test_relu_fuses_into_no_kernel_that_has_none() -> None:
    plan = image_plan(lambda x: relu(top=6.0)(layers.MaxPooling2D(2, name="pool")(x)))
    assert layer(plan, "relu").ops == ("RELU",)  # RELU6 ships as RELU, see op_table
    assert groups(plan)["relu"].clamp == "relu6"


def test_a_float_norm_folds_into_nothing() -> None:
    plan = image_plan(lambda x: norm()(conv("conv")(x)), {"norm": None})
    assert roles(plan) == {"conv": "integer", "norm": "float"}
    assert plan.float_layers() == ("norm",)


# Scales


MOVES = {
    "max pool": layers.MaxPooling2D(2, name="move"),
    "average pool": layers.AveragePooling2D(2, name="move"),
    "pad": layers.ZeroPadding2D(1, name="move"),
    "crop": layers.Cropping2D(1, name="move"),
    "flatten": layers.Flatten(name="move"),
    "reshape": layers.Reshape((9, 12), name="move"),
    "permute": layers.Permute((2, 1, 3), name="move"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_moves_values_has_no_scale_of_its_own(move: layers.Layer) -> None:
    plan = image_plan(lambda x: move(conv("conv")(x)))
    assert sources(plan) == {"image": ("image",), "conv": ("conv",)}
    assert layer(plan, "move").note == "same scale as input"


def test_a_pool_that_computes_rounds_again_on_the_same_grid() -> None:
    plan = image_plan(lambda x: layers.AveragePooling2D(2, name="pool")(conv("conv")(x)))
    pool = layer(plan, "pool")
    (rounding,) = plan.roundings[plan.graph.nodes[-1].outputs[0]]
    assert (pool.group, rounding.group) == ("conv_quantizer", "conv_quantizer")
    assert not rounding.observe


def test_concatenated_values_share_one_scale_through_pools() -> None:
    def build(x: Any) -> Any:
        pooled = layers.MaxPooling2D(2)(conv("a")(x))
        strided = conv("b", strides=2)(x)
        return layers.Concatenate(name="join")([pooled, strided, layers.AveragePooling2D(2)(x)])

    plan = image_plan(build)
    assert sources(plan) == {"image": ("image", "a", "b")}
    assert groups(plan)["image"].sites == 3
    assert "one scale: image, a, b" in str(plan)


def test_each_link_of_a_residual_chain_has_its_own_scale() -> None:
    def build(x: Any) -> Any:
        y = relu("r0")(conv("c0")(x))
        for i in (1, 2):
            y = relu(f"r{i}")(layers.Add(name=f"add{i}")([y, norm(f"n{i}")(conv(f"c{i}")(y))]))
        return y

    plan = image_plan(build)
    assert set(sources(plan)) == {"image", "r0", "n1", "r1", "n2", "r2"}
    assert layer(plan, "r1").note == "fused into add1"


def test_a_shared_layer_has_one_scale_per_call() -> None:
    def build(x: Any) -> Any:
        shared = conv("conv")
        return shared(shared(x))

    plan = image_plan(build)
    assert set(sources(plan)) == {"image", "conv", "conv_call2"}


def test_a_clamp_is_the_groups_only_if_all_have_it() -> None:
    def build(x: Any, second: float | None) -> Any:
        both = [relu("a")(conv("c")(x)), relu("b", second)(conv("d")(x))]
        return layers.Concatenate()(both)

    same, mixed = image_plan(lambda x: build(x, None)), image_plan(lambda x: build(x, 6.0))
    assert groups(same)["a"].clamp == "relu"
    assert groups(mixed)["a"].clamp is None
    assert [layer(mixed, n).note for n in "ab"] == ["fused into c", "fused into d"]


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        ("softmax", 0.0, 255 / 256),
        ("sigmoid", 0.0, 255 / 256),
        ("tanh", -1.0, 127 / 128),
        ("log_softmax", -255 / 16, 0.0),
    ],
)
def test_kernels_with_a_fixed_scale_get_it(activation: str, low: float, high: float) -> None:
    plan = image_plan(lambda x: layers.Dense(4, activation=activation, name="dense")(x))
    group = groups(plan)[f"dense_{activation}"]
    assert group.range_method == Fixed(low, high)
    assert not group.is_observed
    assert groups(plan)["dense"].is_observed


def test_a_fixed_scale_in_a_group_with_another_is_requantized() -> None:
    def build(x: Any) -> Any:
        gate = layers.Activation("sigmoid", name="gate")(x)
        return layers.Concatenate(name="join")([conv("conv")(x), gate])

    plan = image_plan(build)
    assert layer(plan, "gate").note.startswith("requantized: the kernel's fixed scale")
    assert layer(plan, "gate").group == "conv_quantizer"
    assert sources(plan)["conv"] == ("conv", "gate")
    assert groups(plan)["gate_kernel"].range_method == Fixed(0.0, 255 / 256)


def test_equal_fixed_scales_share_theirs() -> None:
    def build(x: Any) -> Any:
        gates = [layers.Activation("sigmoid", name=n)(x) for n in ("a", "b")]
        return layers.Concatenate()(gates)

    plan = image_plan(build)
    assert groups(plan)["a"].range_method == Fixed(0.0, 255 / 256)
    assert "requantized" not in str(plan)


def test_training_only_layers_leave_no_operator() -> None:
    plan = image_plan(lambda x: conv("conv")(layers.Dropout(0.5, name="drop")(x)))
    assert roles(plan) == {"drop": "training only", "conv": "integer"}
    assert layer(plan, "drop").ops == ()
    assert set(sources(plan)) == {"image", "conv"}


# Islands


def test_a_float_island_is_rounded_on_both_sides() -> None:
    plan = image_plan(lambda x: conv("c")(conv("b")(conv("a")(x))), {"b": None})
    assert roles(plan) == {"a": "integer", "b": "float", "c": "integer"}
    assert set(sources(plan)) == {"image", "a", "b", "c"}
    assert layer(plan, "b").note == "the policy leaves it float"


def test_a_float_head_and_tail_bring_no_range_where_nobody_reads_integers() -> None:
    plan = image_plan(lambda x: conv("c")(conv("b")(conv("a")(x))), {"[ac]": None})
    assert set(sources(plan)) == {"a", "b"}


def test_an_input_that_only_floats_read_is_not_rounded() -> None:
    plan = image_plan(lambda x: conv("b")(layers.Dropout(0.1)(conv("a")(x))), {"a": None})
    assert set(sources(plan)) == {"dropout", "b"}


# Policies


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


def test_rules_that_match_nothing_are_reported() -> None:
    policy = {"cnov*": None, layers.Dense: None, "conv": MINMAX, "image": None}
    x = keras.Input((6, 6, 3), name="image")
    model = keras.Model(x, conv("conv")(x), name="model")
    plan = kqat.plan(model, policy)
    assert plan.unused_rules == ("cnov*", str(layers.Dense), "image")
    assert "rule matched nothing: cnov*" in str(plan)
    with pytest.warns(PolicyWarning) as caught:
        kqat.quantize_model(model, policy, calibration_data=np.ones((2, 6, 6, 3)))
    messages = [str(w.message) for w in caught]
    assert messages[0] == "The policy's rule 'cnov*' matched no layer of 'model'."
    assert len(messages) == 3
    assert {w.filename for w in caught} == {__file__}


def test_a_policy_whose_rules_all_match_warns_of_nothing() -> None:
    x = keras.Input((6, 6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = np.ones((2, 6, 6, 3))
        kqat.quantize_model(keras.Model(x, conv("a")(x)), {"a": MINMAX}, calibration_data=data)


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


def test_planning_touches_nothing() -> None:
    x = keras.Input((6, 6, 3), name="image")
    model = keras.Model(x, relu()(norm()(conv("conv")(x))), name="model")
    before = model.to_json(), model.get_weights()
    first, second = kqat.plan(model), kqat.plan(model)
    assert first == second
    assert model.to_json() == before[0]
    np.testing.assert_equal(model.get_weights(), before[1])


def test_a_given_range_is_that_of_the_layers_own_output() -> None:
    inputs = keras.Input((4,), name="x")
    outputs = keras.layers.Dense(3, activation="elu", name="dense")(inputs)
    config = kqat.QuantizeConfig(activation_range=kqat.Fixed(-1.0, 3.0))
    plan = kqat.plan(keras.Model(inputs, outputs), config)
    methods = {group.name: group.range_method for group in plan.groups}
    assert methods == {
        "x_quantizer": kqat.MovingAverage(),
        "dense_quantizer": kqat.MovingAverage(),
        "dense_elu_quantizer": kqat.Fixed(-1.0, 3.0),
    }
