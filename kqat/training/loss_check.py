"""Whether a QAT model adds to its loss what the float model adds, where nothing is rounded.

It is asked once, of two random samples, before anything is trained: a loss may depend on what the
tracing of a call does not show, and what it reads may be folded away.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.graph import Graph, GraphLoss, fill, is_of_users, losses_noted, parts_of, trace
from kqat.training.unrounded import call_unrounded

# Sums of floats in another order; terms that differ in kind differ by more.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4
_WHY = (
    "depends on `training`, on random numbers, on a state, or on a value that the QAT model does "
    "not compute, as what a BatchNormalization that is folded reads"
)


def may_add_losses(model: keras.Model) -> bool:
    """Whether some layer inside may add a loss when it is called."""
    return any(
        is_of_users(part) or getattr(part, "activity_regularizer", None) is not None
        for part in parts_of(model)
    )


def wrong_losses(
    model: keras.Model, graph: Graph, qat: keras.Model, losses: Sequence[GraphLoss]
) -> tuple[set[int], dict[str, str]]:
    """The losses that a QAT model should not add, and those that it lacks.

    Args:
        model: the float model.
        graph: of that.
        qat: its QAT model, not trained yet.
        losses: those of opened calls that it adds.

    Returns:
        The places of wrong ones among those of the QAT model's graph, and the names of the user's
        layers whose losses are not trained, each with the reason.
    """
    values = [_values(ref, seed) for seed, ref in enumerate(graph.inputs)]
    given = fill(graph.input_struct, dict(zip(graph.inputs, values, strict=True)).__getitem__)
    wanted = _added_by(model, given, training=False)
    of_users = any(is_of_users(part) for part in parts_of(model))
    trained = _added_by(model, given, training=True) if of_users else wanted
    problems = {one.layer.label: one.layer.problem for one in losses if one.layer.problem}
    if wanted is None or trained is None:
        return {i for i, one in enumerate(losses) if one.layer.problem}, problems
    if not (losses or wanted.by_label or trained.by_label):
        return set(), {}
    total, found = _added_by_qat(qat, values)
    wrong, unlike = _unlike_the_float_models(wanted, found, total)
    problems = {**dict.fromkeys(unlike, _WHY), **problems}
    if of_users:
        others = [n for n in _others_in_training(wanted, trained) if n not in problems]
        problems |= dict.fromkeys(others, _WHY)
        wrong |= {i for i, one in enumerate(found) if one.label in others}
    return wrong, problems


def _unlike_the_float_models(
    wanted: "_Added", found: Sequence["_Found"], total: float
) -> tuple[set[int], Collection[str]]:
    """The places of losses that the float model does not add so, and the layers of lost ones."""
    # Keras looks for losses in the layers of a model alone.
    gone = {i for i, one in enumerate(found) if one.label in wanted.elsewhere}
    known = gone | {i for i, one in enumerate(found) if one.problem}
    if _alike(wanted.total(), total - sum(found[i].number for i in gone)):
        return known, ()
    unlike: dict[str, set[int]] = {}
    for label in {one.label: one for one in found}:
        places = [i for i, one in enumerate(found) if one.label == label]
        numbers = wanted.by_label.get(label, [])
        if len(numbers) != len(places):
            continue  # A part of the layer bears another name.
        pairs = zip(places, numbers, strict=True)
        if others := {i for i, number in pairs if not _alike(found[i].number, number)}:
            unlike[label] = others
    wrong = known.union(*unlike.values())
    if wrong != gone:
        return wrong, unlike
    lost = [label for label in wanted.by_label if label not in {one.label for one in found}]
    return wrong, lost or wanted.by_label.keys()


def _others_in_training(wanted: "_Added", trained: "_Added") -> list[str]:
    """The layers whose losses are others in training than in inference."""
    # Dropout and its kin change what a loss is computed of.
    same = all(np.array_equal(*pair) for pair in zip(wanted.outputs, trained.outputs, strict=True))
    return [
        label
        for label, numbers in trained.by_label.items()
        for before in [wanted.by_label.get(label, [])]
        if len(numbers) != len(before) or (same and not _alike(sum(numbers), sum(before)))
    ]


def weight_penalties(model: keras.Model) -> float:
    """The sum of the regularizers of a model's trainable weights."""
    variables = {id(v): v for v in model.trainable_variables}.values()
    found = [v.regularizer(v.value) for v in variables if v.regularizer is not None]
    return float(sum(float(np.sum(np.asarray(one))) for one in found))


def same_penalties(first: float, second: float) -> bool:
    """Whether two sums of penalties are one, but for the order in which floats are added."""
    return _alike(first, second)


@dataclasses.dataclass(frozen=True)
class _Added:
    """The losses that one call added, by the names of the layers, and its outputs."""

    by_label: Mapping[str, list[float]]
    outputs: list[np.ndarray]
    elsewhere: Collection[str]  # names of layers that are no part of the model

    def total(self) -> float:
        return sum(sum(numbers) for numbers in self.by_label.values())


@dataclasses.dataclass(frozen=True)
class _Found:
    """A loss in the graph of a QAT model: whose it is, and how much it is."""

    label: str
    number: float
    problem: str


def _added_by(model: keras.Model, given: Any, training: bool) -> _Added | None:
    """What a call of a float model adds; `None` where it takes no random samples."""
    try:
        with keras.StatelessScope(), losses_noted() as found:  # A state stays as it was.
            outputs = model(given, training=training)
    except Exception:  # Whatever a user's own class raises.
        return None
    inside = {id(part) for part in parts_of(model)}
    by_label: dict[str, list[float]] = {}
    for part, value in found:
        if id(part) in inside:
            by_label.setdefault(part.name, []).append(_number(value))
    elsewhere = {part.name for part, _ in found if id(part) not in inside} - by_label.keys()
    return _Added(by_label, [np.asarray(y) for y in keras.tree.flatten(outputs)], elsewhere)


def _added_by_qat(qat: keras.Model, values: list[Any]) -> tuple[float, list[_Found]]:
    """The sum of all losses that a QAT model adds, and each of those of opened calls."""
    graph = trace(qat)
    each: list[_Found] = []
    with keras.StatelessScope(), losses_noted() as found:
        outputs, read = graph.run_with_losses(values, call_unrounded)
        first = keras.tree.flatten(outputs)[0]
        for loss, parts in zip(graph.losses, read, strict=True):
            before = len(found)
            loss.layer([first, *parts])
            number = sum(_number(value) for _, value in found[before:])
            each.append(_Found(loss.layer.label, number, loss.layer.problem))
    return sum(_number(value) for _, value in found), each


def _number(value: Any) -> float:
    return float(np.sum(np.asarray(keras.ops.cast(value, "float32"), np.float64)))


def _alike(first: float, second: float) -> bool:
    return bool(np.isclose(first, second, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True))


def _values(ref: Any, seed: int) -> Any:
    """Two random samples: small numbers, or indexes that any table has."""
    rng = np.random.default_rng(seed)
    shape = (2, *ref.shape[1:])
    values: Any = rng.integers(0, 2, shape) if ref.holds_indexes else rng.normal(size=shape)
    return keras.ops.convert_to_tensor(values, ref.dtype)
