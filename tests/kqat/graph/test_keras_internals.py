"""Subclassed models, custom layers and functions: opened up by tracing, or refused by line."""

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import kqat
from kqat.graph import call_signature, keras_internals, operations_between, values_between
from kqat.graph.tracer import rebuild, trace
from kqat.planning.tied_weights import expand_tied
from tests.coverage.cases import inputs_of
from tests.coverage.custom_cases import CASES
from tests.coverage.index_cases import CASES as INDEX_CASES


def _expanded(model: keras.Model) -> keras.Model:
    graph = trace(model)
    configs = dict.fromkeys(node.name for node in graph.nodes)
    graph, *_ = expand_tied(graph, lambda node: False, "expanded", configs)
    return rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "layers")


@pytest.mark.parametrize("case", [*CASES, *INDEX_CASES], ids=lambda case: case.name)
def test_parts_compute_what_the_model_computes(case: Any) -> None:
    model = case.model()
    x = inputs_of(model, 5)
    parts = _expanded(model)
    ours, theirs = (keras.tree.flatten(m(x, training=False)) for m in (parts, model))
    for a, b in zip(ours, theirs, strict=True):
        # Sums run in another order: a few float32 roundings of values near ten.
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-4, atol=1e-5)
    # Parts of one weight may be weights of their own, and parts that nothing reads are left out.
    variables = [m.trainable_variables for m in (parts, model)]
    assert len(variables[0]) >= len(variables[1])
    counts = [sum(np.size(v) for v in found) for found in variables]
    assert counts[0] <= counts[1]


def test_names_are_the_same_each_time() -> None:
    model = next(case for case in CASES if case.name == "subclassed").model()
    first, second = trace(model), trace(model)
    assert [node.name for node in first.nodes] == [node.name for node in second.nodes]
    assert first.output_names == second.output_names == ("mix", "score")


class Foreign(layers.Layer):
    def call(self, x: Any) -> Any:
        return tf.math.cumulative_logsumexp(x, axis=1)


class Takes(layers.Layer):
    """A layer that cannot be looked into: its weights have to be named."""

    def build(self, shape: Any) -> None:
        self.matrix = self.add_weight(name="matrix", shape=(shape[-1], 5))

    def call(self, x: Any) -> Any:
        return ops.convert_to_tensor(x) @ self.matrix


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            Foreign(name="own"),
            r"line \d+ of test_keras_internals.py, `return tf.math.cumulative_logsumexp\(x",
        ),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_way_out(layer: Any, message: str) -> None:
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(3)(layer(x)))
    with pytest.raises(kqat.UnsupportedLayerError, match=message):
        kqat.plan(model)
    with pytest.raises(kqat.UnsupportedLayerError, match=r"policy=\{'own': None\}"):
        kqat.plan(model)


def _named(spec: kqat.QuantSpec) -> dict[str, kqat.QuantizeConfig]:
    return {"own": kqat.QuantizeConfig(weights={"matrix": spec})}


def test_a_config_that_names_weights_keeps_a_custom_layer_whole() -> None:
    x = keras.Input((4,))
    model = keras.Model(x, Takes(name="own")(x))
    spec = kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True, axis="channel")
    plan = kqat.plan(model, _named(spec))
    (layer,) = plan.layers
    assert layer.kind == "Takes"
    assert {name: grid.axis for name, grid in layer.weights.items()} == {"matrix": (-1,)}


def test_tokens_are_whole_numbers() -> None:
    x = keras.Input((6,), name="tokens")  # float32, as Keras has it where nothing is said
    model = keras.Model(x, layers.Dense(2)(layers.Flatten()(layers.Embedding(10, 3)(x))))
    qat = kqat.quantize_model(model, calibration_data=np.ones((4, 6), np.int32))
    assert qat.inputs[0].dtype == "int32"
    with pytest.raises(kqat.CalibrationError, match="whole numbers for input 'tokens'"):
        kqat.quantize_model(model, calibration_data=np.full((4, 6), 0.5))


def test_what_lies_between_tensors_inside_a_model() -> None:
    """As a `keras.Function` of inner tensors has it, which Keras before 3.15 refuses to make."""
    x = keras.Input((4,))
    before = keras.layers.Dense(3, name="before")(x)
    left = keras.layers.ReLU(name="left")(before)
    dense = keras.layers.Dense(3, name="right")
    right = dense(left)
    y = keras.ops.add(right, before)
    names = [operation.name for operation in operations_between([before], [y])]
    assert names[:2] == ["left", "right"] and len(names) == 3
    assert operations_between({"a": before}, [before]) == []
    value = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    (found,) = values_between([before], [y], [value])
    expected = dense(np.maximum(value, 0.0)) + value
    np.testing.assert_array_equal(found, expected)


def test_signatures_are_those_of_each_class_and_object() -> None:
    class Doubled(keras.layers.Dense):
        def call(self, x: Any, factor: float = 2.0) -> Any:
            return super().call(x) * factor

    plain, doubled, own = keras.layers.Dense(2), Doubled(2), keras.layers.Dense(2)
    object.__setattr__(own, "call", lambda x, mask=None: x)
    for layer in (plain, doubled, own, doubled, keras.layers.Dense(3), keras.layers.Dropout(0.5)):
        assert call_signature(layer) == inspect.signature(layer.call)


class Residual(layers.Layer):
    """A layer whose call branches on shapes as TensorFlow's code does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.dense = layers.Dense(4)
        self.norm = layers.EinsumDense("ab,bc->ac", 4)

    def build(self, shape: Any) -> None:
        self.gain = self.add_weight(shape=(4,), name="gain", initializer="ones")
        self.dense.build(shape)
        self.norm.build(shape)

    def call(self, x: Any) -> Any:
        assert x.get_shape().rank == ops.ndim(x) == 2
        return x[...] + self.norm(ops.relu(self.dense(x) * self.gain))


class Doubled(layers.Dense):
    def call(self, x: Any) -> Any:
        return 2.0 * super().call(x)


# What is changed while a call is traced, as Keras has it.
_HOMES = (
    keras.KerasTensor,
    layers.Layer,
    layers.Dense,
    sys.modules[layers.Layer.__module__],
    sys.modules[ops.ndim.__module__].Ndim,
    sys.modules[ops.ndim.__module__].Size,
)


def _found(*more: Any) -> list[dict[str, int]]:
    """The attributes of all that is changed, by the identity of what they hold."""
    homes = (*_HOMES, *more)
    return [{name: id(value) for name, value in vars(home).items()} for home in homes]


def _patches() -> dict[str, tuple[Callable[[], Any], list[Any]]]:
    """Each patch, and the layers that it changes."""
    model = keras.Sequential([keras.Input((4,)), Residual(), Doubled(4)])
    own, stock = model.layers
    twins = {id(own): None, id(stock): keras_internals._stock_twin(stock)}
    notes = keras_internals._Notes()
    return {
        "sizes": (keras_internals._sizes_known, []),
        "keys": (keras_internals._keys_of_tensors, []),
        "calls": (lambda: keras_internals._calls_inlined([own, stock], twins, notes), [own, stock]),
        "inputs": (lambda: keras_internals._as_inputs([own, stock], {}), [own, stock]),
        "shapes": (lambda: keras_internals._shapes_told(own), [own.norm]),
        "names": (lambda: keras_internals._names_apart(own, [], []), [own, own.dense]),
    }


@pytest.mark.parametrize("name", ["sizes", "keys", "calls", "inputs", "shapes", "names"])
def test_patches_of_keras_restore_what_they_found(name: str) -> None:
    patch, changed = _patches()[name]
    before = _found(*changed)
    with patch():
        inside = _found(*changed)
        assert inside != before
        with contextlib.suppress(KeyError), patch():
            raise KeyError
        assert _found(*changed) == inside
    assert _found(*changed) == before


def test_names_of_inputs_may_begin_anew() -> None:
    keras.utils.clear_session(free_memory=False)
    model = keras.Sequential([keras.Input((4,)), Residual()])
    assert model.inputs[0]._keras_history.operation.name == "input_layer"
    keras.utils.clear_session(free_memory=False)
    _expanded(model)


@pytest.mark.slow
def test_threads_quantize_at_once() -> None:
    data = np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)
    models = [
        keras.Sequential([keras.Input((4,)), Residual(), Doubled(4), Residual(), layers.Dense(2)])
        for _ in range(4)
    ]
    before, limit, errors = _found(), sys.getrecursionlimit(), []

    def quantize(model: Any) -> None:
        try:
            kqat.quantize_model(model, calibration_data=data)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=quantize, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert _found() == before
    assert sys.getrecursionlimit() == limit
