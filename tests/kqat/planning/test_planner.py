"""Every decision of a plan: what fuses, what shares a scale, what stays float, what is refused."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat import QuantizeConfig, QuantSpec
from kqat.grids.ranges.fixed import Fixed
from kqat.grids.ranges.minmax import MinMax
from kqat.planning.plan import Group, LayerPlan, Plan

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


@pytest.mark.parametrize(
    "build", [read_twice, also_an_output, conv_called_twice, norm_called_twice]
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


def test_a_clamp_with_a_regularizer_is_not_carried_out_by_the_quantizer() -> None:
    # The regularizer needs the clamp's output before it is rounded.
    act = layers.Activation("relu", activity_regularizer="l2", name="relu")
    plan = image_plan(lambda x: act(conv("conv")(x)))
    assert layer(plan, "relu").note == "fused into conv"
    assert groups(plan)["relu"].clamp is None


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
    assert "one scale for image, a, b" in str(plan)


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
    assert all(len(roundings) == 1 for roundings in plan.roundings.values())


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


def test_a_rounding_of_a_kernel_is_not_that_of_a_layer_of_its_name() -> None:
    """A softmax beside others is rounded on its kernel's scale first, then on theirs."""
    x = keras.Input((6,))
    soft = keras.layers.Softmax(name="a")(keras.layers.Dense(4, name="a_kernel")(x))
    plan = kqat.plan(keras.Model(x, keras.layers.Concatenate()([soft, keras.layers.Dense(4)(x)])))
    first = {ref: placed[0].group for ref, placed in plan.roundings.items()}
    made = {node.name: first.get(node.outputs[0]) for node in plan.graph.nodes}
    assert made["a"] != made["a_kernel"]
