"""A graph in layers that the registry calls simple: one integer operator each, or none.

Fused activations are split off, composite layers decomposed, functions and custom layers opened
up by tracing their own `call`.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.base import ModelError, TrainerWarning, UnsupportedLayerError
from kqat.graph import (
    AddedLoss,
    Graph,
    GraphLoss,
    Node,
    Part,
    Ref,
    WeightReads,
    attach_masks,
    bearing,
    borne_mask,
    call_signature,
    duplicate,
    fill,
    holds_indexes,
    is_half,
    is_of_users,
    is_taken_for_bias,
    is_tensor,
    maker_of,
    operations_between,
    parts_of,
    rebuild,
    refs_in,
    run_here,
    takes_masks_off,
    trace,
    trace_call,
    unique_name,
    unmasked,
    values_between,
    with_losses,
    with_masks,
)
from kqat.grids import LOWEST
from kqat.parts import (
    Elementwise,
    Learned,
    Matmul,
    Recurrence,
    Select,
    TensorFlowFunction,
    is_elementwise,
)
from kqat.planning.blends import blended
from kqat.registry import LayerRule, as_layers, is_custom, rule_for
from kqat.rewrites import FAR_BELOW, WANT_BATCH, as_values, computed, is_weight, whole_numbers

# Copies of layers by the identity of the layer, for all of its calls.
Copies = dict[int, Callable[..., Any]]
# Rounds in which composite layers become simpler ones; few need more than ten.
MOST_ROUNDS = 50
_MASKED = "attention, recurrent layers, merges, Softmax and GlobalAveragePooling1D"
# Layers that read a weight as a constant of the file, on the grid that they hand on.
READS_LEARNED = (keras.layers.Concatenate, Matmul, Select, Learned)

# Layers that merge tensors pair by pair, as operations that take a constant for one.
MERGES: Mapping[type, Callable[[Any, Any], Any]] = {
    keras.layers.Add: keras.ops.add,
    keras.layers.Subtract: keras.ops.subtract,
    keras.layers.Multiply: keras.ops.multiply,
    keras.layers.Maximum: keras.ops.maximum,
    keras.layers.Minimum: keras.ops.minimum,
}


def expand(
    graph: Graph,
    keep: Callable[[Node], bool],
    name: str,
    fused: Collection[str] = (),
    reads: WeightReads | None = None,
) -> tuple[Graph, dict[str, str]]:
    """A float copy of `graph` in which every layer is one that the registry calls simple.

    Fused activations are split off and composite layers decomposed; the copy computes the same
    values and shares no variable with the original. A layer that is called twice stays one.

    Args:
        graph: of the user's model.
        keep: whether a node stays as it is, needing no row in the registry (it will stay float).
        name: of the model, for messages.
        fused: names of the nodes that ship as a fused operator of their kind.
        reads: is told where the layers of `graph` read their weights. Copies of one variable that
            is read in two places are variables apart, which `tied_weights` puts together again.

    Returns:
        The expanded graph, and for each of its layers' names the name of the original node.

    Raises:
        UnsupportedLayerError: if the registry has no row for a layer.
    """
    kept = {node.name for node in graph.nodes if keep(node)}
    graph = blended(graph, frozenset(kept))
    if reads is not None:
        reads.note_model(graph, lambda node: None if _opens(node, kept) else node.name in kept)
    expanded, origins = _expand_once(graph, kept, name, {}, fused, reads)
    # A part may be composite itself, as the activation of Dense(activation="silu").
    rounds = 0
    while unfinished := _unfinished(expanded, origins, kept, fused):
        rounds += 1
        if rounds > MOST_ROUNDS:
            raise UnsupportedLayerError(
                f"Expected parts that become simpler. Received: '{unfinished}' of layer "
                f"'{origins[unfinished]}', which after {rounds} rounds is none of the layers "
                f"that ship. Leave the layer float with policy={{'{origins[unfinished]}': None}}; "
                "and tell us, for kqat should have known."
            )
        still = {n.name for n in expanded.nodes if origins[n.layer.name] in kept}
        further, parts = _expand_once(expanded, still, name, origins, fused, reads, again=True)
        layer_names = {node.name: node.layer.name for node in expanded.nodes}
        origins = {part: origins[layer_names[node]] for part, node in parts.items()}
        expanded = further
    return expanded, origins


def _opens(node: Node, kept: set[str]) -> bool:
    """Whether the parts of a node tell what it reads."""
    is_layer = isinstance(node.layer, keras.layers.Layer)
    if node.name in kept or not is_layer:
        return False
    if type(node.layer) is keras.layers.TimeDistributed:
        return is_of_users(node.layer.layer)  # It stands in the graph itself.
    try:
        return rule_for(node.layer).opens
    except UnsupportedLayerError:  # Expansion says so, by its name.
        return False


def _unfinished(
    graph: Graph, origins: dict[str, str], kept: set[str], fused: Collection[str]
) -> str | None:
    """A layer that is composite, or reads a weight that stands apart from it; its name."""
    weights = {n.outputs[0] for n in graph.nodes if isinstance(n.layer, Learned)}
    for node in graph.nodes:
        if origins[node.layer.name] in kept:
            continue
        if _simpler(node, origins[node.layer.name], fused, {}) is not None:
            return str(node.layer.name)
        apart = not isinstance(node.layer, READS_LEARNED)
        if apart and weights & set(node.inputs):
            return str(node.layer.name)
        if any(is_weight(v) for v in keras.tree.flatten((node.args, node.kwargs))):
            return str(node.layer.name)
    outputs = set(graph.outputs)
    return next(
        (str(n.layer.name) for n in graph.nodes if outputs & weights & set(n.outputs)), None
    )


def _simpler(
    node: Node,
    origin: str,
    fused: Collection[str],
    copies: Copies,
    reads: WeightReads | None = None,
) -> Callable[..., Any] | None:
    """What computes the node with simpler layers; `None` where it is simple already."""
    layer = node.layer
    if not isinstance(layer, keras.layers.Layer):
        return _tried(layer, as_layers(layer, node.name), node.name, origin)
    rule = rule_for(layer, origin)
    if node.masks and takes_masks_off(layer):
        return _opened_layer(node, origin, copies, reads)
    if rule.opens:
        opened = _opened_function if rule.table else _opened_layer
        return opened(node, origin, copies, reads)
    if rule.decompose_masked and (node.args[1:] or node.kwargs.get("mask") is not None):
        made = rule.decompose_masked(layer, node.name)
        return None if made is None else _tried(layer, made, node.name, origin)
    if (same := _handed_on(node, rule)) is not None:
        return _tried(layer, same, node.name, origin)
    decompose = rule.decompose_fused if rule.decompose_fused and origin in fused else rule.decompose
    made = decompose(layer, node.name) if decompose else None
    return None if made is None else _tried(layer, made, node.name, origin)


def _handed_on(node: Node, rule: LayerRule) -> keras.layers.Layer | None:
    """What stands for a layer that returns the numbers that it is given; `None` for others."""
    if rule.hands_on is None:
        return None
    (given,), (made,) = node.inputs, node.outputs
    before, behind = (tuple(n for n in ref.shape[1:] if n is not None) for ref in (given, made))
    if len(before) + len(behind) < len(given.shape[1:]) + len(made.shape[1:]):
        return None  # Sizes that are not known may differ.
    if given.holds_indexes or given.dtype != made.dtype:
        return None
    if not rule.hands_on(node.layer, before, behind):
        return None
    if before == behind:
        return keras.layers.Identity(name=node.name, dtype=made.dtype)
    return keras.layers.Reshape(behind, name=node.name)


def _without_training(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call but for `training`."""
    return {name: value for name, value in options.items() if name != "training"}


def _tried(
    operation: Any, made: Callable[..., Any], name: str, origin: str | None = None
) -> Callable[..., Any]:
    """`made`, after a trial that it computes what `operation` does: a row may not know an option.

    Args:
        operation: it may be a layer.
        made: what is to stand for it.
        name: of the operation.
        origin: name of the user's layer that it is a part of; it is that layer itself by default.

    Raises:
        UnsupportedLayerError: if it does not.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        # The parts compute what inference does, whatever is asked for.
        outputs = made(*args, **_without_training(kwargs))
        tensors = with_masks(t for t in keras.tree.flatten((args, kwargs)) if is_tensor(t))
        values = {id(t): _trial_values(t, seed) for seed, t in enumerate(tensors)}
        args, kwargs = keras.tree.map_structure(lambda x: values.get(id(x), x), (args, kwargs))
        if isinstance(operation, keras.layers.MultiHeadAttention):
            attach_masks(operation, args, kwargs)
        if type(operation).__name__ in WANT_BATCH:
            args = keras.tree.map_structure(_for_two_samples, args)
        masked = [t for t in tensors if borne_mask(t) is not None]
        pairs = [(values[id(t)], values[id(borne_mask(t))]) for t in masked]
        with keras.StatelessScope(), bearing(pairs):  # A state stays as it was.
            expected = _trial(operation, args, kwargs)
        found = keras.tree.flatten(outputs)
        computed_now = [y for y in found if is_tensor(y)]
        try:
            results = values_between(tensors, computed_now, list(values.values()), _inferring)
        except Exception:  # Such as of a shape: a part computes another one in inference.
            _check_parts(tensors, computed_now, origin or name)
            raise
        by_tensor = dict(zip(map(id, computed_now), results, strict=True))
        found = [by_tensor.get(id(y), y) for y in found]
        both = zip(keras.tree.flatten(expected), found, strict=True)
        if not all(_alike(a, b) or (_hides(a) and _alike(_raised(a), _raised(b))) for a, b in both):
            raise _other_values(operation, args, name, origin or name)
        return outputs

    return call


def _hides(x: Any) -> bool:
    """Whether values that are far below the others are as far below as those of hidden scores."""
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
        return False
    values = np.asarray(keras.ops.cast(x, "float32"))
    below = values[np.isfinite(values) & (values < FAR_BELOW)]
    return bool(len(below) and np.all(below <= LOWEST))


def _raised(x: Any) -> Any:
    """Values of which none is far below all others: such a score is hidden, by whichever number."""
    return keras.ops.where(keras.ops.isfinite(x), keras.ops.maximum(x, FAR_BELOW), x)


def _check_parts(inputs: Sequence[Any], outputs: Sequence[Any], origin: str) -> None:
    """Checks that the layers between symbolic tensors have rows, and what becomes of each.

    Raises:
        UnsupportedLayerError: if there is a layer that has no row, or not with these shapes.
    """

    def checked(part: Any) -> Callable[..., Any]:
        if not isinstance(part, keras.layers.Layer):
            return part
        rule = rule_for(part, origin)
        made = rule.decompose(part, part.name) if rule.decompose else None
        if made is None:
            return part
        return lambda *args, **kwargs: made(*args, **_without_training(kwargs))

    try:
        values_between(inputs, outputs, inputs, checked)
    except UnsupportedLayerError:
        raise
    except Exception:  # Of the same kind as the caller's own, which it raises.
        return


def check_computes(graph: Graph, model: keras.Model) -> None:
    """Checks that a graph computes what the model does, where a `call` was run to find it.

    A custom layer is tried alone, when it is opened; a subclassed model and a model inside are not.

    Raises:
        ModelError: if it does not.
    """
    if not graph.was_run:
        return

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        return _trial(node.layer, args, kwargs)

    values = {ref: _trial_values(ref, seed) for seed, ref in enumerate(graph.inputs)}
    with keras.StatelessScope():  # A state stays as it was.
        given = fill(graph.input_struct, values.__getitem__)
        expected = run_here(model, given, training=False)
        found = graph.run(list(values.values()), call)
    pairs = zip(keras.tree.flatten(expected), keras.tree.flatten(found), strict=True)
    if not all(_alike(a, b) for a, b in pairs):
        raise ModelError(
            f"Expected model '{model.name}' to compute what its call was seen to do. Received: "
            f"other values on random inputs, {_WHY_OTHER}. Use keras.ops.where, and means in place "
            "of sums that are divided by a size."
        )


def compute_alike(first: Graph, second: Graph) -> bool:
    """Whether two graphs of simple layers, of the same inputs, agree on two random samples."""

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        return _trial(node.layer, args, kwargs)

    values = [_trial_values(ref, seed) for seed, ref in enumerate(first.inputs)]
    with keras.StatelessScope():  # A state stays as it was.
        found = [keras.tree.flatten(graph.run(values, call)) for graph in (first, second)]
    return all(_alike(a, b) for a, b in zip(*found, strict=True))


_WHY_OTHER = (
    "as where Python branches on a value or a size, the number of samples is a factor, random "
    "numbers are drawn, or a state changes with each call"
)


def _other_values(
    operation: Any, args: Sequence[Any], name: str, origin: str
) -> UnsupportedLayerError:
    if isinstance(operation, keras.layers.Layer) and rule_for(operation, name).opens:
        return UnsupportedLayerError(
            f"Expected layer '{name}' of type {type(operation).__name__} to compute what its call "
            f"was seen to do. Received: other values on random inputs, {_WHY_OTHER}. Use "
            f"keras.ops.where, or leave it float with policy={{'{origin}': None}}."
        )
    if type(operation).__name__ == "Add" and is_taken_for_bias(*args):
        shapes = " and ".join(str(tuple(x.shape)) for x in args)
        return UnsupportedLayerError(
            f"Expected '{name}' of type Add to add as its operands broadcast. Received: shapes "
            f"{shapes}, of which Keras takes the second for a bias of the channels and adds it "
            "along another axis. Let the operand that is broadcast stand first: keras.ops.add(y, "
            "x)."
        )
    return UnsupportedLayerError(
        f"Expected '{name}' of type {type(operation).__name__} to compute what its integer "
        f"form does. Received: {_options(operation)}, with which they differ on random "
        f"inputs. Leave it float with policy={{'{origin}': None}}, or compose it of other "
        "functions; and tell us, for kqat should have known."
    )


def _for_trial(operation: Any) -> Any:
    """The operation for two samples, where it holds a shape for another number of them.

    Keras's ConvTranspose hands its options on in the wrong order, and so runs as a function only.
    """
    kind = type(operation).__name__
    if kind == "ConvTranspose":
        options = ("strides", "padding", "output_padding", "data_format", "dilation_rate")
        given = {option: getattr(operation, option) for option in options}
        return functools.partial(keras.ops.conv_transpose, **given)
    if kind != "BroadcastTo":
        return operation
    return type(operation)((2, *operation.shape[1:]))


def _inferring(operation: Any) -> Callable[..., Any]:
    """An operation as it infers: a layer may train by default, as Keras's augmenting ones do.

    Models inside it may keep the `training` of the call that built them.
    """
    inference = {"training": False} if isinstance(operation, keras.layers.Layer) else {}
    return lambda *args, **kwargs: run_here(operation, *args, **{**kwargs, **inference})


def _trial(operation: Any, args: Any, kwargs: Any) -> Any:
    """What an operation infers of two samples, beside weights that were tiled to a batch of one.

    Most broadcast such a weight; an attention, of which it is the query, does not.
    """
    operation = _inferring(_for_trial(operation))
    try:
        return operation(*args, **kwargs)
    except Exception:  # Whatever Keras or a user's own class raises of shapes that do not fit.
        whole = keras.tree.map_structure(_for_two_samples, (args, kwargs))
        if not any(map(is_weight, keras.tree.flatten((args, kwargs)))):
            raise
    args, kwargs = whole
    return operation(*args, **kwargs)


def _for_two_samples(value: Any) -> Any:
    return keras.ops.repeat(value, 2, axis=0) if is_weight(value) and value.shape[0] == 1 else value


def _trial_values(tensor: Any, seed: int) -> Any:
    """Values for a symbolic tensor, with two samples."""
    rng = np.random.default_rng(seed)
    shape = [size or 2 for size in tensor.shape]
    values: Any = rng.normal(size=shape)
    if holds_indexes(tensor):
        # The first two rows of any table are there.
        low, high = whole_numbers.bounds(tensor) or (0, 1)
        values = rng.integers(low, min(low + 1, high) + 1, shape)
    if tensor.dtype == "bool":
        values[..., 0] = 1  # A mask shows something.
    return keras.ops.convert_to_tensor(values, tensor.dtype)


def _alike(expected: Any, found: Any) -> bool:
    """Whether values are equal but for roundings, where the expected ones are finite."""
    if 0 in expected.shape:  # Nothing can read it.
        return True
    if is_weight(found) and tuple(found.shape[:1]) == (1,) != tuple(expected.shape[:1]):
        found = keras.ops.broadcast_to(found, expected.shape)  # It is the same for all samples.
    if tuple(expected.shape) != tuple(found.shape):
        return False
    if holds_indexes(expected):
        return bool(np.array_equal(expected, found))
    a, b = (np.asarray(keras.ops.cast(x, "float32")) for x in (expected, found))
    # Two roundings of the type, of sums that may cancel; another function differs by more.
    tolerance = 0.05 if is_half(expected.dtype) or is_half(found.dtype) else 1e-3
    finite = np.isfinite(a)
    largest = np.max(np.abs(a[finite]), initial=1.0)
    return np.allclose(a[finite], b[finite], rtol=tolerance, atol=tolerance * largest)


def _options(operation: Any) -> dict[str, Any]:
    plain = bool | int | float | str | tuple | list | None
    try:
        options = operation.get_config()
    except Exception:  # An operation has none; a user's own may be broken.
        options = vars(operation)
    return {
        key: value
        for key, value in options.items()
        if not key.startswith("_") and key != "name" and isinstance(value, plain)
    }


def _opened_function(
    node: Node, origin: str, copies: Copies, reads: WeightReads | None
) -> Callable[..., Any] | None:
    """A function of the user's as one table, as its parts, or (`None`) as it is, for a table.

    Raises:
        UnsupportedLayerError: if it is no function of each number alone, nor made of `keras.ops`.
    """
    layer, name = node.layer, node.name
    shape = node.inputs[0].shape
    single = len(node.inputs) == 1
    elementwise = single and is_elementwise(_inferring(layer), shape)
    try:
        symbols = {ref: _symbolic(ref) for ref in node.inputs}  # One, however often it is read.
        args, kwargs = fill((node.args, node.kwargs), symbols.__getitem__)
        graph = blended(trace_call(layer, args, kwargs, name, is_custom))
    except ModelError as error:
        if elementwise:
            return None
        raise UnsupportedLayerError(
            f"Expected a function of each number alone, or one made of keras.ops. Received: layer "
            f"'{origin}' of type {type(layer).__name__}, which is neither. {error} To do that use "
            f"policy={{'{origin}': None}}."
        ) from error
    tell_asides(graph.asides, "layer", origin)
    whole = _table_of_parts(layer, graph, name) if elementwise and len(graph.nodes) > 1 else None
    table = None if whole is None else _with_losses_around(whole, graph)
    if reads is not None and table is None:
        reads.note_opened(graph, node, origin)
    return _tried(layer, table or _inlined(graph, name, copies), name, origin)


def _opened_layer(
    node: Node, origin: str, copies: Copies, reads: WeightReads | None = None
) -> Callable[..., Any]:
    """A custom layer as its parts, which are copies; later calls share those with weights."""
    layer, name = node.layer, node.name
    opened: list[tuple[Any, Any]] = []  # arguments and outputs

    def call(*args: Any, **kwargs: Any) -> Any:
        for given, outputs in opened:
            if _are_of_a_kind(given, (args, kwargs)):
                return _called_again(given, outputs, (args, kwargs))
        if not layer.weights and len(node.inputs) == 1 and not kwargs and not node.masks:
            table = _table(layer, args[0], name)
            if table is not None:
                return table(*args)
        try:
            graph = blended(trace_call(layer, args, kwargs, name, is_custom))
        except ModelError as error:
            raise UnsupportedLayerError(
                f"{error} Or leave layer '{origin}' of type {type(layer).__name__} float with "
                f"policy={{'{origin}': None}}, name its weights there in a kqat.QuantizeConfig, or "
                "describe it with kqat.register_layer."
            ) from error
        tell_asides(graph.asides, "layer", origin)
        if reads is not None:
            reads.note_opened(graph, layer, origin)
        batched = [ref.shape[:1] == (None,) for ref in node.outputs]
        outputs = _inlined(graph, name, copies, batched)(*args, **kwargs)
        opened.append(((args, kwargs), outputs))
        return outputs

    return _tried(layer, call, name, origin)


def _are_of_a_kind(first: Any, second: Any) -> bool:
    """Whether arguments of two calls differ in nothing but in which tensors they are."""

    def kinds(given: Any) -> list[Any]:
        return [
            (tuple(x.shape), str(x.dtype)) if is_tensor(x) and borne_mask(x) is None else x
            for x in keras.tree.flatten(given)
        ]

    plain = tuple | bool | int | float | str | None
    pairs = list(zip(kinds(first), kinds(second), strict=False))
    same = all(isinstance(a, plain) and type(a) is type(b) and a == b for a, b in pairs)
    return same and str(_shape_of(first)) == str(_shape_of(second))


def _shape_of(structure: Any) -> Any:
    """A structure with nothing in it."""
    return keras.tree.map_structure(lambda x: 0, structure)


def _called_again(first: Any, outputs: Any, second: Any) -> Any:
    """What a call computes as an earlier one did, with the same weights.

    Args:
        first: the arguments of the earlier call.
        outputs: what it made of them.
        second: the arguments of this call.
    """
    given, now = ([x for x in keras.tree.flatten(one) if is_tensor(x)] for one in (first, second))

    def used(operation: Any) -> Any:
        if isinstance(operation, AddedLoss):
            return operation.anew(operation.name)
        # A layer without weights is made anew, to have its own grid.
        return operation if getattr(operation, "weights", ()) else duplicate(operation)

    flat = keras.tree.flatten(outputs)
    made = [y for y in flat if is_tensor(y)]
    values = dict(zip(map(id, made), values_between(given, made, now, used), strict=True))
    return keras.tree.map_structure(lambda y: values.get(id(y), y), outputs)


def _table(layer: Any, x: Any, name: str) -> Callable[..., Any] | None:
    """A layer as a table, if it is a function of each number alone and no few operations.

    Two operations may fuse into what stands before them. What TensorFlow alone computes is kept as
    TensorFlow's graph.
    """
    try:
        if not is_elementwise(_inferring(layer), tuple(x.shape)):
            return None
    except Exception:  # Whatever a user's own class raises: opening it tells where.
        return None
    try:
        graph = trace_call(layer, (x,), {}, name, is_custom)
        if len(graph.nodes) <= 2:
            return None
        whole = _table_of_parts(layer, graph, name)
        table = None if whole is None else _with_losses_around(whole, graph)
        if table is not None:
            tell_asides(graph.asides, "layer", name)
        return table
    except ModelError:
        if keras.backend.backend() != "tensorflow":
            return None
        try:
            takes_training = "training" in call_signature(layer).parameters
            inference = {"training": False} if takes_training else {}
            infers = functools.partial(layer.call, **inference)
            function = TensorFlowFunction.of(infers, name="graph")
            table = Elementwise.of(function, name=name)
        except Exception:  # It branches on a value: opening it tells where.
            return None
        return table if _computes(table, layer, x) else None


def _with_losses_around(table: Callable[..., Any], graph: Graph) -> Callable[..., Any] | None:
    """A table that adds the losses of a graph; `None` if one is of a value inside the graph."""
    outside = (*graph.inputs, *graph.outputs)
    if any(ref not in outside for loss in graph.losses for ref in loss.inputs):
        return None
    if not graph.losses:
        return table

    def call(x: Any) -> Any:
        y = table(x)
        values = dict(zip(outside, (x, y), strict=True))
        read = [[values[ref] for ref in loss.inputs] for loss in graph.losses]
        return with_losses(y, graph.losses, read)

    return call


def _with_penalty(layer: Any, simpler: Callable[..., Any], origin: str) -> Callable[..., Any]:
    """`simpler`, with the penalty of its outputs that Keras adds for the layer in its place.

    Some of these hand the `activity_regularizer` on to a part.
    """
    penalty = getattr(layer, "activity_regularizer", None)
    if penalty is None or is_custom(layer):  # Of a custom layer it is among the losses of its call.
        return simpler

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = simpler(*args, **kwargs)
        given = with_masks(t for t in keras.tree.flatten((args, kwargs)) if is_tensor(t))
        parts = operations_between(given, outputs)
        if any(getattr(part, "activity_regularizer", None) is not None for part in parts):
            return outputs
        values = [t for t in keras.tree.flatten(outputs) if is_tensor(t)]
        loss = GraphLoss(AddedLoss(activity_penalty=penalty, label=origin), ())
        return with_losses(outputs, [loss] * len(values), [[value] for value in values])

    return call


def _table_of_parts(layer: Any, graph: Graph, name: str) -> Elementwise | None:
    """A function of each number alone as one table of what `layer` computes it with.

    `None` where it is not written for one number: it names axes, or it holds weights, or a constant
    of equal numbers for all channels. Its parts ship then, one by one.

    Args:
        layer: what computes the function.
        graph: of its call at the shape that its input has in the model.
        name: of the table.
    """

    def parts(x: Any, graph: Graph) -> Any:
        given = [v for node in graph.nodes for v in keras.tree.flatten((node.args, node.kwargs))]
        if any(node.has_weights for node in graph.nodes) or any(map(is_weight, given)):
            raise ValueError("Expected a function without weights. Received: some.")
        return graph.run([x], lambda node, *args, **kwargs: duplicate(node.layer)(*args, **kwargs))

    # A function may read a size or the number of axes, as `x / x.shape[-1] ** 0.5` does: these are
    # constants of the graph. One that spreads a number over the shape is seen at one number only.
    ways: list[Callable[[Any], Any]] = [
        lambda x: parts(x, graph),
        lambda x: parts(x, trace_call(layer, (x,), {}, name, is_custom)),
    ]
    for way in ways:
        try:
            table = Elementwise.of(way, name=name)
            if _computes(table, layer, graph.inputs[0]):
                return table
        except Exception:  # Whatever a user's own function raises.
            continue
    return None


def _computes(table: Elementwise, layer: Any, x: Any) -> bool:
    """Whether `table` has the values of `layer` at the shape of `x`, by trial."""
    values = 3 * _trial_values(x, seed=0)  # Far enough to reach the bends of usual functions.
    return _alike(_trial(layer, (values,), {}), table(values))


def _symbolic(ref: Ref) -> Any:
    return keras.KerasTensor(ref.shape, ref.dtype)


def _inlined(
    graph: Graph, name: str, copies: Copies, batched: Sequence[bool] = ()
) -> Callable[..., Any]:
    """A callable that runs `graph`, whose last part takes over `name`.

    An output that is a weight becomes a value where `batched` says that a batch is expected, as it
    is where nothing is said; else it is handed on as a weight.

    Layers are copies, one for all calls of a layer; operations are layers of the registry at once,
    for those that are given a shape know none for any batch size.
    """
    last = set(graph.outputs)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        is_last = len(last) == 1 and last <= set(node.outputs)
        part = name if is_last else node.name
        args, kwargs = as_values(node.layer, args, kwargs, part)
        if not isinstance(node.layer, keras.layers.Layer):
            return _tried(node.layer, as_layers(node.layer, part), part)(*args, **kwargs)
        if node.masks and takes_masks_off(node.layer):  # While its arguments bear them.
            opened = _opened_layer(dataclasses.replace(node, name=part), part, copies)
            return unmasked(opened(*args, **kwargs))
        if id(node.layer) not in copies:
            copies[id(node.layer)] = duplicate(node.layer, part, **_told_shape(node))
        return unmasked(copies[id(node.layer)](*args, **kwargs))

    def run(*args: Any, **kwargs: Any) -> Any:
        given = keras.tree.flatten((args, kwargs))
        tensors = with_masks(t for t in given if is_tensor(t))[: len(graph.inputs)]
        # The graph says which call reads which mask.
        with bearing([(t, None) for t in tensors]):
            outputs, read = graph.run_with_losses(tensors, call)
        values = keras.tree.flatten(outputs)
        names = [name, *(f"{name}_{i}" for i in range(1, len(values)))]
        wanted = batched or [True] * len(values)
        found = [
            _as_output(x, tensors, n) if has_batch else x
            for x, n, has_batch in zip(values, names, wanted, strict=True)
        ]
        packed = keras.tree.pack_sequence_as(outputs, found)
        return with_losses(packed, graph.losses, read)

    return run


def _told_shape(node: Node) -> dict[str, Any]:
    """The output shape of an EinsumDense, which may have been built for an axis without size."""
    if type(node.layer) is not keras.layers.EinsumDense:
        return {}
    return {"output_shape": node.outputs[0].shape[1:]}


def _as_output(value: Any, given: Sequence[Any], name: str) -> Any:
    """An output that is a weight, as a value; one that is given, as what a layer hands on."""
    if any(value is tensor for tensor in given):
        return keras.layers.Identity(name=name, dtype=value.dtype)(value)
    if not is_weight(value):
        return value
    like = given[0]
    batched = len(value.shape) > 0 and value.shape[0] == 1
    array = np.asarray(value, np.float32)
    array = array[0] if batched else array
    trained = isinstance(value, keras.Variable) and value.trainable
    layer = Learned(list(array.shape), batched=batched, name=name, trainable=trained)
    return Part(layer, [array])(like)


def _expand_once(
    graph: Graph,
    kept: set[str],
    name: str,
    users: dict[str, str],
    fused: Collection[str],
    reads: WeightReads | None,
    again: bool = False,
) -> tuple[Graph, dict[str, str]]:
    """One round; `users` maps names of layers to those of the user's layers that they are of.

    With `again` the layers of `graph` are copies that a round before made: what is simple among
    them stays, as another copy of it would cost as much as the first.
    """
    copies: Copies = {}
    origins: dict[str, str] = {}
    taken = {*graph.input_names, *(node.name for node in graph.nodes)}
    known: set[int] = set()
    learned: dict[int, tuple[Learned, Any]] = {}
    seen: list[Any] = []

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        user = users.get(getattr(node.layer, "name", node.name), node.name)
        given: Any = args, kwargs
        likes = [learned[id(t)][1] for t in keras.tree.flatten(given) if id(t) in learned]
        args, kwargs = _read(node, args, kwargs, learned)
        flat = keras.tree.flatten((args, kwargs))
        if not any(is_tensor(t) for t in flat) and any(is_weight(t) for t in flat):
            likes = likes or seen[:1]
            outputs = _of_weights(node, args, kwargs, likes[0])
            # What reads such a value in this round may take it for the number that it is.
            for value in filter(is_tensor, keras.tree.flatten(outputs)):
                maker, _ = maker_of(value)
                learned[id(value)] = maker, likes[0]
        else:
            outputs = unmasked(made(node, user, args, kwargs))
        _check_outputs(node, graph, outputs)
        given = with_masks(t for t in keras.tree.flatten((given, likes)) if is_tensor(t))
        for operation in operations_between(given, outputs):
            new = id(operation) not in known and operation is not node.layer
            if new and operation.name != node.name:
                operation.name = unique_name(operation.name, taken)
            known.add(id(operation))
            origins.setdefault(operation.name, node.name)
        if isinstance(node.layer, Learned) and id(node.layer) in copies:
            part: Any = copies[id(node.layer)]
            learned[id(outputs)] = part.layer if isinstance(part, Part) else part, args[0]
        return outputs

    def made(node: Node, user: str, args: Any, kwargs: Any) -> Any:
        if isinstance(node.layer, Learned) and node.outputs[0] in graph.outputs:
            layer = node.layer
            value = keras.Variable(np.asarray(layer.value)[None], trainable=layer.trainable)
            return computed(value, args[0], len(layer.shape) + 1, node.name)
        if node.name not in kept:
            args, kwargs = _weights_read(node, user, args, kwargs)
            merge = MERGES.get(type(node.layer))
            if merge is not None and any(is_weight(v) for v in args[0]):
                return functools.reduce(merge, args[0])
            integers = whole_numbers.moved(node.layer, args[0], node.name) if args else None
            if integers is not None:
                return integers
        # Calls of one layer share its weights; a layer without any is made anew for each call.
        key = id(node.layer) if getattr(node.layer, "weights", ()) else id(node)
        if key not in copies:
            copies[key] = _simplify(node, user, node.name in kept, fused, copies, reads, again)
        return copies[key](*args, **kwargs)

    return trace(rebuild(graph, call, name, given=seen.append)), origins


def _check_outputs(node: Node, graph: Graph, outputs: Any) -> None:
    """Refuses constants without a batch as outputs of the model."""
    pairs = zip(node.outputs, keras.tree.flatten(outputs), strict=True)
    if any(ref in graph.outputs and not is_tensor(value) for ref, value in pairs):
        raise ModelError(
            f"Expected outputs with a batch as their first axis. Received: an output of '"
            f"{node.name}' of type {type(node.layer).__name__}, a constant of shape "
            f"{node.outputs[0].shape}. Leave it out of the model's outputs."
        )


def _weights_read(node: Node, user: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, in which weights may stand that a layer before it handed on.

    A custom layer is traced with those that have no batch.
    """
    opens = isinstance(node.layer, keras.layers.Layer) and rule_for(node.layer, user).opens
    if not opens:
        return as_values(node.layer, args, kwargs, node.name)
    refs = keras.tree.flatten((node.args, node.kwargs))
    alone = [isinstance(ref, Ref) and ref.shape[:1] != (None,) for ref in refs]
    values = keras.tree.flatten((args, kwargs))
    kept = {i: v for i, (v, is_alone) in enumerate(zip(values, alone, strict=True)) if is_alone}
    rest = [None if i in kept else v for i, v in enumerate(values)]
    found, _ = as_values(node.layer, tuple(rest), {}, node.name)
    flat = [kept.get(i, v) for i, v in enumerate(found)]
    packed: tuple[Any, Any] = keras.tree.pack_sequence_as((args, kwargs), flat)
    return packed


def _of_weights(node: Node, args: Any, kwargs: Any, like: Any) -> Any:
    """What a node computes from weights alone: weights, or values where it has a batch."""
    with keras.StatelessScope():
        values = node.layer(*args, **kwargs)
    flat = keras.tree.flatten((args, kwargs))
    trained = any(getattr(v, "trainable", False) for v in flat if is_weight(v))
    made = [keras.Variable(v, trainable=trained) for v in keras.tree.flatten(values)]
    found = [
        _as_output(v, [like], node.name) if ref.shape[:1] == (None,) else v
        for v, ref in zip(made, node.outputs, strict=True)
    ]
    return keras.tree.pack_sequence_as(values, found)


def _read(node: Node, args: Any, kwargs: Any, learned: dict[int, Any]) -> tuple[Any, Any]:
    """The arguments with weights themselves in the place of layers that hold but a weight."""
    if isinstance(node.layer, READS_LEARNED) or not learned:
        return args, kwargs

    def weight(value: Any) -> Any:
        if id(value) not in learned:
            return value
        layer, _ = learned[id(value)]
        array = np.asarray(layer.value)
        array = array[None] if layer.batched else array
        return keras.Variable(array, trainable=layer.trainable, name=layer.name)

    return keras.tree.map_structure(weight, (args, kwargs))


def _reads_masks(layer: Any, origin: str) -> bool:
    """Whether masks mean to a layer what it makes of them: a custom one takes them as tensors."""
    rule = rule_for(layer, origin)
    return rule.masks or rule.opens


def tell_asides(asides: Iterable[str], kind: str, name: str, stacklevel: int = 2) -> None:
    """Warns of what calls do in training that the QAT model does not.

    Args:
        asides: see `Graph.asides`.
        kind: `"layer"` or `"model"`.
        name: of it.
        stacklevel: as for `warnings.warn`.
    """
    for aside in asides:
        within = "" if aside.startswith(f"'{name}' ") else f"Inside {kind} '{name}', "
        warnings.warn(
            f"{within}{aside}. The QAT model does not: compute that in the loss or in the metrics "
            "that compile takes.",
            TrainerWarning,
            stacklevel=stacklevel,
        )


def _of_all_steps(node: Node, origin: str) -> Callable[..., Any]:
    """A copy of a BatchNormalization, which takes no mask: only its statistics leave steps out."""
    if refs_in(node.kwargs.get("mask")) and node.layer.trainable:
        warnings.warn(
            f"Layer '{origin}' of type BatchNormalization leaves masked steps out of the "
            "statistics that it gathers in training. The QAT model counts them. To keep the "
            f"statistics as they are, set model.get_layer('{origin}').trainable = False.",
            TrainerWarning,
            stacklevel=2,
        )
    copy = duplicate(node.layer, node.name)

    def call(x: Any, mask: Any = None) -> Any:
        del mask
        return copy(x)

    return call


def _is_run_by_users_cell(layer: Any) -> bool:
    """Whether a layer is a recurrence in whose step a cell of the user's own stands itself."""
    return isinstance(layer, Recurrence) and any(map(is_of_users, parts_of(layer.step)))


def _simplify(
    node: Node,
    origin: str,
    keep: bool,
    fused: Collection[str],
    copies: Copies,
    reads: WeightReads | None,
    again: bool,
) -> Callable[..., Any]:
    simpler = None if keep else _simpler(node, origin, fused, copies, reads)
    masked = refs_in(node.kwargs.get("mask"))
    if simpler is None and again and not masked and _stands_as_copied(node):
        return node.layer
    if simpler is None and type(node.layer) is keras.layers.BatchNormalization:
        return _of_all_steps(node, origin)
    if (keep and node.masks) or (masked and (keep or not _reads_masks(node.layer, origin))):
        kind, stays = type(node.layer).__name__, ", which stays as it is" if keep else ""
        raise ModelError(
            f"Expected masks for {_MASKED} that ship as integers. Received: a mask for layer "
            f"'{origin}' of type {kind}{stays}. Pad to a fixed length, and leave mask_zero and "
            "Masking out, or stop the mask before the layer: keras.layers.Reshape hands none on."
        )
    if simpler is None and _is_run_by_users_cell(node.layer):
        return node.layer  # It is of the round before, and no config tells what the cell does.
    if simpler is not None:
        return _with_penalty(node.layer, simpler, origin)
    # Who reads its mask reads it as a tensor of the graph.
    options = {"mask_zero": False} if getattr(node.layer, "mask_zero", False) else {}
    return duplicate(node.layer, node.name, **options)


def _stands_as_copied(node: Node) -> bool:
    """Whether a copy of a copied layer would be the same: by name, and making no mask."""
    is_named = getattr(node.layer, "name", None) == node.name
    return is_named and not node.masks and not getattr(node.layer, "mask_zero", False)
