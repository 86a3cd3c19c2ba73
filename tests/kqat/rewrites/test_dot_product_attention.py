"""`keras.ops.dot_product_attention` with masks, a bias and shared heads, as users write it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand
from tests.newer_keras import needs_keras

STEPS, WIDTH, HEADS = 6, 8, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, STEPS, 16)).astype(np.float32)
SHOWN = (np.arange(STEPS) < RNG.integers(2, STEPS + 1, (32, 1))).astype(np.int32)
EARLIER = np.tril(np.ones((1, 1, STEPS, STEPS), bool))
Options = Callable[["Attend", Any], dict[str, Any]]


@keras.saving.register_keras_serializable("test_dot_product_attention")
class Attend(layers.Layer):
    """Attention by one operation; `options` makes its arguments of the layer and the mask."""

    def __init__(self, options: Options, key_heads: int = HEADS) -> None:
        super().__init__(name="attend")
        self.options, self.key_heads = options, key_heads
        self.query = layers.Dense(HEADS * WIDTH)
        self.pairs = [layers.Dense(key_heads * WIDTH) for _ in range(2)]

    def build(self, *shapes: Any) -> None:
        """Creates a bias for each head and pair of steps."""
        shape = (1, HEADS, STEPS, STEPS)
        self.bias = self.add_weight(name="bias", shape=shape, initializer="random_normal")

    def call(self, x: Any, shown: Any) -> Any:
        """The heads side by side."""
        query = ops.reshape(self.query(x), (-1, STEPS, HEADS, WIDTH))
        key, value = (
            ops.reshape(dense(x), (-1, STEPS, self.key_heads, WIDTH)) for dense in self.pairs
        )
        mixed = ops.dot_product_attention(query, key, value, **self.options(self, shown))
        return ops.reshape(mixed, (-1, STEPS, HEADS * WIDTH))


def padding(layer: Attend, shown: Any) -> dict[str, Any]:
    return {"mask": ops.cast(shown, "bool")[:, None, None, :]}


def everything(layer: Attend, shown: Any) -> dict[str, Any]:
    return {**padding(layer, shown), "bias": layer.bias, "scale": 0.25, "is_causal": True}


CASES: dict[str, tuple[Options, int]] = {
    "padding": (padding, HEADS),
    "constant": (lambda layer, shown: {"mask": EARLIER}, HEADS),
    "a bias": (lambda layer, shown: {"bias": layer.bias}, HEADS),
    "a constant bias": (lambda layer, shown: {"bias": np.where(EARLIER, 0.0, -1e9)}, HEADS),
    "a scale of zero": (lambda layer, shown: {"scale": 0.0}, HEADS),
    "all": (everything, HEADS),
    "shared heads": (everything, 2),
}


def _model(options: Options, key_heads: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input((STEPS, 16), name="x")
    shown = keras.Input((STEPS,), dtype="int32", name="shown")
    return keras.Model([x, shown], Attend(options, key_heads)(x, shown))


@pytest.mark.parametrize(("options", "key_heads"), CASES.values(), ids=CASES)
def test_parts_attend_as_the_operation_does(options: Options, key_heads: int) -> None:
    if key_heads != HEADS:
        needs_keras("3.13", "dot_product_attention with shared heads")
    model = _model(options, key_heads)
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    parts = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    expected = model([X, SHOWN])
    np.testing.assert_allclose(parts([X, SHOWN]), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["padding", "shared heads"])
def test_the_file_attends_so_too(case: str) -> None:
    qat = kqat.quantize_model(model := _model(*CASES[case]), calibration_data=[X, SHOWN])
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, [X, SHOWN], samples=4)
    assert report.is_full_integer
    assert all(part.is_right and not part.unmatched for part in report.runtimes)
    expected = np.asarray(model([X, SHOWN]))
    noise = np.mean(np.square(expected - np.asarray(qat([X, SHOWN]))))
    # Eight bits leave 31 to 34 dB here; a mask or bias that is lost leaves less than 10.
    assert noise < 10**-2.8 * np.mean(np.square(expected))
