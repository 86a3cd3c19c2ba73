"""Means over the steps that a mask shows."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat.base.errors import UnsupportedLayerError
from kqat.graph.tracer import rebuild, trace
from kqat.planning.expansion import expand

WORDS = 20


def _model(steps: int, **options: Any) -> keras.Model:
    x = keras.Input((steps,), dtype="int32", name="words")
    y = layers.Embedding(WORDS, 4, mask_zero=True)(x)
    y = layers.GlobalAveragePooling1D(name="pool", **options)(y)
    model = keras.Model(x, layers.Dense(3)(y), name="net")
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape, scale=0.5))
    return model


def _words(steps: int, samples: int = 48) -> np.ndarray:
    generator = np.random.default_rng(0)
    words = generator.integers(1, WORDS, (samples, steps)).astype(np.int32)
    for row, count in enumerate(generator.integers(1, steps + 1, samples)):
        words[row, generator.permutation(steps)[count:]] = 0
    return words


@pytest.mark.parametrize("steps", [1, 3, 4, 17])
@pytest.mark.parametrize("keepdims", [False, True])
def test_the_mean_is_that_of_the_steps_shown(steps: int, keepdims: bool) -> None:
    model, words = _model(steps, keepdims=keepdims), _words(steps)
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    made = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    np.testing.assert_allclose(made(words), model(words), rtol=1e-4, atol=1e-5)
    # Keras divides zero by zero where nothing is shown.
    nothing = np.zeros((1, steps), np.int32)
    bias = np.asarray(model.layers[-1].bias)
    np.testing.assert_allclose(np.ravel(made(nothing)), bias, atol=1e-6)


def test_a_float_mask_is_refused() -> None:
    x = keras.Input((3, 4))
    y = layers.GlobalAveragePooling1D(name="pool")(x, mask=keras.ops.max(x, axis=-1))
    with pytest.raises(UnsupportedLayerError, match=r"boolean mask of shape .* in layer 'pool'"):
        kqat.plan(keras.Model(x, y))


def test_a_mask_of_steps_in_the_last_axis_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"'channels_last' in layer 'pool', .* mask"):
        kqat.plan(_model(4, data_format="channels_first"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "int16x8"])
def test_the_file_leaves_masked_steps_out(policy: str) -> None:
    """Also where calibration saw only long rows: a short one has its own weights."""
    model, words = _model(17), _words(17)
    long = words[np.count_nonzero(words, axis=1) >= 8]
    qat = kqat.quantize_model(model, policy, calibration_data=long)
    blob = tflite_export.convert(qat)
    runtimes = ["litert_reference", "litert"]
    if policy == "int8":  # TFLite Micro has no int16 GATHER.
        runtimes.append("tflite_micro")
    report = tflite_export.verify(qat, blob, words, runtimes=tuple(runtimes))
    for result in report.runtimes:
        assert result.is_right and result.exact is not None and result.exact.is_exact, report
    short = words[np.count_nonzero(words, axis=1) < 4]
    expected, found = np.asarray(model(short)), np.asarray(qat(short))
    # Values beyond the calibrated range are cut off; weights that were off would ruin all.
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.9
