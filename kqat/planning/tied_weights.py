"""Weights that several layers read are one variable again after layers were opened and copied.

Layers that do the same with a weight become one layer, called more than once. Where they do
different things with it (a table's rows, and products with the table transposed), one `TiedWeight`
takes their place. So both uses train the one variable, and one grid serves both in the file.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import ModelError, TrainerWarning
from kqat.config import QuantizeConfig
from kqat.graph import (
    Graph,
    Node,
    Part,
    SharedWeight,
    WeightReads,
    config_of,
    holders,
    holds_indexes,
    is_tensor,
    operations_between,
    rebuild,
    trace,
)
from kqat.parts import ChannelAffine, ConstantKind, Learned, TiedWeight, WeightUse, WithConstant
from kqat.planning.expansion import expand
from kqat.rewrites import zero

Configs = Mapping[str, QuantizeConfig | None]
# Names of the user's layers that read one weight.
Readers = tuple[str, ...]


def expand_tied(
    graph: Graph,
    keep: Callable[[Node], bool],
    name: str,
    configs: Configs,
    fused: Collection[str] = (),
) -> tuple[Graph, dict[str, str], list[Readers]]:
    """As `expand`, with each trained variable of the user's held by one layer.

    Args:
        graph: of the user's model.
        keep: whether a node stays as it is.
        name: of the model.
        configs: of the user's layers, by name.
        fused: names of the nodes that ship as a fused operator of their kind.

    Returns:
        The expanded graph, for each of its layers' names the name of the original node, and for
        each shared variable the names of the original nodes that read it.

    Raises:
        ModelError: if a weight is read in two ways that no grid serves, or in a part only.
        UnsupportedLayerError: if the registry has no row for a layer.
    """

    def expanded() -> tuple[Graph, dict[str, str], WeightReads]:
        reads = WeightReads()
        simple, origins = expand(graph, keep, name, fused, reads)
        return *_calls_merged(simple, origins, reads, graph, name), reads

    simple, origins, reads = expanded()
    if (copied := reads.copied()) is not None:
        variable, reader = copied
        raise ModelError(
            f"Expected trained weights of '{name}' that are read as variables. Received: "
            f"'{variable.path}', of which '{reader}' holds a copy, as where Python computes with "
            "it when the model is built: it would not be trained. Compute with it in the call of a "
            "layer that holds its owner as an attribute, or freeze it by trainable = False."
        )
    found = reads.shared()
    if not found:
        return simple, origins, []
    if reads.are_told_apart(found):
        places = _to_tie(found, name)
    else:
        with _other_numbers([shared.variable for shared in found]):
            *_, probed = expanded()
            places = _to_tie(probed.shared(), name)
    if not places:
        return simple, origins, []
    tied = [found[place] for place in places]
    if reads.are_told_apart(tied):
        return _all_tied(simple, origins, tied, configs, name)
    with _other_numbers([shared.variable for shared in tied]) as restored:
        simple, origins, reads = expanded()
        # What a rewrite copied, as TimeDistributed does, has other variables each time.
        tied = [reads.shared()[place] for place in places]
        simple, origins, readers = _all_tied(simple, origins, tied, configs, name)
        restored(simple)
    return simple, origins, readers


def _to_tie(found: Sequence[SharedWeight], name: str) -> list[int]:
    """The places of the weights of which copies would not train as they do.

    Single numbers that are picked out of a weight, and vectors that are computed from one, become
    weights themselves, as what is computed from a weight and read once does; a warning says so.
    """
    wanted = []
    for place, shared in enumerate(found):
        if shared.is_divided:
            continue
        if not shared.is_of_vectors:
            wanted.append(place)
            continue
        warnings.warn(
            f"'{shared.variable.path}' of model '{name}' is read as {len(shared.reads)} weights "
            f"that '{shared.reads[0].name}' computes from it or picks out of it. The QAT model "
            "trains each of these weights by itself.",
            TrainerWarning,
            stacklevel=2,
        )
    return wanted


def of_one_config(graph: Graph, readers: Sequence[Readers]) -> tuple[tuple[str, ...], ...]:
    """The names of nodes of the user's model that must have one config, in the model's order.

    They are the calls of one layer, those that read one weight, and all that such pairs join.

    Args:
        graph: of the user's model.
        readers: for each shared variable, the names of the nodes that read it.
    """
    calls: dict[int, list[str]] = {}
    for node in graph.nodes:
        calls.setdefault(id(node.layer), []).append(node.name)
    groups: list[set[str]] = []
    for names in map(set, (*calls.values(), *readers)):
        met = [group for group in groups if group & names]
        groups = [group for group in groups if not group & names]
        groups.append(names.union(*met))
    ordered = [tuple(node.name for node in graph.nodes if node.name in one) for one in groups]
    return tuple(sorted((one for one in ordered if len(one) > 1), key=_places(graph)))


def _places(graph: Graph) -> Callable[[tuple[str, ...]], int]:
    places = {node.name: place for place, node in enumerate(graph.nodes)}
    return lambda names: places[names[0]]


# Whole numbers that float32 tells apart.
_MOST_NUMBERS = 2**24


@contextlib.contextmanager
def _other_numbers(variables: Sequence[Any]) -> Iterator[Callable[[Graph], None]]:
    """Gives variables numbers, none of them twice, by which copies are known again.

    Afterwards they are as they were. What is yielded gives the layers of a graph that hold copies
    the numbers of before.
    """
    before = [np.array(variable) for variable in variables]
    total = sum(array.size for array in before)
    if total > _MOST_NUMBERS:
        raise ModelError(
            f"Expected shared weights that their numbers tell apart. Received: "
            f"'{variables[0].path}' and others of {total:,} numbers, all equal or equal to another "
            "weight's. Give them numbers at random before they are quantized."
        )
    scale = 2.0 ** -np.ceil(np.log2(total + 1))
    ends = np.cumsum([array.size for array in before])
    order = np.random.default_rng(0).permutation(ends[-1]) + 1.0
    given = [
        np.float32(part * scale).reshape(array.shape)
        for part, array in zip(np.split(order, ends[:-1]), before, strict=True)
    ]

    def restored(graph: Graph) -> None:
        for old, new in zip(before, given, strict=True):
            for _, held in list(holders(graph, new)):
                values = np.empty(new.size, np.float32)
                # Axes may have moved.
                values[np.argsort(held, axis=None)] = old.reshape(-1)[np.argsort(new, axis=None)]
                held.assign(values.reshape(held.shape))

    try:
        for variable, numbers in zip(variables, given, strict=True):
            variable.assign(numbers)
        yield restored
    finally:
        for variable, old in zip(variables, before, strict=True):
            variable.assign(old)


def _all_tied(
    graph: Graph,
    origins: dict[str, str],
    found: Sequence[SharedWeight],
    configs: Configs,
    name: str,
) -> tuple[Graph, dict[str, str], list[Readers]]:
    """The graph in which one layer holds each of the weights."""
    readers = [_checked(shared, graph, origins, configs, name) for shared in found]
    for shared in found:
        graph, origins = _tied(graph, origins, shared, name)
    return graph, origins, readers


def _rebuilt(
    graph: Graph, origins: Mapping[str, str], name: str, made: Mapping[int, Callable[..., Any]]
) -> tuple[Graph, dict[str, str]]:
    """The graph with other callables in the place of some layers, by their identity."""
    parts = dict(origins)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        output = made.get(id(node.layer), node.layer)(*args, **kwargs)
        if id(node.layer) in made:
            for part in operations_between([t for t in args if is_tensor(t)], output):
                parts.setdefault(part.name, origins[node.layer.name])
        return output

    built = trace(rebuild(graph, call, name))
    built = dataclasses.replace(built, output_names=graph.output_names)
    kept = {node.layer.name for node in built.nodes}
    return built, {layer: origin for layer, origin in parts.items() if layer in kept}


def _calls_merged(
    graph: Graph, origins: dict[str, str], reads: WeightReads, user: Graph, name: str
) -> tuple[Graph, dict[str, str]]:
    """The graph in which the parts of an opened layer serve all calls of that layer.

    `user` is the graph of the user's model.
    """
    counts = graph.calls()
    calls: dict[int, list[str]] = {}
    for node in user.nodes:
        calls.setdefault(id(node.layer), []).append(node.name)
    parts: dict[str, dict[int, Any]] = {}
    for node in graph.nodes:
        if node.has_weights and counts[id(node.layer)] == 1:
            parts.setdefault(origins[node.layer.name], {})[id(node.layer)] = node.layer
    made: dict[int, Callable[..., Any]] = {}
    for layer in reads.opened_again():
        found = [list(parts.get(call, {}).values()) for call in calls.get(id(layer), [])]
        first, others = found[:1], found[1:]
        if others and all(_are_alike(first[0], other) for other in others):
            reads.merged(layer)
            for other in others:
                made |= {id(b): a for a, b in zip(first[0], other, strict=True)}
    return _rebuilt(graph, origins, name, made) if made else (graph, origins)


def _are_alike(first: list[Any], other: list[Any]) -> bool:
    """Whether layers are the same, one by one, but for their names."""
    return len(first) == len(other) and all(map(_is_same, first, other))


def _is_same(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or len(a.weights) != len(b.weights):
        return False
    configs = [{**config_of(layer), "name": ""} for layer in (a, b)]
    if configs[0] != configs[1]:
        return False
    return all(map(np.array_equal, a.get_weights(), b.get_weights()))


def _tied(
    graph: Graph, origins: dict[str, str], shared: SharedWeight, name: str
) -> tuple[Graph, dict[str, str]]:
    """The graph in which one layer holds a weight."""
    found = list(holders(graph, shared.variable))
    first, others = found[0][0], [layer for layer, _ in found[1:]]
    if all(_is_same(first, other) for other in others):
        made = {id(other): first for other in others}
        return _rebuilt(graph, origins, name, made) if made else (graph, origins)
    return _rebuilt(graph, origins, name, _together(shared, found, name))


def _checked(
    shared: SharedWeight, graph: Graph, origins: Mapping[str, str], configs: Configs, name: str
) -> Readers:
    """The user's layers that read a weight; checks that they hold all of it, on one grid."""
    floats = [read.name for read in shared.reads if read.is_float]
    if floats:
        raise _refused(shared, name, f"of which '{floats[0]}' stays float", _SAME_CONFIG)
    parts = [read.name for read in shared.reads if not read.whole]
    if parts:
        raise _refused(
            shared, name, f"of which '{parts[0]}' reads a part, or what is computed from it"
        )
    held_by = {id(layer): layer for layer, _ in holders(graph, shared.variable)}
    if len(held_by) < len(shared.reads):
        raise _refused(
            shared, name, "of which one splits it, or computes with it before a kernel reads it"
        )
    first, *others = readers = tuple(origins[layer.name] for layer in held_by.values())
    for other in others:
        if configs[other] != configs[first]:
            found = f"for which the policy has two configs ('{first}' and '{other}')"
            raise _refused(shared, name, found, _SAME_CONFIG)
    return readers


_SAME_CONFIG = "Give all layers that read it one config: the weight has one grid in the file."
_APART = (
    "Read it whole, as rows, in products or sums; let one layer own it and call that layer twice; "
    "or freeze it by trainable = False."
)


def _refused(shared: SharedWeight, name: str, why: str, help: str = _APART) -> ModelError:
    return ModelError(
        f"Expected trained weights of '{name}' that one layer of the file can hold. Received: "
        f"'{shared.variable.path}', which {shared.readers}, {why}: each would train a copy of "
        f"its own. {help}"
    )


@dataclasses.dataclass(frozen=True)
class _Held:
    """A weight as one layer holds it: its matrix, what is done with it, and the layer's bias."""

    matrix: np.ndarray
    use: WeightUse
    bias: np.ndarray | None = None


def _held(layer: Any, variable: Any) -> _Held | None:
    """How a simple layer holds a weight; `None` where it can be no use of a `TiedWeight`."""
    array = np.asarray(variable, np.float32)
    if isinstance(layer, layers.Embedding):
        return _Held(array, WeightUse.ROWS)
    if type(layer) is layers.Dense and variable is layer.kernel:
        bias = np.asarray(layer.bias, np.float32) if layer.use_bias else None
        linear = layer.activation in (None, keras.activations.linear)
        return _Held(array, WeightUse.PRODUCT, bias) if linear else None
    if isinstance(layer, Learned):
        return _Held(_without_leading_ones(array), WeightUse.SUM)
    if isinstance(layer, ChannelAffine) and layer.scale != layer.center:
        return _Held(array, WeightUse.FACTOR if layer.scale else WeightUse.SUM)
    uses = {ConstantKind.ADD: WeightUse.SUM, ConstantKind.MULTIPLY: WeightUse.FACTOR}
    if isinstance(layer, WithConstant) and layer.kind in uses:
        return _Held(_without_leading_ones(array), uses[layer.kind])
    return None


def _without_leading_ones(array: np.ndarray) -> np.ndarray:
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return array


def _together(
    shared: SharedWeight, found: list[tuple[Any, Any]], name: str
) -> dict[int, Callable[..., Any]]:
    """One `TiedWeight` in the place of all layers that hold a weight: the calls of each."""
    held = [_held(layer, variable) for layer, variable in found]
    for (layer, _), one in zip(found, held, strict=True):
        if one is None:
            kind = type(layer).__name__
            raise _refused(
                shared, name, f"of which '{layer.name}', a {kind}, takes no grid of another layer"
            )
    base = next((h.matrix for h in held if h and h.use is not WeightUse.PRODUCT), None)
    if base is None:
        assert held[0] is not None
        base = held[0].matrix
    biases: list[np.ndarray] = []
    options: dict[str, Any] = {}
    uses: dict[int, dict[str, Any]] = {}
    for (layer, _), one in zip(found, held, strict=True):
        assert one is not None
        use, straight = one.use, np.array_equal(one.matrix, base)
        if use is WeightUse.PRODUCT and not straight and np.array_equal(one.matrix.T, base):
            use = WeightUse.TRANSPOSED
        elif not straight:
            raise _refused(shared, name, f"of which '{layer.name}' reads it in another shape")
        uses[id(layer)] = {"use": use.value}
        if one.bias is not None:
            uses[id(layer)]["bias"] = len(biases)
            biases.append(one.bias)
        _take_options(options, layer, use, shared, name)
    first = found[0][0]
    tied = TiedWeight(
        base.shape,
        [bias.size for bias in biases],
        all(given["use"] == WeightUse.PRODUCT for given in uses.values()),
        name=first.name,
        dtype=first.dtype_policy,
        **options,
    )
    part = Part(tied, [base, *biases])

    def with_options(layer: Any, given: dict[str, Any]) -> Callable[..., Any]:
        if not isinstance(layer, Learned):
            return lambda x: part(x, **given)

        # A constant on the grid of who reads it cannot be on the weight's: it is added to zero.
        def value(x: Any) -> Any:
            if holds_indexes(x):
                raise _refused(shared, name, f"of which '{layer.name}' stands beside indexes")
            return part(zero(x, len(layer.shape), layer.name), **given)

        return value

    return {id(layer): with_options(layer, uses[id(layer)]) for layer, _ in found}


def _take_options(
    options: dict[str, Any], layer: Any, use: WeightUse, shared: SharedWeight, name: str
) -> None:
    """Adds the regularizer and the constraint of a layer to those of a `TiedWeight`.

    Raises:
        ModelError: if the layer has options that a `TiedWeight` lacks.
    """
    prefix = "embeddings" if isinstance(layer, layers.Embedding) else "kernel"
    if isinstance(layer, ChannelAffine):
        prefix = "gamma" if layer.scale else "beta"
    if isinstance(layer, Learned):
        prefix = "value"
    for kind in ("regularizer", "constraint"):
        given = getattr(layer, f"{prefix}_{kind}", None)
        before = options.get(f"kernel_{kind}")
        turned = kind == "constraint" and use is WeightUse.TRANSPOSED
        if given is not None and (turned or before not in (None, given)):
            raise _refused(shared, name, f"of which '{layer.name}' has a {kind} of its own")
        if given is not None:
            options[f"kernel_{kind}"] = given
    own = ("bias_regularizer", "bias_constraint", "activity_regularizer")
    for option in own:
        if getattr(layer, option, None) is not None:
            raise _refused(shared, name, f"of which '{layer.name}' has a {option}")
