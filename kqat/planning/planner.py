"""Graph and policy to `Plan`: who gets which quantizer, before a weight is touched.

Three questions are answered once, from the graph's edges. *Fusion*: which BatchNormalization folds
into which layer, which clamp into which producer. *Scales*: operators that demand the same scale
for input and output (TFLite quantization specification) join their tensors into one group, which
has one quantizer. *Precision*: where integers and floats meet, an explicit boundary stands.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import keras

from kqat.base import PolicyError
from kqat.config import QuantizeConfig, QuantizePolicy
from kqat.graph import Graph, Node, Ref, trace
from kqat.grids import Fixed, MaxAbs, MovingAverage, QuantSpec, RangeMethod
from kqat.parts import Recurrence, Requantize
from kqat.planning.expansion import expand
from kqat.planning.layer_configs import assign_configs, fused_nodes, row_for, stays_whole
from kqat.planning.plan import Group, LayerPlan, Plan, Rounding
from kqat.planning.shared_scales import Joined
from kqat.planning.weight_grids import resolve_weights
from kqat.planning.width_changes import match_widths
from kqat.registry import LayerRule, Output


def make_plan(graph: Graph, policy: QuantizePolicy, model_name: str) -> Plan:
    """Decides about every layer of `graph`, the graph of a float model.

    Raises:
        UnsupportedLayerError: if a layer that is to be quantized has no integer form.
        PolicyError: if the policy asks for what cannot ship.
    """
    configs, input_configs, unused = assign_configs(graph, policy)
    whole = {n.name for n in graph.nodes if stays_whole(n.layer, configs[n.name])}
    fused = fused_nodes(graph, configs)
    expanded, origins = expand(graph, lambda node: node.name in whole, model_name, fused)
    expanded, requantizations = match_widths(expanded, origins, configs, input_configs)
    origins, configs = (
        {**origins, **{name: name for name in requantizations}},
        {**configs, **requantizations},
    )
    plan = _Planner(expanded, origins, configs, input_configs).plan(model_name)
    return dataclasses.replace(plan, unused_rules=unused, output_names=graph.output_names)


def _plan_step(recurrence: Recurrence, origin: str, config: QuantizeConfig) -> Plan:
    """The plan of one step: its inputs come rounded, and a state keeps its scale."""
    expanded, parts = expand(trace(recurrence.step), lambda node: False, recurrence.step.name)
    states = expanded.inputs[recurrence.sequences :]
    ties = tuple(zip(states, expanded.outputs, strict=True))
    planner = _Planner(expanded, dict.fromkeys(parts, origin), {origin: config}, {}, ties)
    return planner.plan(recurrence.step.name)


class _Planner:
    """The working state of one plan; each public method answers one question."""

    def __init__(
        self,
        graph: Graph,
        origins: Mapping[str, str],
        configs: Mapping[str, QuantizeConfig | None],
        input_configs: Mapping[str, QuantizeConfig],
        ties: tuple[tuple[Ref, Ref], ...] | None = None,
    ):
        self.graph = graph
        self.origins = origins
        self.input_configs = input_configs
        self.ties = ties  # states before and after one step; `None` for a whole model
        self.consumers, self.producers = graph.consumers(), graph.producers()
        self.outputs = set(graph.outputs)
        # Policies and messages know the names of the user's layers, not those of their parts.
        self.user_names = user_names = {node: origins[node.layer.name] for node in graph.nodes}
        self.configs = {node.name: configs[user_names[node]] for node in graph.nodes}
        self.rules: dict[Node, LayerRule | None] = {
            node: row_for(node.layer, name, self.configs[node.name])
            for node, name in user_names.items()
        }
        self.calls = graph.calls()
        self.folded: dict[Node, Node] = {}  # BatchNormalization -> the layer it folds into
        self.clamps: dict[Ref, Node] = {}  # value -> the clamp that a quantizer carries out
        self.groups: dict[str, Group] = {}
        self.roundings: dict[Ref, tuple[Rounding, ...]] = {}
        self.joined = Joined()
        self._group_names: dict[Ref, str] = {}  # first of joined values -> their group
        self.steps = {
            node: _plan_step(node.layer, user_names[node], config)
            for node, rule in self.rules.items()
            if rule and rule.output is Output.INSIDE and (config := self.configs[node.name])
        }

    def plan(self, model_name: str) -> Plan:
        """Every decision."""
        self.fuse()
        self.join_scales()
        self.place_roundings()
        self.check_given_ranges()
        layers = [self.layer_plan(n, self.origins[n.layer.name]) for n in self.graph.nodes]
        parts = {id(node.layer): plan for node, plan in self.steps.items()}.values()
        return Plan(
            model_name=model_name,
            layers=(*layers, *(layer for plan in parts for layer in plan.layers)),
            groups=(*self.groups.values(), *(group for plan in parts for group in plan.groups)),
            unused_rules=(),
            input_names=self.graph.input_names,
            output_names=(),
            graph=self.graph,
            roundings=self.roundings,
            steps={node.name: plan for node, plan in self.steps.items()},
            rules={node.name: rule for node, rule in self.rules.items() if rule is not None},
        )

    def integer(self, node: Node) -> bool:
        """Whether the node computes on integers; training-only layers are as their input is."""
        rule = self.rules[node]
        if rule is not None and rule.output is Output.VANISHES:
            producer = self.producers.get(node.inputs[0])
            return self.integer(producer) if producer else self.rounded_input(node.inputs[0])
        return rule is not None

    def rounded_input(self, ref: Ref) -> bool:
        """Whether a model input becomes integers: some consumer computes on them."""
        return not ref.holds_indexes and any(
            self._computes_on_integers(n) for n in self.consumers[ref]
        )

    def _computes_on_integers(self, node: Node) -> bool:
        rule = self.rules[node]
        if rule is not None and rule.output is Output.VANISHES:
            return any(self.rounded_input(ref) for ref in node.outputs)
        return rule is not None

    def fuse(self) -> None:
        """Finds what folds: BatchNormalization into layers with weights, clamps into quantizers."""
        for node in self.graph.nodes:
            rule = self.rules[node]
            if rule is None:
                continue
            if rule.clamp and node.layer.activity_regularizer is None:
                self.clamps[node.outputs[0]] = node
            producer = self._only_reader_of(node)
            if producer is None or not isinstance(node.layer, keras.layers.BatchNormalization):
                continue
            source = self.rules[producer]
            once = self.calls[id(node.layer)] == self.calls[id(producer.layer)] == 1
            if source is not None and source.takes_normalization and once:
                self.folded[node] = producer

    def _only_reader_of(self, node: Node) -> Node | None:
        """The producer of the node's input, if nothing but the node reads that."""
        ref = node.inputs[0]
        alone = len(self.consumers[ref]) == 1 and ref not in self.outputs
        return self.producers.get(ref) if alone else None

    def fused_clamp(self, node: Node) -> Node | None:
        """The producer whose kernel carries out the clamp `node`, if it has such a kernel."""
        producer = self._only_reader_of(node)
        rule = self.rules[producer] if producer else None
        return producer if rule and rule.takes_clamp else None

    def transparent(self, ref: Ref) -> bool:
        """Whether a value never exists as integers: it lies inside a fused kernel."""
        readers = self.consumers[ref]
        if len(readers) != 1 or ref in self.outputs:
            return False
        reader = readers[0]
        if reader in self.folded:
            return True
        rule = self.rules[reader]
        return bool(rule and rule.clamp and self.fused_clamp(reader))

    def join_scales(self) -> None:
        """Joins the values that must share one scale."""
        for before, after in self.ties or ():
            self.joined.join(before, after)
        for node in self.graph.nodes:
            rule = self.rules[node]
            if rule is None or rule.output not in (Output.SAME, Output.VANISHES):
                continue
            if rule.output is Output.VANISHES and not self.integer(node):
                continue
            for ref in (*node.inputs, *node.outputs[1:]):
                if not ref.holds_indexes and not node.outputs[0].holds_indexes:
                    self.joined.join(ref, node.outputs[0])

    def place_roundings(self) -> None:
        """Makes the groups and puts a rounding after each value that becomes integers."""
        members: dict[Ref, list[tuple[str, Ref, Node | None]]] = {}
        for name, ref, node in self._sources():
            members.setdefault(self.joined.root(ref), []).append((name, ref, node))
        again = [n for n, r in self.rules.items() if r and r.output is Output.SAME and r.rounds]
        roots = {self.joined.root(node.outputs[0]) for node in again}
        names = {
            root: self._make_group(sources)
            for root, sources in members.items()
            # A value that comes rounded needs a grid of ours only to meet others.
            if len(sources) > 1 or root in roots or sources[0][2] not in self.steps
        }
        self._group_names = names
        for node in self.graph.nodes:
            rule = self.rules[node]
            if rule and rule.output is Output.SAME and rule.rounds:
                group = names[self.joined.root(node.outputs[0])]
                self.roundings[node.outputs[0]] = (Rounding(group, 0, observe=False),)

    def _sources(self) -> Iterable[tuple[str, Ref, Node | None]]:
        """Values that bring a range of their own: name, ref and the node that makes them."""
        for ref, name in zip(self.graph.inputs, self.graph.input_names, strict=True):
            if self.ties is None and self.rounded_input(ref):
                yield name, ref, None
        for node in self.graph.nodes:
            rule = self.rules[node]
            ref = node.outputs[0]
            if ref.holds_indexes:
                continue
            if rule is None or not self.integer(node):
                for index, value in enumerate(node.outputs):
                    if any(self.integer(reader) for reader in self.consumers[value]):
                        yield f"{node.name}_{index}" if index else node.name, value, node
            elif rule.output is Output.INSIDE:
                for index, value in enumerate(node.outputs):
                    yield f"{node.name}_{index}" if index else node.name, value, node
            elif rule.output in (Output.OWN, Output.FIXED) and not self.transparent(ref):
                yield node.name, ref, node

    def _make_group(self, sources: list[tuple[str, Ref, Node | None]]) -> str:
        fixed = [self._fixed_range(node, ref) for _, ref, node in sources]
        common = fixed[0] if len(set(fixed)) == 1 else None
        own = [source for source, range_ in zip(sources, fixed, strict=True) if range_ is None]
        spec, method = self._agreed(own or sources)
        if common is not None:
            spec, method = QuantSpec(bits=spec.bits), Fixed(*common)
        clamps = {self._clamp(ref) for _, ref, _ in sources}
        clamp = clamps.pop() if len(clamps) == 1 and common is None else None
        name = f"{sources[0][0]}_quantizer"
        if isinstance(method, Fixed) and method.high > 6.0:
            for own_name, ref, _ in sources:
                if self._stands_alone(ref, "relu6"):
                    raise PolicyError(
                        f"Expected a range that ends at 6 or below for '{own_name}', which clamps "
                        f"at 6. Received: {method}."
                    )
        for site, ((own_name, ref, _), range_) in enumerate(zip(sources, fixed, strict=True)):
            here: tuple[Rounding, ...] = (Rounding(name, site, observe=True),)
            if range_ is not None and common is None:
                # The kernel's own scale first, then the group's: an explicit requantization.
                label = f"{own_name}_kernel"
                kernel = f"{label}_quantizer"
                grid, fixed_range = QuantSpec(bits=spec.bits), Fixed(*range_)
                self.groups[kernel] = Group(
                    kernel, grid, fixed_range, None, 1, (own_name,), label=label
                )
                here = (Rounding(kernel, 0, observe=True), *here)
            elif clamp is None and self._stands_alone(ref, "relu6"):
                # An operator of its own has to end at 6; the group's grid may go beyond.
                here = (Rounding(self._clamped_group(own_name, spec, method), 0, True), *here)
            self.roundings[ref] = here
            if clamp is None and len(here) == 1:
                self.clamps.pop(ref, None)
        names = tuple(source[0] for source in sources)
        hides = any(n and (rule := self.rules[n]) and rule.hides for _, _, n in sources)
        self.groups[name] = Group(name, spec, method, clamp, len(sources), names, hides, names[0])
        return name

    def _stands_alone(self, ref: Ref, clamp: str) -> bool:
        """Whether `ref` is made by this clamp as an operator of its own."""
        node = self.clamps.get(ref)
        return node is not None and self._clamp(ref) == clamp and self.fused_clamp(node) is None

    def _clamped_group(self, source: str, spec: QuantSpec, method: RangeMethod) -> str:
        label = f"{source}_clamp"
        name = f"{label}_quantizer"
        self.groups[name] = Group(name, spec, method, "relu6", 1, (source,), label=label)
        return name

    def _fixed_range(self, node: Node | None, ref: Ref) -> tuple[float, float] | None:
        rule = self.rules[node] if node else None
        config = self.configs[node.name] if node else None
        if node in self.steps:
            method = self._range_inside(node, ref)
            return (method.low, method.high) if isinstance(method, Fixed) else None
        return rule.range_at(config.activation.bits) if rule and config else None

    def _clamp(self, ref: Ref) -> str | None:
        node = self.clamps.get(ref)
        rule = self.rules[node] if node else None
        return rule.clamp if rule else None

    def _agreed(self, sources: list[tuple[str, Ref, Node | None]]) -> tuple[QuantSpec, RangeMethod]:
        """The one grid and range method that all sources of a group ask for."""
        found: dict[tuple[QuantSpec, RangeMethod], str] = {}
        for name, ref, node in sources:
            rule = self.rules[node] if node else None
            config = self.configs[node.name] if node else self.input_configs.get(name)
            inner = node is not None and self._is_inner(node)
            if config is None:  # an input, or a float layer: its first integer reader decides
                config, inner = self._reader_config(ref), True
                assert config is not None, "an integer layer reads the value"
            method = config.activation_range
            # A range that is given is that of the layer's own output, of nothing before it.
            if inner and isinstance(method, Fixed):
                method = MovingAverage()
            found.setdefault(((rule and rule.grid) or config.activation, method), name)
        if len(found) > 1:
            (a, b), (first, second) = list(found)[:2], list(found.values())[:2]
            raise PolicyError(
                f"Expected one activation grid for '{first}' and '{second}', whose values meet in "
                f"an operator that demands equal scales. Received: {a} and {b}."
            )
        return next(iter(found))

    def check_given_ranges(self) -> None:
        """Refuses a config whose fixed range is that of no value in the file.

        Raises:
            PolicyError: naming its first layer.
        """
        given: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            config = self.configs[node.name]
            if config is not None and isinstance(config.activation_range, Fixed):
                given.setdefault(id(config), []).append(node)
        for nodes in given.values():
            config = self.configs[nodes[0].name]
            if config and config.activation_range not in map(self._shipped_range, nodes):
                raise PolicyError(
                    f"Expected a fixed range for a layer whose output has a range of its own. "
                    f"Received: {config.activation_range} for '{self.user_names[nodes[0]]}', whose "
                    "values lie inside a kernel or take their scale from another layer. Give it "
                    "to the layer that ends the kernel, as the activation, or to that other one."
                )

    def _shipped_range(self, node: Node) -> RangeMethod | None:
        """The range of the value that the node's kernel ends with."""
        ref = node.outputs[0]
        if node in self.steps:
            return self._range_inside(node, ref)
        while self.transparent(ref):
            ref = self.consumers[ref][0].outputs[0]
        group = self._group_names.get(self.joined.root(ref))
        return self.groups[group].range_method if group else None

    def _range_inside(self, node: Node, ref: Ref) -> RangeMethod:
        """The range of an output of a recurrence: a state's, of which the first is the output."""
        step, state = self.steps[node], max(node.outputs.index(ref) - 1, 0)
        rounding = step.roundings[step.graph.outputs[state]][-1]
        return next(g.range_method for g in step.groups if g.name == rounding.group)

    def _is_inner(self, node: Node) -> bool:
        """Whether the node is a part of a user's layer before the last one."""
        name = self.user_names[node]
        readers = self.consumers[node.outputs[0]]
        return any(self.user_names[reader] == name for reader in readers)

    def _reader_config(self, ref: Ref) -> QuantizeConfig | None:
        """The config of the first integer layer that reads a value and stays in the file."""
        for reader in filter(self.integer, self.consumers[ref]):
            rule, config = self.rules[reader], self.configs[reader.name]
            if rule and rule.output is Output.VANISHES:
                config = self._reader_config(reader.outputs[0])
            if config is not None:
                return config
        return None

    def layer_plan(self, node: Node, origin: str) -> LayerPlan:
        """What the plan says about one node of the expanded graph."""
        rule, config = self.rules[node], self.configs[node.name]
        weights: dict[str, QuantSpec] = {}
        ops: tuple[str, ...] = ()
        if rule is None or config is None:
            role, note = "float", "the policy leaves it float"
        elif rule.output is Output.VANISHES:
            role, note = "training only", "no operator in the file"
        elif node in self.folded:
            role, note = "folded", f"into {self.folded[node].name}"
        elif node.outputs[0] in self.clamps or (rule.clamp and self.fused_clamp(node)):
            into = self.fused_clamp(node)
            role, note = "clamp", f"fused into {into.name}" if into else "operator of its own"
            ops = () if into else rule.ops
        else:
            role = "integer"
            weights = resolve_weights(node.name, node.layer, rule, config)
            ops, note = rule.ops, self._note(node)
        roundings = self.roundings.get(node.outputs[0], ())
        return LayerPlan(
            name=node.name,
            origin=origin,
            kind=type(node.layer).__name__,
            role=role,
            weights=weights,
            weight_step=config.weight_step if config else MaxAbs(),
            normalization=next((b.name for b, n in self.folded.items() if n is node), None),
            group=roundings[-1].group if roundings else None,
            ops=ops,
            bits=config.activation.bits if config else 0,
            note=note,
        )

    def _note(self, node: Node) -> str:
        roundings = self.roundings.get(node.outputs[0], ())
        if len(roundings) > 1:
            return "requantized: the kernel's fixed scale meets a group with another"
        if isinstance(node.layer, Requantize):
            return f"two widths meet: int{node.layer.source_bits} to int{node.layer.bits}"
        rule = self.rules[node]
        return rule.output.value if rule else ""
