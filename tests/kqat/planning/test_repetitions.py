"""Repetitions that a product or a sum would broadcast are left out, and masked means are seen."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.graph import give_readers, rebuild, trace
from kqat.parts import Hold
from kqat.planning.expansion import expand
from kqat.planning.repetitions import drop_repetitions

STEPS, WIDTH = 24, 5
INT8 = kqat.QuantizeConfig()

Call = Callable[[Any, Any], Any]


def _column(mask: Any) -> Any:
    return ops.expand_dims(ops.cast(mask, "float32"), -1)


def _mean(x: Any, shown: Any) -> Any:
    return ops.sum(x * shown, 1) / ops.maximum(ops.sum(shown, 1), 1e-9)


def repeated(x: Any, mask: Any) -> Any:
    return _mean(x, ops.repeat(_column(mask), WIDTH, axis=-1))


def tiled(x: Any, mask: Any) -> Any:
    return _mean(x, ops.tile(_column(mask), (1, 1, WIDTH)))


def ones(x: Any, mask: Any) -> Any:
    return _mean(x, _column(mask) * ops.ones_like(x))


def joined(x: Any, mask: Any) -> Any:
    return _mean(x, ops.concatenate([_column(mask)] * WIDTH, -1))


def truths(x: Any, mask: Any) -> Any:
    shown = ops.repeat(ops.expand_dims(mask, -1), WIDTH, axis=-1)
    return ops.sum(ops.where(shown, x, 0.0), 1) / ops.sum(ops.cast(shown, "float32"), 1)


def vector(x: Any, mask: Any) -> Any:
    shown = layers.RepeatVector(WIDTH)(ops.cast(mask, "float32"))
    return _mean(x, ops.transpose(shown, (0, 2, 1)))


SPELLINGS = (repeated, tiled, ones, joined, truths, vector)


def _model(call: Call) -> keras.Model:
    x, ids = keras.Input((STEPS, WIDTH)), keras.Input((STEPS,), dtype="int32")
    made = call(x, ops.not_equal(ids, 0))
    give_readers([x, ids])  # Of calls that read the mask alone.
    return keras.Model([x, ids], made)


def _data() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    ids = np.arange(STEPS) < np.arange(1, STEPS + 1)[:, None]
    return [generator.normal(size=(STEPS, STEPS, WIDTH)).astype(np.float32), ids.astype(np.int32)]


def _dropped(model: keras.Model, config: Any = INT8) -> tuple[keras.Model, list[str]]:
    """The model without repetitions, and the kinds of its layers."""
    graph, origins = expand(trace(model), lambda node: False, "expanded")
    graph, origins = drop_repetitions(graph, origins, dict.fromkeys(origins.values(), config), "m")
    assert {node.layer.name for node in graph.nodes} == set(origins)
    made = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")
    return made, [type(node.layer).__name__ for node in graph.nodes]


@pytest.mark.parametrize("call", SPELLINGS, ids=[call.__name__ for call in SPELLINGS])
def test_a_repeated_mask_is_a_mask_of_steps(call: Call) -> None:
    model = _model(call)
    made, kinds = _dropped(model)
    assert not {"Take", "Concatenate", "Resizing", "Permute"} & set(kinds)
    np.testing.assert_allclose(made(_data()), model(_data()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("call", SPELLINGS, ids=[call.__name__ for call in SPELLINGS])
def test_a_masked_mean_is_seen_behind_it(call: Call) -> None:
    assert any(isinstance(node.layer, Hold) for node in kqat.plan(_model(call)).graph.nodes)


def test_gates_of_one_number_for_each_row_are_no_longer_repeated() -> None:
    """What is computed of two of them is repeated too, and so is a mean over other axes."""

    def gated(x: Any, mask: Any) -> Any:
        gate = ops.repeat(ops.mean(x, -1, keepdims=True), WIDTH, axis=-1)
        return x * ops.sigmoid(gate - ops.mean(gate, axis=1, keepdims=True))

    model = _model(gated)
    made, kinds = _dropped(model)
    assert "Take" not in kinds
    np.testing.assert_allclose(made(_data()), model(_data()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, mask: [x * ops.repeat(_column(mask), WIDTH, -1), ops.repeat(_column(mask), 2, 1)],
        lambda x, mask: ops.repeat(_column(mask), WIDTH, axis=-1) * 2.0,
        lambda x, mask: ops.concatenate([x, ops.repeat(_column(mask), WIDTH, axis=-1)], -1),
        lambda x, mask: (lambda t: [x * t, layers.Dense(2)(t)])(
            ops.repeat(_column(mask), WIDTH, -1)
        ),
    ],
    ids=["several entries", "output", "joined with others", "read by a kernel"],
)
def test_what_is_read_whole_stays_repeated(call: Call) -> None:
    model = _model(call)
    made, kinds = _dropped(model)
    assert "Take" in kinds
    for found, expected in zip(
        keras.tree.flatten(made(_data())), keras.tree.flatten(model(_data())), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_left_float_stay_as_they_are() -> None:
    assert "Take" in _dropped(_model(repeated), None)[1]
