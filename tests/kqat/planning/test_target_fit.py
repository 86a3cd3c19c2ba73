"""Which layers fit a device, what is said of those that do not, and the model that does."""

import json
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
from kqat.base.errors import TargetError
from kqat.devices.kernels import RUNTIMES, TABLE_OPS
from kqat.devices.replacements import NEAREST
from kqat.devices.targets import TARGETS
from kqat.registry.layer_table import ACTIVATIONS

NPUS = ("ethos_u55", "ethos_u65", "ethos_u85", "edge_tpu")


def zoo() -> keras.Model:
    """Activations of every kind, as a layer's argument, as layers, as operations, in a model."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3), name="x")
    y = L.Conv2D(4, 3, activation="gelu", name="conv")(x)
    y = L.Activation("mish", name="odd")(y)
    inner = keras.Sequential(
        [keras.Input((6, 6, 4)), L.ELU(name="elu"), L.Conv2D(2, 1, name="one")]
    )
    y = inner(y)
    y = keras.ops.softplus(keras.ops.silu(y))
    y = L.Flatten()(L.LeakyReLU(name="leaky")(y))
    return keras.Model(x, L.Dense(5, "softmax", name="class")(y), name="zoo")


def unfit(model: keras.Model, target: str) -> dict[str, str | None]:
    """The layers that do not fit, with what takes their activation's place."""
    return {m.layer: m.replacement for m in kqat.plan(model, target=target).misfits}


def test_each_target_names_its_own_layers() -> None:
    model = zoo()
    assert unfit(model, "litert") == unfit(model, "tflite_micro") == {}
    names = {layer.origin for layer in kqat.plan(model).layers}
    soft, inner = "softplus", next(name for name in names if name.endswith("_elu"))
    assert unfit(model, "ethos_u55") == {"odd": "hard_silu", soft: "relu"}
    assert unfit(model, "ethos_u65") == unfit(model, "ethos_u55")
    assert unfit(model, "ethos_u85") == {}
    assert unfit(model, "edge_tpu") == {
        "conv": "relu6", "odd": "relu6", inner: "relu", soft: "relu", "leaky": "relu"
    }  # fmt: skip
    assert {"conv", "odd", "silu", "leaky"} < set(unfit(model, "cmsis_nn"))


def test_the_plan_says_so() -> None:
    plan = kqat.plan(zoo(), target="edge_tpu")
    text = plan.text(200)
    assert "layer 'conv' (CAST, GATHER) runs, but not on the Edge TPU: use relu6 for gelu" in text
    table = json.loads(plan.to_json())
    assert table["target"] == "edge_tpu"
    assert {m["layer"] for m in table["misfits"]} == {m.layer for m in plan.misfits}
    assert not any(m.blocking for m in plan.misfits)
    fitting = kqat.plan(keras.Sequential([keras.Input((4,)), L.Dense(2)]), target="edge_tpu")
    assert "target edge_tpu: every layer fits" in str(fitting)
    assert "target" not in str(kqat.plan(zoo()))


@pytest.mark.parametrize("target", NPUS)
def test_an_adapted_model_fits(target: str) -> None:
    model = zoo()
    adapted = kqat.adapt(model, target)
    assert kqat.plan(adapted, target=target).misfits == ()
    assert (adapted.name, adapted.output_names) == (model.name, model.output_names)
    assert [t.name for t in adapted.inputs] == [t.name for t in model.inputs]
    for old, new in zip(model.get_weights(), adapted.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert model.get_layer("conv").activation is keras.activations.gelu


def test_what_fits_computes_the_same() -> None:
    model = zoo()
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    same, other = kqat.adapt(model, "tflite_micro"), kqat.adapt(model, "edge_tpu")
    np.testing.assert_array_equal(model(x), same(x))
    assert not np.array_equal(model(x), other(x))


def test_the_original_and_its_copy_share_nothing() -> None:
    model = zoo()
    adapted = kqat.adapt(model, "edge_tpu")
    before = model.get_weights()
    adapted.set_weights([w + 1 for w in adapted.get_weights()])
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


def test_a_shared_layer_stays_shared() -> None:
    x = keras.Input((6,), name="x")
    dense = L.Dense(6, "gelu", name="twice")
    model = keras.Model(x, dense(dense(x)))
    adapted = kqat.adapt(model, "edge_tpu")
    assert len(adapted.weights) == 2
    assert kqat.plan(adapted, target="edge_tpu").misfits == ()


def test_the_impossible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential([keras.Input((4, 4, 1)), L.GlobalAveragePooling2D(name="pool")])
    with pytest.raises(TargetError, match=r"one of the targets \['cmsis_nn', .*Received: 'toast'"):
        kqat.plan(model, target="toast")
    monkeypatch.setitem(kqat.devices.kernels.KERNELS, "MEAN", frozenset())
    (misfit,) = kqat.plan(model, target="tflite_micro").misfits
    assert misfit.blocking and misfit.replacement is None
    with pytest.raises(TargetError, match=r"runs, or that have.*layer 'pool' \(MEAN\) does not"):
        kqat.adapt(model, "tflite_micro")


def test_the_tables_name_what_exists() -> None:
    assert set(NEAREST) <= set(ACTIVATIONS)
    assert {name for row in NEAREST.values() for name in row} <= set(ACTIVATIONS)
    assert {target.runtime for target in TARGETS.values()} <= RUNTIMES
    for target in TARGETS.values():
        assert bool(target.accelerator) == bool(target.accelerated)
        # A table can always be looked up, if only by the CPU.
        assert all(target.runs(op) for op in TABLE_OPS)


@pytest.mark.parametrize(
    ("target", "axis", "said"),
    [
        # Its packed convolutions are slow; the others have no kernel.
        ("litert", "channel", {"conv"}), ("tflite_micro", None, set()),
        ("tflite_micro", "channel", set()),
        ("ethos_u55", None, {"conv", "dense"}),
    ],
)  # fmt: skip
def test_weights_that_will_not_be_packed_are_named(
    target: str, axis: str | None, said: set[str]
) -> None:
    x = keras.Input((6, 6, 2), name="x")
    y = L.Dense(3, name="dense")(L.Flatten()(L.Conv2D(4, 3, name="conv")(x)))
    spec = kqat.QuantSpec(bits=4, symmetric=True, narrow_range=True, axis=axis)
    plan = kqat.plan(keras.Model(x, y), kqat.QuantizeConfig(weights=spec), target=target)
    assert {m.layer for m in plan.misfits} == said
    why = "is several times as slow" if target == "litert" else "this target has no kernel for"
    for misfit in plan.misfits:
        assert "stores its 4-bit weights as int8" in str(misfit) and why in str(misfit)


def wide() -> keras.Model:
    x = keras.Input((8, 8, 3), name="x")
    y = L.UpSampling2D(interpolation="bilinear", name="smooth")(L.Conv2D(4, 3, name="conv")(x))
    y = L.UpSampling2D(name="sharp")(L.Activation("mish", name="odd")(y))
    return keras.Model(x, L.Dense(3, name="head")(L.GlobalMaxPooling2D(name="peak")(y)))


@pytest.mark.parametrize(
    ("target", "policy", "blocked", "slow"),
    [
        ("litert", "int16x8", {}, {}),
        ("tflite_micro", "int16x8", {"smooth": "RESIZE_BILINEAR", "peak": "REDUCE_MAX"}, {}),
        ("tflite_micro", {"peak": "int16x8"}, {"peak": "REDUCE_MAX"}, {}),
        ("tflite_micro", {"conv": "int16x8", "odd": "int16x8"}, {}, {}),
        ("ethos_u55", {"odd": "int16x8"}, {}, {"odd": "CAST, DIV, GATHER"}),
        ("ethos_u55", {"conv": "int16x8", "peak": "int16x8"}, {}, {"odd": "CAST, GATHER"}),
        ("edge_tpu", {"conv": "int16x8", "odd": "int16x8"}, {},
         {"conv": "CONV_2D", "conv_int8": "QUANTIZE", "smooth_int16": "QUANTIZE",
          "odd": "CAST, DIV, GATHER", "odd_int8": "QUANTIZE"}),
    ],
)  # fmt: skip
def test_a_plan_knows_the_kernels_of_sixteen_bits(
    target: str, policy: Any, blocked: dict[str, str], slow: dict[str, str]
) -> None:
    found = kqat.plan(wide(), policy, target=target).misfits
    names = [
        {m.layer: ", ".join(m.operators) for m in found if m.blocking is b} for b in (True, False)
    ]
    assert names == [blocked, slow]
    for misfit in found:
        if misfit.blocking:
            assert f"'{misfit.layer}' ({misfit.operators[0]}) does not run there on int16" in str(
                misfit
            )
            assert "give it 'int8' in the policy" in misfit.remedy


def test_a_plan_knows_the_shapes_of_the_edge_tpu() -> None:
    x = keras.Input((4, 6), name="x")
    y = L.Softmax(name="rows")(L.Dense(6, name="dense")(x))
    y = L.Dense(5, name="head")(L.Flatten()(L.LayerNormalization(name="norm")(y)))
    z = L.MaxPooling3D(name="deep")(L.Reshape((2, 2, 6, 1), name="four")(x))
    model = keras.Model(x, [L.Softmax(name="class")(y), z])
    said = {
        m.layer: str(m) for m in kqat.plan(model, target="edge_tpu").misfits if "for it" in str(m)
    }
    assert set(said) == {"rows", "norm", "four", "deep", "dense"}
    assert (
        "(SOFTMAX) runs, but not on the Edge TPU, for it reads (4, 6); SOFTMAX takes"
        in said["rows"]
    )
    assert "averages 6 channels" in said["norm"]
    assert "makes (4, 6); FULLY_CONNECTED makes one axis only" in said["dense"]
    assert "only the three innermost axes may be larger than 1" in said["four"]
    assert kqat.plan(model, target="litert").misfits == ()


@pytest.mark.parametrize(
    ("call", "target", "operator"),
    [
        # Slopes of every other of six axes: no two neighbouring axes can be one.
        (lambda x: every_other_of_six(x), "litert", None),
        (lambda x: every_other_of_six(x), "tflite_micro", "TRANSPOSE"),
        (lambda x: L.PReLU(shared_axes=[1, 3])(x), "tflite_micro", None),
        (lambda x: L.PReLU()(x), "tflite_micro", None),
        (lambda x: keras.ops.sigmoid(x[..., :2]), "tflite_micro", None),
        (lambda x: L.ReLU()(x), "tflite_micro", None),
    ],
)
def test_values_of_too_many_axes_are_named(call: Any, target: str, operator: str | None) -> None:
    x = keras.Input((4, 4, 6))
    model = keras.Model(x, call(L.Reshape((4, 4, 2, 3))(L.Conv2D(6, 1)(x))))
    found = kqat.plan(model, target=target).misfits
    assert {misfit.operators for misfit in found} == ({(operator,)} if operator else set())
    assert all(misfit.blocking and "6 axes" in misfit.reason for misfit in found)


def every_other_of_six(x: Any) -> Any:
    return L.PReLU(shared_axes=[2, 4])(L.Reshape((4, 2, 2, 2, 3))(x))


@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda x: ops.flip(x, axis=1), "GATHER"),
        (lambda x: ops.cast(ops.repeat(x > 1, 2, axis=1), "int32"), "GATHER"),
        (lambda x: ops.transpose(ops.reshape(x, (-1, 2, 3)), (0, 2, 1)), "TRANSPOSE"),
        (lambda x: ops.pad(x, ((0, 0), (1, 1)), mode="reflect"), "MIRROR_PAD"),
        (lambda x: ops.pad(x, ((0, 0), (1, 1)), constant_values=3), None),
        (lambda x: ops.stack([x[:, 3:], x[:, :3]], axis=1), None),
    ],
)
def test_indexes_that_a_kernel_does_not_move_are_named(call: Any, operator: str | None) -> None:
    """TFLite Micro's kernels of these take quantities alone; the file did not load there."""
    x = keras.Input((6,), dtype="int32")
    rows = L.Embedding(8, 4)(call(x))
    model = keras.Model(x, L.Dense(2)(L.Flatten()(rows)))
    found = kqat.plan(model, target="tflite_micro").misfits
    assert [misfit.operators for misfit in found] == ([(operator,)] if operator else [])
    assert all(misfit.blocking for misfit in found)
    assert kqat.plan(model, target="litert").misfits == ()


def test_the_price_of_packed_convolutions_is_told() -> None:
    chain = [L.Conv2D(4, 3, name="conv"), L.Flatten(), L.Dense(4, name="dense")]
    model = keras.Sequential([keras.Input((6, 6, 3)), *chain])
    told = kqat.plan(model, "w4a8")
    assert "LiteRT takes 3.5 to 5 times as long for packed convolutions" in str(told)
    assert "LiteRT takes" not in str(kqat.plan(model))
    on_phone = kqat.plan(model, "w4a8", target="litert").misfits
    assert [(m.layer, m.blocking) for m in on_phone] == [("conv", False)]
    assert "convert(weights='packed')" in on_phone[0].remedy
    on_chip = kqat.plan(model, "w4a8", target="cmsis_nn").misfits
    assert not any("int8" in m.reason for m in on_chip)
