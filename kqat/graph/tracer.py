"""Any Keras model as one flat graph, and what walks it. With `opening` it knows Keras internals.

A `Graph` lists calls in the order in which they run; a `Ref` stands for each value that flows
between them. `Graph.run` gives meaning to a call, and so serves to rebuild a model, to calibrate
it and to compare it with a runtime.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.base import ModelError, array_of
from kqat.graph.added_losses import AddedLoss, BatchSize, OfEachSample, saved_and_read
from kqat.graph.copies import duplicate
from kqat.graph.keras_internals import (
    PATCHING,
    Opened,
    SeenLoss,
    bearing,
    borne_mask,
    call_signature,
    calls_in_order,
    calls_to,
    give_readers,
    infer_by_default,
    inner_function,
    is_of_users,
    maker_name,
    maker_of,
    moves_batch,
    open_call,
    open_model,
    opened_function,
    operations_between,
    passes_mask_by,
    typed_inputs,
    without_batch,
)
from kqat.graph.output_masks import MaskedOutput, without_output_masks

DEEPEST_MODEL = 100_000  # calls that may lie one behind the other in a model


@dataclasses.dataclass(frozen=True, eq=False)
class Ref:
    """A value in a graph: `shape` has the batch size (often `None`) first."""

    shape: tuple[int | None, ...]
    dtype: str

    @property
    def holds_indexes(self) -> bool:
        """Whether it holds indexes or truth values, which have no scale; not quantities."""
        return not keras.backend.is_float_dtype(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One call of one layer; `name` is unique in the graph.

    `args` and `kwargs` are those of the call, with a `Ref` in place of each tensor; `inputs`
    lists these refs in order. `masks` are those that values bear in the call, each behind its
    value, where layers inside the layer read them.
    """

    name: str
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    masks: tuple[tuple[Ref, Ref], ...] = ()

    @functools.cached_property
    def inputs(self) -> tuple[Ref, ...]:
        """The values that the call reads, once per use."""
        return refs_in((self.args, self.kwargs))

    @property
    def has_weights(self) -> bool:
        """Whether the layer has weights; an operation of `keras.ops` has none."""
        return bool(getattr(self.layer, "weights", ()))


@dataclasses.dataclass(frozen=True, eq=False)
class GraphLoss:
    """A loss that is computed of values in a graph.

    `layer` hands its first input on and makes the loss of the others, which stand in `inputs`.
    There are none where it has a problem.
    """

    layer: AddedLoss
    inputs: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A flat functional graph; the structures are the model's own, with refs in them."""

    nodes: tuple[Node, ...]
    input_struct: Any
    output_struct: Any
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    # What makes the mask by which losses leave steps of an output out, of the model's inputs.
    output_masks: tuple[keras.Model | None, ...] = ()
    # Whether an output bears a mask that is not among them, as layers make it.
    loses_masks: bool = False
    # Whether some of it is what a `call` of the user's was seen to do.
    was_run: bool = False
    # What calls add to the losses; no node computes it.
    losses: tuple[GraphLoss, ...] = ()
    # What such a `call` did beside it, such as to update a metric: a subject and a verb each.
    asides: tuple[str, ...] = ()

    @functools.cached_property
    def inputs(self) -> tuple[Ref, ...]:
        """The model's inputs in its order."""
        return refs_in(self.input_struct)

    @functools.cached_property
    def outputs(self) -> tuple[Ref, ...]:
        """The model's outputs in its order."""
        return refs_in(self.output_struct)

    @property
    def input_keys(self) -> tuple[str, ...]:
        """What data and files call the inputs: keys of a dict, or the names."""
        return keys_of(self.input_struct, self.input_names)

    @property
    def output_keys(self) -> tuple[str, ...]:
        """What targets and files call the outputs: keys of a dict, or the names."""
        return keys_of(self.output_struct, self.output_names)

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
            with bearing([(values[ref], values[mask]) for ref, mask in node.masks]):
                results = keras.tree.flatten(call(node, *args, **kwargs))
            values.update(zip(node.outputs, results, strict=True))
        return fill(self.output_struct, values.__getitem__)

    def run_with_losses(
        self, inputs: Sequence[Any], call: Callable[..., Any]
    ) -> tuple[Any, list[list[Any]]]:
        """As `run`; beside the outputs, the values that each loss is made of."""
        read = [list(loss.inputs) for loss in self.losses]
        whole = dataclasses.replace(self, output_struct=[self.output_struct, read])
        outputs, values = whole.run(inputs, call)
        return outputs, values

    def consumers(self) -> dict[Ref, list[Node]]:
        """The nodes that read each value, once per use."""
        table: dict[Ref, list[Node]] = {ref: [] for ref in self.inputs}
        for node in self.nodes:
            table.update((ref, []) for ref in node.outputs)
            for ref in node.inputs:
                table[ref].append(node)
        return table

    def calls(self) -> Counter[int]:
        """How often each layer is called, by its identity."""
        return Counter(id(node.layer) for node in self.nodes)

    def producers(self) -> dict[Ref, Node]:
        """The node that writes each value; model inputs have none."""
        return {ref: node for node in self.nodes for ref in node.outputs}

    def computing(self, refs: Iterable[Ref]) -> set[Node]:
        """The nodes that values depend on."""
        producers, found, waiting = self.producers(), set[Node](), list(refs)
        while waiting:
            node = producers.get(waiting.pop())
            if node is not None and node not in found:
                found.add(node)
                waiting += node.inputs
        return found


def trace(model: Any) -> Graph:
    """The graph of a built Keras model, nested and subclassed models opened up.

    Raises:
        ModelError: if `model` is not a built Keras model of fixed shape, or one whose `call`
            cannot be traced.
    """
    whole = open_model(model)
    opened, output_masks, loses_masks = without_output_masks(whole)
    inputs = [Ref(_shape(t, opened.batch), dtype) for t, dtype in typed_inputs(opened)]
    for tensor in opened.tensors:
        _check_input(tensor, model.name)
    by_tensor = {id(t): ref for t, ref in zip(opened.tensors, inputs, strict=True)}
    nodes: list[Node] = []
    kinds = [isinstance(o, keras.layers.InputLayer) for o in opened.function.operations]
    shell = model.name if kinds.count(False) == 1 else ""
    walk = _Walk("", nodes, set(), shell)
    output_struct = _inline(opened, dict(by_tensor), walk)
    _check_sizes(nodes, model.name)
    if set(inputs) & set(refs_in(output_struct)):
        raise ModelError(
            f"Expected outputs that layers compute. Received: model '{model.name}', which hands an "
            "input on as an output. Leave that out, or put keras.layers.Identity before it."
        )
    # The layer's name is saved with a model; the tensor's is not.
    input_names = [maker_name(t) for t in opened.tensors]
    output_names = [maker_name(_bare(t)) for t in keras.tree.flatten(whole.output)]
    if opened.fresh:
        makers = {ref: node.name for node in nodes for ref in node.outputs}
        names = tuple(makers[ref] for ref in refs_in(output_struct))
        output_names = list(keys_of(output_struct, names))
    taken = set(input_names)
    return Graph(
        nodes=tuple(nodes),
        input_struct=_map_tensors(opened.input, by_tensor),
        output_struct=output_struct,
        input_names=tuple(input_names),
        output_names=tuple(unique_name(name, taken) for name in output_names),
        output_masks=output_masks,
        loses_masks=loses_masks,
        was_run=bool(walk.seen),
        losses=tuple(walk.losses),
        asides=walk.asides,
    )


def trace_call(
    layer: Any, args: Any, kwargs: Any, name: str, inlined: Callable[[Any], bool]
) -> Graph:
    """The graph of what `layer` computes from symbolic arguments, its parts named after `name`.

    Where the graph reads a weight, a variable stands in the call's arguments.

    Args:
        layer: a built layer.
        args: of its call.
        kwargs: of its call.
        name: what the names of the parts begin with.
        inlined: for which layers inside the graph shows what they compute in their place.

    Raises:
        ModelError: if it cannot be traced.
    """
    opened = open_call(layer, args, kwargs, inlined)
    refs = {id(t): Ref(_shape(t, opened.batch), str(t.dtype)) for t in opened.tensors}
    walk = _Walk(f"{name}_", [], set())
    inputs = list(refs.values())
    output_struct = _inline(opened, dict(refs), walk)
    nodes = tuple(walk.nodes)
    losses = tuple(walk.losses)
    return Graph(nodes, inputs, output_struct, (), (), losses=losses, asides=walk.asides)


def rebuild(
    graph: Graph,
    call: Callable[..., Any],
    name: str,
    output_names: Sequence[str] = (),
    output_masks: Sequence[keras.Model | None] = (),
    given: Callable[[Any], Any] | None = None,
) -> keras.Model:
    """A new functional model: fresh inputs of the same names, `call` for every node.

    Args:
        graph: what to rebuild.
        call: as for `Graph.run`, with symbolic tensors.
        name: the new model's name.
        output_names: names of the new model's outputs; no layer that `call` makes may bear one,
            save the layer that makes that output. Where empty, outputs bear the names of the
            layers that make them.
        output_masks: as those of a graph, for outputs that are to bear masks; needs their names. An
            output that bears a mask as its layer makes it stays as it is.
        given: is called with each fresh input, before any node.
    """
    fresh = {
        ref: keras.Input(ref.shape[1:], dtype=ref.dtype, name=input_name)
        for ref, input_name in zip(graph.inputs, graph.input_names, strict=True)
    }
    if given is not None:
        for tensor in fresh.values():
            given(tensor)
    outputs, read = graph.run_with_losses(list(fresh.values()), call)
    if graph.losses:
        outputs = with_losses(outputs, graph.losses, read, output_names)
    if output_names:
        flat = keras.tree.flatten(outputs)
        named = [
            MaskedOutput(mask, name=output_name, dtype=tensor.dtype)([tensor, *fresh.values()])
            if mask is not None and borne_mask(tensor) is None
            else tensor
            if maker_name(tensor) == output_name
            else keras.layers.Identity(name=output_name, dtype=tensor.dtype)(tensor)
            for tensor, output_name, mask in zip(
                flat, output_names, output_masks or [None] * len(flat), strict=True
            )
        ]
        outputs = keras.tree.pack_sequence_as(outputs, named)
    give_readers(fresh.values())
    with _deep_recursion():
        model = keras.Model(fill(graph.input_struct, fresh.__getitem__), outputs, name=name)
    infer_by_default(model)
    return model


def with_losses(
    outputs: Any,
    losses: Sequence[GraphLoss],
    read: Sequence[Sequence[Any]],
    output_names: Sequence[str] = (),
) -> Any:
    """The outputs, the first of which adds losses.

    A loss of which a value is not computed any more is left out.

    Args:
        outputs: symbolic tensors, and weights.
        losses: of the graph that made them.
        read: what each loss is made of.
        output_names: as for `rebuild`.
    """
    flat = keras.tree.flatten(outputs)
    place = next((i for i, t in enumerate(flat) if isinstance(t, keras.KerasTensor)), None)
    if place is None:
        return outputs
    maker, _ = maker_of(flat[place])
    taken = {operation.name for operation in operations_between((), flat)}
    for loss, values in zip(losses, read, strict=True):
        if all(isinstance(value, keras.KerasTensor) for value in values):
            name = unique_name("added_loss", taken)
            flat[place] = loss.layer.anew(name)([flat[place], *values])
    if maker.name in output_names and flat[place] is not keras.tree.flatten(outputs)[place]:
        # What hands it on bears the output's name.
        maker.name = unique_name(f"{maker.name}_value", taken)
    return keras.tree.pack_sequence_as(outputs, flat)


def _bare(tensor: Any) -> Any:
    """The output that a layer makes, before losses were added to it."""
    layer, inputs = maker_of(tensor)
    return _bare(inputs[0]) if isinstance(layer, AddedLoss) else tensor


def copied(graph: Graph, name: str, copy_of: Callable[[Node], Any]) -> keras.Model:
    """A copy of the model that a graph was traced from, layer by layer.

    Calls of one layer share its weights, and so do those of its copy.

    Args:
        graph: what to copy.
        name: of the copy.
        copy_of: the copy of the layer of a node, which is its first call.
    """
    copies: dict[int, Any] = {}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if id(node.layer) not in copies:
            copies[id(node.layer)] = copy_of(node)
        return copies[id(node.layer)](*args, **kwargs)

    return rebuild(graph, call, name, graph.output_names, graph.output_masks)


@contextlib.contextmanager
def _deep_recursion() -> Iterator[None]:
    """Lets Keras, which walks a model by recursion, walk a recurrence of many steps."""
    with PATCHING:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(max(limit, DEEPEST_MODEL))
        try:
            yield
        finally:
            sys.setrecursionlimit(limit)


def non_finite_variables(model: keras.Model) -> Iterator[tuple[keras.Variable, int]]:
    """The weights of `model` that hold NaN or infinity, each with how many of its numbers do."""
    for variable in model.weights:
        if str(variable.dtype).startswith(("float", "bfloat")):
            values = np.asarray(array_of(variable), np.float32)
            if broken := np.count_nonzero(~np.isfinite(values)):
                yield variable, int(broken)


def _check_input(tensor: Any, model_name: str) -> None:
    if any(size is None for size in tensor.shape[1:]):
        raise ModelError(
            f"Expected fixed input shapes in model '{model_name}': an integer file carries them. "
            f"Received: input '{tensor.name}' of shape {tuple(tensor.shape)}. Give "
            "kqat.quantize_model or kqat.plan the sizes of the file, such as "
            f"input_shapes={_example(tensor)}."
        )
    for kind in ("sparse", "ragged"):
        if getattr(tensor, kind, False):
            raise ModelError(
                f"Expected dense inputs in model '{model_name}'. Received: input '{tensor.name}', "
                f"which is {kind}; a file has no such tensors. Build it with keras.Input(shape), "
                "and give dense data: tf.sparse.to_dense(x), or x.to_tensor(shape=...)."
            )
    if not str(tensor.dtype).startswith(("float", "bfloat", "int32", "int64", "uint8", "bool")):
        raise _wrong_type(tensor.name, tensor.dtype, model_name)


def _wrong_type(name: str, dtype: str, model_name: str) -> ModelError:
    return ModelError(
        "Expected float inputs, uint8 inputs that hold quantities (pixels), int32 inputs that hold "
        f"indexes (token ids), or bool inputs (masks), in model '{model_name}'. Received: input "
        f"'{name}' of dtype {dtype}. Declare indexes int32, pixels uint8, masks bool and other "
        "quantities float32."
    )


def _example(tensor: Any) -> tuple[int, ...]:
    """A shape without the batch, such as a user could give for an input of open sizes."""
    return tuple(64 if size is None else size for size in tensor.shape[1:])


def _check_sizes(nodes: Sequence[Node], model_name: str) -> None:
    for node in nodes:
        if any(0 in ref.shape[1:] for ref in (*node.inputs, *node.outputs)):
            shapes = [ref.shape for ref in (*node.inputs, *node.outputs)]
            raise ModelError(
                f"Expected values with elements in model '{model_name}'. Received: layer "
                f"'{node.name}' from and to shapes {shapes}. Leave the empty part out."
            )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Where an inlined model stands: name prefix, nodes so far, names used.

    `shell` is the outermost model's name. Where that model does nothing but call a model of the
    same name, as `with_input_shapes` makes one, the names of layers do not begin with it: policies
    name layers as their model does.
    """

    prefix: str
    nodes: list[Node]
    names: set[str]
    shell: str = ""
    seen: list[Opened] = dataclasses.field(default_factory=list)  # what was opened by running it
    losses: list[GraphLoss] = dataclasses.field(default_factory=list)

    @property
    def asides(self) -> tuple[str, ...]:
        """What calls did beside what the graph shows, each once."""
        return tuple(dict.fromkeys(aside for opened in self.seen for aside in opened.asides))

    def name_of(self, layer: Any, opened: Opened) -> str:
        """A name for a call, which is the same each time that a model is traced."""
        path = opened.owners.get(id(layer), "")
        named = isinstance(layer, keras.layers.Layer) or not opened.fresh
        return self.prefix + path + (layer.name if named else type(layer).__name__.lower())


def _shape(tensor: Any, batch: int | None) -> tuple[int | None, ...]:
    """The shape of a tensor with `None` for a batch size that was fixed while opening."""
    shape = tuple(tensor.shape)
    fixed = batch is not None and shape and shape[0] is not None and shape[0] % batch == 0
    return (None, *shape[1:]) if fixed else shape


def _inline(opened: Opened, refs: dict[int, Any], walk: _Walk) -> Any:
    """Appends the calls of a function; returns its output structure with refs in it.

    `refs` maps the identity of the function's symbolic tensors to refs; it starts with its inputs.
    Weights stand as variables in the place of refs.
    """
    refs.update(opened.weights)
    walk.seen.extend([opened] if opened.fresh else [])
    for call, masks, borne, maker in calls_in_order(
        opened.function, refs, opened.masks, opened.made_masks
    ):
        if all(id(t) in refs for t in call.outputs):  # It computes with weights alone.
            continue
        layer = call.operation
        if isinstance(layer, AddedLoss):
            first, *values = _map_tensors(call.arguments.args[0], refs)
            walk.losses.append(GraphLoss(layer, tuple(values)))
            refs[id(call.outputs[0])] = first
            continue
        kwargs = {**call.arguments.kwargs, **masks}
        if opened.sequence:
            kwargs.pop("training", None)
        args, kwargs = _map_tensors((call.arguments.args, kwargs), refs)
        args, kwargs = _call_options(layer, args, kwargs)
        bearers = {
            refs[id(t)]: refs[id(borne[id(t)])]
            for t in call.input_tensors
            if id(t) in borne and isinstance(refs[id(t)], Ref)
        }
        inner = _inner_model(layer, args, kwargs, bearers)
        if inner is None:
            if opened.batch is not None:
                layer, args, kwargs = _of_any_batch(call, opened.batch, args, kwargs)
            outputs = [Ref(_shape(t, opened.batch), str(t.dtype)) for t in call.outputs]
            wanted = walk.name_of(layer, opened)
            if maker is not None:
                # Users know the layer, not the comparison that Keras makes of it.
                wanted = f"{walk.prefix}{maker}_{type(layer).__name__.lower()}"
            name = unique_name(wanted, walk.names, "_call{}")
            given_masks = tuple(bearers.items())
            walk.nodes.append(Node(name, layer, args, kwargs, tuple(outputs), given_masks))
        else:
            if inner.fresh:
                read = refs_in(_named_inputs(inner, args, kwargs))
                masked = [bearers[r] for r in read if r in bearers]
                given: tuple[Any, ...] = tuple(dict.fromkeys([*read, *masked]))
            else:
                kwargs.pop("mask", None)  # Its inputs bear it.
                given = _values_in(_named_inputs(inner, args, kwargs))
            if len(given) != len(inner.tensors):
                raise ModelError(
                    f"Expected a call of model '{layer.name}' on its {len(inner.tensors)} inputs. "
                    f"Received: {len(given)} tensors. Give it those that it names and no others."
                )
            inner_refs = {id(t): r for t, r in zip(inner.tensors, given, strict=True)}
            if not inner.fresh:
                pairs = [p for p in zip(inner.tensors, given, strict=True) if isinstance(p[1], Ref)]
                borne_inside = {id(t): bearers[r] for t, r in pairs if r in bearers}
                made_masks = {
                    key: keras.Input(ref.shape[1:], dtype=ref.dtype)
                    for key, ref in borne_inside.items()
                }
                inner = dataclasses.replace(inner, masks=made_masks)
                inner_refs |= {id(mask): borne_inside[key] for key, mask in made_masks.items()}
            path = opened.owners.get(id(layer), "")
            wraps = layer.name == walk.shell
            prefix = "" if wraps else f"{walk.prefix}{path}{layer.name}_"
            deeper = _Walk(prefix, walk.nodes, walk.names, seen=walk.seen, losses=walk.losses)
            outputs = list(_values_in(_inline(inner, inner_refs, deeper)))
        refs.update((id(t), ref) for t, ref in zip(call.outputs, outputs, strict=True))
    for seen in opened.losses:
        try:
            walk.losses.append(_graph_loss(seen, opened, refs, walk))
        except _NoFunctionError as error:
            layer = AddedLoss(label=seen.layer.name, problem=str(error))
            walk.losses.append(GraphLoss(layer, ()))
    return _map_tensors(opened.output, refs)


class _NoFunctionError(Exception):
    """Why a loss is no function of values in the graph alone."""


def _graph_loss(seen: SeenLoss, opened: Opened, refs: Mapping[int, Any], walk: _Walk) -> GraphLoss:
    """A loss that a call added, as a function of values that the graph computes anyway.

    Args:
        seen: the loss, a symbolic tensor inside `opened`.
        opened: what was called.
        refs: what stands for its symbolic tensors, as far as outputs depend on them.
        walk: where the model stands.

    Raises:
        _NoFunctionError: if it depends on more than such values.
    """
    if seen.problem:
        raise _NoFunctionError(seen.problem)
    renewed = {id(old): refs[id(new)] for old, new in opened.renewed if id(new) in refs}
    known, nodes = {**renewed, **refs}, []
    shared = {id(v) for node in walk.nodes for v in getattr(node.layer, "variables", ())}
    for call in calls_to([seen.value], known):
        layer, arguments = call.operation, (call.arguments.args, call.arguments.kwargs)
        args, kwargs = _map_tensors(arguments, known)
        if isinstance(layer, keras.layers.Layer):
            variables = {id(v) for v in layer.variables}
            if is_of_users(layer) or inner_function(layer) or variables & shared:
                raise _NoFunctionError(f"depends on another call of '{layer.name}'")
            args, kwargs = _call_options(layer, args, kwargs)
        elif opened.batch is not None:
            layer, args, kwargs = _of_any_batch(call, opened.batch, args, kwargs)
        outputs = tuple(Ref(_shape(t, opened.batch), str(t.dtype)) for t in call.outputs)
        nodes.append(Node(call.operation.name, layer, args, kwargs, outputs))
        known.update((id(t), ref) for t, ref in zip(call.outputs, outputs, strict=True))
    value = known[id(seen.value)]
    read = keras.tree.flatten([[(n.args, n.kwargs) for n in nodes], value])
    if any(isinstance(v, keras.Variable) and v.trainable for v in read):
        raise _NoFunctionError("depends on a trained weight (let add_weight have a regularizer)")
    if not isinstance(value, Ref):
        raise _NoFunctionError(
            "depends on weights alone (let the layer that has them have a regularizer)"
        )
    made = {ref for node in nodes for ref in node.outputs}
    given = tuple(dict.fromkeys(r for r in [*refs_in(read), value] if r not in made))
    name = seen.layer.name
    if seen.regularizer is not None:
        return GraphLoss(AddedLoss(activity_penalty=seen.regularizer, label=name), given)
    function = _function_of(Graph(tuple(nodes), list(given), value, (), ()), opened.batch)
    return GraphLoss(AddedLoss(function, label=name), given)


def _function_of(graph: Graph, batch: int | None) -> keras.Model:
    """A functional model of a graph's own inputs, as it is read from a file.

    A number beside a value that equals `batch`, which stood for the batch size, stands for it: a
    loss is often divided by it. Where it does not, the loss is another one on two samples, and is
    found to be when the QAT model is made. An array of one sample, as the lengths of sequences,
    is repeated for each where an operation does not take it beside more.

    Raises:
        _NoFunctionError: if a file cannot hold it, or it takes no other number of samples.
    """
    inputs = [keras.Input(batch_shape=ref.shape, dtype=ref.dtype) for ref in graph.inputs]
    batched = [t for t in inputs if t.shape[:1] == (None,)]

    def constant(value: Any) -> Any:
        if isinstance(value, keras.Variable):
            value = np.asarray(value)
        number = isinstance(value, int | float | np.ndarray) or keras.ops.is_tensor(value)
        if number and not isinstance(value, bool) and np.size(value) == 1 and batched:
            if float(np.asarray(value).reshape(())) == batch:
                return BatchSize()(batched[0])
        return value

    def of_each(value: Any) -> Any:
        array = isinstance(value, np.ndarray) or keras.ops.is_tensor(value)
        if not array or isinstance(value, keras.KerasTensor) or not batched:
            return value
        if np.ndim(value) == 0 or np.shape(value)[0] != 1:
            return value
        one = np.asarray(value)
        return OfEachSample(one[0].tolist(), str(one.dtype))(batched[0])

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = keras.tree.map_structure(constant, (args, kwargs))
        try:
            return duplicate(node.layer)(*args, **kwargs)
        except Exception:  # Each operation has its own for shapes that do not fit.
            args, kwargs = keras.tree.map_structure(of_each, (args, kwargs))
            return duplicate(node.layer)(*args, **kwargs)

    try:
        output = keras.layers.Identity()(graph.run(inputs, call))
        function = saved_and_read(keras.Model(inputs, output))
        function([np.zeros([size or 2 for size in t.shape], t.dtype) for t in inputs])
    except Exception as error:  # Whatever Keras or a user's own class raises.
        raise _NoFunctionError(
            "is no function of values alone that a file can hold, as where random numbers are drawn"
        ) from error
    return function


def _named_inputs(inner: Opened, args: Any, kwargs: Any) -> Any:
    """What a model inside reads of its arguments: of a dict, what it has names for."""
    if len(args) != 1 or not isinstance(args[0], dict):
        return args, kwargs
    named = isinstance(inner.input, dict)
    keys = list(inner.input) if named else [t.name for t in keras.tree.flatten(inner.input)]
    if not set(keys) <= set(args[0]):
        return args, kwargs
    found = [args[0][key] for key in keys]
    return dict(zip(keys, found, strict=True)) if named else found


# Operations that hold a shape, and under which name.
_SHAPES = {"Reshape": "newshape", "BroadcastTo": "shape", "Slice": "shape"}


def _of_any_batch(call: Any, batch: int, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """The operation and arguments of a call without the batch size that was fixed meanwhile."""
    operation = call.operation

    def any_batch(value: Any) -> Any:
        constant = keras.ops.is_tensor(value) or isinstance(value, np.ndarray)
        if not constant or isinstance(value, keras.KerasTensor | keras.Variable):
            return value
        array = np.asarray(value)
        if array.ndim == 0 or array.shape[0] == 0 or array.shape[0] % batch:
            return value
        single = without_batch(array, batch)
        return value if single is None else single

    args, kwargs = keras.tree.map_structure(any_batch, (args, kwargs))
    attribute = _SHAPES.get(type(operation).__name__)
    if attribute is not None:
        shape = tuple(-1 if s is None else s for s in _shape(call.outputs[0], batch))
        # Python's own copy makes it anew of the arguments that it was made of, whatever they are.
        changed = object.__new__(type(operation))
        vars(changed).update({**vars(operation), attribute: shape})
        operation = changed
        if type(operation).__name__ == "Slice" and (len(args) == 3 or attribute in kwargs):
            # An argument of its call before Keras 3.12.
            args, kwargs = args[:2], {**kwargs, attribute: shape}
    return operation, args, kwargs


def _inner_model(layer: Any, args: Any, kwargs: Any, masks: Mapping[Ref, Ref]) -> Opened | None:
    """A model inside a model, opened; `None` for a layer. `masks` are those of its arguments."""
    function = inner_function(layer)
    if function is not None and not moves_batch(function):
        return opened_function(function, layer)
    if not isinstance(layer, keras.Model):
        return None
    refs = dict.fromkeys([*refs_in((args, kwargs)), *masks.values()])
    fresh = {r: keras.Input(batch_shape=r.shape, dtype=r.dtype) for r in refs}
    filled = fill((args, kwargs), fresh.__getitem__)
    with bearing([(fresh[ref], fresh[mask]) for ref, mask in masks.items()]):
        return open_call(layer, *filled)


def _call_options(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments: the first by position, and of the rest those that say something.

    `training=False` is left out where it is the default: Keras itself overrides it in `fit`. Layers
    that augment data do so by default; whoever calls one alone shall see what inference computes.

    Raises:
        ModelError: if that is `training=True`.
    """
    parameters = call_signature(layer).parameters
    # Keras records the default of its preprocessing layers, which is True.
    default = parameters["training"].default if "training" in parameters else None
    if "training" in parameters and kwargs.get("training") and not default:
        raise ModelError(
            f"Expected layers that compute as inference does when they ship. Received: "
            f"training=True in the call of '{layer.name}'. Call it without `training`. A file "
            "draws no random numbers: for several samples of an output (Monte Carlo dropout), "
            "multiply by a mask that is an input of the model, and draw it before each run."
        )
    said = {k: v for k, v in kwargs.items() if k != "training" and not (k == "mask" and v is None)}
    if default:
        said["training"] = False
    if "mask" in said and passes_mask_by(layer):
        del said["mask"]
    first = next(iter(parameters), None)
    if not args and first in said:
        args = (said.pop(first),)
    return args, said


def keys_of(structure: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """What data and files call the leaves: the joined keys of dicts, or `names`."""
    leaves = range(len(keras.tree.flatten(structure)))
    found = dict(paths_of(keras.tree.pack_sequence_as(structure, list(leaves))))
    paths = [found[leaf] for leaf in leaves]
    named = all(isinstance(part, str) for path in paths for part in path)
    joined = tuple("_".join(map(str, path)) for path in paths)
    # Two paths may make one name: {"a_b": x, "a": {"b": y}}.
    return joined if named and all(paths) and len(set(joined)) == len(joined) else names


def paths_of(structure: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each leaf with its path, as `keras.tree.flatten_with_path` has it from Keras 3.7 on."""
    if isinstance(structure, Mapping):
        inside: Iterable[tuple[Any, Any]] = structure.items()
    elif isinstance(structure, list | tuple):
        inside = enumerate(structure)
    else:
        yield structure, path
        return
    for key, part in inside:
        yield from paths_of(part, (*path, key))


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
    # Keras's own walk of such a structure takes as long as an operator of a small model.
    if isinstance(structure, Ref):
        return function(structure)
    if type(structure) in (tuple, list):
        return type(structure)([fill(part, function) for part in structure])
    if type(structure) is dict:
        return {key: fill(part, function) for key, part in structure.items()}
    if structure is None or isinstance(structure, bool | int | float | str):
        return structure
    return keras.tree.map_structure(lambda x: function(x) if isinstance(x, Ref) else x, structure)


def _values_in(structure: Any) -> tuple[Any, ...]:
    """The refs of a structure, and the weights and constants that stand in the place of refs."""
    leaves = keras.tree.flatten(structure)
    return tuple(
        x
        for x in leaves
        if isinstance(x, Ref | keras.Variable | np.ndarray) or keras.ops.is_tensor(x)
    )


def refs_in(structure: Any) -> tuple[Ref, ...]:
    return tuple(x for x in keras.tree.flatten(structure) if isinstance(x, Ref))
