"""Any Keras model as one flat graph, and what walks it. The only room that knows Keras internals.

A `Graph` lists calls in the order in which they run; a `Ref` stands for each value that flows
between them. `Graph.run` gives meaning to a call, and so serves to rebuild a model, to calibrate
it and to compare it with a runtime.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from kqat.decompositions import duplicate
from kqat.errors import ModelError
from kqat.operations import as_layers
from kqat.registry import rule_for


@dataclasses.dataclass(frozen=True, eq=False)
class Ref:
    """A value in a graph: `shape` has the batch size (often `None`) first."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One call of one layer; `name` is unique in the graph.

    `args` and `kwargs` are those of the call, with a `Ref` in place of each tensor; `inputs`
    lists these refs in order.
    """

    name: str
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]

    @property
    def inputs(self) -> tuple[Ref, ...]:
        """The values that the call reads, once per use."""
        return _refs((self.args, self.kwargs))


@dataclasses.dataclass(frozen=True)
class Graph:
    """A flat functional graph; the structures are the model's own, with refs in them."""

    nodes: tuple[Node, ...]
    input_struct: Any
    output_struct: Any
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Ref, ...]:
        """The model's inputs in its order."""
        return _refs(self.input_struct)

    @property
    def outputs(self) -> tuple[Ref, ...]:
        """The model's outputs in its order."""
        return _refs(self.output_struct)

    def run(self, inputs: Sequence[Any], call: Callable[..., Any]) -> Any:
        """Runs the graph; returns values in the model's output structure.

        Args:
            inputs: one value per model input.
            call: `call(node, *args, **kwargs)` with values in place of refs; returns the node's
                output value, or a list of them.
        """
        values: dict[Ref, Any] = dict(zip(self.inputs, inputs, strict=True))
        for node in self.nodes:
            args, kwargs = fill((node.args, node.kwargs), values.__getitem__)
            results = keras.tree.flatten(call(node, *args, **kwargs))
            values.update(zip(node.outputs, results, strict=True))
        return fill(self.output_struct, values.__getitem__)

    def consumers(self) -> dict[Ref, list[Node]]:
        """The nodes that read each value, once per use."""
        table: dict[Ref, list[Node]] = {ref: [] for ref in self.inputs}
        for node in self.nodes:
            table.update((ref, []) for ref in node.outputs)
            for ref in node.inputs:
                table[ref].append(node)
        return table

    def producers(self) -> dict[Ref, Node]:
        """The node that writes each value; model inputs have none."""
        return {ref: node for node in self.nodes for ref in node.outputs}


def trace(model: Any) -> Graph:
    """The graph of a built Sequential or Functional model, nested models opened up.

    Raises:
        ModelError: if `model` is not a built Keras model of fixed shape, or is a subclassed one.
    """
    function = _functional(model)
    nodes: list[Node] = []
    inputs = [Ref(tuple(t.shape), str(t.dtype)) for t in function.inputs]
    by_tensor = {id(t): ref for t, ref in zip(function.inputs, inputs, strict=True)}
    output_struct = _inline(function, dict(by_tensor), _Walk("", nodes, set()))
    if set(inputs) & set(_refs(output_struct)):
        raise ModelError(
            f"Expected outputs that layers compute. Received: model '{model.name}', which hands an "
            "input on as an output. Leave that out, or put keras.layers.Identity before it."
        )
    # The layer's name is saved with a model; the tensor's is not.
    input_names = [t._keras_history.operation.name for t in function.inputs]
    taken = set(input_names)
    return Graph(
        nodes=tuple(nodes),
        input_struct=_map_tensors(function.input, by_tensor),
        output_struct=output_struct,
        input_names=tuple(input_names),
        output_names=tuple(unique_name(name, taken) for name in function.output_names),
    )


def rebuild(
    graph: Graph, call: Callable[..., Any], name: str, output_names: Sequence[str] = ()
) -> keras.Model:
    """A new functional model: fresh inputs of the same names, `call` for every node.

    Args:
        graph: what to rebuild.
        call: as for `Graph.run`, with symbolic tensors.
        name: the new model's name.
        output_names: names of the new model's outputs; no layer that `call` makes may bear one,
            save the layer that makes that output. Where empty, outputs bear the names of the
            layers that make them.
    """
    fresh = {
        ref: keras.Input(ref.shape[1:], dtype=ref.dtype, name=input_name)
        for ref, input_name in zip(graph.inputs, graph.input_names, strict=True)
    }
    outputs = graph.run(list(fresh.values()), call)
    if output_names:
        flat = keras.tree.flatten(outputs)
        named = [
            tensor
            if tensor._keras_history.operation.name == output_name
            else keras.layers.Identity(name=output_name, dtype=tensor.dtype)(tensor)
            for tensor, output_name in zip(flat, output_names, strict=True)
        ]
        outputs = keras.tree.pack_sequence_as(outputs, named)
    return keras.Model(fill(graph.input_struct, fresh.__getitem__), outputs, name=name)


def expand(graph: Graph, keep: Callable[[Node], bool], name: str) -> tuple[Graph, dict[str, str]]:
    """A float copy of `graph` in which every layer is one that the registry calls simple.

    Fused activations are split off and composite layers decomposed; the copy computes the same
    values and shares no variable with the original. A layer that is called twice stays one.

    Args:
        graph: of the user's model.
        keep: whether a node stays as it is, needing no row in the registry (it will stay float).
        name: of the model, for messages.

    Returns:
        The expanded graph, and for each of its layers' names the name of the original node.

    Raises:
        UnsupportedLayerError: if the registry has no row for a layer.
    """
    kept = {node.name for node in graph.nodes if keep(node)}
    expanded, origins = _expand_once(graph, kept, name)
    # A part may be composite itself, as the activation of Dense(activation="silu").
    while any(_is_composite(n, origins[n.layer.name], kept) for n in expanded.nodes):
        still = {n.name for n in expanded.nodes if origins[n.layer.name] in kept}
        further, parts = _expand_once(expanded, still, name)
        layer_names = {node.name: node.layer.name for node in expanded.nodes}
        origins = {part: origins[layer_names[node]] for part, node in parts.items()}
        expanded = further
    return expanded, origins


def _is_composite(node: Node, origin: str, kept: set[str]) -> bool:
    if origin in kept:
        return False
    rule = rule_for(node.layer, origin)
    return bool(rule.decompose and rule.decompose(node.layer, node.name) is not None)


def _expand_once(graph: Graph, kept: set[str], name: str) -> tuple[Graph, dict[str, str]]:
    copies: dict[int, Callable[..., Any]] = {}
    origins: dict[str, str] = {}
    taken = {*graph.input_names, *(node.name for node in graph.nodes)}
    known: set[int] = set()

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        # Calls of one layer share its weights; a layer without any is made anew for each call.
        key = id(node.layer) if getattr(node.layer, "weights", ()) else id(node)
        if key not in copies:
            copies[key] = _simplify(node, node.name in kept)
        outputs = copies[key](*args, **kwargs)
        for operation in _operations_between((args, kwargs), outputs):
            new = id(operation) not in known and operation is not node.layer
            if new and operation.name != node.name:
                operation.name = unique_name(operation.name, taken)
            known.add(id(operation))
            origins.setdefault(operation.name, node.name)
        return outputs

    return trace(rebuild(graph, call, name)), origins


def non_finite_variable(model: keras.Model) -> str | None:
    """Path of the first weight of `model` that holds NaN or infinity, if there is one."""
    for variable in model.weights:
        if str(variable.dtype).startswith(("float", "bfloat")):
            if not np.isfinite(np.asarray(variable, np.float32)).all():
                return variable.path
    return None


def _operations_between(inputs: Any, outputs: Any) -> list[Any]:
    tensors = [t for t in keras.tree.flatten(inputs) if isinstance(t, keras.KerasTensor)]
    unique = list({id(t): t for t in tensors}.values())
    function = keras.Function(unique, keras.tree.flatten(outputs))
    return [op for op in function.operations if not isinstance(op, keras.layers.InputLayer)]


def _simplify(node: Node, keep: bool) -> Callable[..., Any]:
    layer = node.layer
    if keep:
        return duplicate(layer, node.name)
    if not isinstance(layer, keras.layers.Layer):
        return as_layers(layer, node.name)
    rule = rule_for(layer, node.name)
    simpler = rule.decompose(layer, node.name) if rule.decompose else None
    return duplicate(layer, node.name) if simpler is None else simpler


def _functional(model: Any) -> Any:
    if not isinstance(model, keras.Model):
        legacy = any(base.__module__.startswith("tf_keras") for base in type(model).__mro__)
        raise ModelError(
            f"Expected a keras.Model (Keras 3). Received: {type(model).__module__}."
            f"{type(model).__name__}."
            + (" It is a Keras 2 (tf_keras) model: rebuild it with Keras 3." if legacy else "")
        )
    if not model.built:
        raise ModelError(
            f"Expected a built model. Received: '{model.name}', which has no weights yet. Begin "
            "it with keras.Input(shape), or call it once on data."
        )
    function = _inner_function(model)
    if function is None:
        raise ModelError(
            f"Expected a Sequential or Functional model. Received: '{model.name}' of type "
            f"{type(model).__name__}. Use keras.Model(x, model.call(x)) with "
            "x = keras.Input(shape)."
        )
    for tensor in function.inputs:
        _check_input(tensor, model.name)
    return function


def _check_input(tensor: Any, model_name: str) -> None:
    if any(size is None for size in tensor.shape[1:]):
        raise ModelError(
            f"Expected fixed input shapes in model '{model_name}': an integer file carries them. "
            f"Received: input '{tensor.name}' of shape {tuple(tensor.shape)}. Rebuild the model "
            "with a fixed shape."
        )
    if not str(tensor.dtype).startswith(("float", "bfloat")):
        raise ModelError(
            f"Expected float inputs in model '{model_name}'. Received: input '{tensor.name}' of "
            f"dtype {tensor.dtype}. Declare it float32; "
            "tflite_export.convert(inference_input_type='uint8') makes the file take bytes."
        )


def _inner_function(layer: Any) -> Any:
    """The Functional inside a Sequential, or a Functional itself; `None` for anything else."""
    function = getattr(layer, "_functional", None) or layer
    return function if hasattr(function, "_nodes_by_depth") else None


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Where an inlined model stands: name prefix, nodes so far, names used."""

    prefix: str
    nodes: list[Node]
    names: set[str]


def _inline(function: Any, refs: dict[int, Ref], walk: _Walk) -> Any:
    """Appends the calls of `function`; returns its output structure with refs in it.

    `refs` maps the identity of the function's symbolic tensors to refs; it starts with its inputs.
    """
    for depth in sorted(function._nodes_by_depth, reverse=True):
        for call in function._nodes_by_depth[depth]:
            if call.is_input:
                continue
            layer = call.operation
            args, kwargs = _map_tensors((call.arguments.args, call.arguments.kwargs), refs)
            args, kwargs = _call_options(layer, args, kwargs)
            inner = _inner_function(layer)
            if inner is None:
                outputs = [Ref(tuple(t.shape), str(t.dtype)) for t in call.outputs]
                name = unique_name(walk.prefix + layer.name, walk.names, "_call{}")
                walk.nodes.append(Node(name, layer, args, kwargs, tuple(outputs)))
            else:
                given = _refs(args[0] if args else kwargs)
                inner_refs = {id(t): r for t, r in zip(inner.inputs, given, strict=True)}
                prefix = f"{walk.prefix}{layer.name}_"
                deeper = _Walk(prefix, walk.nodes, walk.names)
                outputs = list(_refs(_inline(inner, inner_refs, deeper)))
            refs.update((id(t), ref) for t, ref in zip(call.outputs, outputs, strict=True))
    return _map_tensors(function.output, refs)


def _call_options(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments: the first by position, and of the rest those that say something.

    `training=False` is left out: Keras itself overrides it in `fit`.

    Raises:
        ModelError: if a mask is passed, or `training=True`.
    """
    parameters = inspect.signature(layer.call).parameters
    # Keras records the default of its preprocessing layers, which is True.
    default = parameters["training"].default if "training" in parameters else None
    if kwargs.get("training") and not default:
        raise ModelError(
            f"Expected layers that compute as inference does when they ship. Received: "
            f"training=True in the call of '{layer.name}'. Call it without `training`."
        )
    if _refs(kwargs.get("mask")):
        raise ModelError(
            f"Expected a model without masks: integer kernels know none. Received: a mask for "
            f"layer '{layer.name}'. Pad to a fixed length and leave Masking out."
        )
    said = {k: v for k, v in kwargs.items() if k != "training" and (k, v) != ("mask", None)}
    first = next(iter(parameters), None)
    if not args and first in said:
        args = (said.pop(first),)
    return args, said


def unique_name(name: str, taken: set[str], ending: str = "_{}") -> str:
    """`name`, or where it is taken with the first ending that is not; takes it."""
    numbered = (name + ending.format(number) for number in itertools.count(2))
    unique = next(n for n in itertools.chain([name], numbered) if n not in taken)
    taken.add(unique)
    return unique


def _map_tensors(structure: Any, refs: dict[int, Ref]) -> Any:
    return keras.tree.map_structure(
        lambda x: refs[id(x)] if isinstance(x, keras.KerasTensor) else x, structure
    )


def fill(structure: Any, function: Callable[[Ref], Any]) -> Any:
    """`structure` with `function(ref)` in place of each ref."""
    return keras.tree.map_structure(lambda x: function(x) if isinstance(x, Ref) else x, structure)


def _refs(structure: Any) -> tuple[Ref, ...]:
    return tuple(x for x in keras.tree.flatten(structure) if isinstance(x, Ref))
