"""QAT model to `FrozenModel`: BatchNorm folded, weights on their grid, ranges final.

The frozen model is the only thing that `tflite_export` sees: a float Keras model whose weights
are integers times scales, with a `Marker` after every value that is an integer in the file, and
the tables that say what each marker and each weight stands for.
"""

import dataclasses
import functools
import warnings
from typing import Any

import keras
import numpy as np

from kqat.base import FreezeError, TrainerWarning, array_of
from kqat.freezing.folding import channelwise, freeze_layer, output_factor
from kqat.freezing.frozen_model import FrozenModel
from kqat.freezing.frozen_parts import FrozenParts, Value, labels
from kqat.freezing.frozen_weight import FrozenConstant
from kqat.freezing.node_facts import find_node_facts
from kqat.freezing.recurrences import fused, unrolled
from kqat.freezing.stripper import checked_graph
from kqat.freezing.unplanned import check_planned
from kqat.graph import Graph, Node, Ref, duplicate, rebuild
from kqat.grids import Bounds, Clamp, Site, arithmetic
from kqat.parts import (
    ByteInput,
    Hide,
    Learned,
    PrecisionBoundary,
    RecurrenceKind,
    TiedWeight,
    clamp_layer,
    reads_rows,
)
from kqat.registry import LayerFacts, Output, stock_facts
from kqat.training import (
    ActivationQuantizer,
    QuantizedRecurrence,
    QuantizeWrapper,
    all_layers,
    check_finite,
    rounded_once,
    warn_of_drift,
)


def freeze(qat: keras.Model) -> FrozenModel:
    """A QAT model as it ships: BatchNormalization folded, weights on their grids, ranges final.

    `tflite_export.convert` does this itself, or takes the result.

    Args:
        qat: a QAT model, calibrated or trained; it is not changed.

    Raises:
        ModelError: if `qat` is no QAT model, or layers were added to it since it was planned.
        FreezeError: if a range was never observed, an optimizer that averages left zeros in all
            trained variables, or a weight is not finite or overflows where BatchNormalization folds
            into it.

    Warns:
        CalibrationWarning: if training moved ranges far away from those of calibration.
        TrainerWarning: if weights are on the grids of a stage of `kqat.FallingBits`, which ship.
    """
    # What is trained no more has no losses.
    graph = dataclasses.replace(checked_graph(qat), losses=())
    check_planned(graph, qat.name)
    check_finite(qat, FreezeError)
    _check_averages(qat)
    warn_of_drift(qat, stacklevel=2)
    parts = FrozenParts(graph)
    wrappers = [layer for layer in all_layers(qat) if isinstance(layer, QuantizeWrapper)]
    _warn_of_stages(wrappers, qat.name, stacklevel=2)
    with rounded_once(wrappers):
        model = rebuild(graph, _GraphFreezer(graph, parts).call, qat.name)
    frozen = FrozenModel(
        model=model,
        sites=tuple(parts.sites),
        weights=tuple(parts.weights),
        tables=tuple(parts.tables),
        lstms=tuple(parts.lstms),
        constants=tuple(parts.constants),
        input_names=graph.input_keys,
        output_names=graph.output_keys,
    )
    return frozen.with_facts(find_node_facts(frozen.graph, parts.sites, parts.carried))


def _warn_of_stages(wrappers: list[QuantizeWrapper], name: str, *, stacklevel: int) -> None:
    """Warns where a callback has put other grids in the place of the planned ones.

    They are what the model computes with now, and so what ships.
    """
    found = [
        f"{now.bits} bits, planned with {wrapper.planned_specs[weight].bits}, in "
        f"'{wrapper.layer.name}'"
        for wrapper in wrappers
        for weight, now in wrapper.weight_specs.items()
        if now != wrapper.planned_specs[weight]
    ]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        warnings.warn(
            f"Weights of '{name}' are on the grids of a stage of kqat.FallingBits, which ship: "
            f"{found[0]}{more}. A fit that was interrupted leaves them so. Call fit again with the "
            "callback, or the callback's on_train_end(), which puts the planned grids back.",
            TrainerWarning,
            stacklevel=stacklevel + 1,
        )


def _check_averages(qat: keras.Model) -> None:
    """Raises where averages of no step stand in the place of all weights.

    Zeros alone are no fault: so begin a head on a frozen backbone, and the slopes of a PReLU.
    """
    optimizer = getattr(qat, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    trained = qat.trainable_variables
    if not getattr(optimizer, "use_ema", False) or not trained:
        return
    if any(np.any(array_of(variable)) for variable in trained):
        return
    raise FreezeError(
        f"Expected weights other than zero in '{qat.name}'. Received: zeros in all {len(trained)} "
        "trained variables. An optimizer with use_ema=True puts its averages in the place of all "
        "weights at the end of fit, and they are zero where it took no step: with mixed_float16 it "
        "takes none while the scaled loss overflows. Train the model again, for more steps or in "
        "float32."
    )


class _GraphFreezer:
    """Freezes the nodes of one graph: of the model, or of one step of a recurrence.

    `grids` are the grids of the values that are integers, as far as the graph has run.
    """

    def __init__(self, graph: Graph, parts: FrozenParts):
        self.graph = graph
        self.parts = parts
        self.producers = graph.producers()
        self.labels = labels(graph)
        self.input_names = dict(zip(graph.inputs, graph.input_keys, strict=True))
        # A value that only another grid clips is on its own grid before.
        self.rounded = {
            node.inputs[0]
            for node in graph.nodes
            if isinstance(node.layer, ActivationQuantizer)
            and not isinstance(node.layer.clamp, Bounds)
        }
        # What a kernel's output is multiplied by before it is rounded ships in its weights.
        self.factors = {
            self.producers[node.inputs[0]]: node.layer for node in graph.nodes if self._scales(node)
        }
        # What scales and shifts the input of a kernel ships in its weights and its bias.
        self.affines = {
            name for node in graph.nodes for name in node.kwargs.get("input_affines") or ()
        }
        self.grids: dict[Ref, Site] = {}
        # Values that no input of the model reaches. The converter computes them, and would compute
        # a marker as well, so they have none. The file holds them on the grid of their reader.
        self.constants: set[Ref] = set()

    def run(self, inputs: list[Value]) -> list[Value]:
        """The graph's outputs for these inputs; a step is run once for each step of a sequence."""
        for ref, value in zip(self.graph.inputs, inputs, strict=True):
            self._note(ref, value)
        tensors = self.graph.run([value.tensor for value in inputs], self.call)
        return self._values(self.graph.outputs, keras.tree.flatten(tensors))

    def call(self, node: Node, *args: Any, **kwargs: Any) -> list[Any]:
        """The node's frozen output tensors, symbolic; see `kqat.graph.tracer.Graph.run`."""
        values = self._frozen(node, args, kwargs)
        if self._is_constant(node):
            self.constants.update(node.outputs)
        for ref, value in zip(node.outputs, values, strict=True):
            self._note(ref, value)
        return [value.tensor for value in values]

    def _scales(self, node: Node) -> bool:
        """Whether a layer multiplies what a kernel makes, before it is rounded."""
        producer = self.producers.get(node.inputs[0]) if node.inputs else None
        kernel = producer.layer if producer else None
        weights = isinstance(kernel, QuantizeWrapper) and bool(kernel.weight_specs)
        return weights and output_factor(node.layer) is not None

    def _is_constant(self, node: Node) -> bool:
        reads_constants = bool(node.inputs) and self.constants.issuperset(node.inputs)
        return isinstance(node.layer, Learned) or reads_constants

    def _note(self, ref: Ref, value: Value) -> None:
        if value.grid is None:
            self.grids.pop(ref, None)
        else:
            self.grids[ref] = value.grid

    def _values(self, refs: tuple[Ref, ...], tensors: list[Any]) -> list[Value]:
        return [Value(t, self.grids.get(ref)) for ref, t in zip(refs, tensors, strict=True)]

    def _frozen(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Value]:
        """The node's output values, by what kind of layer `training.build` put there."""
        layer = node.layer
        if isinstance(layer, ActivationQuantizer):
            return [self.round(node, args[0])]
        if isinstance(layer, QuantizedRecurrence):
            return self._recurrence(node, self._values(node.inputs, args[0]))
        if isinstance(layer, PrecisionBoundary):
            return [Value(args[0] if self._is_constant(node) else self.parts.fence(args[0]))]
        if self._scales(node):
            return [Value(args[0])]
        if layer.name in self.affines:
            return [Value(args[0], self.grids.get(node.inputs[0]))]
        if not isinstance(layer, QuantizeWrapper):
            facts = stock_facts(layer) if self._grids_read(node) else None
            return self._plain(node, layer, facts, args, kwargs)
        branch = kwargs.get("branch", 0)
        kwargs = layer.layer_options(kwargs)
        if not layer.computes_with_grids:
            facts = layer.facts if self._grids_read(node) else None
            return self._plain(node, layer.layer, facts, args, kwargs)
        channels = node.outputs[0].shape[-1] or 0
        make = functools.partial(self._freeze_wrapper, channels, branch, self.factors.get(node))
        frozen = self.parts.once(layer, make, branch)
        if isinstance(layer.layer, TiedWeight) and reads_rows(layer.layer, kwargs):
            # They are integers of the weight, for whoever reads them on a grid of his own, too.
            scale = np.asarray(layer.scale("kernel"), np.float32).reshape(())
            grid = Site(node.name, np.float32(scale), 0, 8, ())
            return [self.parts.mark(self.labels[node], frozen(*args, **kwargs), grid)]
        return [Value(tensor) for tensor in keras.tree.flatten(frozen(*args, **kwargs))]

    def _grids_read(self, node: Node) -> list[Site]:
        return [self.grids[ref] for ref in node.inputs if ref in self.grids]

    def _plain(
        self,
        node: Node,
        layer: Any,
        facts: LayerFacts | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Value]:
        """A layer without weights on a grid; `facts` is `None` where it reads no integers."""
        if facts is None:
            copy = self.parts.once(layer, _float_copy)
            values = [Value(t) for t in keras.tree.flatten(copy(*args, **kwargs))]
            if isinstance(layer, ByteInput) and node.outputs[0] not in self.rounded:
                # Layers left float read it; a float input would tell the exporter so itself.
                return [Value(self.parts.fence(values[0].tensor))]
            return values
        grids = self._grids_read(node)
        if facts.output is Output.VANISHES:
            return [Value(args[0], grids[0])]
        bits = grids[0].bits
        if self._is_constant(node):
            copy = self.parts.once(layer, _float_copy)
            grid = grids[0] if facts.output is Output.SAME else None
            return [Value(t, grid) for t in keras.tree.flatten(copy(*args, **kwargs))]
        if facts.ships_as_table(bits, float(grids[0].scale)):
            table = self.parts.table(layer, node.name, bits)
            self.parts.carried[id(table.layer)] = facts
            return [Value(table(args[0]))]
        copy = self.parts.once(layer, functools.partial(self._carrying_copy, facts))
        tensors = keras.tree.flatten(copy(*args, **kwargs))
        if facts.output is not Output.SAME:
            return [Value(tensor) for tensor in tensors]
        self._check_same(node, grids)
        return [
            Value(tensor)
            if ref in self.rounded or ref.holds_indexes
            else self.parts.mark(node.name, tensor, grids[0])
            for ref, tensor in zip(node.outputs, tensors, strict=True)
        ]

    def _carrying_copy(self, facts: LayerFacts, layer: Any) -> Any:
        """A float copy of which the facts are kept for the exporter."""
        copy = _float_copy(layer)
        self.parts.carried[id(getattr(copy, "layer", copy))] = facts
        return copy

    def _freeze_wrapper(
        self, channels: int, branch: int, multiplied_by: Any, wrapper: QuantizeWrapper
    ) -> Any:
        """The float layer, or layers, that compute with the wrapper's integers."""
        if not wrapper.weight_specs:
            rounded = wrapper.bias_on_grid()
            weights, affine = channelwise(
                wrapper.layer, channels, self.parts.free_name, rounded, wrapper.ships_as_sum
            )
            self.parts.weights.extend(weights)
            return affine
        factor = None if multiplied_by is None else output_factor(multiplied_by)
        weights, part = freeze_layer(wrapper, branch, factor)
        self.parts.weights.extend(weights)
        self.parts.carried[id(part.layer)] = wrapper.facts
        return part

    def _recurrence(self, node: Node, inputs: list[Value]) -> list[Value]:
        layer: QuantizedRecurrence = node.layer
        if layer.kind is RecurrenceKind.UNROLLED:
            step = _GraphFreezer(layer.parts.graph, self.parts)
            return unrolled(node, inputs, self.parts, step.run, step.round)
        grids = [_site(n.layer, node.name) for n in layer.parts.state_roundings]
        return fused(node, self.labels[node], inputs[0], (grids[0], grids[1]), self.parts)

    def round(self, node: Node, x: Any) -> Value:
        """The site of a value that a quantizer rounds, behind the clamp that it carries out."""
        layer: ActivationQuantizer = node.layer
        observes = node.kwargs.get("observe", True)
        grid = _site(layer, layer.label)
        # What has to end at bounds does so with its grid, but a constant has none yet.
        by_grid = isinstance(layer.clamp, Bounds) and not self._is_constant(node)
        clamp: Clamp | Bounds | None = layer.clamp
        if isinstance(layer.clamp, Bounds) and by_grid:
            # Of a grid with both ends alike only the upper one is that of the clip.
            above_zero = layer.spec.symmetric and layer.clamp.low == 0.0
            clamp = Clamp.RELU if above_zero else None
        if clamp and observes:
            name = self.parts.free_name(f"kqat_clamp_{len(self.parts.sites)}")
            x = clamp_layer(clamp, name=name, dtype="float32")(x)
        if self._is_constant(node):
            self._note_constant(node.inputs[0], grid)
            return Value(x, grid)
        return self.parts.mark(self._site_name(node, observes), x, grid)

    def _note_constant(self, ref: Ref, grid: Site) -> None:
        """Keeps the integers of a weight that an operator with scales of its own may read."""
        layer = self.producers[ref].layer
        if isinstance(layer, Learned):
            values = np.asarray(layer.value, np.float32)
            self.parts.constants.append(FrozenConstant(values, grid))

    def _site_name(self, node: Node, observes: bool) -> str:
        """What the value is called: as the group of its quantizer, or where others are in that
        group too, as the layer that makes it.
        """
        producer = self.producers.get(node.inputs[0])
        if producer is None:
            return self.input_names[node.inputs[0]]
        if isinstance(producer.layer, ByteInput):
            return self.input_names[producer.inputs[0]]
        if node.layer.sites == 1 and observes:
            return node.layer.label
        is_quantizer = isinstance(producer.layer, ActivationQuantizer)
        return producer.name if is_quantizer else self.labels[producer]

    def _check_same(self, node: Node, grids: list[Site]) -> None:
        distinct = {grid.grid for grid in grids}
        quantities = sum(not ref.holds_indexes for ref in node.inputs)
        if len(distinct) != 1 or len(grids) != quantities:
            raise FreezeError(
                f"Expected one scale for all inputs of '{node.name}'. Received: {distinct}. The "
                "model was changed after kqat.quantize_model; quantize it anew."
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
