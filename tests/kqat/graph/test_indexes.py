"""Indexes and quantities: which inputs a table is read by, and what is refused."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
import tflite_export

STEPS, WORDS, WIDTH = 6, 9, 4


class Net(keras.Model):
    """A subclassed model of the layers that are given; `call` runs a function of them."""

    def __init__(self, run: Callable[..., Any], *parts: Any):
        super().__init__(name="net")
        self.run, self.parts = run, parts

    def call(self, x: Any) -> Any:
        """What the function makes of the input and the parts."""
        return self.run(x, *self.parts)


class Placed(layers.Layer):
    """Rows of words and of places."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.words, self.places = _table(), layers.Embedding(STEPS, WIDTH)

    def call(self, x: Any) -> Any:
        """Their sums."""
        return self.words(x) + self.places(ops.arange(STEPS))


class Rows(layers.Layer):
    """A table of words without an Embedding."""

    def build(self, input_shape: Any) -> None:
        """Makes the table."""
        self.table = self.add_weight(shape=(WORDS, WIDTH), name="table")

    def call(self, x: Any) -> Any:
        """Its rows."""
        return ops.take(self.table, x, axis=0)


def _table(name: str | None = None, mask_zero: bool = True) -> Any:
    return layers.Embedding(WORDS, WIDTH, mask_zero=mask_zero, name=name)


def _plain() -> Any:
    return _table(mask_zero=False)


def _mean(x: Any, table: Any, other: Any) -> Any:
    shown = ops.expand_dims(ops.cast(ops.not_equal(x, 0), "float32"), -1)
    return ops.mean((table(x) + other(x)) * shown, axis=1)


def _words() -> np.ndarray:
    words = np.random.default_rng(0).integers(1, WORDS, (24, STEPS)).astype(np.int32)
    words[::2, 4:] = 0
    return words


def _nested() -> keras.Model:
    return keras.Sequential([_table(), layers.GlobalAveragePooling1D()])


NETS: dict[str, Callable[[], keras.Model]] = {
    "recurrence": lambda: Net(lambda x, t, g: g(t(x)), _table(), layers.GRU(3)),
    "two tables and a comparison": lambda: Net(_mean, _table(), _plain()),
    "table in a layer": lambda: Net(lambda x, t, g: g(t(x)), Placed(), layers.LSTM(3)),
    "table in a model": lambda: Net(lambda x, t, d: d(t(x)), _nested(), layers.Dense(3)),
    "part of the words": lambda: Net(lambda x, t, f: f(t(x[:, 1:])), _plain(), layers.Flatten()),
    "rows of a weight": lambda: Net(lambda x, t, f: f(t(x)), Rows(), layers.Flatten()),
    "codes": lambda: Net(lambda x, d: d(ops.one_hot(x[:, 0], WORDS)), layers.Dense(3)),
    "cast": lambda: Net(lambda x, t, f: f(t(ops.cast(x, "int32"))), _plain(), layers.Flatten()),
}


@pytest.mark.parametrize("name", NETS)
def test_subclassed_models_take_indexes(name: str) -> None:
    """Of the data that they were called on, Keras keeps the shape and not the type."""
    model = NETS[name]()
    model(_words())
    (graph_input,) = kqat.graph.trace(model).inputs
    assert graph_input.dtype == "int32"
    kqat.plan(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recurrence", "table in a layer", "table in a model"])
def test_the_files_of_subclassed_text_models_are_right(name: str) -> None:
    model = NETS[name]()
    model(_words())
    qat = kqat.quantize_model(model, calibration_data=_words())
    assert qat.inputs[0].dtype == "int32"
    report = tflite_export.verify(qat, tflite_export.convert(qat), _words())
    assert all(r.is_right and r.exact and r.exact.is_exact for r in report.runtimes), report


@pytest.mark.parametrize(
    ("make", "maker"),
    [
        (lambda x: ops.multiply(x, 0.5), "multiply"),
        (lambda x: ops.mean(x, axis=1, keepdims=True), "mean"),
    ],
    ids=["multiply", "mean"],
)
@pytest.mark.parametrize("subclassed", [True, False])
def test_what_computes_quantities_for_a_table_is_refused(
    make: Callable[[Any], Any], maker: str, subclassed: bool
) -> None:
    """When it is planned, by name; not when the file is written."""
    table = _table("table", mask_zero=False)
    if subclassed:
        model: Any = Net(lambda x, t, f: f(t(make(x))), table, layers.Flatten())
        model(_words() // STEPS)
    else:
        x = keras.Input((STEPS,), dtype="int32")
        model = keras.Model(x, layers.Flatten()(table(make(x))))
    with pytest.raises(kqat.ModelError, match=rf"layer 'table' .* quantity, of '{maker}\w*'"):
        kqat.plan(model)


@pytest.mark.parametrize(
    "merge",
    [
        lambda rows, x: layers.Concatenate(name="merge")([rows, x]),
        lambda rows, x: layers.Add(name="merge")([rows, x]),
        lambda rows, x: layers.Concatenate()([rows, layers.Dense(2, name="merge")(x)]),
    ],
    ids=["concatenate", "add", "dense"],
)
def test_indexes_that_are_computed_with_as_quantities_are_refused(
    merge: Callable[[Any, Any], Any],
) -> None:
    x = keras.Input((WIDTH,), dtype="int32", name="words")
    rows = _plain()(x[:, 0])
    model = keras.Model(x, layers.Dense(2)(merge(rows, x)))
    message = r"'merge' .* read quantities\. Received: int32 of input 'words'"
    with pytest.raises(kqat.UnsupportedLayerError, match=message):
        kqat.plan(model)


def test_a_comparison_does_not_make_indexes_of_quantities() -> None:
    """A table of truth values reads no number of the input itself."""
    model = Net(lambda x, t, f: f(t(x > 0.5)), _plain(), layers.Flatten())
    model(np.random.default_rng(0).normal(size=(8, STEPS)).astype("float32"))
    (graph_input,) = kqat.graph.trace(model).inputs
    assert graph_input.dtype == "float32"
