"""Sums over steps that are divided by a count of steps, as people write masked means by hand."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export
from kqat.graph import rebuild, trace
from kqat.parts import Hold
from kqat.planning import counted_sums
from kqat.planning.counted_sums import scale_sums
from kqat.planning.expansion import expand

WORDS, WIDTH = 30, 4


def _shown(ids: Any) -> Any:
    return ops.cast(ops.not_equal(ids, 0), "float32")


def _column(ids: Any) -> Any:
    return _shown(ids)[..., None]


def plain(x: Any, ids: Any) -> Any:
    """What most people write."""
    return ops.sum(x * _column(ids), 1) / ops.sum(_column(ids), 1)


def at_least_one(x: Any, ids: Any) -> Any:
    """A divisor that is never zero."""
    total = ops.sum(x * _column(ids), axis=1)
    return total / ops.maximum(ops.sum(_shown(ids), axis=1, keepdims=True), 1.0)


def with_epsilon(x: Any, ids: Any) -> Any:
    """A divisor that is hardly zero, and kept axes."""
    shown = ops.expand_dims(_shown(ids), -1)
    mean = ops.sum(x * shown, 1, keepdims=True) / (ops.sum(shown, 1, keepdims=True) + 1e-9)
    return ops.reshape(mean, (-1, x.shape[-1]))


def no_nan(x: Any, ids: Any) -> Any:
    """A quotient that is zero where nothing is shown."""
    return ops.divide_no_nan(ops.sum(x * _column(ids), 1), ops.sum(_column(ids), 1))


def clipped(x: Any, ids: Any) -> Any:
    """A divisor with ends, of means."""
    shown = _column(ids)
    return ops.mean(x * shown, 1) / ops.clip(ops.mean(shown, 1), 1e-9, 1e9)


def selected(x: Any, ids: Any) -> Any:
    """Zeros in place of hidden steps, and a sum of integers."""
    shown = ops.not_equal(ids, 0)
    count = ops.sum(ops.cast(shown, "int32"), axis=1, keepdims=True)
    return ops.sum(ops.where(shown[..., None], x, 0.0), 1) / ops.cast(count, "float32")


def counted(x: Any, ids: Any) -> Any:
    """A count of truth values, at least one, in a product of matrices."""
    count = ops.maximum(ops.count_nonzero(ops.not_equal(ids, 0), axis=1), 1)
    rows = ops.matmul(_shown(ids)[:, None, :], x)[:, 0]
    return rows / ops.cast(count, "float32")[:, None]


def chosen(x: Any, ids: Any) -> Any:
    """A divisor that is chosen, in an equation."""
    count = ops.sum(_shown(ids), 1, keepdims=True)
    return ops.einsum("bt,btd->bd", _shown(ids), x) / ops.where(count > 0, count, 1.0)


def padding(x: Any, ids: Any) -> Any:
    """A mask of what is hidden."""
    shown = 1.0 - ops.cast(ops.equal(ids, 0), "float32")[..., None]
    return ops.sum(x * shown, 1) * (1.0 / ops.sum(shown, 1))


def weights_first(x: Any, ids: Any) -> Any:
    """Weights whose sum is one."""
    shown = _shown(ids)
    weights = shown / ops.sum(shown, 1, keepdims=True)
    return ops.sum(x * weights[..., None], 1)


def rooted(x: Any, ids: Any) -> Any:
    """A sum over the root of the count, of which 1/sqrt(200) is the least."""
    return 0.2 * ops.sum(x * _column(ids), 1) * ops.rsqrt(ops.sum(_column(ids), 1))


def other_mask(x: Any, ids: Any) -> Any:
    """The sum of some steps over the count of others."""
    some = ops.cast(ops.greater(ids, 5), "float32")
    count = ops.maximum(ops.sum(_shown(ids), 1, keepdims=True), 1.0)
    return ops.sum(x * some[..., None], 1) / count


def attended(x: Any, ids: Any) -> Any:
    """A weighted mean of what is shown."""
    weights = ops.sigmoid(x[..., :1] * 2.0) * _column(ids)
    return ops.sum(x * weights, 1) / ops.sum(weights, 1)


def normalized(x: Any, ids: Any) -> Any:
    """Exponentials whose sum is one, by hand."""
    weights = ops.exp(ops.tanh(x[..., 1])) * _shown(ids)
    weights = weights / (ops.sum(weights, 1, keepdims=True) + 1e-7)
    return ops.sum(weights[..., None] * x, 1)


def product_of_weights(x: Any, ids: Any) -> Any:
    """A weighted mean as an equation."""
    weights = ops.exp(x[..., 2]) * _shown(ids)
    return ops.einsum("bt,btd->bd", weights, x) / ops.sum(weights, 1, keepdims=True)


def row_of_weights(x: Any, ids: Any) -> Any:
    """Weights whose sum is one, in a product of matrices."""
    weights = _shown(ids) / (ops.sum(_shown(ids), -1, keepdims=True) + 1e-9)
    return ops.matmul(weights[:, None, :], x)[:, 0]


SPELLINGS = (
    plain, at_least_one, with_epsilon, no_nan, clipped, selected, counted, chosen, padding,
    weights_first, row_of_weights, rooted, other_mask, attended, normalized, product_of_weights,
)  # fmt: skip


def _model(steps: int, *calls: Callable[[Any, Any], Any]) -> keras.Model:
    ids = keras.Input((steps,), dtype="int32", name="ids")
    embedding = layers.Embedding(WORDS, WIDTH, name="words")
    x = embedding(ids)
    model = keras.Model(ids, [call(x, ids) for call in calls], name="net")
    table = np.random.default_rng(1).normal(size=(WORDS, WIDTH), scale=0.5)
    embedding.embeddings.assign(table - table.mean(axis=0))
    return model


def _ids(steps: int, samples: int = 256, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, WORDS, (samples, steps)).astype(np.int32)
    for row, count in zip(ids, generator.integers(1, steps + 1, samples), strict=True):
        row[generator.permutation(steps)[count:]] = 0
    return ids


def _scaled(model: keras.Model) -> tuple[keras.Model, int]:
    """The model with the sums changed, and how many values are chosen by a count in it."""
    graph, origins = expand(trace(model), lambda node: False, "expanded")
    configs = dict.fromkeys(origins.values(), kqat.QuantizeConfig())
    graph, origins = scale_sums(graph, origins, configs, "scaled")
    assert {node.layer.name for node in graph.nodes} <= set(origins)
    made = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    return made, sum(isinstance(node.layer, Hold) for node in graph.nodes)


@pytest.mark.parametrize("call", SPELLINGS, ids=[call.__name__ for call in SPELLINGS])
def test_the_products_are_what_the_sums_were(call: Callable[[Any, Any], Any]) -> None:
    steps = 150 if call is rooted else 20
    model, ids = _model(steps, call), _ids(steps, 24)
    made, choices = _scaled(model)
    sums = 2 if call in (attended, normalized, product_of_weights) else 1
    assert choices == sums * 2 if call is not rooted else choices == 1
    np.testing.assert_allclose(made(ids), model(ids), rtol=1e-4, atol=1e-5)


def _of_rows(x: Any, ids: Any) -> Any:
    shown = _column(ids)
    return ops.sum(x * shown, 2) / ops.maximum(ops.sum(shown, 2), 1.0)


def _of_rows_and_columns(x: Any, ids: Any) -> Any:
    shown = _column(ids)
    return ops.sum(x * shown, (1, 2)) / ops.maximum(ops.sum(shown, (1, 2)), 1.0)


def _of_weights_in_rows(x: Any, ids: Any) -> Any:
    weights = ops.sigmoid(x[..., :1]) * _column(ids)
    return ops.sum(x * weights, 2) / (ops.sum(weights, 2) + 1e-6)


def _of_numbers(x: Any, ids: Any) -> Any:
    shown = ops.reshape(_shown(ids), (-1, 60))
    numbers = ops.reshape(x[..., 0], (-1, 60))
    return ops.sum(numbers * shown, 1) / ops.sum(shown, 1)


@pytest.mark.parametrize(
    ("call", "choices"),
    [(_of_rows, 2), (_of_rows_and_columns, 2), (_of_weights_in_rows, 4), (_of_numbers, 2)],
    ids=["rows", "rows_and_columns", "weights_in_rows", "numbers"],
)
def test_other_axes(call: Callable[[Any, Any], Any], choices: int) -> None:
    ids = keras.Input((3, 20), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(ids)
    model = keras.Model(ids, call(x, ids))
    made, found = _scaled(model)
    data = _ids(60, 12).reshape(-1, 3, 20)
    assert found == choices
    np.testing.assert_allclose(made(data), model(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_mask_of_channels_is_none_of_steps(first: bool) -> None:
    x, ids = keras.Input((20, 20)), keras.Input((20,), dtype="int32")
    count = ops.maximum(ops.sum(_shown(ids), 1, keepdims=True), 1.0)
    if first:
        mean = ops.sum(x * (_shown(ids) / count)[:, None, :], 1)
    else:
        mean = ops.sum(x * _shown(ids)[:, None, :], 1) / count
    model = keras.Model([x, ids], mean)
    data = [np.random.default_rng(0).normal(size=(12, 20, 20)), _ids(20, 12)]
    np.testing.assert_allclose(_scaled(model)[0](data), model(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["float32", "int32", "bool"])
def test_masks_that_are_inputs(mask: str) -> None:
    x, shown = keras.Input((20, WIDTH)), keras.Input((20,), dtype=mask)
    weights = ops.cast(shown, "float32")
    mean = ops.einsum("bt,btd->bd", weights, x) / ops.sum(weights, 1, keepdims=True)
    model = keras.Model([x, shown], mean)
    made, found = _scaled(model)
    generator = np.random.default_rng(0)
    data = [generator.normal(size=(12, 20, WIDTH)), (_ids(20, 12) > 0).astype(mask)]
    assert found == (4 if mask == "float32" else 2)
    np.testing.assert_allclose(made(data), model(data), rtol=1e-4, atol=1e-5)


def test_a_length_that_is_an_input() -> None:
    """What its clip says is what it may be."""
    x, length = keras.Input((20, WIDTH)), keras.Input((1,), dtype="int32")
    model = keras.Model([x, length], ops.sum(x, 1) / ops.cast(ops.clip(length, 1, 20), "float32"))
    made, found = _scaled(model)
    lengths = np.arange(1, 21, dtype=np.int32)[:, None]
    values = np.random.default_rng(0).normal(size=(20, 20, WIDTH))
    data = [np.where((np.arange(20) < lengths)[..., None], values, 0.0), lengths]
    assert found == 2
    np.testing.assert_allclose(made(data), model(data), rtol=1e-4, atol=1e-5)


def test_few_steps_and_wide_values_stay_as_they_are() -> None:
    assert _scaled(_model(6, plain, attended, rooted))[1] == 0
    plan = kqat.plan(_model(20, plain), "int16x8")
    assert not any(isinstance(node.layer, Hold) for node in plan.graph.nodes)


LEAST_DB = {plain: 25.0, counted: 25.0, weights_first: 25.0, normalized: 25.0}


@pytest.mark.slow
def test_lengths_from_1_to_200_keep_their_values() -> None:
    """Before, these outputs had an SQNR of 6 to 14 dB."""
    model, ids = _model(200, *LEAST_DB), _ids(200)
    qat = kqat.quantize_model(model, calibration_data=ids)
    for call, expected, found in zip(LEAST_DB, model(ids), qat(ids), strict=True):
        noise = np.mean(np.square(np.asarray(expected) - np.asarray(found)))
        left = 10.0 * np.log10(np.mean(np.square(expected)) / noise)
        print(call.__name__, left)
        assert left > LEAST_DB[call], call


@pytest.mark.slow
def test_all_runtimes_compute_them() -> None:
    model, ids = _model(20, with_epsilon, attended), _ids(20)
    qat = kqat.quantize_model(model, calibration_data=ids)
    blob = tflite_export.convert(qat)
    runtimes = ("litert_reference", "litert", "tflite_micro")
    report = tflite_export.verify(qat, blob, ids, samples=8, runtimes=runtimes)
    assert report.is_full_integer
    for result in report.runtimes:
        assert result.is_right and result.exact is not None and result.exact.is_exact, report


def test_products_that_are_not_what_the_sums_were_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are tried on random inputs: what looks like a count may be none."""
    emit = counted_sums._Scaled.emit

    def doubled(self: Any, name: str, shape: Any) -> Any:
        return layers.Rescaling(2.0, name=name)(emit(self, f"{name}_once", shape))

    monkeypatch.setattr(counted_sums._Scaled, "emit", doubled)
    model, ids = _model(20, plain), _ids(20, 24)
    made, choices = _scaled(model)
    assert choices == 0
    # As many digits as float32 sums of twenty numbers agree in.
    np.testing.assert_allclose(made(ids), model(ids), rtol=1e-4, atol=1e-5)
