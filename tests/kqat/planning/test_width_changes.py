"""Where integers of two widths meet: what the plan, the QAT model and the float model say."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
from kqat.parts.markers import Requantize
from tests.coverage.cases import functional, inputs_of

WIDE = kqat.QuantSpec(bits=16, symmetric=True)
VECTOR = (6,)


def chain() -> keras.Model:
    """Three Dense layers, a Dropout before the last."""

    def call(x: Any) -> Any:
        x = L.Dense(5, activation="relu", name="stem")(x)
        x = L.Dense(5, activation="relu", name="middle")(x)
        return L.Dense(3, name="head")(L.Dropout(0.5, name="drop")(x))

    return functional(VECTOR, call)


def requantizations(model: keras.Model, policy: Any) -> dict[str, str]:
    """The plan's requantizations: name -> note."""
    plan = kqat.plan(model, policy)
    return {layer.name: layer.note for layer in plan.layers if layer.kind == "Requantize"}


UP, DOWN = "two widths meet: int8 to int16", "two widths meet: int16 to int8"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("int8", {}),
        ("int16x8", {}),
        ({"head": "int16x8"}, {"drop_int16": UP}),
        ({"middle": "int16x8"}, {"stem_relu_int16": UP, "drop_int8": DOWN}),
        ({"stem": "int16x8"}, {"stem_relu_int8": DOWN}),
        ({"x": "int16x8"}, {"x_int8": DOWN}),
        ({"stem": "int16x8", "x": "int8"}, {"x_int16": UP, "stem_relu_int8": DOWN}),
        # A float value becomes integers of its reader's width at once.
        ({"middle": None, "head": "int16x8"}, {}),
    ],
    ids=str,
)
def test_a_requantization_stands_only_where_two_widths_meet(policy: Any, expected: Any) -> None:
    assert requantizations(chain(), policy) == expected


def test_readers_of_one_width_share_a_requantization() -> None:
    def call(x: Any) -> Any:
        x = L.Dense(4, name="stem")(x)
        left, right = L.Dense(4, name="left")(x), L.Dense(4, name="right")(x)
        return L.Add(name="add")([left, L.Add(name="inner")([right, x])])

    model = functional(VECTOR, call)
    policy = {"left": "int16x8", "right": "int16x8"}
    both = {"stem_int16": UP, "left_int8": DOWN, "right_int8": DOWN}
    assert requantizations(model, policy) == both


def test_a_float_value_with_readers_of_two_widths() -> None:
    def call(x: Any) -> Any:
        x = L.Dense(4, name="stem")(x)
        return L.Add(name="add")([L.Dense(4, name="left")(x), L.Dense(4, name="right")(x)])

    policy = {"stem": None, "right": "int16x8", "add": "int16x8"}
    # The first reader decides, as it does about an input.
    expected = {"stem_int16": UP, "left_int16": UP}
    assert requantizations(functional(VECTOR, call), policy) == expected


def test_layers_of_one_scale_meet_at_one_width() -> None:
    def call(x: Any) -> Any:
        left, right = L.Dense(4, name="left")(x), L.Dense(4, name="right")(x)
        return L.Concatenate(name="join")([left, right])

    model = functional(VECTOR, call)
    assert requantizations(model, {"left": "int16x8"}) == {"x_int8": DOWN, "left_int8": DOWN}
    groups = {group.name: group.spec.bits for group in kqat.plan(model, {"join": "int16x8"}).groups}
    assert groups == {
        "x_quantizer": 8, "left_quantizer": 8, "right_quantizer": 8, "left_int16_quantizer": 16,
    }  # fmt: skip


def test_a_given_range_is_not_that_of_the_requantization_before() -> None:
    config = kqat.QuantizeConfig(activation=WIDE, activation_range=kqat.Fixed(-2.0, 2.0))
    plan = kqat.plan(chain(), {"head": config})
    ranges = {group.name: group.range_method for group in plan.groups}
    assert ranges["head_quantizer"] == kqat.Fixed(-2.0, 2.0)
    assert ranges["drop_int16_quantizer"] == kqat.MovingAverage()


def test_a_table_of_ranges_shows_sixteen_bits() -> None:
    lines = str(kqat.plan(chain(), {"head": "int16x8"})).splitlines()
    row = next(line for line in lines if line.startswith("drop_int16"))
    assert row.split() == ["drop_int16", "Requantize", "integer", "own,", "int16"]


@pytest.mark.slow
def test_sixteen_bits_train_save_load_and_strip(tmp_path: Path) -> None:
    model = chain()
    x = inputs_of(model, 64)
    qat = kqat.quantize_model(model, {"middle": "int16x8"}, calibration_data=x)
    qat.compile("adam", "mse")
    before = qat.get_weights()
    qat.fit(x, np.zeros((64, 3)), verbose=0)
    assert any(np.any(a != b) for a, b in zip(before, qat.get_weights(), strict=True))
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), qat.predict(x, verbose=0))
    stripped = kqat.strip(qat)
    assert not any(isinstance(layer, Requantize) for layer in stripped.layers)
    names = [layer.name for layer in stripped.layers]
    assert names == ["x", "stem", "stem_relu", "middle", "middle_relu", "drop", "head"]


def test_a_quantizer_of_sixteen_bits_rounds_to_its_grid() -> None:
    model = chain()
    x = inputs_of(model, 64)
    qat = kqat.quantize_model(model, "int16x8", calibration_data=x)
    for site in kqat.freeze(qat).sites:
        assert (site.bits, site.zero_point) == (16, 0)
    scale = kqat.freeze(qat).sites[-1].scale
    steps = qat.predict(x, verbose=0) / scale
    # Values of up to 2**15 steps, in float32's 24 bits.
    np.testing.assert_allclose(steps, np.rint(steps), atol=2.0**-8)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (L.Activation("log_softmax", name="odd"), "whose LOG_SOFTMAX ships on int8 only"),
        (L.PReLU(name="odd"), "of type PReLU, whose PRELU ships on int8 only"),
        (L.Dense(3, dtype="mixed_float16", name="odd"), "which trains in float16"),
    ],
    ids=["log_softmax", "prelu", "float16"],
)
def test_a_layer_without_kernel_is_refused_by_name(layer: Any, found: str) -> None:
    model = functional(VECTOR, layer)
    with pytest.raises(kqat.UnsupportedLayerError, match=f"int16 kernels.*'odd' .*{found}.*Give"):
        kqat.plan(model, "int16x8")
    if not isinstance(layer, L.Dense):
        assert "odd" in str(kqat.plan(model, {"odd": "int8", "x": "int16x8"}))
