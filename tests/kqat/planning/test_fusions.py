"""What folds and fuses where layers are shared, and past layers that compute nothing."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
import tflite_export
from kqat.planning.plan import Role


def shared(
    own: bool, between: Any = None, calls: int = 2, bare: bool = False
) -> tuple[keras.Model, np.ndarray]:
    """A convolution that is called twice, before one BatchNormalization or one for each call.

    With `bare`, one of its calls has none.
    """
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 6, 3))
    levels = [L.Conv2D(4, 1)(x), L.Conv2D(4, 3, strides=2)(x)]
    conv = L.Conv2D(5, 3, padding="same", use_bias=False, name="shared")
    norms = [L.BatchNormalization(name=f"norm_{i}") for i in range(2)]
    ends = []
    for i, level in enumerate(levels):
        y = conv(level)
        if between is not None:
            y = between(y)
        if not (bare and i):
            y = norms[i if own else 0](y)
        ends.append(L.GlobalAveragePooling2D()(L.ReLU(6.0)(y)))
    model = keras.Model(x, L.Concatenate()(ends))
    data = np.random.default_rng(0).normal(size=(32, 6, 6, 3)).astype(np.float32)
    for _ in range(5):
        model(data, training=True)
    return model, data


def roles(model: keras.Model, kind: str) -> set[Role]:
    return {layer.role for layer in kqat.plan(model).layers if layer.kind == kind}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("between", [None, L.Identity(), L.Dropout(0.1), L.Activation("linear")])
def test_a_shared_convolution_takes_its_normalizations_in(own: bool, between: Any) -> None:
    assert roles(shared(own, between)[0], "BatchNormalization") == {Role.FOLDED}


def test_all_calls_fold_or_none_does() -> None:
    model, _ = shared(True, bare=True)
    assert roles(model, "BatchNormalization") == {Role.INTEGER}


def test_a_normalization_behind_two_layers_stays() -> None:
    x = keras.Input((4, 4, 2))
    norm = L.BatchNormalization()
    ends = [norm(L.Conv2D(3, 1, use_bias=False)(x)) for _ in range(2)]
    assert roles(keras.Model(x, L.Add()(ends)), "BatchNormalization") == {Role.INTEGER}


def test_a_clamp_fuses_past_what_computes_nothing() -> None:
    parts = [L.Conv2D(3, 1), L.Dropout(0.1), L.ReLU(), L.Conv2D(2, 1)]
    plan = kqat.plan(keras.Sequential([keras.Input((4, 4, 2)), *parts]))
    clamp = next(layer for layer in plan.layers if layer.role is Role.CLAMP)
    assert clamp.into == parts[0].name


def triplet() -> keras.Model:
    """One network for three images."""
    parts = [L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU(), L.GlobalAveragePooling2D()]
    base = keras.Sequential([keras.Input((6, 6, 3)), *parts, L.Dense(3, name="embedding")])
    inputs = [keras.Input((6, 6, 3), name=name) for name in ("anchor", "positive", "negative")]
    return keras.Model(inputs, [base(x) for x in inputs])


def detection_head() -> keras.Model:
    """Two shared convolutions with a BatchNormalization for each of three levels, and a last."""
    inputs = [keras.Input((size, size, 3), name=f"level_{size}") for size in (8, 4, 2)]
    tower = [L.SeparableConv2D(3, 3, padding="same"), L.Conv2D(3, 3, padding="same")]
    last = L.Conv2D(2, 1, name="boxes")
    ends = []
    for x in inputs:
        for conv in tower:
            x = L.ReLU()(L.BatchNormalization()(conv(x)))
        ends.append(L.Reshape((-1, 2))(last(x)))
    return keras.Model(inputs, L.Concatenate(axis=1)(ends))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "counts"),
    [
        (triplet, {"CONV_2D": 3, "MEAN": 3, "FULLY_CONNECTED": 3}),
        (detection_head, {"DEPTHWISE_CONV_2D": 3, "CONV_2D": 9, "RESHAPE": 3, "CONCATENATION": 1}),
    ],
)
def test_shared_networks_fold_at_each_call(build: Any, counts: dict[str, int]) -> None:
    keras.utils.set_random_seed(0)
    model, generator = build(), np.random.default_rng(0)
    data = [generator.normal(size=(32, *x.shape[1:])).astype(np.float32) for x in model.inputs]
    for _ in range(3):
        model(data, training=True)
    assert roles(model, "BatchNormalization") == {Role.FOLDED}
    qat = kqat.quantize_model(model, calibration_data=data)
    blob = tflite_export.convert(qat)
    assert tflite_export.inspect(blob).counts() == counts
    part = tflite_export.verify(qat, blob, data, runtimes=["litert"]).runtimes[0]
    assert part.is_right and not part.unmatched
    expected, found = (keras.tree.flatten(m.predict(data, verbose=0)) for m in (model, qat))
    for a, b in zip(expected, found, strict=True):
        # Measured: 34.6 to 44.6 dB; the rest is room for weights that other versions draw.
        assert 10 * np.log10(np.mean(a**2) / np.mean((a - b) ** 2)) > 25


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "w4a8", "per_tensor"])
@pytest.mark.parametrize("own", [False, True])
def test_branches_ship_train_save_and_strip(own: bool, policy: str, tmp_path: Path) -> None:
    model, x = shared(own, L.Dropout(0.1))
    spec = kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True)
    config = kqat.QuantizeConfig(weights=spec) if policy == "per_tensor" else policy
    qat = kqat.quantize_model(model, config, calibration_data=x)
    expected = model.predict(x, verbose=0)
    stripped = kqat.strip(qat)
    np.testing.assert_allclose(stripped.predict(x, verbose=0), expected, atol=1e-5)
    assert len(stripped.weights) == len(model.weights)

    qat.compile(keras.optimizers.SGD(0.01), "mse")
    qat.fit(x, expected, verbose=0)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    blob = tflite_export.convert(loaded)
    assert blob == tflite_export.convert(qat)
    counts = tflite_export.inspect(blob).counts()
    assert counts == {"CONV_2D": 4, "MEAN": 2, "CONCATENATION": 1}
    part = tflite_export.verify(qat, blob, x, runtimes=["litert_reference"]).runtimes[0]
    assert part.max_steps <= 1 and not part.unmatched
