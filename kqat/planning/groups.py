"""Values that share a scale to groups with one quantizer each, and where it rounds.

A *source* is a value that brings a range of its own: what a kernel makes, a model input, the
output of a float layer. All sources that share a scale make one group. A value may be rounded
twice: on the scale that its kernel demands, then on that of its group.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from kqat.base import PolicyError
from kqat.graph import Node, Ref, unique_name
from kqat.grids import (
    Bounds,
    Clamp,
    Fixed,
    GradientEstimator,
    LearnedRangeMethod,
    MovingAverage,
    QuantSpec,
    RangeMethod,
)
from kqat.parts import ByteInput, TiedWeight, reads_rows
from kqat.planning.fusions import Fusions
from kqat.planning.plan import Group, Rounding
from kqat.planning.planned_graph import PlannedGraph
from kqat.planning.shared_scales import SharedScales
from kqat.registry import Output


@dataclasses.dataclass(frozen=True)
class Source:
    """A value that brings a range of its own to its group.

    Args:
        name: what the plan calls it.
        ref: the value.
        node: the node that makes it; `None` for a model input.
        fixed: the range `(low, high)` that its kernel demands, or `None`.
        clamp: the clamp that makes it, which a quantizer may carry out, or `None`.
        ends_at_6: whether the clamp is a ReLU6 that ships as an operator of its own.
    """

    name: str
    ref: Ref
    node: Node | None
    fixed: tuple[float, float] | None
    clamp: Clamp | Bounds | None
    ends_at_6: bool


@dataclasses.dataclass(frozen=True)
class Quantizers:
    """The groups of a plan, and where each rounds.

    Args:
        groups: by name.
        roundings: value -> its roundings, in order.
        group_of: root of each set of values that share a scale -> name of the set's group.
        clamped: values whose clamp their quantizer carries out.
    """

    groups: Mapping[str, Group]
    roundings: Mapping[Ref, tuple[Rounding, ...]]
    group_of: Mapping[Ref, str]
    clamped: frozenset[Ref]


def place_quantizers(planned: PlannedGraph, fusions: Fusions, shared: SharedScales) -> Quantizers:
    """Makes the groups and puts a rounding after each value that becomes integers.

    Raises:
        PolicyError: if the sources of one group ask for different grids.
    """
    members: dict[Ref, list[Source]] = {}
    taken: set[str] = set()
    for source in _sources(planned, fusions):
        members.setdefault(shared.root(source.ref), []).append(source)
        taken.add(source.name)
    again = {
        node.outputs[0]: shared.root(node.outputs[0])
        for node, rule in planned.rules.items()
        if rule and rule.output is Output.SAME and rule.rounds
    }
    given = {shared.root(ref) for ref in planned.given_states}
    groups: dict[str, Group] = {}
    roundings: dict[Ref, tuple[Rounding, ...]] = {}
    group_of: dict[Ref, str] = {}
    for root, sources in members.items():
        # What is on a grid already needs a quantizer only when it shares a scale.
        alone = len(sources) == 1 and root not in again.values()
        if alone and _is_on_a_grid(planned, sources[0].node):
            continue
        made, placed = _make_group(planned, sources, taken, clamps=root not in given)
        groups |= {group.name: group for group in made}
        roundings |= placed
        group_of[root] = made[-1].name
    for ref, root in again.items():
        roundings[ref] = (Rounding(group_of[root], 0, observe=False),)
    clamped = [ref for ref in fusions.clamps if _is_clamped(ref, roundings, groups)]
    return Quantizers(groups, roundings, group_of, frozenset(clamped))


def _is_on_a_grid(planned: PlannedGraph, node: Node | None) -> bool:
    """Whether a node's output is rounded as it is made.

    A recurrence rounds it; rows of a tied weight are on the weight's grid, which has a place in 8
    bits.
    """
    if node is None or node in planned.steps:
        return node is not None
    config = planned.configs[node]
    tied = isinstance(node.layer, TiedWeight) and reads_rows(node.layer, node.kwargs)
    return tied and config is not None and config.activation.bits == 8


def _is_clamped(
    ref: Ref, roundings: Mapping[Ref, tuple[Rounding, ...]], groups: Mapping[str, Group]
) -> bool:
    """Whether the quantizer of a clamp's output carries the clamp out."""
    placed = roundings.get(ref, ())
    return not placed or len(placed) > 1 or groups[placed[0].group].clamp is not None


def _sources(planned: PlannedGraph, fusions: Fusions) -> Iterator[Source]:
    """Every value that brings a range of its own."""
    for ref, name in zip(planned.graph.inputs, planned.graph.input_names, strict=True):
        if planned.states is None and planned.is_rounded(ref):
            yield Source(name, ref, None, None, None, False)
    for node in planned.graph.nodes:
        if not node.outputs[0].holds_indexes:
            for index, ref in _values_with_a_range(planned, fusions, node):
                name = f"{node.name}_{index}" if index else node.name
                yield _source(planned, fusions, name, ref, node)


def _values_with_a_range(
    planned: PlannedGraph, fusions: Fusions, node: Node
) -> Iterator[tuple[int, Ref]]:
    """The outputs of a node that bring a range of their own, with their positions."""
    kind = planned.output_kind(node)
    if kind is None or not planned.is_integer(node):
        for index, ref in enumerate(node.outputs):
            if any(planned.is_integer(reader) for reader in planned.consumers[ref]):
                yield index, ref
    elif kind is Output.INSIDE:
        yield from enumerate(node.outputs)
    elif kind in (Output.OWN, Output.FIXED) and node.outputs[0] not in fusions.inside:
        yield 0, node.outputs[0]


def _source(planned: PlannedGraph, fusions: Fusions, name: str, ref: Ref, node: Node) -> Source:
    clamping = fusions.clamps.get(ref)
    rule = planned.rules[clamping] if clamping else None
    clamp: Clamp | Bounds | None = rule.clamp if rule else None
    if clamping is not None and clamp is Clamp.BOUNDS:
        clamp = clamping.layer.bounds
    alone = clamping is not None and clamping not in fusions.activations
    ends_at_6 = alone and clamp is Clamp.RELU6
    return Source(name, ref, node, _fixed_range(planned, node, ref), clamp, ends_at_6)


def _fixed_range(planned: PlannedGraph, node: Node, ref: Ref) -> tuple[float, float] | None:
    """The range that the kernel of a value demands."""
    if node in planned.steps:
        method = planned.range_inside(node, ref)
        return (method.low, method.high) if isinstance(method, Fixed) else None
    rule, config = planned.rules[node], planned.configs[node]
    if rule and isinstance(node.layer, ByteInput):
        return node.layer.range
    return rule.range_at(config.activation.bits) if rule and config else None


def _make_group(
    planned: PlannedGraph, sources: list[Source], taken: set[str], *, clamps: bool
) -> tuple[list[Group], dict[Ref, tuple[Rounding, ...]]]:
    """The group of sources that share a scale, and the roundings of each of them.

    The group comes last in the list, behind those that round on a kernel's own scale first. With
    `clamps` its quantizer may carry out the clamp that all sources end with; an initial state that
    is given comes from elsewhere, and is not clamped. `taken` are the labels that groups bear.
    """
    fixed = {source.fixed for source in sources}
    common = fixed.pop() if len(fixed) == 1 else None
    own = [source for source in sources if source.fixed is None]
    spec, method, gradient = _agreed(planned, own or sources)
    if common is not None:
        spec, method = QuantSpec(bits=spec.bits), Fixed(*common)
    ends = {source.clamp for source in sources}
    clamp = ends.pop() if clamps and len(ends) == 1 and common is None else None
    _check_end(sources, method)
    name = f"{sources[0].name}_quantizer"
    before: list[Group] = []
    roundings: dict[Ref, tuple[Rounding, ...]] = {}
    for site, source in enumerate(sources):
        here: tuple[Rounding, ...] = (Rounding(name, site, observe=True),)
        first = None
        if source.fixed is not None and common is None:
            # The kernel's own scale first, then the group's: an explicit requantization.
            label = unique_name(f"{source.name}_kernel", taken)
            grid = QuantSpec(bits=spec.bits)
            first = _group_of_one(label, source, grid, Fixed(*source.fixed), None)
        elif clamp is None and (source.ends_at_6 or isinstance(source.clamp, Bounds)):
            # An operator of its own has to end at 6; the group's grid may go beyond. Only the ends
            # of a grid keep to bounds.
            label = unique_name(f"{source.name}_clamp", taken)
            first = _group_of_one(label, source, spec, method, source.clamp)
        if first is not None:
            before.append(first)
            here = (Rounding(first.name, 0, observe=True), *here)
        roundings[source.ref] = here
    names = tuple(source.name for source in sources)
    rules = [planned.rules[source.node] for source in sources if source.node]
    hides = any(rule is not None and rule.hides for rule in rules)
    if hides and isinstance(method, LearnedRangeMethod):
        method = MovingAverage()  # A mask needs room below the scores, which a loss does not leave.
    group = Group(name, spec, method, clamp, len(sources), names, hides, label=sources[0].name)
    made = [dataclasses.replace(one, gradient=gradient) for one in (*before, group)]
    return made, roundings


def _group_of_one(
    label: str, source: Source, spec: QuantSpec, method: RangeMethod, clamp: Clamp | Bounds | None
) -> Group:
    """A group that rounds one value before its own group does."""
    return Group(f"{label}_quantizer", spec, method, clamp, 1, (source.name,), label=label)


def _check_end(sources: list[Source], method: RangeMethod) -> None:
    if not isinstance(method, Fixed) or method.high <= 6.0:
        return
    for source in sources:
        if source.ends_at_6:
            raise PolicyError(
                f"Expected a range that ends at 6 or below for '{source.name}', which clamps "
                f"at 6. Received: {method}. Use kqat.Fixed(0.0, 6.0), or give it no range."
            )


Asked = tuple[QuantSpec, RangeMethod, GradientEstimator | None]


def _agreed(planned: PlannedGraph, sources: list[Source]) -> Asked:
    """The one grid, range method and gradient that all sources of a group ask for."""
    found: dict[Asked, str] = {}
    for source in sources:
        found.setdefault(_asked(planned, source), source.name)
    if len(found) > 1:
        (a, b), (first, second) = list(found)[:2], list(found.values())[:2]
        raise PolicyError(
            f"Expected one activation grid for '{first}' and '{second}', whose values meet in "
            f"an operator that demands equal scales. Received: {a} and {b}. Give both layers "
            "the same activation grid."
        )
    return next(iter(found))


def _asked(planned: PlannedGraph, source: Source) -> Asked:
    """The grid, range method and gradient that the config of one source asks for."""
    node = source.node
    rule = planned.rules[node] if node else None
    config = planned.configs[node] if node else planned.input_configs.get(source.name)
    inner = node is not None and planned.is_inner(node)
    if config is None:  # A model input or a float layer: its first integer reader decides.
        config, inner = planned.reader_config(source.ref), True
        assert config is not None, "an integer layer reads the value"
    method = config.activation_range
    # A range that is given is that of the layer's own output, of nothing before it.
    if inner and isinstance(method, Fixed):
        method = MovingAverage()
    if planned.states is not None and isinstance(method, LearnedRangeMethod):
        raise PolicyError(
            "Expected an observed range for the values inside a recurrent layer. Received: "
            f"{method} for '{source.name}', which is learned: steps of a sequence share "
            "ranges that only observers move. Give the recurrent layer "
            "activation_range=kqat.MovingAverage()."
        )
    return (rule and rule.grid) or config.activation, method, config.activation_gradient


def check_given_ranges(
    planned: PlannedGraph, fusions: Fusions, shared: SharedScales, quantizers: Quantizers
) -> None:
    """Refuses a config whose fixed range is that of no value in the file.

    Raises:
        PolicyError: naming its first layer.
    """

    def shipped_range(node: Node) -> RangeMethod | None:
        """The range of the value that the node's kernel ends with."""
        ref = node.outputs[0]
        if node in planned.steps:
            return planned.range_inside(node, ref)
        while ref in fusions.inside:
            ref = planned.consumers[ref][0].outputs[0]
        group = quantizers.group_of.get(shared.root(ref))
        return quantizers.groups[group].range_method if group else None

    given: dict[int, list[Node]] = {}
    for node in planned.graph.nodes:
        config = planned.configs[node]
        if config is not None and isinstance(config.activation_range, Fixed):
            given.setdefault(id(config), []).append(node)
    for nodes in given.values():
        config = planned.configs[nodes[0]]
        if config and config.activation_range not in map(shipped_range, nodes):
            raise PolicyError(
                f"Expected a fixed range for a layer whose output has a range of its own. "
                f"Received: {config.activation_range} for '{planned.user_names[nodes[0]]}', whose "
                "values lie inside a kernel or take their scale from another layer. Give it "
                "to the layer that ends the kernel, as the activation, or to that other one."
            )
