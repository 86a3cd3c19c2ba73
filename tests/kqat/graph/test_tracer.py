"""Any model as one flat graph: names, structures, and the same values to the bit."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import kqat
from kqat.base.errors import ModelError
from kqat.graph.tracer import Graph, Node, non_finite_variables, rebuild, trace
from kqat.planning.expansion import expand

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 6, 6, 3)).astype(np.float32)
ROWS = RNG.normal(size=(4, 6)).astype(np.float32)


def image_model(*chain: layers.Layer, name: str = "model") -> keras.Model:
    return keras.Sequential([keras.Input((6, 6, 3), name="image"), *chain], name=name)


def nested() -> keras.Model:
    """Three levels deep; the innermost model is called at two places."""
    core = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(6, name="dense"),
            layers.BatchNormalization(name="norm"),
        ],
        name="core",
    )
    x = keras.Input((6,), name="row")
    block = keras.Model(x, core(layers.Dense(6, name="dense")(core(x))), name="block")
    x = keras.Input((6,), name="row")
    return keras.Model(x, layers.Dense(2, name="dense")(block(x)), name="model")


def base() -> keras.Model:
    """A model, with a model inside, whose layers differ between training and inference."""
    deep = image_model(layers.BatchNormalization(name="norm"), name="deep")
    parts = layers.Conv2D(3, 1, name="conv"), deep, layers.Dropout(0.5, name="drop")
    return image_model(*parts, name="base")


def two_by_two() -> keras.Model:
    """Inputs and outputs in dicts."""
    inputs = {"b": keras.Input((6,), name="b"), "a": keras.Input((6,), name="a")}
    total = layers.Add(name="total")([inputs["b"], inputs["a"]])
    outputs = {"z": layers.Dense(2, name="one")(total), "y": layers.ReLU(name="two")(total)}
    return keras.Model(inputs, outputs, name="model")


def run(graph: Graph, *values: Any) -> Any:
    return graph.run(list(values), lambda node, *args, **kwargs: node.layer(*args, **kwargs))


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def keep(node: Node) -> bool:
    return False


def test_a_sequential_model_is_a_chain() -> None:
    model = image_model(layers.Conv2D(2, 3, name="conv"), layers.Flatten(name="flat"))
    graph = trace(model)
    assert names(graph) == ["conv", "flat"]
    assert (graph.input_names, graph.output_names) == (("image",), ("flat",))
    conv, flat = graph.nodes
    assert conv.inputs == graph.inputs
    assert flat.inputs == conv.outputs
    assert flat.outputs == graph.outputs
    assert graph.inputs[0].shape == (None, 6, 6, 3)
    assert graph.outputs[0].shape == (None, 32)
    assert graph.consumers()[conv.outputs[0]] == [flat]
    assert graph.producers() == {conv.outputs[0]: conv, flat.outputs[0]: flat}


def test_nested_models_are_opened_up_by_path() -> None:
    model = nested()
    graph = trace(model)
    assert names(graph) == [
        "block_core_dense",
        "block_core_norm",
        "block_dense",
        "block_core_dense_call2",
        "block_core_norm_call2",
        "dense",
    ]
    assert graph.nodes[0].layer is graph.nodes[3].layer
    np.testing.assert_array_equal(run(graph, ROWS), model(ROWS))


def test_names_are_unique_beside_a_users_own_call2() -> None:
    x = keras.Input((6,))
    shared = layers.Dense(6, name="dense")
    graph = trace(keras.Model(x, layers.Dense(6, name="dense_call2")(shared(shared(x)))))
    assert len(set(names(graph))) == 3


def test_a_value_read_twice_by_one_call_counts_twice() -> None:
    x = keras.Input((6,))
    graph = trace(keras.Model(x, layers.Multiply(name="square")([x, x])))
    (square,) = graph.nodes
    assert square.inputs == (graph.inputs[0], graph.inputs[0])
    assert graph.consumers()[graph.inputs[0]] == [square, square]


def test_structures_are_the_models_own() -> None:
    model = two_by_two()
    graph = trace(model)
    assert graph.input_names == ("a", "b")
    assert graph.output_names == ("two", "one")
    assert set(graph.input_struct) == {"a", "b"}
    assert set(graph.output_struct) == {"y", "z"}
    rebuilt = rebuild(graph, lambda node, *args: node.layer(*args), "again", graph.output_names)
    data = {"a": ROWS, "b": -2 * ROWS}
    expected, found = model(data), rebuilt(data)
    assert set(found) == {"y", "z"}
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key])
    assert rebuilt.output_names == ["two", "one"]


def test_lists_stay_lists() -> None:
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    model = keras.Model([a, b], [layers.Add(name="sum")([a, b]), layers.ReLU(name="relu")(b)])
    graph = trace(model)
    rebuilt = rebuild(graph, lambda node, *args: node.layer(*args), "again")
    assert isinstance(rebuilt([ROWS, ROWS]), list)
    np.testing.assert_array_equal(rebuilt([ROWS, 3 * ROWS])[0], 4 * ROWS)


def test_an_unnamed_input_bears_its_layers_name() -> None:
    # The tensor's own name counts all tensors of the process, and is not saved.
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    assert trace(model).input_names == ("input_layer",)


def test_outputs_have_distinct_names() -> None:
    x = keras.Input((6,), name="x")
    shared = layers.Dense(6, name="dense")
    first = shared(x)
    model = keras.Model(x, [first, first, shared(first)])
    graph = trace(model)
    assert graph.output_names == ("dense", "dense_2", "dense_3")
    rebuilt = rebuild(graph, lambda node, *args: node.layer(*args), "again", graph.output_names)
    assert rebuilt.output_names == list(graph.output_names)
    assert trace(rebuilt).output_names == graph.output_names


def test_keys_that_would_join_to_one_name_are_left_to_the_inputs_names() -> None:
    """Such a model trained, and conversion ended in an error of Python."""
    p, q = keras.Input((4,), name="a_b"), keras.Input((4,), name="q")
    graph = trace(keras.Model({"a_b": p, "a": {"b": q}}, layers.Add()([p, q])))
    assert sorted(graph.input_keys) == ["a_b", "q"]


def test_an_input_is_no_output() -> None:
    x = keras.Input((6,), name="x")
    with pytest.raises(ModelError, match=r"model 'model', which hands an input on.*Identity"):
        trace(keras.Model(x, [x, layers.Dense(6)(x)], name="model"))


def test_training_false_is_left_out_as_keras_overrides_it_in_fit() -> None:
    x = keras.Input((6, 6, 3))
    graph = trace(keras.Model(x, base()(x, training=False)))
    assert {node.name: node.kwargs for node in graph.nodes} == {
        "base_conv": {},
        "base_deep_norm": {},
        "base_drop": {},
    }


@pytest.mark.parametrize("outer", [True, False], ids=["model", "layer"])
def test_training_true_is_refused(outer: bool) -> None:
    x = keras.Input((6, 6, 3))
    y = base()(x, training=True) if outer else layers.Dropout(0.5, name="base")(x, training=True)
    with pytest.raises(ModelError, match=r"call of 'base'.* without .*input of the model"):
        trace(keras.Model(x, y))


def chain(*parts: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        for part in parts:
            x = part(x)
        return x

    return apply


def add_three(x: Any) -> Any:
    return layers.Add(name="add")([layers.Conv2D(3, 1, name=f"c{i}")(x) for i in range(3)])


EXACT: dict[str, Callable[[Any], Any]] = {
    "relu": layers.Conv2D(4, 3, activation="relu", name="conv"),
    "relu6": layers.DepthwiseConv2D(3, activation="relu6", name="conv"),
    "softmax": layers.Dense(4, activation="softmax", name="conv"),
    "silu": layers.Conv2D(4, 3, activation="silu", name="conv"),
    "activation layer": layers.Conv2D(4, 3, activation=layers.LeakyReLU(0.1), name="conv"),
    "separable": layers.SeparableConv2D(4, 3, activation="relu", name="conv"),
    "ReLU": layers.ReLU(6.0),
    "ReLU with slope": layers.ReLU(negative_slope=0.25),
    "sum of three": add_three,
    "upsampling": layers.UpSampling2D(2),
    "bilinear": layers.UpSampling2D(2, interpolation="bilinear"),
    "repeat": chain(layers.Flatten(), layers.RepeatVector(3)),
    "batch norm": chain(layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization()),
    "operators": lambda x: keras.ops.relu(x) + layers.Conv2D(3, 1)(x) * 2.0,
}


@pytest.mark.parametrize("build", EXACT.values(), ids=EXACT)
def test_an_expanded_model_computes_the_same_bits(build: Callable[[Any], Any]) -> None:
    x = keras.Input((6, 6, 3), name="image")
    model = keras.Model(x, build(x), name="model")
    model.set_weights([RNG.normal(size=w.shape) ** 2 for w in model.get_weights()])
    graph, origins = expand(trace(model), keep, model.name)
    np.testing.assert_array_equal(run(graph, IMAGES), model(IMAGES))
    assert set(origins) == {node.layer.name for node in graph.nodes}
    assert set(origins.values()) <= set(names(trace(model)))
    shared = {id(v) for v in model.variables} & {id(v) for v in graph_variables(graph)}
    assert shared == set()


def graph_variables(graph: Graph) -> list[Any]:
    return [v for node in graph.nodes for v in getattr(node.layer, "variables", ())]


def test_an_average_is_within_a_rounding() -> None:
    x = keras.Input((6, 6, 3))
    parts = [layers.Conv2D(3, 1, name=f"c{i}")(x) for i in range(3)]
    model = keras.Model(x, layers.Average(name="mean")(parts))
    graph, _ = expand(trace(model), keep, model.name)
    # Keras divides by 3; TFLite's kernels multiply by a constant: one rounding of float32 apart.
    np.testing.assert_array_almost_equal_nulp(run(graph, IMAGES), model(IMAGES).numpy(), 1)


def test_a_layer_called_twice_stays_one() -> None:
    x = keras.Input((6,))
    shared = layers.Dense(6, activation="relu", name="dense")
    graph, origins = expand(trace(keras.Model(x, shared(shared(x)))), keep, "model")
    assert names(graph) == ["dense", "dense_relu", "dense_call2", "dense_relu_call2"]
    assert graph.nodes[0].layer is graph.nodes[2].layer
    assert origins == {"dense": "dense", "dense_relu": "dense"}


def test_parts_make_way_for_the_users_names() -> None:
    # Keras names the second Add 'add_1', as its decomposition names the first one's first part.
    x = keras.Input((6,))
    dense = [layers.Dense(6, activation="relu", name=f"d{i}")(x) for i in range(3)]
    total = layers.Add(name="add_1")([layers.Add(name="add")(dense), x])
    model = keras.Model(x, layers.ReLU(name="d0_relu")(total))
    graph, origins = expand(trace(model), keep, "model")
    assert len(set(names(graph))) == len(graph.nodes)
    assert origins["add_1"] == "add_1"
    assert origins["d0_relu"] == "d0_relu"
    assert {origins[n] for n in names(graph)} == set(names(trace(model)))
    np.testing.assert_array_equal(run(graph, ROWS), model(ROWS))


def test_kept_layers_and_operations_need_no_row() -> None:
    x = keras.Input((6,))
    model = keras.Model(x, layers.Dense(2, name="dense")(keras.ops.sort(x)))
    graph, _ = expand(trace(model), lambda node: node.name.startswith("sort"), "model")
    np.testing.assert_array_equal(run(graph, ROWS), model(ROWS))


def test_expanding_leaves_the_model_alone() -> None:
    model = image_model(layers.Conv2D(4, 3, activation="relu", name="conv"), layers.ReLU())
    before = model.to_json(), [w.copy() for w in model.get_weights()]
    graph, _ = expand(trace(model), keep, "model")
    graph.nodes[0].layer.kernel.assign(graph.nodes[0].layer.kernel + 1.0)
    assert model.to_json() == before[0]
    np.testing.assert_equal(model.get_weights(), before[1])


def test_broken_weights_are_named() -> None:
    model = image_model(layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="norm"))
    assert list(non_finite_variables(model)) == []
    model.layers[1].moving_variance.assign([1.0, np.inf, 1.0, 1.0])
    found = [(variable.path, broken) for variable, broken in non_finite_variables(model)]
    assert found == [("model/norm/moving_variance", 1)]


@pytest.mark.parametrize("structure", [lambda b: {"b": b}, lambda b: [b]], ids=["dict", "list"])
def test_a_model_inside_takes_what_it_names_of_a_dict(structure: Any) -> None:
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner = keras.Model(structure(b), keras.layers.Dense(2, name="dense")(b), name="inner")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras says that it leaves `a` out.
        outer = keras.Model({"a": a, "b": b}, [inner({"a": a, "b": b}), keras.layers.ReLU()(a)])
    graph = trace(outer)
    dense = next(node for node in graph.nodes if node.name == "inner_dense")
    assert dense.inputs == (graph.inputs[1],)


class Queries(keras.Model):
    """A Functional model inside, called on a weight beside a tensor, as the Perceiver's blocks."""

    def __init__(self) -> None:
        super().__init__(name="queries")
        latent, data = keras.Input((2, 6), name="latent"), keras.Input((4, 6), name="data")
        mixed = layers.Attention()([layers.Dense(6)(latent), data])
        self.block = keras.Model({"latent": latent, "data": data}, layers.Add()([mixed, latent]))

    def build(self, shape: Any) -> None:
        self.latent = self.add_weight(shape=(2, 6), initializer="random_normal")

    def call(self, x: Any) -> Any:
        latent = keras.ops.expand_dims(self.latent, 0)
        for _ in range(2):
            latent = self.block({"latent": latent, "data": x})
        return latent


def test_a_model_inside_may_be_called_on_a_weight() -> None:
    x = keras.Input((4, 6))
    model = keras.Model(x, Queries()(layers.Dense(6)(x)))
    graph, _ = expand(trace(model), lambda node: False, "expanded")
    parts = rebuild(graph, lambda node, *args, **kwargs: node.layer(*args, **kwargs), "parts")
    data = RNG.normal(size=(3, 4, 6)).astype(np.float32)
    np.testing.assert_allclose(parts(data), model(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("given", "taken"), [("int64", "int32"), ("float64", "float32")])
def test_inputs_of_64_bits_are_taken_in_32(given: str, taken: str) -> None:
    """Tokenizers return int64, and operators of indexes take int32 on all runtimes."""
    x = keras.Input((6,), dtype=given)
    more = keras.layers.Embedding(9, 4)(x) if given == "int64" else keras.layers.Dense(4)(x)
    assert [ref.dtype for ref in trace(keras.Model(x, more)).inputs] == [taken]
    counted = keras.ops.cast(x > 3, "float32")
    assert [ref.dtype for ref in trace(keras.Model(x, counted)).inputs] == [taken]


def _folded(x: Any) -> Any:
    return ops.reshape(layers.Dense(4)(ops.reshape(x, (24, 3))), (4, 6, 4))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_of_fixed_size_may_stand_in_shapes(batch: int) -> None:
    x = keras.Input(batch_shape=(batch, 4, 6))
    row = np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 1, 6)
    y = ops.concatenate([layers.Dense(6)(x), ops.broadcast_to(row, (batch, 1, 6))], axis=1)
    model = keras.Model(x, layers.Dense(2)(ops.reshape(y, (batch, -1))))
    values = RNG.normal(size=(batch, 4, 6)).astype(np.float32)
    expanded, _ = expand(trace(model), lambda node: False, "expanded")
    assert np.array_equal(np.asarray(run(expanded, values)), np.asarray(model(values)))


def test_a_fixed_batch_that_is_folded_is_refused_by_name() -> None:
    x = keras.Input(batch_shape=(4, 6, 3))
    with pytest.raises(kqat.UnsupportedLayerError, match="'reshape' to keep the batch axis first"):
        kqat.plan(keras.Model(x, _folded(x)))
