"""Weights that several layers read are one variable again after layers were opened and copied.

Layers that do the same with a weight become one layer, called more than once. Where they do
different things with it (a table's rows, and products with the table transposed), one `TiedWeight`
takes their place. So both uses train the one variable, and one grid serves both in the file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import ModelError
from kqat.config import QuantizeConfig
from kqat.graph import (
    Graph,
    Node,
    Part,
    SharedWeight,
    WeightReads,
    config_of,
    holders,
    rebuild,
    trace,
    varies,
)
from kqat.parts import ConstantKind, TiedWeight, WeightUse, WithConstant

Configs = Mapping[str, QuantizeConfig | None]


def tie_weights(
    graph: Graph,
    origins: Mapping[str, str],
    reads: WeightReads,
    configs: Configs,
    name: str,
    calls: Mapping[int, list[str]],
) -> tuple[Graph, dict[str, str]]:
    """`graph` in which each trained variable of the user's is held by one layer.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        reads: where the user's layers read their weights.
        configs: of the user's layers, by name.
        name: of the model.
        calls: the names of a user's layer's calls, by its identity.

    Returns:
        The graph, and the origins of its layers.

    Raises:
        ModelError: if a weight is read in two ways that no grid serves, or in a part only.
    """
    graph, origins = _calls_merged(graph, dict(origins), reads, name, calls)
    for shared in reads.shared():
        graph, origins = _tied(graph, origins, shared, configs, name)
    return graph, origins


def _rebuilt(
    graph: Graph, origins: Mapping[str, str], name: str, made: Mapping[int, Callable[..., Any]]
) -> tuple[Graph, dict[str, str]]:
    """The graph with other callables in the place of some layers, by their identity."""

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        return made.get(id(node.layer), node.layer)(*args, **kwargs)

    built = trace(rebuild(graph, call, name))
    built = dataclasses.replace(built, output_names=graph.output_names)
    kept = {node.layer.name for node in built.nodes}
    return built, {layer: origin for layer, origin in origins.items() if layer in kept}


def _calls_merged(
    graph: Graph,
    origins: dict[str, str],
    reads: WeightReads,
    name: str,
    calls: Mapping[int, list[str]],
) -> tuple[Graph, dict[str, str]]:
    """The graph in which the parts of an opened layer serve all calls of that layer."""
    counts = graph.calls()
    parts: dict[str, dict[int, Any]] = {}
    for node in graph.nodes:
        if node.has_weights and counts[id(node.layer)] == 1:
            parts.setdefault(origins[node.layer.name], {})[id(node.layer)] = node.layer
    made: dict[int, Callable[..., Any]] = {}
    for layer in reads.opened_again():
        first, *others = (list(parts.get(call, {}).values()) for call in calls.get(id(layer), []))
        if all(_are_alike(first, other) for other in others):
            reads.merged(layer)
            for other in others:
                made |= {id(b): a for a, b in zip(first, other, strict=True)}
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
    graph: Graph, origins: dict[str, str], shared: SharedWeight, configs: Configs, name: str
) -> tuple[Graph, dict[str, str]]:
    """The graph in which one layer holds a weight."""
    _check_reads(shared, graph, name)
    found = list(holders(graph, shared.variable))
    if len({id(layer) for layer, _ in found}) < len(shared.reads):
        raise _refused(
            shared, name, "of which one splits it, or computes with it before a kernel reads it"
        )
    _check_configs(shared, [origins[layer.name] for layer, _ in found], configs, name)
    first, others = found[0][0], [layer for layer, _ in found[1:]]
    if all(_is_same(first, other) for other in others):
        return _rebuilt(graph, origins, name, {id(other): first for other in others})
    return _rebuilt(graph, origins, name, _together(shared, found, name))


def _check_reads(shared: SharedWeight, graph: Graph, name: str) -> None:
    floats = [read.name for read in shared.reads if read.is_float]
    if floats:
        raise _refused(shared, name, f"of which '{floats[0]}' stays float", _SAME_CONFIG)
    parts = [read.name for read in shared.reads if not read.whole]
    if parts:
        raise _refused(
            shared, name, f"of which '{parts[0]}' reads a part, or what is computed from it"
        )
    if not varies(shared.variable):
        raise _refused(
            shared,
            name,
            "and whose numbers are all equal, by which it cannot be followed",
            "Load trained weights first, or initialize it at random.",
        )


def _check_configs(
    shared: SharedWeight, names: list[str], configs: Configs, model_name: str
) -> None:
    config = configs[names[0]]
    for name in names[1:]:
        if configs[name] != config:
            found = f"for which the policy has other configs: {config} and {configs[name]}"
            raise _refused(shared, model_name, found, _SAME_CONFIG)


_SAME_CONFIG = "Give all layers that read it one config: the weight has one grid in the file."
_APART = (
    "Read it whole, as rows, in products or sums; let one layer own it and call that layer twice; "
    "or freeze it by trainable = False."
)


def _refused(shared: SharedWeight, name: str, why: str, help: str = _APART) -> ModelError:
    return ModelError(
        f"Expected trained weights of '{name}' that one layer of the file can hold. Received: "
        f"'{shared.variable.path}', which {shared.readers} read, {why}: each would train a copy of "
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
    uses = {ConstantKind.ADD: WeightUse.SUM, ConstantKind.MULTIPLY: WeightUse.FACTOR}
    if isinstance(layer, WithConstant) and layer.kind in uses:
        while array.ndim > 1 and array.shape[0] == 1:
            array = array[0]
        return _Held(array, uses[layer.kind])
    return None


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
        name=first.name,
        dtype=first.dtype_policy,
        **options,
    )
    part = Part(tied, [base, *biases])

    def with_options(given: dict[str, Any]) -> Callable[..., Any]:
        return lambda x: part(x, **given)

    return {key: with_options(given) for key, given in uses.items()}


def _take_options(
    options: dict[str, Any], layer: Any, use: WeightUse, shared: SharedWeight, name: str
) -> None:
    """Adds the regularizer and the constraint of a layer to those of a `TiedWeight`.

    Raises:
        ModelError: if the layer has options that a `TiedWeight` lacks.
    """
    prefix = "embeddings" if isinstance(layer, layers.Embedding) else "kernel"
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
