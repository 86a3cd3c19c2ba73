"""A weight that several kernels read: in the file one grid, and one tensor where layouts agree."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from kqat.graph import trace
from kqat.parts import TiedWeight
from tflite_export import flatbuffer
from tflite_export.flatbuffer.tree import ModelT

ROWS, WIDTH, STEPS = 40, 16, 6
IDS = np.random.default_rng(0).integers(0, ROWS, (64, STEPS)).astype(np.int32)
X = np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float32)
# Measured: 35.2 to 48.5 dB; the rest is room for weights that other versions draw.
LEAST_DB = 25.0


class Head(L.Layer):
    """Scores by the table of an embedding."""

    def __init__(self, table: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table

    def build(self, input_shape: Any) -> None:
        self.bias = self.add_weight(shape=(ROWS,), initializer="normal")

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.transpose(self.table.embeddings)) + self.bias


class Decoder(L.Layer):
    """The transposed kernel of a Dense."""

    def __init__(self, encoder: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder = encoder

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.transpose(self.encoder.kernel))


class Positions(L.Layer):
    """Adds a table, and rows of it."""

    def build(self, input_shape: Any) -> None:
        self.table = self.add_weight(shape=(STEPS, WIDTH), initializer="normal")

    def call(self, x: Any, places: Any) -> Any:
        return x + self.table + ops.take(self.table, places, axis=0)


def _embedded(embedding: Any) -> tuple[Any, Any]:
    ids = keras.Input((STEPS,), dtype="int32", name="ids")
    return ids, L.Dense(WIDTH, activation="relu")(embedding(ids))


def head() -> tuple[keras.Model, Any]:
    table = L.Embedding(ROWS, WIDTH, embeddings_initializer="glorot_normal")
    ids, x = _embedded(table)
    return keras.Model(ids, Head(table)(x)), IDS


def capped() -> tuple[keras.Model, Any]:
    table = L.ReversibleEmbedding(
        ROWS, WIDTH, embeddings_initializer=keras.initializers.RandomNormal(1.0), logit_soft_cap=4.0
    )
    ids, x = _embedded(table)
    return keras.Model(ids, table(x, reverse=True)), IDS


def joined() -> tuple[keras.Model, Any]:
    """Rows of the table beside other values, on one scale with them."""
    table = L.Embedding(ROWS, WIDTH, embeddings_initializer="glorot_normal")
    ids, x = _embedded(table)
    return keras.Model(ids, Head(table)(L.Concatenate(axis=1)([table(ids), x]))), IDS


def decoder() -> tuple[keras.Model, Any]:
    encoder = L.Dense(12, activation="tanh")
    return keras.Sequential([keras.Input((WIDTH,)), encoder, Decoder(encoder)]), X


def positions() -> tuple[keras.Model, Any]:
    ids, places = (keras.Input((STEPS,), dtype="int32", name=n) for n in ("ids", "places"))
    x = L.Embedding(ROWS, WIDTH)(ids)
    model = keras.Model([ids, places], L.Dense(3)(Positions()(x, places)))
    return model, [IDS, IDS % STEPS]


def products() -> tuple[keras.Model, Any]:
    """One kernel in two Dense layers, its channels of unlike size."""
    x, dense = keras.Input((WIDTH,)), L.Dense(WIDTH, bias_initializer="normal")
    again = L.Lambda(lambda t: ops.matmul(t, dense.kernel))
    model = keras.Model(x, again(L.ReLU()(dense(x))))
    dense.kernel.assign(np.array(dense.kernel) * 2.0 ** -(np.arange(WIDTH) % 6))
    return model, X


Trained = tuple[keras.Model, bytes, Any, float]


def trained(build: Callable[[], tuple[keras.Model, Any]], policy: str) -> Trained:
    """A QAT model after a step of training, its file, data, and its SQNR before, in dB."""
    keras.utils.set_random_seed(0)
    model, data = build()
    expected = np.asarray(model(data))
    qat = kqat.quantize_model(model, policy=policy, calibration_data=data)
    error = np.asarray(qat(data)) - expected
    qat.compile(keras.optimizers.SGD(1e-3), "mse")
    qat.fit(data, expected, batch_size=64, verbose=0)
    ratio = 10.0 * np.log10(np.mean(expected**2) / np.mean(error**2))
    return qat, tflite_export.convert(qat), data, float(ratio)


def check_right(qat: keras.Model, blob: bytes, data: Any, most: int = 1) -> None:
    report = tflite_export.verify(qat, blob, data, samples=8)
    assert report.float_operators == 0
    assert {part.runtime for part in report.runtimes} >= {"litert", "tflite_micro"}
    for part in report.runtimes:
        assert part.problem is None
        assert part.max_steps <= most
        assert not part.unmatched


def read_by(model: ModelT, name: str, position: int) -> list[int]:
    """The constants at an input of the operators of a kind: indexes of tensors."""
    graph = model.subgraphs[0]
    found = (op for op in graph.operators if flatbuffer.op_name(model, op) == name)
    return [int(operator.inputs[position]) for operator in found]


@pytest.fixture(scope="module")
def language_model() -> Trained:
    return trained(head, "int8")


def test_a_table_read_both_ways_is_one_tensor(language_model: Trained) -> None:
    qat, blob, _, ratio = language_model
    model = flatbuffer.read(blob)
    (rows,) = read_by(model, "GATHER", 0)
    assert not read_by(model, "QUANTIZE", 0)  # Rows are read as they are.
    assert rows == read_by(model, "FULLY_CONNECTED", 1)[-1]
    tensor = model.subgraphs[0].tensors[rows]
    assert flatbuffer.tensor_name(tensor).endswith("/kernel")
    assert list(tensor.quantization.zeroPoint) == [0] and len(tensor.quantization.scale) == 1
    table = flatbuffer.tensor_data(model, tensor)
    assert table is not None and table.shape == (ROWS, WIDTH)
    assert blob.count(table.tobytes()) == 1
    (wrapper,) = (q for q in qat.layers if hasattr(getattr(q, "layer", None), "biases"))
    integers = np.rint(np.array(wrapper.on_grid("kernel")) / np.array(wrapper.scale("kernel")))
    np.testing.assert_array_equal(table, integers)
    assert ratio > LEAST_DB


def test_biases_train_on_their_grids(language_model: Trained) -> None:
    qat, blob, _, _ = language_model
    (call,) = (node for node in trace(qat).nodes if "bias" in node.kwargs)
    wrapper = call.layer
    (shipped,) = wrapper.tied_biases_on_grid()
    model = flatbuffer.read(blob)
    tensor = model.subgraphs[0].tensors[read_by(model, "FULLY_CONNECTED", 2)[-1]]
    integers = flatbuffer.tensor_data(model, tensor)
    assert integers is not None
    np.testing.assert_allclose(shipped, integers * tensor.quantization.scale, rtol=1e-6)
    trained_bias = np.asarray(wrapper.layer.bias_list[0])
    assert not np.array_equal(shipped, trained_bias)
    zeros = np.zeros((1, STEPS, WIDTH), np.float32)
    np.testing.assert_array_equal(wrapper(zeros, **call.kwargs)[0, 0], shipped)
    (frozen,) = (q for q in kqat.freeze(qat).model.layers if isinstance(q, TiedWeight))
    np.testing.assert_array_equal(frozen.bias_list[0], shipped)
    # A layer that reads rows knows the grid that they are on.
    (dense,) = (q for q in qat.layers if isinstance(getattr(q, "layer", None), L.Dense))
    assert dense.bias_on_grid() is not None


def test_what_trains_ships(language_model: Trained) -> None:
    check_right(*language_model[:3])


def test_it_is_saved_and_loaded(language_model: Trained, tmp_path: Any) -> None:
    qat, blob, data, _ = language_model
    qat.save(tmp_path / "qat.keras")
    again = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(again(data), qat(data))
    assert tflite_export.convert(again) == blob


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("build", [head, decoder, positions])
def test_mixed_precision_ships(build: Callable[[], Any], precision: str) -> None:
    keras.config.set_dtype_policy(precision)
    qat, blob, data, ratio = trained(build, "int8")
    check_right(qat, blob, data)
    assert ratio > LEAST_DB


@pytest.mark.slow
@pytest.mark.parametrize("build", [capped, joined, decoder, positions, products])
def test_other_uses_ship(build: Callable[[], Any]) -> None:
    qat, blob, data, ratio = trained(build, "int8")
    check_right(qat, blob, data)
    assert ratio > LEAST_DB
    if build is joined:  # Rows are on the table's grid, and on that of what they are joined with.
        assert read_by(flatbuffer.read(blob), "QUANTIZE", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "policy", "reader"),
    [
        (head, "w4a8", "FULLY_CONNECTED"),
        (head, "ternary", "FULLY_CONNECTED"),
        (head, "int16x8", "FULLY_CONNECTED"),
        (positions, "w4a8", "ADD"),
    ],
)
def test_other_widths_ship(build: Callable[[], Any], policy: str, reader: str) -> None:
    qat, blob, data, _ = trained(build, policy)
    check_right(qat, blob, data)
    model = flatbuffer.read(blob)
    assert set(read_by(model, "GATHER", 0)) & set(read_by(model, reader, 1))
