"""`adapt` with data: joins of unlike members become outputs, or their members are scaled alike."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
from kqat.graph import trace
from kqat.training import output_parts

X = np.random.default_rng(0).uniform(-1, 1, (64, 6, 6, 3)).astype(np.float32)


def members(x: Any) -> list[Any]:
    boxes = L.Rescaling(320.0, name="boxes")(L.Conv2D(4, 1, activation="sigmoid")(x))
    scores = L.Conv2D(3, 1, activation="sigmoid", name="scores")(x)
    return [boxes, scores, L.Conv2D(2, 1, activation="tanh", name="angles")(x)]


def model_of(head: Callable[[list[Any]], Any]) -> keras.Model:
    x = keras.Input((6, 6, 3), name="image")
    return keras.Model(x, head(members(x)), name="detector")


def calibration_says(model: keras.Model) -> str:
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        kqat.quantize_model(model, calibration_data=X)
    return " ".join(str(w.message) for w in met)


def test_the_warning_names_the_way_out() -> None:
    text = calibration_says(model_of(L.Concatenate(name="both")))
    assert "'both' has one scale for values of unlike size" in text
    assert "kqat.adapt(model, calibration_data=…)" in text


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (L.Concatenate(name="both"), ["boxes", "both_1"]),
        (lambda m: ops.concatenate([m[1], m[0]], axis=-1), ["scores", "boxes"]),
        (lambda m: [L.Conv2D(1, 1, name="more")(m[1]), L.Concatenate(name="both")(m[:2])],
         ["more", "boxes", "scores"]),
        (lambda m: {"all": L.Concatenate(name="both")(m)}, ["all_0", "all_1"]),
    ],
    ids=["layer", "operation", "list", "dict"],
)  # fmt: skip
def test_a_join_that_ends_the_model_becomes_outputs(head: Any, names: list[str]) -> None:
    model = model_of(head)
    apart = kqat.adapt(model, calibration_data=X)
    found = apart(X)
    wholes = list(map(np.asarray, keras.tree.flatten(model(X))))
    parts = output_parts(trace(model), X)
    for part, value in zip(parts, keras.tree.flatten(found), strict=True):
        np.testing.assert_allclose(part.of(wholes), value, rtol=1e-6)
    if isinstance(found, dict):
        assert list(found) == names
        found = list(found.values())
    else:
        assert list(apart.output_names) == names
    joined = keras.tree.flatten(model(X))
    values = np.concatenate(found[1:] if names[0] == "more" else found, axis=-1)
    np.testing.assert_allclose(values, joined[-1], rtol=1e-6)
    assert "unlike size" not in calibration_says(apart)


def test_parts_of_outputs_keep_their_place_where_keys_are_sorted_otherwise() -> None:
    """`y1` is before `y_0`, and was given the name of another output."""
    model = model_of(
        lambda m: {"y": L.Concatenate(name="both")(m[:2]), "y1": L.ReLU(name="y1")(m[1])}
    )
    apart = kqat.adapt(model, calibration_data=X)
    found = apart(X)
    assert sorted(found) == ["y1", "y_0", "y_1"]
    assert list(apart.output_names) == ["y1", "boxes", "scores"]
    wholes = list(map(np.asarray, keras.tree.flatten(model(X))))
    parts = output_parts(trace(model), X)
    for part, value in zip(parts, keras.tree.flatten(found), strict=True):
        np.testing.assert_allclose(part.of(wholes), value, rtol=1e-6)


@pytest.mark.parametrize(
    "reader",
    [
        L.Dense(5, name="head"),
        L.Conv2D(5, 3, padding="same", name="head"),
        L.DepthwiseConv2D(3, depth_multiplier=2, name="head"),
        L.SeparableConv2D(5, 3, name="head"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_members_of_a_join_inside_are_scaled_alike(reader: L.Layer) -> None:
    model = model_of(lambda m: reader(L.Concatenate(name="both")(m)))
    alike = kqat.adapt(model, calibration_data=X)
    np.testing.assert_allclose(alike(X), model(X), rtol=1e-4, atol=1e-4)
    factors = {layer.name: layer.scale for layer in alike.layers if isinstance(layer, L.Rescaling)}
    assert factors.pop("boxes") == 320.0
    assert set(factors) == {"both_scaled_1", "both_scaled_2"}
    assert all(factor >= 128 for factor in factors.values())
    assert "'both' has one scale" not in calibration_says(alike)


def test_what_nothing_can_take_up_is_told() -> None:
    model = model_of(lambda m: L.MaxPooling2D(name="pool")(L.Concatenate(name="both")(m)))
    with pytest.warns(kqat.CalibrationWarning, match=r"'both' joins values.*'pool' reads them"):
        same = kqat.adapt(model, calibration_data=X)
    np.testing.assert_array_equal(same(X), model(X))
    with pytest.raises(kqat.CalibrationError, match="a target, calibration_data, or both"):
        kqat.adapt(model)


def test_alike_members_stay_joined() -> None:
    model = model_of(lambda m: L.Concatenate(name="both")(m[1:]))
    assert kqat.adapt(model, calibration_data=X).output_names == ["both"]


class Joined(keras.Model):
    """A model inside, which joins values and adds a loss of the whole and of one member."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.join = L.Concatenate(name="both")

    def call(self, members: list[Any]) -> Any:
        joined = self.join(members)
        self.add_loss(ops.mean(ops.square(joined)) + ops.mean(members[1]))
        return joined


@pytest.mark.parametrize("head", [lambda y: y, L.Dense(3, name="head")], ids=["end", "inside"])
@pytest.mark.parametrize(
    "joined", [lambda m: L.Concatenate(activity_regularizer="l2")(m), lambda m: Joined()(m)],
    ids=["penalty", "call"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`build")
def test_losses_of_a_join_stay_what_they_were(joined: Any, head: Any) -> None:
    model = model_of(lambda m: head(joined(m)))
    apart = kqat.adapt(model, calibration_data=X)
    copy = keras.models.model_from_json(apart.to_json())
    copy.set_weights(apart.get_weights())
    model(X), apart(X), copy(X)
    (before,) = model.losses
    np.testing.assert_allclose(apart.losses, [before], rtol=1e-5)
    np.testing.assert_allclose(copy.losses, [before], rtol=1e-5)


class Concatenate(L.Concatenate):
    """A user's own, of the same name."""

    def call(self, inputs: Any) -> Any:
        return super().call([inputs[0] + 1.0, *inputs[1:]])


def test_a_users_own_join_is_not_taken_for_the_stock_one() -> None:
    model = model_of(Concatenate(name="own"))
    np.testing.assert_allclose(kqat.adapt(model, calibration_data=X)(X), model(X), rtol=1e-5)
