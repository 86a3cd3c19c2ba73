"""The public functions `plan`, `adapt` and `quantize_model`: float model in, QAT model out."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from kqat.base import (
    CalibrationError,
    ModelError,
    TargetError,
    TrainerWarning,
    UnsupportedLayerError,
    is_scope_name,
)
from kqat.config import QuantizePolicy
from kqat.devices import target_named
from kqat.graph import (
    Graph,
    check_as_many,
    non_finite_variables,
    parts_of,
    recomputes,
    trace,
    with_input_shapes,
)
from kqat.grids import CalibrationMethod
from kqat.planning import (
    Plan,
    check_computes,
    make_plan,
    misfits,
    tell_asides,
    with_replacements,
)
from kqat.tfmot import translate_policy
from kqat.training import (
    DEFAULT_METHOD,
    Preserve,
    calibrate_for,
    check_method,
    check_preserved,
    check_unquantized,
    may_add_losses,
    of_fixed_shape,
    preserved_kinds,
    same_penalties,
    weight_penalties,
    with_unlike_members_apart,
    wrap,
    wrong_losses,
)


class PolicyWarning(UserWarning):
    """A policy does less than it says: a rule decides nothing, or `quantize_apply` leaves layers
    float.
    """


class RangeWarning(UserWarning):
    """There are no calibration data: ranges will start from the first training batches."""


_TRAINER_METHODS = ("train_step", "test_step", "compute_loss")


def plan(
    model: keras.Model,
    policy: Any = "int8",
    *,
    target: str | None = None,
    input_shapes: Any = None,
) -> Plan:
    """Every decision that `quantize_model` would make about `model`, before a weight is touched.

    Args:
        model: a built Keras 3 model.
        policy: as for `quantize_model`.
        target: a name from `kqat.TARGETS`. The plan then lists every layer that does not fit the
            device, with the reason and the smallest change that helps.
        input_shapes: as for `quantize_model`.

    Raises:
        ModelError, UnsupportedLayerError, PolicyError: as `quantize_model`.
        TargetError: if there is no such target.
    """
    device = None if target is None else target_named(target)
    if input_shapes is not None:
        model = with_input_shapes(model, input_shapes)
    graph = _checked_graph(model)
    decided = _plan(graph, policy, model.name)
    problems = {loss.layer.label: loss.layer.problem for loss in decided.graph.losses}
    _tell_lost({name: why for name, why in problems.items() if why}, model.name)
    if device is None:
        return decided
    found = misfits(graph, decided, device)
    return dataclasses.replace(decided, target=target, misfits=found)


def adapt(
    model: keras.Model, target: str | None = None, *, calibration_data: Any = None
) -> keras.Model:
    """A float copy of `model` that suits a device better, or loses less where values are joined.

    With `target`: an activation function that does not run fast there is replaced by the most
    similar one that does: h-swish for mish, ReLU6 for GELU (`kqat.devices.NEAREST`). The copy has
    the same weights but computes different values, so train it on. Layers without a replacement
    stay as they are.

    With `calibration_data`: a Concatenate of values of unlike size, as boxes in pixels beside
    scores, would lose the small ones on its one scale. Where it is an output, its members become
    outputs of their own, in its place. Inside, its small members are scaled up, and the weights of
    the layers that read it are scaled down; the copy computes the same.

    Nested models come out flat.

    Args:
        model: a float model, as for `quantize_model`.
        target: a name from `kqat.TARGETS`.
        calibration_data: typical inputs, as for `kqat.calibrate`, by which sizes are measured.

    Raises:
        TargetError: if there is no such target, or if the device cannot run a layer at all and
            there is no replacement.
        CalibrationError: if there is neither a target nor data, or data are not as the inputs.
        ModelError, UnsupportedLayerError: as `quantize_model`.

    Warns:
        kqat.CalibrationWarning: if small values of a join inside cannot be scaled up, as a layer
            that reads them has no weights to scale down.
    """
    if target is None and calibration_data is None:
        raise CalibrationError(
            "Expected a target, calibration_data, or both. Received: neither. Name the device that "
            "the model shall suit, or give typical inputs."
        )
    given = model
    if target is not None:
        found = plan(model, target=target).misfits
        stuck = [str(misfit) for misfit in found if misfit.blocking and not misfit.replacement]
        if stuck:
            raise TargetError(
                f"Expected layers that target '{target}' runs, or that have a replacement. "
                f"Received: {'; '.join(stuck)}."
            )
        model = with_replacements(trace(model), found, model.name)
    if calibration_data is not None:
        graph = _checked_graph(model)
        model = with_unlike_members_apart(graph, calibration_data, model.name)
    check_as_many(given, model, "Give kqat.quantize_model the model itself.")
    _tell_recomputed(given, stacklevel=2)
    return model


def quantize_model(
    model: keras.Model,
    policy: Any = "int8",
    *,
    calibration_data: Any = None,
    calibration: str | CalibrationMethod | None = None,
    preserve: str | Sequence[str] | None = None,
    input_shapes: Any = None,
) -> keras.Model:
    """A QAT copy of `model`: compile it, `fit` it, `tflite_export.convert` it.

    `model` is not changed. Inputs and outputs keep their order, names and structure.

    Args:
        model: a built Keras 3 model.
        policy: a preset (`"int8"`), a `QuantizeConfig` for all layers, a `QuantizePolicy`, or a
            mapping from name patterns or layer classes to configs, presets or `None` (stay
            float): `{"stem*": None, keras.layers.Dense: my_config}`. All other layers are int8. A
            tfmot `QuantizeConfig` may stand for a `kqat.QuantizeConfig` everywhere.
        calibration_data: typical inputs, as for `kqat.calibrate`. Without them, ranges
            start from the first training batches.
        calibration: how ranges are found from these data, as `method` of `kqat.calibrate`. The
            reasons for the default are in `benchmarks/calibration.md`.
        preserve: what training keeps of pruned or clustered weights (`kqat.prune`,
            `kqat.cluster`): `"sparsity"`: weights that are zero stay zero; `"clusters"`: a weight
            of k distinct values, 255 at most, has at most k distinct integers in the file; or both.
            Clustered weights are rounded with one step for the whole tensor, and learn as a mean.
        input_shapes: the sizes of the file where the model leaves them open, as
            `keras.Input((None, None, 3))` does: one shape without the batch, or a list or a
            mapping (by input name) of such shapes. By default, open sizes are those of the
            calibration data.

    Raises:
        ModelError: if `model` is not such a model, is quantized already, or has weights that are
            NaN or infinite.
        UnsupportedLayerError: if a layer has no integer form; says which one and what to do.
        PolicyError: if the policy asks for something that no integer kernel can do, if a name
            pattern in it matches no layer and no input, or a grid cannot hold the zeros or clusters
            that `preserve` asks for.
        CalibrationError: if the data are empty, misshapen or not finite, or if `calibration` is
            given without data.

    Reference: Jacob et al. 2018, section 3 (https://arxiv.org/abs/1712.05877).
    """
    return quantized_and_plan(model, policy, calibration_data, calibration, preserve, input_shapes)[
        0
    ]


def quantized_and_plan(
    model: keras.Model,
    policy: Any,
    calibration_data: Any,
    calibration: str | CalibrationMethod | None = None,
    preserve: str | Sequence[str] | None = None,
    input_shapes: Any = None,
    check: Callable[[Graph, Plan], None] | None = None,
) -> tuple[keras.Model, Plan]:
    """The QAT model and its plan, for public functions; warnings name the line that calls these.

    Arguments and errors are those of `quantize_model`, but for `check`: it is called with the float
    graph and the plan, before any work, and raises where its caller could not use the model.
    """
    if calibration is not None:
        check_method(calibration)
    if calibration is not None and calibration_data is None:
        raise CalibrationError(
            f"Expected calibration_data for calibration={calibration!r}. Received: none. Give some "
            "hundred typical inputs, or leave calibration out."
        )
    kinds = preserved_kinds(preserve)
    given, kind = model, type(model)
    model = of_fixed_shape(model, input_shapes, calibration_data)
    graph = _checked_graph(model)
    _check_weights(model)
    decided = _plan(graph, policy, model.name, kinds)
    if check is not None:
        check(graph, decided)
    for rule in decided.unused_rules:
        warnings.warn(
            f"The policy's rule {rule!r} decides nothing about '{model.name}': earlier rules "
            "decide about all that it matches, or it is for a class of which there is no layer.",
            PolicyWarning,
            stacklevel=3,
        )
    own = [m for m in _TRAINER_METHODS if getattr(kind, m) is not getattr(keras.Model, m)]
    if own:
        warnings.warn(
            f"'{model.name}' of type {kind.__name__} has {' and '.join(own)} of its own; "
            "the QAT model is a plain keras.Model and does not call it. Write your training loop "
            "around the QAT model.",
            TrainerWarning,
            stacklevel=3,
        )
    if graph.loses_masks:
        warnings.warn(
            f"'{model.name}' leaves masked steps out of its losses and metrics, by a mask of Keras "
            "on its output that layers make. The QAT model does not: give fit and evaluate a "
            "sample_weight that is 0 at these steps.",
            TrainerWarning,
            stacklevel=3,
        )
    tell_asides(graph.asides, "model", model.name, stacklevel=4)
    _tell_recomputed(given, stacklevel=3)
    if not decided.groups:
        raise ModelError(
            f"Expected a layer to quantize. Received: '{model.name}', which computes nothing, or "
            "whose layers the policy all leaves float. Change the policy."
        )
    qat = wrap(decided, kinds)
    check_preserved(qat, kinds)
    if decided.graph.losses or may_add_losses(model):
        qat, decided = _with_right_losses(model, graph, qat, decided, kinds)
    if calibration_data is not None:
        calibrate_for(qat, calibration_data, calibration or DEFAULT_METHOD, stacklevel=4)
    elif any(group.is_observed for group in decided.groups):
        warnings.warn(
            f"No calibration data: the ranges of '{model.name}' start from its first training "
            "batches, and inference stays unrounded until then.",
            RangeWarning,
            stacklevel=3,
        )
    return qat, decided


def _with_right_losses(
    model: keras.Model, graph: Graph, qat: keras.Model, decided: Plan, kinds: Sequence[Preserve]
) -> tuple[keras.Model, Plan]:
    """The QAT model without losses that are not the float model's; a warning tells of each."""
    wrong, problems = wrong_losses(model, graph, qat, decided.graph.losses)
    _tell_lost(problems, model.name, stacklevel=6)
    before, after = weight_penalties(model), weight_penalties(qat)
    if not same_penalties(before, after):
        warnings.warn(
            f"Regularizers of the weights of '{model.name}' add {before:.4g} to the loss; in the "
            f"QAT model, where layers hold other weights, they add {after:.4g}. Where that matters "
            "write your training loop around the QAT model, with a penalty of your own.",
            TrainerWarning,
            stacklevel=4,
        )
    if wrong:
        losses = tuple(one for i, one in enumerate(decided.graph.losses) if i not in wrong)
        decided = dataclasses.replace(
            decided, graph=dataclasses.replace(decided.graph, losses=losses)
        )
        qat = wrap(decided, kinds)
    return qat, decided


def _tell_recomputed(model: keras.Model, stacklevel: int) -> None:
    """Warns of layers that `keras.RematScope` has computed again; copies of them are not.

    Keras finds gradients of a layer's variables then, and none of the rounded weights that a
    wrapper puts in their place.
    """
    inside = [part for part in parts_of(model) if part is not model and recomputes(part)]
    names = [part.name for part in inside if not isinstance(part, keras.layers.InputLayer)]
    if names:
        shown = ", ".join(f"'{name}'" for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"'{model.name}' has layers under keras.RematScope, {shown}{more}, which compute their "
            "values again for the gradients. The new model keeps these values in memory: it "
            "computes the same and takes more of it. Where that is too much, train with smaller "
            "batches.",
            TrainerWarning,
            stacklevel=stacklevel + 1,
        )


def _tell_lost(problems: Mapping[str, str], name: str, stacklevel: int = 4) -> None:
    """Warns of losses that layers of model `name` add, and its QAT model does not: layer -> why."""
    asides = [f"'{layer}' adds a loss in its call that {why}" for layer, why in problems.items()]
    tell_asides(asides, "model", name, stacklevel=stacklevel)


def _plan(graph: Graph, policy: Any, name: str, kinds: Sequence[Preserve] = ()) -> Plan:
    translated = translate_policy(QuantizePolicy.of(policy), graph)
    return make_plan(graph, translated, name, keeps_clusters=Preserve.CLUSTERS in kinds)


def _checked_graph(model: Any) -> Graph:
    if keras.config.floatx() != "float32":
        raise ModelError(
            "Expected keras.config.floatx() to be 'float32': ranges and scales have that type. "
            f"Received: {keras.config.floatx()!r}. Call keras.config.set_floatx('float32') first; "
            "a model that was made before keeps its own type."
        )
    graph = trace(model)
    for node in graph.nodes:
        for part in parts_of(node.layer) if isinstance(node.layer, keras.layers.Layer) else ():
            _check_whole_weights(part, node.name)
        if getattr(node.layer, "is_annotation", False):
            raise ModelError(
                f"Expected a model without annotated layers. Received: '{model.name}', in which "
                f"'{node.layer.layer.name}' is annotated. Use kqat.quantize_apply, which quantizes "
                "annotated layers as they ask and leaves the others float; or quantize the model "
                "from before it was annotated."
            )
        # The name of a layer in a model inside begins with that of the model.
        if not is_scope_name(node.name):
            raise ModelError(
                "Expected names of layers and of models inside to have letters of a to z, digits "
                "and _.>- alone: TensorFlow runs no other in fit, nor converts it. Received: "
                f"{node.name!r}. "
                "Make the model with other names and hand on the weights, with "
                "keras.models.clone_model(model, clone_function=…) and set_weights."
            )
    check_unquantized(model)
    check_computes(graph, model)
    return graph


def _check_whole_weights(layer: Any, node: str) -> None:
    """Checks that a layer's weights are floats, of one kernel; it may be a part of layer `node`.

    Raises:
        UnsupportedLayerError: if Keras quantized the layer, or gave it adapters.
    """
    where = f"'{node}'" if layer.name == node else f"'{layer.name}' inside '{node}'"
    mode = getattr(layer, "quantization_mode", None)
    if mode is not None:
        raise UnsupportedLayerError(
            f"Expected float weights in layer {where}. Received: weights that Keras "
            f"quantized, by quantize({mode!r}). Give kqat the model as it was before; it finds the "
            "integers itself."
        )
    if getattr(layer, "lora_enabled", False):
        raise UnsupportedLayerError(
            f"Expected one kernel in layer {where}. Received: LoRA adapters beside it. "
            "model.save_weights(path) adds them to the kernels: load that file into the model as "
            "it was before enable_lora, and give kqat that."
        )


def _check_weights(model: keras.Model) -> None:
    broken = next(non_finite_variables(model), None)
    if broken is not None:
        raise ModelError(
            f"Expected finite weights. Received: NaN or infinity in '{broken[0].path}' of "
            f"'{model.name}'. The float model is broken; train it again."
        )
