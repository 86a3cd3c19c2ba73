"""QAT model to `FrozenModel`: BatchNorm folded, weights on their grid, ranges final.

The frozen model is the only thing that `tflite_export` sees: a float Keras model whose weights
are integers times scales, with a `Marker` after every value that is an integer in the file, and
the tables that say what each marker and each weight stands for.
"""

import dataclasses
from typing import Any

import keras
import numpy as np

from kqat.base import FreezeError
from kqat.freezing.folding import channelwise, freeze_layer, gate_numbers
from kqat.freezing.frozen_model import FrozenModel
from kqat.freezing.frozen_weight import FrozenWeight
from kqat.freezing.stripper import checked_graph
from kqat.graph import (
    Graph,
    Node,
    Ref,
    clone,
    duplicate,
    non_finite_variable,
    rebuild,
)
from kqat.grids import Site, arithmetic
from kqat.parts import (
    FrozenLSTM,
    GateNumbers,
    Hide,
    Marker,
    PrecisionBoundary,
    Slice,
    Stack,
    Tabulated,
    Take,
    Unstack,
    sliced,
)
from kqat.registry import LayerRule, Output, rule_for
from kqat.training import ActivationQuantizer, QuantizedRecurrence, QuantizeWrapper


def freeze(qat: keras.Model) -> FrozenModel:
    """Folds, bakes and marks a QAT model, which is left alone.

    Raises:
        ModelError: if `qat` is no QAT model.
        FreezeError: if a range was never observed, or a weight is not finite or overflows
            where BatchNormalization folds into it.
    """
    graph = checked_graph(qat)
    path = non_finite_variable(qat)
    if path is not None:
        raise FreezeError(
            f"Expected finite weights and ranges. Received: NaN or infinity in '{path}' of "
            f"'{qat.name}'. Its training diverged; go back to a checkpoint."
        )
    freezer = _Freezer(graph)
    model = rebuild(graph, freezer.call, qat.name)
    return FrozenModel(
        model=model,
        sites=tuple(freezer.sites),
        weights=tuple(freezer.weights),
        tables=tuple(freezer.tables),
        lstms=tuple(freezer.lstms),
        input_names=graph.input_keys,
        output_names=graph.output_keys,
    )


def _float_copy(layer: Any) -> Any:
    """The layer as it ships, in float32; recurrent ones step by step: a loop has a subgraph."""
    if isinstance(layer, Hide):
        return keras.layers.Add(name=layer.name, dtype="float32")
    copy = duplicate(layer, dtype="float32")
    whole = getattr(copy, "layer", None)
    for part in (whole, *(getattr(whole, f"{way}_layer", None) for way in ("forward", "backward"))):
        if isinstance(part, keras.layers.RNN):
            part.unroll = True
    return copy


def _beyond_kernel(rule: LayerRule, source: Site) -> bool:
    """Whether the operator's own kernel is wrong on this grid."""
    return source.bits == 8 and float(source.scale) > rule.largest_input_scale


def _site(quantizer: ActivationQuantizer, name: str) -> Site:
    """The grid of a quantizer's values, which have no shape yet."""
    low, high = quantizer.range()
    if quantizer.hides and high - low > -arithmetic.HIDDEN:
        raise FreezeError(
            f"Expected attention scores that spread less than {-arithmetic.HIDDEN:.0f}, so that a "
            f"mask hides them in the file. Received: {low:.0f} to {high:.0f} in "
            f"'{quantizer.name}'. Scale queries or keys, as MultiHeadAttention does."
        )
    scale, zero_point = arithmetic.nudge(np.float32(low), np.float32(high), quantizer.spec)
    return Site(name, np.float32(scale), int(zero_point), quantizer.spec.bits, ())


class _Freezer:
    """The working state of `freeze`."""

    def __init__(self, graph: Graph):
        self.consumers = graph.consumers()
        self.producers = graph.producers()
        self.input_names = dict(zip(graph.inputs, graph.input_keys, strict=True))
        self.sites: list[Site] = []
        self.weights: list[FrozenWeight] = []
        self.tables: list[Tabulated] = []
        self.lstms: list[FrozenLSTM] = []
        self.grids: dict[Ref, Site] = {}
        self.copies: dict[int, Any] = {}
        self.names: dict[str, int] = {}
        self.fences = 0

    def call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        """The node's frozen output value, symbolic; see `kqat.graph.tracer.Graph.run`."""
        layer, output = node.layer, node.outputs[0]
        if isinstance(layer, ActivationQuantizer):
            return self._quantizer(node, args[0])
        if isinstance(layer, QuantizedRecurrence):
            run = self._unrolled if layer.kind == "unrolled" else self._fused
            return run(node, args[0])
        if isinstance(layer, PrecisionBoundary):
            self.fences += 1
            return Marker("fence", 0, name=f"kqat_fence_{self.fences}")(args[0])
        if isinstance(layer, QuantizeWrapper):
            kwargs = {k: v for k, v in kwargs.items() if k != "training"}
            channels = node.outputs[0].shape[-1] or 0
            return self._cached(layer, lambda la: self._freeze_wrapper(la, channels))(
                *args, **kwargs
            )
        grids = [self.grids[ref] for ref in node.inputs if ref in self.grids]
        rule = rule_for(layer, node.name) if grids else None
        if rule is not None and rule.output is Output.VANISHES:
            self.grids[output] = grids[0]
            return args[0]
        bits = grids[0].bits if grids else 0
        if rule is not None and (rule.is_table(bits) or _beyond_kernel(rule, grids[0])):
            return self._tabulated(layer, node.name, bits)(args[0])
        value = self._cached(layer, _float_copy)(*args, **kwargs)
        if rule is None or rule.output is not Output.SAME:
            return value
        self._check_same(node, grids)
        return [
            v if self._is_rounded(ref) else self._mark(ref, node.name, v, grids[0])
            for ref, v in zip(node.outputs, keras.tree.flatten(value), strict=True)
        ]

    def _unrolled(self, node: Node, inputs: list[Any]) -> list[Any]:
        """A recurrence as as many steps as its sequences have, which share weights and grids."""
        layer: QuantizedRecurrence = node.layer
        graph, count = layer.parts.graph, layer.sequences
        self.consumers |= graph.consumers()
        self.producers |= graph.producers()
        self.grids |= {
            inner: self.grids[outer]
            for inner, outer in zip(graph.inputs[:count], node.inputs[:count], strict=True)
        }
        sequences = [
            Unstack(name=f"{node.name}_unstack_{i}")(x) for i, x in enumerate(inputs[:count])
        ]
        states = inputs[count:] or [
            self._zeros(sequences[0][0], int(state.shape[-1] or 0), f"{node.name}_zeros_{i}")
            for i, state in enumerate(graph.inputs[count:])
        ]
        roundings = layer.parts.state_roundings
        states = [self._quantizer(n, state) for n, state in zip(roundings, states, strict=True)]
        grids = [self.grids[ref] for ref in graph.outputs]
        self.grids |= zip(graph.inputs[count:], grids, strict=True)
        outputs = []
        for values in layer.steps(sequences):
            states = graph.run([*values, *states], self.call)
            outputs.append(states[0])
        stacked = Stack(name=f"{node.name}_stack")(layer.in_order(outputs))
        results = layer.results(stacked, states)
        results = results if layer.return_state else [results]
        self.grids |= zip(node.outputs, [grids[0], *grids], strict=False)
        if layer.return_sequences:
            results[0] = self._mark(node.outputs[0], node.name, results[0], grids[0])
        return results

    def _fused(self, node: Node, inputs: list[Any]) -> list[Any]:
        """A recurrence as the one layer that its operator is; what turns sequences stays apart."""
        layer: QuantizedRecurrence = node.layer
        name, source, x = node.name.removeprefix("quant_"), self.grids[node.inputs[0]], inputs[0]
        result, carry = (_site(n.layer, node.name) for n in layer.parts.state_roundings)
        gates: dict[str, GateNumbers] = {}
        for wrapper in layer.parts.wrappers:
            frozen, _ = freeze_layer(wrapper)
            self.weights.extend(frozen)
            gates |= gate_numbers(wrapper.layer, {w.name.split("/")[-1]: w for w in frozen})
        ref, backwards = node.outputs[0], [*range(x.shape[1])][::-1]
        if layer.go_backwards:
            x = Take(backwards, 1, name=f"{name}_backwards")(x)
            x = self._mark(ref, f"{name}_backwards", x, source)
        whole = FrozenLSTM(gates, source=source, carry=carry, result=result, name=name)
        self.lstms.append(whole)
        if layer.return_sequences and not layer.flip:
            return [self._mark(ref, name, whole(x), result)]
        y = self._mark(ref, f"{name}_steps", whole(x), result)
        if layer.return_sequences:
            y = Take(backwards, 1, name=f"{name}_flip")(y)
        else:
            y = sliced(y, (slice(None), -1), f"{name}_last")
        return [self._mark(ref, name, y, result)]

    def _zeros(self, x: Any, units: int, name: str) -> Any:
        """`(batch, units)` zeros, computed from `x`: a constant would be folded away."""
        part = Slice([0], [units], [1], name=f"{name}_part")(x)
        return keras.layers.Subtract(name=name)([part, part])

    def _is_rounded(self, ref: Ref) -> bool:
        return any(isinstance(n.layer, ActivationQuantizer) for n in self.consumers[ref])

    def _tabulated(self, layer: Any, name: str, bits: int) -> Tabulated:
        index = len(self.tables)
        copy = clone(layer, dtype="float32")
        self.tables.append(Tabulated(copy, index, bits, name=f"{name}_table_{index}"))
        return self.tables[-1]

    def _cached(self, layer: Any, make: Any) -> Any:
        if id(layer) not in self.copies:
            self.copies[id(layer)] = make(layer)
        return self.copies[id(layer)]

    def _check_same(self, node: Node, grids: list[Site]) -> None:
        distinct = {(grid.scale, grid.zero_point, grid.bits) for grid in grids}
        if len(distinct) != 1 or len(grids) != sum(not ref.holds_indexes for ref in node.inputs):
            raise FreezeError(
                f"Expected one scale for all inputs of '{node.name}'. Received: {distinct}. The "
                "model was changed after kqat.quantize_model; quantize it anew."
            )

    def _quantizer(self, node: Node, x: Any) -> Any:
        layer: ActivationQuantizer = node.layer
        observes = node.kwargs.get("observe", True)
        producer = self.producers.get(node.inputs[0])
        if producer is None:
            name = self.input_names[node.inputs[0]]
        elif layer.sites == 1 and observes:
            name = layer.name.removesuffix("_quantizer")
        else:
            name = producer.name.removeprefix("quant_")
        grid = _site(layer, name)
        if layer.clamp and observes:
            clamp = f"kqat_clamp_{len(self.sites)}"
            x = keras.layers.Activation(layer.clamp, name=clamp, dtype="float32")(x)
        return self._mark(node.outputs[0], name, x, grid)

    def _mark(self, ref: Ref, name: str, value: Any, grid: Site) -> Any:
        self.names[name] = self.names.get(name, 0) + 1
        unique = name if self.names[name] == 1 else f"{name}_{self.names[name]}"
        site = dataclasses.replace(grid, name=unique, shape=tuple(value.shape[1:]))
        self.grids[ref] = site
        self.sites.append(site)
        index = len(self.sites) - 1
        return Marker("site", index, name=f"kqat_marker_{index}")(value)

    def _freeze_wrapper(self, wrapper: QuantizeWrapper, channels: int) -> Any:
        if not wrapper.weight_specs:
            frozen, layer = channelwise(wrapper.layer, channels)
        else:
            frozen, layer = freeze_layer(wrapper)
        self.weights.extend(frozen)
        return layer
