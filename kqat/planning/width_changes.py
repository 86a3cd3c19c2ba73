"""Where integers of two widths meet: a requantization of its own in the graph.

An integer kernel reads and writes activations of one width, that of its layer's config. A value of
another width goes through a `Requantize` first, which becomes a QUANTIZE in the file; so every
value of the graph has one width, and what plans after this need not think of it.
"""

import dataclasses
from collections.abc import Mapping

from kqat.base import UnsupportedLayerError
from kqat.config import QuantizeConfig
from kqat.devices import ops_at, runtimes_with
from kqat.graph import Graph, Node, Ref, fill, unique_name
from kqat.grids import Fixed, MovingAverage
from kqat.parts import Requantize
from kqat.planning.layer_configs import row_for
from kqat.registry import LayerRule, Output


def match_widths(
    graph: Graph,
    origins: Mapping[str, str],
    configs: Mapping[str, QuantizeConfig | None],
    input_configs: Mapping[str, QuantizeConfig],
) -> tuple[Graph, dict[str, QuantizeConfig]]:
    """`graph` with a `Requantize` between a value and each layer of another width that reads it.

    A value that is no integer where it is made (a model input, a float layer's output) has the
    width that its own rule gives it, or that of its first reader.

    Args:
        graph: of simple layers.
        origins: name of each of its layers -> name of the user's layer.
        configs: of the user's layers, by name.
        input_configs: those that rules give to model inputs.

    Returns:
        The graph, and the configs of the nodes that are new in it, by name.

    Raises:
        UnsupportedLayerError: if a layer has no kernel of the width that its config asks for.
    """
    widths = {config.activation.bits for config in configs.values() if config}
    widths |= {config.activation.bits for config in input_configs.values()}
    if widths <= {8}:
        return graph, {}
    by_node = {node.name: configs[origins[node.layer.name]] for node in graph.nodes}
    walk = _Walk(graph, by_node, input_configs)
    for node in graph.nodes:
        walk.visit(node)
    return dataclasses.replace(graph, nodes=tuple(walk.nodes)), walk.new_configs


class _Walk:
    """One walk over the nodes in the order in which they run."""

    def __init__(
        self,
        graph: Graph,
        configs: Mapping[str, QuantizeConfig | None],
        input_configs: Mapping[str, QuantizeConfig],
    ):
        self.configs = configs
        self.consumers = graph.consumers()
        self.names = dict(zip(graph.inputs, graph.input_names, strict=True))
        self.taken = {*graph.input_names, *graph.output_names, *(n.name for n in graph.nodes)}
        self.nodes: list[Node] = []
        self.new_configs: dict[str, QuantizeConfig] = {}
        self.requantized: dict[tuple[Ref, int], Ref] = {}
        self.floats: set[Ref] = set()  # what float layers make
        self.widths: dict[Ref, int] = {}
        for ref, name in self.names.items():
            given = input_configs.get(name)
            self.widths[ref] = given.activation.bits if given else self._first_width(ref, True)

    def visit(self, node: Node) -> None:
        """Appends the node, behind the requantizations that it needs."""
        config = self.configs[node.name]
        vanishes = config is not None and self._vanishes(node)
        if vanishes and node.inputs[0] in self.floats:
            config = None  # as its input is
        if config is not None and not vanishes:
            self._check(node, config)
            width = config.activation.bits
            refs = {ref: self._at(ref, width, config) for ref in node.inputs}
            args, kwargs = fill((node.args, node.kwargs), refs.__getitem__)
            node = dataclasses.replace(node, args=args, kwargs=kwargs)
        for index, ref in enumerate(node.outputs):
            self.names[ref] = f"{node.name}_{index}" if index else node.name
            if config is None:
                self.floats.add(ref)
                self.widths[ref] = self._first_width(ref, False)
            else:
                self.widths[ref] = self.widths[node.inputs[0]] if vanishes else width
        self.nodes.append(node)

    def _rule(self, node: Node) -> LayerRule | None:
        return row_for(node.layer, node.name, self.configs[node.name], node.kwargs)

    def _vanishes(self, node: Node) -> bool:
        rule = self._rule(node)
        return rule is not None and rule.output is Output.VANISHES

    def _first_width(self, ref: Ref, through: bool) -> int:
        """Width of the first integer layer that reads a value; 0 if there is none.

        With `through`, training-only layers are looked through.
        """
        for reader in self.consumers[ref]:
            config = self.configs[reader.name]
            if config is None:
                continue
            if not self._vanishes(reader):
                return config.activation.bits
            if through and (width := self._first_width(reader.outputs[0], True)):
                return width
        return 0

    def _at(self, ref: Ref, width: int, config: QuantizeConfig) -> Ref:
        """The value `ref` at a width; requantized, once, where it has another."""
        given = self.widths[ref]
        if given == width or ref.holds_indexes:
            return ref
        if (ref, width) not in self.requantized:
            name = unique_name(f"{self.names[ref]}_int{width}", self.taken)
            output = Ref(ref.shape, ref.dtype)
            layer = Requantize(given, width, name=name)
            self.nodes.append(Node(name, layer, (ref,), {}, (output,)))
            # A range that is given is that of the reader's own output.
            if isinstance(config.activation_range, Fixed):
                config = dataclasses.replace(config, activation_range=MovingAverage())
            self.new_configs[name] = config
            self.requantized[ref, width] = output
        return self.requantized[ref, width]

    def _check(self, node: Node, config: QuantizeConfig) -> None:
        rule = self._rule(node)
        values = (*node.inputs, *node.outputs)
        if rule is None or config.activation.bits == 8 or all(ref.holds_indexes for ref in values):
            return
        bits = config.activation.bits
        ops = ops_at(rule.ops, bits, max(len(ref.shape) for ref in values))
        lacking = [op for op in ops if not runtimes_with(op, bits)]
        if lacking and not rule.is_table(bits):
            found = f"whose {', '.join(lacking)} ships on int8 only"
        elif node.layer.compute_dtype != "float32":
            # Its 11 or 8 bits cannot hold what is rounded to 16.
            found = f"which trains in {node.layer.compute_dtype}; dtype='float32' would do"
        else:
            return
        raise UnsupportedLayerError(
            f"Expected layers with int16 kernels where activations have 16 bits. Received: layer "
            f"'{node.name}' of type {type(node.layer).__name__}, {found}. Give this layer "
            "'int8' in the policy, or None to leave it float."
        )
