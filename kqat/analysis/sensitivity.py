"""What each layer's weights cost the model at fewer bits, measured in one traced graph."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.analysis.replay import Replay, as_array, decibels
from kqat.base import CalibrationError, PolicyError, TextEnum, decimal, significant, tracked
from kqat.config import QuantizeConfig, QuantizePolicy, resolve_config
from kqat.graph import Graph, Node, fill, trace
from kqat.grids import QuantSpec, StepMethod
from kqat.planning import Plan, make_plan
from kqat.training import (
    QuantizeWrapper,
    as_tensors,
    calibrate_for,
    call_unrounded,
    call_with,
    check_unquantized,
    of_fixed_shape,
    rounded_as,
    some_samples,
    wrap,
)

SAMPLES = 128
# Random vectors of Hutchinson's estimate.
PROBES = 32


class Measure(TextEnum):
    """How a layer's loss is measured."""

    SQNR = "sqnr"
    LOSS = "loss"
    HESSIAN = "hessian"


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs at one choice.

    Attributes:
        layer: the user's layer; a composite one counts as one.
        choice: name of the preset.
        cost: what its rounding costs; see `Sensitivity.measure`.
    """

    layer: str
    choice: str
    cost: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What the weights of each layer cost at each choice, all others unrounded.

    Attributes:
        measure: `"sqnr"`: noise of the outputs over their power; `"loss"`: change of the loss;
            `"hessian"`: half the mean trace of the loss's Hessian times the squared rounding error,
            an estimate of that change.
        choices: names of presets.
        layers: names of the layers, in their order; of those that read one weight, which are one
            choice, the name of the first.
        costs: one for each layer and choice.
        weights: number of weights of each layer.
        tied: layer -> the names of all layers that it stands for, where there are more.
    """

    measure: Measure
    choices: tuple[str, ...]
    layers: tuple[str, ...]
    costs: tuple[LayerCost, ...]
    weights: Mapping[str, int]
    tied: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def cost(self, layer: str, choice: str) -> float:
        """What one layer costs at one choice."""
        return next(c.cost for c in self.costs if (c.layer, c.choice) == (layer, choice))

    def __str__(self) -> str:
        head = f"{'layer':<32} {'weights':>9}" + "".join(f" {c:>10}" for c in self.choices)
        what = "SQNR of the outputs in dB" if self.measure is Measure.SQNR else "change of the loss"
        lines = [f"sensitivity: {what}, where this layer's weights alone are rounded", head]
        for layer in self.layers:
            cells = (self.cost(layer, choice) for choice in self.choices)
            words = (
                decimal(decibels(c)) if self.measure is Measure.SQNR else significant(c, 3)
                for c in cells
            )
            lines.append(
                f"{layer[:32]:<32} {self.weights[layer]:>9,}" + "".join(f" {w:>10}" for w in words)
            )
        lines += [f"one choice: {', '.join(names)}" for names in self.tied.values()]
        return "\n".join(lines)


def sensitivity(
    model: keras.Model,
    data: Any,
    *,
    choices: Sequence[str] = ("int8", "w4a8"),
    policy: Any = "int8",
    measure: str = "sqnr",
    loss: Any = None,
) -> Sensitivity:
    """What the weights of each layer of a float model cost at each of some presets.

    The model is traced once and run once unrounded; each question runs only what lies behind the
    layer. The steps of low-bit weights are those with the least squared error, at which training
    starts.

    Args:
        model: a built float model, as for `kqat.quantize_model`; it is not changed.
        data: typical inputs, as for `kqat.calibrate`; `(inputs, targets)` where a loss is asked
            for. At most 128 samples are used.
        choices: names of presets that differ in their weights.
        policy: for what the choices do not decide: layers that it leaves float stay so.
        measure: `"sqnr"`, `"loss"` or `"hessian"` (on the TensorFlow backend).
        loss: a Keras loss or its name, for the last two.

    Raises:
        PolicyError: if a choice or the measure is not known, or a loss is missing.
        ModelError, UnsupportedLayerError, CalibrationError: as `kqat.quantize_model`.

    Reference, for the Hessian: Dong et al. 2020, the sum of equation 2.11
    (https://arxiv.org/abs/1911.03852), times the 1/2 of the Taylor series.
    """
    return measured_layers(model, data, choices, policy, measure, loss)[0]


def measured_layers(
    model: keras.Model, data: Any, choices: Sequence[str], policy: Any, measure: str, loss: Any
) -> tuple[Sensitivity, Plan, Graph]:
    """The sensitivity, the plan of `policy`, and the graph of `model`."""
    asked = _checked_measure(measure, loss)
    configs = {choice: _weights_of(choice) for choice in dict.fromkeys(choices)}
    if len(configs) < 2:
        raise PolicyError(
            f"Expected at least two presets as choices. Received: {list(choices)}. Use "
            "('int8', 'w4a8')."
        )
    inputs, targets = _split(data, asked)
    check_unquantized(model)
    model = of_fixed_shape(model, None, inputs)
    float_graph = trace(model)
    plan = make_plan(float_graph, QuantizePolicy.of(policy), model.name)
    qat = wrap(plan)
    graph = trace(qat)
    arrays = some_samples(inputs, graph, SAMPLES)
    calibrate_for(qat, keras.tree.pack_sequence_as(qat.input, arrays), "minmax", stacklevel=4)
    replay = Replay(graph, as_tensors(arrays, graph))
    layers = _layers(plan, graph)
    if not layers:
        raise PolicyError(
            f"Expected layers with weights on a grid. Received: '{model.name}' with a policy that "
            "leaves all of them float."
        )
    judge = _judge(replay, asked, loss, targets, layers)
    costs = [
        LayerCost(name, choice, judge(nodes, *config))
        for name, nodes in tracked(layers.items(), "measuring layers", len(layers))
        for choice, config in configs.items()
    ]
    weights = {
        name: sum(
            int(np.prod(getattr(node.layer.layer, weight).shape))
            for node in _once(nodes)
            for weight in node.layer.weight_specs
        )
        for name, nodes in layers.items()
    }
    tied = {names[0]: names for names in plan.tied if names[0] in layers}
    found = Sensitivity(asked, tuple(configs), tuple(layers), tuple(costs), weights, tied)
    return found, plan, float_graph


def _checked_measure(measure: str, loss: Any) -> Measure:
    if measure not in tuple(Measure):
        raise PolicyError(
            f"Expected measure to be one of {[str(m) for m in Measure]}. Received: {measure!r}."
        )
    if (measure != Measure.SQNR) != (loss is not None):
        raise PolicyError(
            f"Expected a loss for measure='loss' and 'hessian', and none for 'sqnr'. Received: "
            f"measure={measure!r}, loss={loss!r}."
        )
    if measure == Measure.HESSIAN and keras.backend.backend() != "tensorflow":
        raise PolicyError(
            "Expected the TensorFlow backend for measure='hessian', which takes second "
            f"derivatives. Received: {keras.backend.backend()}. Use measure='loss'."
        )
    return Measure(measure)


def _weights_of(choice: str) -> tuple[QuantSpec, StepMethod]:
    """The grid and the step method of a preset's weights; a learned step is where it starts."""
    config: QuantizeConfig = resolve_config(choice)
    if not isinstance(choice, str) or not isinstance(config.weights, QuantSpec):
        raise PolicyError(
            f"Expected names of presets as choices. Received: {choice!r}. Use ('int8', 'w4a8')."
        )
    return config.weights, config.weight_step


def _split(data: Any, measure: Measure) -> tuple[Any, np.ndarray | None]:
    if measure is Measure.SQNR:
        return data, None
    if not isinstance(data, tuple) or len(data) != 2:
        raise CalibrationError(
            f"Expected data as a tuple (inputs, targets) of arrays for measure='{measure}'. "
            f"Received: {type(data).__name__}."
        )
    targets = np.asarray(data[1])
    count = len(targets)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).round().astype(int))
    return data[0], targets[chosen]


def _layers(plan: Plan, graph: Graph) -> dict[str, list[Node]]:
    """The user's layers with weights on a grid -> their nodes in the QAT model's graph.

    Layers of one config are one, under the name of the first.
    """
    origins = {layer.name: plan.of_one_config(layer.origin)[0] for layer in plan.layers}
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.layer, QuantizeWrapper) and node.layer.weight_specs:
            name = str(node.layer.layer.name)
            found.setdefault(origins.get(name, name), []).append(node)
    return found


def _once(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, without further calls of a layer."""
    return list({id(node.layer): node for node in nodes}.values())


Judge = Callable[[list[Node], QuantSpec, StepMethod], float]


def _judge(
    replay: Replay, measure: Measure, loss: Any, targets: Any, layers: Mapping[str, list[Node]]
) -> Judge:
    if measure is Measure.SQNR:
        return lambda nodes, spec, step: replay.noise(_rounding(nodes, spec, step))
    loss = keras.losses.get(loss)

    def loss_of(values: Mapping[Any, Any]) -> Any:
        return ops.mean(loss(targets, values[replay.graph.outputs[0]]))

    if len(replay.graph.outputs) != 1:
        raise PolicyError(
            f"Expected a model of one output for measure='{measure}'. Received: "
            f"{len(replay.graph.outputs)} outputs. Use measure='sqnr'."
        )
    if measure is Measure.LOSS:
        before = float(loss_of(replay.exact))

        def change(nodes: list[Node], spec: QuantSpec, step: StepMethod) -> float:
            return float(loss_of(replay.values(_rounding(nodes, spec, step)))) - before

        return change
    traces = _traces(replay, loss_of, layers)

    def estimate(nodes: list[Node], spec: QuantSpec, step: StepMethod) -> float:
        lost = sum(
            float(np.sum((as_array(value) - as_array(getattr(node.layer.layer, name).value)) ** 2))
            for node in _once(nodes)
            for name, value in rounded_weights(node.layer, spec, step).items()
        )
        return 0.5 * traces[id(nodes[0])] * lost

    return estimate


def rounded_weights(
    wrapper: QuantizeWrapper, spec: QuantSpec, step: StepMethod, branch: int = 0
) -> dict[str, Any]:
    """The weights of a layer on another grid, with the layer's own axes of scales.

    A learned step is where it starts.
    """
    return {
        name: rounded_as(wrapper, name, dataclasses.replace(spec, axis=own.axis), step, branch)
        for name, own in wrapper.weight_specs.items()
    }


def _rounding(
    nodes: Sequence[Node], spec: QuantSpec, step: StepMethod
) -> dict[Node, Callable[..., Any]]:
    """Nodes that compute with weights on another grid."""

    def made(node: Node) -> Callable[..., Any]:
        def call(*args: Any, branch: int = 0, **kwargs: Any) -> Any:
            values = rounded_weights(node.layer, spec, step, branch)
            return call_with(node.layer, values, *args, branch=branch, **kwargs)

        return call

    return {node: made(node) for node in nodes}


def _traces(
    replay: Replay, loss_of: Callable[[Mapping[Any, Any]], Any], layers: Mapping[str, list[Node]]
) -> dict[int, float]:
    """Mean of the diagonal of the loss's Hessian over each layer's weights, by its first node.

    By Hutchinson's estimate: the mean of `v^T H v` over random vectors of signs.
    """
    import tensorflow as tf

    groups = [
        [
            getattr(node.layer.layer, name)
            for node in _once(nodes)
            for name in node.layer.weight_specs
        ]
        for nodes in layers.values()
    ]
    variables = [v.value for group in groups for v in group]
    generator = np.random.default_rng(0)
    sums = np.zeros(len(variables))
    inputs = [replay.exact[ref] for ref in replay.graph.inputs]
    for _ in range(PROBES):
        signs = [
            tf.constant(generator.choice([-1.0, 1.0], v.shape).astype(np.float32))
            for v in variables
        ]
        with tf.GradientTape() as outer:
            outer.watch(variables)
            with tf.GradientTape() as inner:
                inner.watch(variables)
                values: dict[Any, Any] = dict(zip(replay.graph.inputs, inputs, strict=True))
                for node in replay.graph.nodes:
                    args, kwargs = fill((node.args, node.kwargs), values.__getitem__)
                    made = call_unrounded(node, *args, **kwargs)
                    values.update(zip(node.outputs, keras.tree.flatten(made), strict=True))
                found = loss_of(values)
            gradients = inner.gradient(found, variables)
            product = tf.add_n(
                [tf.reduce_sum(g * s) for g, s in zip(gradients, signs, strict=True)]
            )
        curved = outer.gradient(product, variables, unconnected_gradients="zero")
        sums += [float(tf.reduce_sum(h * s)) for h, s in zip(curved, signs, strict=True)]
    traces: dict[int, float] = {}
    start = 0
    for nodes, group in zip(layers.values(), groups, strict=True):
        whole = float(np.sum(sums[start : start + len(group)])) / PROBES
        size = sum(int(np.prod(v.shape)) for v in group)
        traces[id(nodes[0])] = max(whole, 0.0) / size
        start += len(group)
    return traces
