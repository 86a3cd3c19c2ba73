"""What is observed of a QAT model: the passes over the data, with noise and without."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat.graph.tracer import trace
from kqat.planning.planner import make_plan
from kqat.training.build import wrap
from kqat.training.observation import Observer

X = np.random.default_rng(0).normal(size=(32, 3, 4)).astype(np.float32)


def observer(build: Callable[[Any], Any]) -> Observer:
    """Has seen one batch."""
    keras.utils.set_random_seed(0)
    x = keras.Input((3, 4), name="x")
    model = keras.Model(x, build(x))
    made = Observer(trace(wrap(make_plan(trace(model), kqat.QuantizePolicy.of("int8"), "model"))))
    made.run([keras.ops.convert_to_tensor(X)], len(X))
    return made


def test_what_noise_does_not_change_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    whole = Observer._call

    def counted(self: Observer, node: Any, *args: Any, **kwargs: Any) -> Any:
        calls[node.name] += 1
        return whole(self, node, *args, **kwargs)

    def build(x: Any) -> list[Any]:
        before = layers.Dense(3, name="before")(x)
        behind = layers.Dense(2, name="behind")(layers.Dropout(0.5, seed=1)(before))
        both = layers.Add(name="both")([behind, layers.Dense(2, name="beside")(x)])
        return [both, layers.Dense(2, name="apart")(before)]

    monkeypatch.setattr(Observer, "_call", counted)
    found = observer(build)
    once, twice = ("before", "beside", "apart"), ("behind", "both")
    assert [calls[f"quant_{name}"] for name in once] == [1, 1, 1]
    assert [calls.get(f"quant_{name}", calls[name]) for name in twice] == [2, 2]
    noise = {quantizer.label: record._noise() for (quantizer, _), record in found.records.items()}
    assert all(noise[name] == (0.0, 0.0) for name in once)
    assert all(max(noise[name]) > 0.0 for name in twice)


def test_a_recurrence_with_and_without_noise_is_compared_call_by_call() -> None:
    """Its quantizers are those of all its calls, of which one reads what noise changes."""

    def build(x: Any) -> list[Any]:
        layer = layers.GRU(2, name="gru")
        return [layer(x), layer(layers.Dropout(0.5, seed=1)(x))]

    records = observer(build).records.values()
    assert any(record.noisy for record in records)
    assert all(len(record.noisy) in (0, len(record.extremes)) for record in records)
