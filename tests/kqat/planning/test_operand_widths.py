"""Few bits go where a kernel can read them: not to constants of elementwise kernels or tables."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat

_random = np.random.default_rng(0)
_X = _random.normal(size=(128, 6, 8)).astype(np.float32)
_CONSTANT = _random.normal(size=(6, 8)).astype(np.float32)


def _model() -> keras.Model:
    """Every kind of operand: a product and a sum with constants, slopes, and a causal mask."""
    x = keras.Input((6, 8))
    y = layers.Dense(8, name="dense")(x) * _CONSTANT + _CONSTANT[::-1]
    y = layers.PReLU(shared_axes=[1], name="slopes")(y)
    y = layers.MultiHeadAttention(2, 4, name="attention")(y, y, use_causal_mask=True)
    return keras.Model(x, y)


@pytest.mark.parametrize("preset", ["w4a8", "w3a8", "ternary", "binary"])
def test_operands_keep_eight_bits(preset: str) -> None:
    model = _model()
    few = {layer.name: layer for layer in kqat.plan(model, preset).layers}
    many = {layer.name: layer for layer in kqat.plan(model).layers}
    operands = {name for name, layer in many.items() if set(layer.weights) & {"value", "alpha"}}
    assert len(operands) == 4
    for name, layer in few.items():
        bits = {spec.bits for spec in layer.weights.values()}
        if name in operands:
            assert bits == {8}
            assert layer.weight_step == kqat.MaxAbs()
        elif bits:
            assert bits < {1, 2, 3, 4}


@pytest.mark.parametrize("preset", ["int8", "w4a8", "ternary", "binary"])
def test_codes_are_exact_at_every_width(preset: str) -> None:
    """A one-hot code of two values is no weight; binary weights would make it -1 and 1."""
    x = keras.Input((4,), dtype="int32")
    codes = layers.CategoryEncoding(6, output_mode="multi_hot", name="codes")(x)
    model = keras.Model(x, layers.Dense(3, name="dense")(codes))
    data = _random.integers(0, 6, (200, 4), dtype=np.int32)
    policy = {"codes*": preset, "dense": "int8"}
    qat = kqat.quantize_model(model, policy, calibration_data=data)
    assert not any("codes" in variable.path for variable in qat.trainable_variables)
    expected, found = np.asarray(model(data)), np.asarray(qat(data))
    assert np.max(np.abs(expected - found)) < 0.02 * np.max(np.abs(expected))


def test_a_width_that_names_the_operand_is_taken() -> None:
    slopes = kqat.QuantizeConfig(weights={"alpha": kqat.QuantSpec(bits=4, symmetric=True)})
    plan = kqat.plan(_model(), {"slopes": slopes})
    layer: Any = next(layer for layer in plan.layers if layer.name == "slopes")
    assert layer.weights["alpha"].bits == 4
