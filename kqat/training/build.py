"""Plan to QAT model: an ordinary Keras model whose layers quantize."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from kqat.base import ModelError, PolicyError, scope_name
from kqat.devices import HALVES_AWAY
from kqat.graph import Node, Part, Ref, clone, duplicate, fill, rebuild, unique_name
from kqat.parts import PrecisionBoundary, Recurrence, TiedWeight, reads_rows
from kqat.planning import Group, LayerPlan, Plan, Role, Rounding
from kqat.registry import LayerFacts, Resolution, registered_rule
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.preservation import Preserve, preserved_in, turned_over
from kqat.training.quantized_recurrence import QuantizedRecurrence
from kqat.training.weight_wrapper import QuantizeWrapper


def all_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of `model` and of the models inside it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from all_layers(layer)
        else:
            yield layer
        if isinstance(layer, Recurrence):
            yield from all_layers(layer.step)


def is_quantized(model: keras.Model) -> bool:
    """Whether `wrap` made this model, or one inside it."""
    kinds = (QuantizeWrapper, ActivationQuantizer)
    return any(isinstance(layer, kinds) for layer in all_layers(model))


def check_quantized(model: keras.Model, purpose: str = "") -> None:
    """Raises ModelError where a model is float; `purpose` says what it is to be for."""
    if not is_quantized(model):
        wanted = f"a QAT model {purpose}".strip()
        raise ModelError(
            f"Expected {wanted}. Received: '{model.name}', which is float. Use "
            "kqat.quantize_model first."
        )


def check_unquantized(model: keras.Model) -> None:
    """Raises ModelError where a model is a QAT model already; `trace` refuses what is no model."""
    if isinstance(model, keras.Model) and is_quantized(model):
        raise ModelError(
            f"Expected a float model. Received: '{model.name}', which is quantized already. Train "
            "it on with fit, or start from the float model."
        )


def trained_model(model: keras.Model) -> keras.Model:
    """The QAT model that `fit` trains: `model`, or what a trainer around one says that it is.

    A trainer, as `kqat.Distiller`, names it by an attribute or property `trained_model`, where its
    outputs are those of that model.
    """
    return getattr(model, "trained_model", model)


def check_preserved(qat: keras.Model, kinds: Sequence[Preserve]) -> None:
    """Raises PolicyError where a QAT model keeps nothing of what it was asked to keep."""
    kept = [
        one
        for layer in all_layers(qat)
        if isinstance(layer, QuantizeWrapper)
        for one in layer.preserve.values()
    ]
    for kind in kinds:
        if not any(one.sparsity if kind is Preserve.SPARSITY else one.clusters for one in kept):
            sparse = kind is Preserve.SPARSITY
            what = "a tenth of zeros or more" if sparse else "few distinct values"
            function = "prune" if sparse else "cluster"
            raise PolicyError(
                f"Expected weights of {what} for preserve='{kind}'. Received: '{qat.name}', which "
                f"has none. Start from kqat.{function}(model), or leave preserve out."
            )


def wrap(plan: Plan, preserve: Sequence[Preserve] = ()) -> keras.Model:
    """The QAT model of a plan: the same inputs and outputs, by the same names.

    Weights are copies; ranges are empty until calibration or training fills them.

    Args:
        plan: what was decided.
        preserve: what the layers keep of their weights in training.

    Raises:
        PolicyError: if a grid cannot hold what is kept.
    """
    assembly = _Assembly(plan, preserve)
    names, masks = plan.output_names, plan.graph.output_masks
    return rebuild(plan.graph, assembly.call, plan.model_name, names, masks)


def _rounds_bias(layer: Any) -> bool:
    """Whether a layer, or the one inside a `Part`, can use the grid of its input."""
    return isinstance(getattr(layer, "layer", None), QuantizeWrapper)


def _size(ref: Ref) -> int:
    """The number of values of one sample; 0 if that is not known."""
    return math.prod(size or 0 for size in ref.shape[1:])


class _Assembly:
    """The working state of `wrap`.

    The value that a node hands on is rounded if the node computes on integers. A reader of the
    other kind gets the other form, which is made once, when first asked for.
    """

    def __init__(self, plan: Plan, preserve: Sequence[Preserve] = ()):
        self.plan = plan
        self.preserve = preserve
        self.decisions: dict[str, LayerPlan] = {layer.name: layer for layer in plan.layers}
        # What scales and shifts the input of a kernel is called as an own layer in training.
        self.scaling = {name for layer in plan.layers for name in layer.scaled_by}
        self.producers = plan.graph.producers()
        self.integer = {
            node: self.decisions[node.name].role is not Role.FLOAT for node in plan.graph.nodes
        }
        self.groups: dict[str, Group] = {group.name: group for group in plan.groups}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.copies: dict[int, Any] = {}
        self.grids: dict[Ref, str | None] = {}  # the name of the quantizer on whose grid a value is
        self.forms: dict[tuple[Ref, bool], Any] = {}
        # What a value that is not rounded yet resolves, see `ActivationQuantizer.call`.
        self.resolutions: dict[Ref, dict[str, Resolution]] = {}
        names = (node.name for node in plan.graph.nodes)
        self.names = {*plan.input_names, *plan.output_names, *names}

    def call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        """The node's output value, symbolic; see `kqat.graph.tracer.Graph.run`."""
        given = [t for t in keras.tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
        values = {
            ref: self._form(ref, tensor, self.integer[node])
            for ref, tensor in zip(node.inputs, given, strict=True)
        }
        args, kwargs = fill((node.args, node.kwargs), values.__getitem__)
        decision = self.decisions[node.name]
        if decision.role is Role.FOLDED or self._carried_out_by_quantizer(node, decision):
            value = args[0]
        else:
            layer = self._layer(node, decision)
            grid = self.grids.get(node.inputs[0]) if node.inputs else None
            before = [self._layer_called(name).name for name in decision.scaled_by]
            if before:
                kwargs["input_affines"] = before
            takes = decision.role is not Role.FACTOR
            if grid is not None and takes and _rounds_bias(layer):
                kwargs["input_quantizer"] = grid
            value = layer(*args, **kwargs, **self._branch(node, decision))
        if not self.integer[node]:
            return value
        if node.inputs and node.name not in self.plan.steps:
            # What is not rounded hands the integers of its inputs on; rows are on the table's grid.
            grid = self.grids.get(node.inputs[0])
            if isinstance(node.layer, TiedWeight) and reads_rows(node.layer, node.kwargs):
                grid = self._layer(node, decision).layer.name
            handed_on = dict.fromkeys(node.outputs, grid)
            self.grids = {**handed_on, **self.grids}
        resolution = self._resolution(node)
        self.resolutions |= {ref: resolution for ref in node.outputs if resolution}
        values = keras.tree.flatten(value)
        return [self._rounded(ref, v) for ref, v in zip(node.outputs, values, strict=True)]

    def _resolution(self, node: Node) -> dict[str, Resolution]:
        """The finest useful scale of a node's output: quantizer of an input -> share of its scale.

        What is computed inside the kernel before it resolves what that kernel does.
        """
        decision, rule = self.decisions[node.name], self.plan.rules.get(node.name)
        if decision.role in (Role.FOLDED, Role.FACTOR, Role.CLAMP):
            return self.resolutions.get(node.inputs[0], {})
        found: dict[str, Resolution] = {}
        if rule is None or rule.resolution is None:
            return found
        results = _size(node.outputs[0])
        for ref in node.inputs:
            grid, values = self.grids.get(ref), _size(ref)
            if grid is not None and values and results:
                found[grid] = rule.resolution(node.layer, values, results)
        return found

    def _carried_out_by_quantizer(self, node: Node, decision: LayerPlan) -> bool:
        roundings = self.plan.roundings.get(node.outputs[0], ())
        clamps = [self.groups[rounding.group].clamp for rounding in roundings[:1]]
        return decision.role is Role.CLAMP and clamps not in ([], [None])

    def _form(self, ref: Ref, tensor: Any, integer: bool) -> Any:
        if ref.holds_indexes:
            return tensor
        if (ref, integer) not in self.forms:
            self.forms[ref, integer] = self._make_form(ref, tensor, integer)
        return self.forms[ref, integer]

    def _make_form(self, ref: Ref, tensor: Any, integer: bool) -> Any:
        producer = self.producers.get(ref)
        if producer is None:
            if ref not in self.plan.roundings:
                return tensor
            rounded = self._form(ref, tensor, True) if not integer else self._rounded(ref, tensor)
            return rounded if integer else self._boundary(rounded)
        if self.integer[producer] == integer:
            return tensor
        crossed = self._boundary(tensor)
        return self._rounded(ref, crossed) if integer else crossed

    def _boundary(self, tensor: Any) -> Any:
        name = unique_name("precision_boundary", self.names)
        return PrecisionBoundary(name=name)(tensor)

    def _rounded(self, ref: Ref, tensor: Any) -> Any:
        more: dict[str, Any] = {}
        if resolution := self.resolutions.get(ref):
            more["resolution"] = resolution
        producer = self.producers.get(ref)
        rule = self.plan.rules.get(producer.name) if producer else None
        if rule is not None and set(rule.ops) & set(HALVES_AWAY):
            more["halves_away"] = True
        for rounding in self.plan.roundings.get(ref, ()):
            quantizer = self._quantizer(rounding)
            tensor = quantizer(tensor, site=rounding.site, observe=rounding.observe, **more)
            self.grids[ref] = quantizer.name
        return tensor

    def _quantizer(self, rounding: Rounding) -> ActivationQuantizer:
        name = rounding.group
        if name not in self.quantizers:
            group = self.groups[name]
            self.quantizers[name] = ActivationQuantizer(
                group.spec,
                group.range_method,
                clamp=group.clamp,
                sites=group.sites,
                hides=group.hides,
                gradient=group.gradient,
                label=group.label,
                name=unique_name(scope_name(name), self.names),
            )
        return self.quantizers[name]

    def _layer(self, node: Node, decision: LayerPlan) -> Any:
        key = id(node.layer)
        if key not in self.copies:
            self.copies[key] = self._copy(node, decision)
        return self.copies[key]

    def _layer_called(self, name: str) -> Any:
        """The layer in the QAT model of the node of this name."""
        part = self._layer(self._node(name), self.decisions[name])
        return getattr(part, "layer", part)

    def _copy(self, node: Node, decision: LayerPlan) -> Any:
        layer = node.layer
        if node.name in self.plan.steps:
            config = {**layer.options(), "name": unique_name(f"quant_{node.name}", self.names)}
            config |= {"step": wrap(self.plan.steps[node.name], self.preserve), "label": node.name}
            return QuantizedRecurrence(**config)
        rule = self.plan.rules.get(node.name)
        computes = decision.role is Role.INTEGER or node.name in self.scaling
        affine = computes and rule is not None and rule.affine
        # No process that loads the model can be expected to know a row that a user registered.
        carries_facts = rule is not None and rule is registered_rule(layer)
        if not (decision.weights or affine or carries_facts):
            name = node.name
            if name in self.plan.output_names:
                name = unique_name(f"{name}_unrounded", self.names)
            return duplicate(layer, name)
        norms = self._normalizations(layer)
        kept = preserved_in(layer, decision.weights, self.preserve, len(norms))
        wrapper = QuantizeWrapper(
            clone(layer),
            decision.weights,
            clone(norms[0]) if norms else None,
            weight_step=decision.weight_step,
            gradient=decision.weight_gradient,
            between=[clone(part) for part in self._between(node, decision)],
            branches=[clone(norm) for norm in norms[1:]],
            preserve=kept,
            # The row of a tied weight is that of one of its uses.
            facts=None if rule is None or isinstance(layer, TiedWeight) else LayerFacts.of(rule),
            name=unique_name(f"quant_{node.name}", self.names),
            # What is frozen has frozen steps, and thaws as layers do: Keras takes no notice where a
            # flag is set to what it is.
            trainable=any(part.trainable for part in (layer, *norms)),
        )
        weights = [part.get_weights() for part in (layer, *norms)]
        if len(norms) == 1:
            weights = [*turned_over(layer, norms[0], kept)]
        return Part(wrapper, weights, wrapper.take_over)

    def _normalizations(self, layer: Any) -> list[Any]:
        """The BatchNormalizations that fold into a layer, in the order of its calls."""
        calls = [node for node in self.plan.graph.nodes if node.layer is layer]
        names = [self.decisions[node.name].normalization for node in calls]
        norms = [self._node(name).layer for name in names if name]
        return list({id(norm): norm for norm in norms}.values())

    def _between(self, node: Node, decision: LayerPlan) -> list[Any]:
        """The layers between a layer and the BatchNormalization that folds into it."""
        between: list[Any] = []
        if decision.normalization:
            part = self.producers[self._node(decision.normalization).inputs[0]]
            while part is not node:
                between.insert(0, part.layer)
                part = self.producers[part.inputs[0]]
        return between

    def _branch(self, node: Node, decision: LayerPlan) -> dict[str, int]:
        """Which BatchNormalization a call of a layer with more than one takes."""
        if not decision.normalization:
            return {}
        norms = [id(norm) for norm in self._normalizations(node.layer)]
        branch = norms.index(id(self._node(decision.normalization).layer))
        return {"branch": branch} if branch else {}

    def _node(self, name: str) -> Node:
        return next(node for node in self.plan.graph.nodes if node.name == name)
