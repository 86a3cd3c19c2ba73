"""`QuantizedRecurrence`: a recurrent layer in QAT, with one range per value for all time steps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from kqat.graph import Graph, Node, maker_of, trace
from kqat.grids import Fixed
from kqat.parts import LstmState, Recurrence
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.older_files import with_label
from kqat.training.weight_wrapper import QuantizeWrapper

Extremes = tuple[Any, Any]
Note = Callable[[ActivationQuantizer, int, Any], None]


@keras.saving.register_keras_serializable("kqat")
class QuantizedRecurrence(Recurrence):
    """A `Recurrence` whose step is a QAT model.

    Weights and biases are rounded once per batch. In training, all steps use the ranges from
    before the batch; after the batch its minima and maxima over all steps update the ranges. If
    there are no ranges yet, the first batch runs once without rounding to initialize them. Initial
    states are rounded with the ranges of the states.

    Args:
        step, sequences, kwargs: as for `Recurrence`.
        label: the name of the float layer that it replaces; by default its own name.
    """

    def __init__(
        self, step: keras.Model, sequences: int, *, label: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(step, sequences, autocast=False, **{**kwargs, "dtype": "float32"})
        self.label = label or self.name
        self.parts = Parts.of(trace(step))
        self._outer = _SequenceQuantizers()

    def get_config(self) -> dict[str, Any]:
        """The config of a `Recurrence`, and the label."""
        return {**super().get_config(), "label": self.label}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizedRecurrence":
        """The inverse of `get_config`."""
        config = with_label(config, prefix="quant_")
        return cls(keras.saving.deserialize_keras_object(config.pop("step")), **config)

    def call(self, inputs: Sequence[Any], training: bool | None = None) -> Any:
        """The states; see `Recurrence`."""
        quantizers = self.parts.quantizers
        known = ops.all(ops.stack([_is_known(quantizer) for quantizer in quantizers]))
        stored = [_bounds(quantizer) for quantizer in quantizers]
        if not training:
            return ops.cond(
                known,
                lambda: self._scan(inputs, _Pass(self.parts, stored))[0],
                lambda: self._scan(inputs, _Pass(self.parts, None))[0],
            )
        for quantizer in quantizers:
            quantizer.controls.are_read = True
        for wrapper in self.parts.wrappers:
            wrapper.controls.are_read = True
        masks = self._masks(inputs)
        bounds = ops.cond(known, lambda: stored, lambda: self._first_bounds(inputs, masks))
        bounds = keras.tree.map_structure(ops.stop_gradient, bounds)
        rounding = _Pass(self.parts, bounds, masks, training=True)
        results, extremes = self._unroll(inputs, rounding)
        for wrapper in self.parts.wrappers:
            if wrapper.controls.dampening is not None:
                self.add_loss(wrapper.oscillation_penalty())
        for (quantizer, site), (low, high) in zip(self.parts.sites, extremes, strict=True):
            if not quantizer.is_frozen:
                quantizer.observe(ops.stack([low, high]), site)
        return results

    def compute_output_spec(self, inputs: Sequence[Any], training: bool | None = None) -> Any:
        """As every layer's; finds on whose grids the sequences lie."""
        self._outer.find(inputs[: self.sequences])
        return super().compute_output_spec(inputs, training=training)

    def observe(self, inputs: Sequence[Any], note: Note, noisy: bool = False) -> Any:
        """Calls `note` with each value that has a range; returns the states, not rounded.

        Args:
            inputs: as for `call`.
            note: called as `note(quantizer, site, value)` for each step, after the clamp that the
                quantizer carries out.
            noisy: whether Dropout layers drop, as in training.
        """
        masks = self._masks(inputs) if noisy else {}
        rounding = _Noting(self.parts, None, masks, note)
        return self._unroll(inputs, rounding)[0]

    def state_quantizers(self) -> list[ActivationQuantizer]:
        """The quantizers of the states, the output's first."""
        return [node.layer for node in self.parts.state_roundings]

    def _first_bounds(self, inputs: Sequence[Any], masks: Mapping[str, Any]) -> list[Extremes]:
        extremes = self._scan(inputs, _Pass(self.parts, None, masks))[1]
        found: dict[int, list[Extremes]] = {}
        for (quantizer, _), pair in zip(self.parts.sites, extremes, strict=True):
            found.setdefault(id(quantizer), []).append(pair)
        return [
            _bounds(quantizer, found.get(id(quantizer), ())) for quantizer in self.parts.quantizers
        ]

    def _scan(self, inputs: Sequence[Any], rounding: "_Pass") -> tuple[Any, list[Extremes]]:
        """Runs all steps in a loop traced once; returns results, and the extremes at each site."""

        def step(values: list[Any], notes: list[Any]) -> tuple[list[Any], list[Any]]:
            seen: list[list[Any]] = [[] for _ in notes]
            states = rounding.step(values, seen)
            wider = [_wider(old, _extremes(new)) for old, new in zip(notes, seen, strict=True)]
            return states, wider

        inputs, seen = self._with_rounded_states(inputs, rounding)
        with keras.StatelessScope(state_mapping=self._rounded_weights(rounding)):
            return self.scan(inputs, step, [_extremes(values) for values in seen])

    def _unroll(self, inputs: Sequence[Any], rounding: "_Pass") -> tuple[Any, list[Extremes]]:
        """As `_scan`, but unrolled: slower to trace, with faster gradients."""
        inputs, seen = self._with_rounded_states(inputs, rounding)
        sequences = [ops.unstack(x, axis=1) for x in inputs[: self.sequences]]
        states = self.first_states(inputs)
        outputs = []
        with keras.StatelessScope(state_mapping=self._rounded_weights(rounding)):
            for values in self.steps(sequences):
                states = rounding.step([*values, *states], seen)
                outputs.append(states[0])
        stacked = ops.stack(self.in_order(outputs), axis=1)
        return self.results(stacked, states), [_extremes(values) for values in seen]

    def _with_rounded_states(
        self, inputs: Sequence[Any], rounding: "_Pass"
    ) -> tuple[list[Any], list[list[Any]]]:
        """The inputs with their initial states rounded, and the values seen at each site."""
        seen: list[list[Any]] = [[] for _ in self.parts.sites]
        roundings = self.parts.state_roundings[self.own_output :]
        states = [
            rounding.call(seen, node, x)
            for node, x in zip(roundings, inputs[self.sequences :], strict=False)
        ]
        return [*inputs[: self.sequences], *states], seen

    def _rounded_weights(self, rounding: "_Pass") -> list[tuple[Any, Any]]:
        """Pairs of variable and value for a `StatelessScope`: rounded weights, others as they are.

        All variables of the layers are listed, because the scope hides those of an outer scope.
        """
        mapping = []
        for wrapper in self.parts.wrappers:
            rounded = {
                id(getattr(wrapper.layer, name)): wrapper.rounded(name, training=rounding.training)
                for name in wrapper.weight_specs
            }
            scale = rounding.scale_before(wrapper, self._outer.by_position)
            if scale is not None:
                rounded |= {id(v): value for v, value in wrapper.biases_on_grid(scale)}
            mapping += [(v, rounded.get(id(v), v.value)) for v in wrapper.layer.variables]
        return mapping

    def _masks(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The dropout mask of each Dropout layer: the same in all steps, as in Keras's cells."""
        batch = ops.shape(inputs[0])[0]
        return {
            node.name: node.layer(ops.ones((batch, *node.inputs[0].shape[1:])), training=True)
            for node in self.parts.dropouts
        }


@dataclasses.dataclass(frozen=True)
class Parts:
    """The graph of one step, with its nodes and layers sorted by their purpose.

    `sites` are the calls of quantizers that update a range; `state_roundings` are the nodes that
    round the states. `before` has, by a wrapper's identity, the quantizer on whose grid its first
    input lies, or the position of the sequence that this is, where there is one.
    """

    graph: Graph
    quantizers: tuple[ActivationQuantizer, ...]
    wrappers: tuple[QuantizeWrapper, ...]
    dropouts: tuple[Node, ...]
    sites: tuple[tuple[ActivationQuantizer, int], ...]
    state_roundings: tuple[Node, ...]
    before: Mapping[int, ActivationQuantizer | int]

    @classmethod
    def of(cls, graph: Graph) -> "Parts":
        """The parts of a step's graph."""
        producers = graph.producers()
        layers = {id(node.layer): node.layer for node in graph.nodes}.values()
        return cls(
            graph=graph,
            quantizers=tuple(la for la in layers if isinstance(la, ActivationQuantizer)),
            wrappers=tuple(la for la in layers if isinstance(la, QuantizeWrapper)),
            dropouts=tuple(n for n in graph.nodes if isinstance(n.layer, keras.layers.Dropout)),
            sites=tuple(dict.fromkeys(site for n in graph.nodes if (site := _site(n)))),
            state_roundings=tuple(_observing(graph, producers[ref]) for ref in graph.outputs),
            before=_before(graph),
        )


def _observing(graph: Graph, rounding: Node) -> Node:
    """The call of a state's quantizer that moves its range, where a held state is rounded again."""
    if rounding.kwargs.get("observe", True):
        return rounding
    return next(
        n for n in graph.nodes if n.layer is rounding.layer and n.kwargs.get("observe", True)
    )


def _before(graph: Graph) -> dict[int, ActivationQuantizer | int]:
    """On whose grid the first input of each wrapper of a step lies: see `Parts`.

    A wrapper that is called on values of several grids is left out, as a bias has one grid.
    """
    producers = graph.producers()
    sequences = len(graph.inputs) - len(graph.outputs)
    given: dict[Any, Any] = dict(zip(graph.inputs, range(sequences), strict=False))
    for ref, result in zip(graph.inputs[sequences:], graph.outputs, strict=True):
        given[ref] = producers[result].layer  # a state, rounded by the step before

    def behind(ref: Any) -> Any:
        while ref not in given:
            node = producers.get(ref)
            if node is None or isinstance(node.layer, ActivationQuantizer):
                return None if node is None else node.layer
            if node.has_weights or len(node.inputs) != 1:
                return None
            ref = node.inputs[0]
        return given[ref]

    found: dict[int, list[Any]] = {}
    for node in graph.nodes:
        if isinstance(node.layer, QuantizeWrapper):
            found.setdefault(id(node.layer), []).append(behind(node.inputs[0]))
    return {
        key: one
        for key, (one, *more) in found.items()
        if isinstance(one, ActivationQuantizer | int) and all(other is one for other in more)
    }


class _SequenceQuantizers:
    """The quantizers of a recurrence's sequences, found where the model's graph is made.

    Keras, which would take their variables for the recurrence's too, does not look in here.
    """

    def __init__(self) -> None:
        self.by_position: dict[int, ActivationQuantizer] = {}

    def find(self, sequences: Sequence[Any]) -> None:
        """Looks at what made symbolic tensors; others tell nothing."""
        for position, tensor in enumerate(sequences):
            layer, inputs = maker_of(tensor)
            while layer is not None and not isinstance(layer, ActivationQuantizer):
                moves = len(inputs) == 1 and not getattr(layer, "weights", None)
                layer, inputs = maker_of(inputs[0]) if moves else (None, [])
            if layer is not None:
                self.by_position[position] = layer


def _site(node: Node) -> tuple[ActivationQuantizer, int] | None:
    """The quantizer and its call site, if the node updates a range."""
    quantizer = node.layer
    if not isinstance(quantizer, ActivationQuantizer) or _is_given(quantizer):
        return None
    return (quantizer, node.kwargs.get("site", 0)) if node.kwargs.get("observe", True) else None


class _Pass:
    """Computes the steps of one run over time, with or without rounding.

    Args:
        parts: the parts of the recurrence.
        bounds: the range of each of its quantizers, or `None` to round the weights only.
        masks: name of a Dropout layer -> its mask; a Dropout without a mask does nothing.
        training: whether values are rounded as in training.
    """

    def __init__(
        self,
        parts: Parts,
        bounds: Sequence[Extremes] | None,
        masks: Mapping[str, Any] | None = None,
        training: bool = False,
    ):
        self.parts = parts
        self.training = training
        self.masks = masks or {}
        self.bounds: dict[int, Extremes] | None = None
        if bounds is not None:
            ids = map(id, parts.quantizers)
            self.bounds = dict(zip(ids, bounds, strict=True))

    def scale_before(
        self, wrapper: QuantizeWrapper, outer: Mapping[int, ActivationQuantizer]
    ) -> Any:
        """The scale of a wrapper's input, or `None` where nothing is rounded or it is not known.

        `outer` are the quantizers of the sequences, by their position.
        """
        before = self.parts.before.get(id(wrapper))
        if self.bounds is None or before is None:
            return None
        if isinstance(before, int):
            return outer[before].scale() if before in outer else None
        low, high = self.bounds[id(before)]
        return (high - low) / float(before.spec.qmax - before.spec.qmin)

    def step(self, values: list[Any], seen: list[list[Any]]) -> list[Any]:
        """One step; appends the value at each site to `seen`.

        States keep their type: under mixed precision a loop of float32 may have steps of float16.
        """
        # Keras 3.10 loads a step of one output as one that returns it alone, not in a list.
        states = self.parts.graph.run(values, functools.partial(self.call, seen))
        states = keras.tree.flatten(states)
        before = values[len(values) - len(states) :]
        return [ops.cast(new, old.dtype) for new, old in zip(states, before, strict=True)]

    def call(self, seen: list[list[Any]], node: Node, *args: Any, **kwargs: Any) -> Any:
        """The value of one node of the step; see `kqat.graph.tracer.Graph.run`."""
        layer = node.layer
        if isinstance(layer, ActivationQuantizer):
            return self._quantizer(seen, node, args[0])
        if isinstance(layer, keras.layers.Dropout):
            return args[0] * self.masks[node.name] if node.name in self.masks else args[0]
        if isinstance(layer, QuantizeWrapper):
            kwargs = layer.layer_options(kwargs)
            layer = layer.layer  # The scope has rounded its weights already.
        if isinstance(layer, LstmState) and self.bounds is not None:
            return layer.rounded(*args)
        return layer(*args, **kwargs)

    def saw(self, seen: list[list[Any]], site: tuple[ActivationQuantizer, int], x: Any) -> None:
        """Takes in a value that shapes the range of `site`."""
        seen[self.parts.sites.index(site)].append(x)

    def _quantizer(self, seen: list[list[Any]], node: Node, x: Any) -> Any:
        site = _site(node)
        if site is not None:
            self.saw(seen, site, x)
        if self.bounds is None:
            return node.layer.clamped(x)
        low, high = self.bounds[id(node.layer)]
        rounded = node.layer.rounded_on(
            ops.cast(x, "float32"),
            low,
            high,
            training=self.training,
            halves_away=node.kwargs.get("halves_away", False),
        )
        return ops.cast(rounded, x.dtype)


class _Noting(_Pass):
    """A pass that hands on what comes by and keeps nothing."""

    def __init__(self, *args: Any) -> None:
        *rest, self.note = args
        super().__init__(*rest)

    def saw(self, seen: list[list[Any]], site: tuple[ActivationQuantizer, int], x: Any) -> None:
        """Hands it to `note`, as its kernel clamps it: a rounding from zero on is the clamp."""
        self.note(*site, site[0].clamped(x))


def _is_given(quantizer: ActivationQuantizer) -> bool:
    return isinstance(quantizer.range_method, Fixed)


def _is_known(quantizer: ActivationQuantizer) -> Any:
    return ops.cast(1.0 if _is_given(quantizer) else ops.max(quantizer.count.value), "bool")


def _bounds(quantizer: ActivationQuantizer, seen: Sequence[Extremes] = ()) -> Extremes:
    """The current range of a quantizer, or the range of the extremes in `seen` if there are any."""
    if _is_given(quantizer):
        low, high = quantizer.fixed_range()
        return ops.convert_to_tensor(low, "float32"), ops.convert_to_tensor(high, "float32")
    if not seen:
        return quantizer.union(quantizer.site_low.value, quantizer.site_high.value)
    lows, highs = (ops.stack([quantizer.clamped(x) for x in xs]) for xs in zip(*seen, strict=True))
    return quantizer.union(*map(ops.stop_gradient, (lows, highs)))


def _extremes(values: Sequence[Any]) -> Extremes:
    """Minimum and maximum of tensors of one shape and of zero, which is in every range."""
    if not values:
        return ops.zeros((), "float32"), ops.zeros((), "float32")
    together = ops.cast(ops.stack(values), "float32")
    return ops.minimum(ops.min(together), 0.0), ops.maximum(ops.max(together), 0.0)


def _wider(a: Extremes, b: Extremes) -> Extremes:
    return ops.minimum(a[0], b[0]), ops.maximum(a[1], b[1])
