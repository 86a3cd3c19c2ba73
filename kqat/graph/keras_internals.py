"""Models and layers as functions of symbolic tensors, which Keras records call by call.

A Functional model is one already. A subclassed model, or a custom layer, becomes one by running
its `call` (not `__call__`) on symbolic tensors.
"""

import ast
import collections
import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
import math
import operator
import re
import sys
import textwrap
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from kqat.base import ModelError
from kqat.graph.batch_axis import BatchFirst
from kqat.graph.tensorflow_calls import tensorflow_traced
from kqat.graph.values import (
    broadcast_sum,
    complements,
    fingerprint,
    is_half,
    made_of,
    varies,
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A function of symbolic tensors, with the structures in which it takes and returns them.

    `tensors` are the inputs in the function's order, and `weights` the values that no input of the
    model reaches, by the identity of their symbolic tensor: variables that `call` reads, and what
    it computes from them. `batch` is the number that stood for the batch size. `owners` says by
    which path a layer inside is reached. `fresh` says that its operations were made just now, and
    will bear other names the next time. `sequence` says that it is a Sequential: what `training`
    stands in its calls is not the user's, but that of the call in which it was built. `masks` are
    those that inputs bear, by the identity of the input, and `made_masks` those that layers opened
    inside gave to what they return. `losses` are those that calls added, of
    tensors some of which are not the function's: `renewed` has each with the one in its place.
    `asides` says what else they did that is no part of the function, such as to update a metric: a
    subject and a verb each.
    """

    function: Any
    input: Any
    output: Any
    tensors: Sequence[Any]
    weights: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    batch: int | None = None
    owners: Mapping[int, str] = dataclasses.field(default_factory=dict)
    fresh: bool = False
    sequence: bool = False
    masks: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    made_masks: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    losses: tuple["SeenLoss", ...] = ()
    renewed: Sequence[tuple[Any, Any]] = ()
    asides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SeenLoss:
    """A loss that a call was seen to add.

    Attributes:
        layer: that added it.
        value: the symbolic tensor that is the loss, or that a regularizer makes one of.
        regularizer: the layer's `activity_regularizer`, where `value` is its output.
        problem: why it is none that a graph can hold, as it goes on after "a loss that".
    """

    layer: Any
    value: Any
    regularizer: Any = None
    problem: str = ""


@dataclasses.dataclass
class _Notes:
    """What calls were seen to do beside what they compute: losses, and what else, in words.

    `masks` are those that opened layers gave to what they return, by the identity of that, which
    `masked` holds: no later tensor is to have the identity of one that nobody reads.
    """

    losses: list[SeenLoss] = dataclasses.field(default_factory=list)
    masks: dict[int, Any] = dataclasses.field(default_factory=dict)
    masked: list[Any] = dataclasses.field(default_factory=list)
    asides: list[str] = dataclasses.field(default_factory=list)


def is_keras_2(thing: Any) -> bool:
    """Whether a model or layer is one of tf_keras."""
    return any(base.__module__.startswith("tf_keras") for base in type(thing).__mro__)


def open_model(model: Any) -> Opened:
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"Expected a keras.Model (Keras 3). Received: {type(model).__module__}."
            f"{type(model).__name__}."
            + (
                " It is a Keras 2 (tf_keras) model: kqat.load_model(model) makes a Keras 3 model "
                "of it. Where tfmot has wrapped layers, give it the model from before that."
                if is_keras_2(model)
                else ""
            )
        )
    if not model.built:
        raise ModelError(
            f"Expected a built model. Received: '{model.name}', which has no weights yet. Begin "
            "it with keras.Input(shape), or call it once on data."
        )
    function = inner_function(model)
    if function is not None:
        if moves_batch(function):
            # Where that fails, the row of the operation says what it takes.
            with contextlib.suppress(ModelError):
                return open_call(model, (function.input,), {})
        return opened_function(function, model)
    inputs = input_struct(model)
    if isinstance(inputs, tuple) and not inputs:
        raise ModelError(
            f"Expected a subclassed model that was called on data of one argument. Received: "
            f"'{model.name}' of type {type(model).__name__}, of whose input Keras recorded no "
            f"shape{_control_flow(model)}. Call it once on data, or use keras.Model(x, "
            "model.call(x)) with x = keras.Input(shape)."
        )
    wanted = _required_arguments(model)
    if len(wanted) > 1:
        names = ", ".join(wanted)
        raise ModelError(
            "Expected a subclassed model whose call takes one argument, which may be a list or "
            f"dict. Received: '{model.name}' of type {type(model).__name__}, whose call takes "
            f"{names}. Use keras.Model([{names}], model({names})) with a keras.Input for each."
        )
    return _open_untyped(model, inputs)


def _open_untyped(model: Any, inputs: Any) -> Opened:
    """A subclassed model: of the data that it was called on, Keras recorded no type."""
    flat = keras.tree.flatten(inputs)

    def opened_with(indexes: frozenset[int]) -> Opened:
        typed = [
            keras.Input(t.shape[1:], dtype="int32", name=maker_name(t)) if i in indexes else t
            for i, t in enumerate(flat)
        ]
        return open_call(model, (keras.tree.pack_sequence_as(inputs, typed),), {})

    tried: frozenset[int] = frozenset()
    try:
        opened = opened_with(tried)
    except ModelError as error:
        tried = frozenset(range(len(flat)))
        try:  # By floats, Keras picks no rows.
            opened = opened_with(tried)
        except ModelError:
            raise error  # noqa: B904  It has a cause of its own.
    read = _looked_up(opened.function, {id(t): frozenset({id(t)}) for t in opened.tensors})
    indexes = frozenset(i for i, t in enumerate(opened.tensors) if id(t) in read)
    return opened if indexes == tried else opened_with(indexes)


# Operations of which an argument holds indexes, whichever type it has.
_INDEXED_BY = {"Take": "indices", "TakeAlongAxis": "indices", "OneHot": "x"}


def _looked_up(function: Any, inputs: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """Which inputs are read as indexes: as they are, or what operations make of them.

    An Embedding reads such, and operations that pick by places or make codes of them.

    Args:
        function: a Functional model or a `keras.Function`.
        inputs: what stands for each of its inputs, by the identity of the input.
    """
    known = dict(inputs)
    none: frozenset[int] = frozenset()
    found = none
    for call in _calls(function):
        layer = call.operation
        read = none.union(*(known.get(id(t), none) for t in call.input_tensors))
        if not read:
            continue
        if isinstance(layer, keras.layers.Embedding):
            found |= none if _is_reversed(call) else read
        elif not isinstance(layer, keras.layers.Layer):
            argument = _INDEXED_BY.get(type(layer).__name__)
            if argument is not None:
                found |= known.get(id(_given(call).get(argument)), none)
            # Comparisons and later casts tell nothing about what they are made of.
            cast = type(layer).__name__ == "Cast" and id(call.input_tensors[0]) in inputs
            made = [t for t in call.outputs if cast or keras.backend.is_float_dtype(t.dtype)]
            known.update((id(t), read) for t in made)
        elif any(_may_look_up(part) for part in parts_of(layer)):
            found |= _looked_up_inside(call, known)
    return found


def _is_reversed(call: Any) -> bool:
    """Whether a call of a ReversibleEmbedding gives scores of its rows, and looks none up."""
    return bool(_given(call).get("reverse"))


def _may_look_up(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Embedding) or not _is_stock(layer)


def _looked_up_inside(call: Any, known: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """As `_looked_up`, of a layer or a model inside; `known` is by tensors outside."""
    layer = call.operation
    function = inner_function(layer)
    if function is not None:
        first = next(iter(_given(call).values()), None)
        inner, outer = list(function.inputs), _given_inside(layer, first)
    else:
        try:
            opened = open_call(layer, call.arguments.args, call.arguments.kwargs)
        except ModelError:  # It is refused later, by name, or stays float.
            return frozenset()
        function, inner = opened.function, list(opened.tensors)
        outer = with_masks(_tensors((call.arguments.args, call.arguments.kwargs)))
    pairs = zip(inner, outer, strict=False)
    return _looked_up(function, {id(i): known[id(o)] for i, o in pairs if id(o) in known})


def _required_arguments(model: Any) -> list[str]:
    """The arguments that a call of `model` must be given, but for what Keras hands over."""
    parameters = inspect.signature(model.call).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in named and p.default is p.empty]
    return [name for name in required if name not in ("training", "mask")]


def input_struct(model: Any) -> Any:
    """A model's inputs, as symbolic tensors in the structure that it takes; `()` if unknown."""
    function = _functional(model)
    if function is not None:
        return function.input
    shape = (model.get_build_config() or {}).get("input_shape")
    return () if shape is None else _inputs_of_shape(shape)


def opened_function(function: Any, model: Any) -> Opened:
    """A Functional model, which is open already, or the one inside a Sequential."""
    sequence = isinstance(model, keras.Sequential)
    # A batch of fixed size is a number in shapes, as that of a Reshape.
    sizes = {t.shape[0] if len(t.shape) else None for t in function.inputs}
    batch = sizes.pop() if len(sizes) == 1 else None
    if batch is not None and _is_moved(function, batch, {}):
        batch = None  # The operation that moves it is refused by its name.
    return Opened(
        function, function.input, function.output, function.inputs, batch=batch, sequence=sequence
    )


def _control_flow(layer: Any) -> str:
    """The first line of `layer.call` that branches on what may be a tensor's value."""
    try:
        lines, first = inspect.getsourcelines(type(layer).call)
    except OSError:  # There is no source file.
        return ""
    for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
        if isinstance(node, ast.If | ast.While) and any(
            isinstance(part, ast.Call | ast.Compare) for part in ast.walk(node.test)
        ):
            line = lines[node.lineno - 1].strip()
            where = f"line {first + node.lineno - 1}, `{line}`"
            return f", as happens where Python branches on a value: {where}"
    return ""


def _inputs_of_shape(shape: Any, path: tuple[str, ...] = ()) -> Any:
    """A `keras.Input` for each shape of a structure; `path` are the keys that lead to it."""
    if isinstance(shape, Mapping):
        return {key: _inputs_of_shape(part, (*path, key)) for key, part in shape.items()}
    name = "_".join(path) or "input"
    if all(isinstance(part, list | tuple | Mapping) for part in shape):
        return [_inputs_of_shape(part, (name, str(i))) for i, part in enumerate(shape)]
    return keras.Input(shape[1:], name=name)


def borne_mask(tensor: Any) -> Any:
    """The mask that a tensor, symbolic or not, bears as Keras sees it; `None` for none."""
    return get_keras_mask(tensor)


def open_call(
    layer: Any,
    args: Any,
    kwargs: Any,
    inlined: Callable[[Any], bool] = lambda layer: False,
    mask_of: Callable[[Any], Any] = borne_mask,
) -> Opened:
    """What `layer` computes from symbolic arguments, without the layer.

    The batch has a fixed size meanwhile, one that no other axis has, so that `call` may compute
    with it. The layer's float variables stand as symbolic tensors, as do those of the layers inside
    for which `inlined` holds, whose `call` runs in the place of their own node. So what `call` does
    with a variable is seen, whatever it is.

    Args:
        layer: a built layer or model, or one that builds itself at its first call.
        args: of the call, symbolic tensors among them.
        kwargs: of the call. Variables in either are weights of what is opened.
        inlined: which layers inside are opened as well.
        mask_of: gives the mask that an argument bears, which layers inside may read; it is an input
            of what is opened, after the arguments.

    Raises:
        ModelError: if it does not compute on them; quotes the line that does not.
    """
    bearers = _tensors((args, kwargs))
    given = {id(t): t for t in with_masks(bearers, mask_of)}
    batch = _batch_size(layer, list(given.values()))
    fresh = {
        key: keras.Input(batch_shape=_of_batch(t, batch), dtype=t.dtype, name=name)
        for (key, t), name in zip(given.items(), _input_names(given.values()), strict=True)
    }
    masks = {id(fresh[id(t)]): fresh[id(m)] for t in bearers if (m := mask_of(t)) is not None}
    for tensor in fresh.values():
        set_keras_mask(tensor, masks.get(id(tensor)))
    args, kwargs = keras.tree.map_structure(lambda x: fresh.get(id(x), x), (args, kwargs))
    inside = [part for part in parts_of(layer) if part is layer or inlined(part)]
    tensors = list(fresh.values())
    read = {id(v): v for v in keras.tree.flatten((args, kwargs)) if isinstance(v, keras.Variable)}
    stand_ins = {key: keras.Input(batch_shape=v.shape, dtype=v.dtype) for key, v in read.items()}
    args, kwargs = keras.tree.map_structure(lambda x: stand_ins.get(id(x), x), (args, kwargs))
    given_weights = {key: (stand_ins[key], v) for key, v in read.items()}
    notes = _Notes()
    told = given_weights, notes
    function, output, weights, hidden = _called(layer, args, kwargs, tensors, inside, *told)
    if owners := _owners_read(layer, function, inside):
        # It is called, and its variables are read from outside as well.
        with contextlib.suppress(ModelError):  # Who looks for copies of weights finds it then.
            again = [*inside, *owners]
            found = _called(layer, args, kwargs, tensors, again, *told)
            inside, (function, output, weights, hidden) = again, found
    if loops := _loops_of_shared_cells(function):
        found = _called(layer, args, kwargs, tensors, inside, *told, loops)
        function, output, weights, hidden = found
    if hidden:
        # A layer that the graph does not show, whose variables are read from outside, or which
        # looks up constants.
        owners = [p for p in parts_of(layer) if any(id(v) in hidden for v in _own_variables(p))]
        inside = [*inside, *owners]
        found = _called(layer, args, kwargs, tensors, inside, *told, loops)
        function, output, weights, _ = found
    renewed: list[tuple[Any, Any]] = []
    if _is_moved(function, batch, weights):
        if _reads_masks(function, masks, notes.masks):
            raise ModelError(
                f"Expected the batch on the first axis of all values in '{layer.name}' of type "
                f"{type(layer).__name__}, in which layers read a mask. Received: values with the "
                "batch elsewhere. Undo what moves it, or stop the mask before the layer: "
                "keras.layers.Reshape hands none on."
            )
        function, output, weights, renewed = _with_batch_first(
            layer, function, output, tensors, weights, batch
        )
    owners_by_path = {id(part): path for part, path in _paths(layer, inlined)}
    return Opened(
        function,
        args[0] if len(args) == 1 else list(args),
        output,
        tensors,
        {key: _first_of_batch(value, batch, layer) for key, value in weights.items()},
        batch,
        owners_by_path,
        True,
        masks=masks,
        made_masks=dict(notes.masks),
        losses=tuple(notes.losses),
        renewed=renewed,
        asides=tuple(dict.fromkeys(notes.asides)),
    )


def _owners_read(layer: Any, function: Any, inside: Sequence[Any]) -> list[Any]:
    """The stock layers inside `layer` of whose variables constants of a function are copies.

    Python computes with a variable at once where no symbolic tensor stands for it.
    """
    calls = [call for operation in function.operations for call in operation._inbound_nodes]
    values = keras.tree.flatten([(call.arguments.args, call.arguments.kwargs) for call in calls])
    constants = [
        v
        for v in values
        if (isinstance(v, np.ndarray) or keras.ops.is_tensor(v))
        and not isinstance(v, keras.Variable | keras.KerasTensor)
        and _is_float(v)
        and varies(v)
    ]
    if not constants:
        return []
    sizes = {int(np.size(v)) for v in constants}
    copies = {fingerprint(v) for v in constants}
    others = [part for part in parts_of(layer) if all(part is not known for known in inside)]
    return [
        part
        for part in others
        if any(
            math.prod(v.shape) in sizes and fingerprint(v) in copies
            for v in _own_variables(part)
            if _is_float(v)
        )
    ]


def _loops_of_shared_cells(function: Any) -> list[Any]:
    """The recurrent layers of a function whose weights another of its layers reads as well.

    A cell that is also called by hand goes on where the loop over a sequence ends.
    """
    layers = [o for o in function.operations if isinstance(o, keras.layers.Layer)]
    readers = collections.Counter(id(v) for layer in layers for v in layer.variables)
    return [
        layer
        for layer in layers
        if isinstance(layer, keras.layers.RNN)
        and not layer.stateful
        and any(readers[id(v)] > 1 for v in layer.variables)
    ]


def _step_by_step(layer: Any) -> Callable[..., Any]:
    """What a recurrent layer computes, as one call of its cell for each step of its input."""

    def call(sequences: Any, initial_state: Any = None, mask: Any = None, **options: Any) -> Any:
        del options
        if mask is not None:
            raise ModelError(
                f"Expected no mask for layer '{layer.name}', whose cell is also called by hand. "
                "Received: one. Stop it before the layer: keras.layers.Reshape hands none on."
            )
        if initial_state is None:
            initial_state = layer.get_initial_state(keras.ops.shape(sequences)[0])
        nested = keras.tree.is_nested(initial_state)
        states: Any = list(initial_state) if nested else [initial_state]
        steps = range(sequences.shape[1])
        outputs = []
        for step in reversed(steps) if layer.go_backwards else steps:
            output, states = layer.cell(sequences[:, step], states)
            states = states if keras.tree.is_nested(states) else [states]
            outputs.append(output)
        output = keras.ops.stack(outputs, axis=1) if layer.return_sequences else outputs[-1]
        return (output, *states) if layer.return_state else output

    return call


def with_masks(tensors: Iterable[Any], mask_of: Callable[[Any], Any] = borne_mask) -> list[Any]:
    """Symbolic tensors, each once, and after them the masks that they bear."""
    given = list({id(t): t for t in tensors}.values())
    found = [m for t in given if (m := mask_of(t)) is not None]
    return list({id(t): t for t in [*given, *found]}.values())


def _check_untouched(layer: Any, tensors: Iterable[Any]) -> None:
    """Checks that the call took no input for what an operation makes.

    `keras.ops.cond` and its kin return the very tensor that their first branch returns, as if
    there were no other branch.

    Raises:
        ModelError: if it did; names the operation.
    """
    for tensor in tensors:
        maker = tensor._keras_history.operation
        if not isinstance(maker, keras.layers.InputLayer):
            raise ModelError(
                f"Expected operations on tensors in layer '{layer.name}' of type "
                f"{type(layer).__name__}. Received: keras.ops.{type(maker).__name__.lower()}, "
                "which takes one of several Python functions by a value. An integer file runs all "
                "of its operators; use keras.ops.where, which takes both results."
            )


def _is_moved(function: Any, batch: int, constant: Mapping[int, Any]) -> bool:
    """Whether some tensor of a function has the batch elsewhere than alone on its first axis."""
    return any(
        any(size and size % batch == 0 for size in t.shape) and t.shape[0] != batch
        for call in _calls(function)
        for t in call.outputs
        if id(t) not in constant
    )


def _with_batch_first(
    layer: Any, function: Any, output: Any, tensors: list[Any], weights: Any, batch: int
) -> tuple[Any, Any, dict[int, Any], list[tuple[Any, Any]]]:
    """The function, its output structure and the weights among its outputs, the batch first.

    The last value has the tensors that had it first already, each with the one in its place.
    """
    runs = BatchFirst(batch, weights, f"{layer.name}' of type '{type(layer).__name__}")
    with PATCHING, _shapes_told(layer):
        runs.run(_calls(function), tensors)
    made = {key: tensor for key, (tensor, _) in runs.known.items()}
    before = [t for call in _calls(function) for t in call.outputs if id(t) in made]
    renewed = [
        (t, made[id(t)]) for t in before if t.shape[0] == batch and t.shape == made[id(t)].shape
    ]
    for tensor in _tensors(output):
        if id(tensor) in made and tensor.shape[0] != batch:
            raise ModelError(
                f"Expected outputs with the batch alone on their first axis. Received: "
                f"'{layer.name}' of type {type(layer).__name__}, one of whose outputs has the "
                f"shape {tuple(tensor.shape)}, where {batch} stands for the batch. Undo inside it "
                "what moved the batch. keras.ops.squeeze without axis= drops a batch of 1 as well: "
                "name the axes."
            )
    output = keras.tree.map_structure(lambda t: made.get(id(t), t), output)
    held = {id(t): t for t in _tensors(output) if id(t) in weights}
    inputs = [*tensors, *held.values()]
    with _names_apart(layer, inputs, output):
        function = _function(inputs, keras.tree.flatten(output))
    return function, output, {key: weights[key] for key in held}, renewed


def _of_batch(tensor: Any, batch: int) -> tuple[Any, ...]:
    shape = tuple(tensor.shape)
    return (batch, *shape[1:]) if shape and shape[0] is None else shape


def _input_names(tensors: Iterable[Any]) -> list[str | None]:
    """The names of tensors that inputs make; `None` for others."""
    made = [getattr(t, "_keras_history", None) for t in tensors]
    return [
        h.operation.name if h and isinstance(h.operation, keras.layers.InputLayer) else None
        for h in made
    ]


def _batch_size(layer: Any, tensors: list[Any]) -> int:
    """A prime for the batch size that divides the size of no axis in sight."""
    sizes = {int(s) for t in tensors for s in t.shape[1:] if s}
    sizes |= {int(s) for v in layer.variables for s in v.shape}
    primes = (n for n in itertools.count(3, 2) if all(n % d for d in range(3, n, 2)))
    return next(p for p in primes if p > 12 and all(s % p for s in sizes))


_SIGNATURES: weakref.WeakKeyDictionary[Any, inspect.Signature] = weakref.WeakKeyDictionary()


def call_signature(operation: Any) -> inspect.Signature:
    """The signature of `operation.call`; found once for all operations of a class."""
    method = operation.call
    function = getattr(method, "__func__", None)
    if function is None:  # An object's own, not its class's.
        return inspect.signature(method)
    if function not in _SIGNATURES:
        _SIGNATURES[function] = inspect.signature(method)
    return _SIGNATURES[function]


def parts_of(layer: Any) -> list[Any]:
    """`layer` and all layers inside it, in an order that copies share."""
    return list({id(part): part for part in layer._flatten_layers()}.values())


def recomputes(layer: Any) -> bool:
    """Whether Keras computes a layer's values again for its gradients, by `keras.RematScope`."""
    mode = getattr(layer, "_remat_mode", None)
    if mode is None or not mode.mode:
        return False
    return mode.mode != "list_of_layers" or layer.name in (mode.layer_names or ())


def _paths(layer: Any, inlined: Callable[[Any], bool]) -> Iterator[tuple[Any, str]]:
    """The layers that stay layers, each with the names of the opened layers around it."""
    for part in layer._layers:
        if not inlined(part):
            yield part, ""
            continue
        for inner, path in _paths(part, inlined):
            yield inner, f"{part.name}_{path}"


def _own_variables(layer: Any) -> list[Any]:
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _called(
    layer: Any,
    args: Any,
    kwargs: Any,
    tensors: list[Any],
    inside: list[Any],
    given: Mapping[int, tuple[Any, Any]],
    notes: _Notes,
    loops: Sequence[Any] = (),
) -> tuple[Any, Any, dict[int, Any], dict[int, str]]:
    """`layer.call` with the variables of `inside` as symbolic tensors.

    `given` are variables among the arguments, each with the symbolic tensor that stands for it;
    `loops` are recurrent layers inside that call their cell step by step. `notes` receives what is
    done that is no part of the function.

    Returns:
        The function of `tensors` and of the variables, the output structure, values of tensors
        that depend on variables alone, and the variables that were read without being seen.
    """
    weights: dict[int, tuple[Any, Any]] = dict(given)
    notes.losses.clear()  # They were of other symbolic tensors.
    notes.masks.clear()
    try:
        with PATCHING:
            opened = [p for p in inside if p is layer or not _is_stock(p)]
            # Before symbolic tensors stand for the variables that they hold.
            twins = {id(part): _stock_twin(part) for part in opened}
            with (
                masks_told(),
                _as_inputs(inside, weights),
                _calls_inlined([*opened, *loops], twins, notes),
                _masks_noted([part for part in opened if part is not layer], notes),
                _patched(*((loop, "call", _step_by_step(loop)) for loop in loops)),
                _shapes_told(layer),
                _keys_of_tensors(),
                _arrays_give_way(),
                _sums_broadcast(),
                _sizes_known(),
                _asides_noted(layer, inside, notes),
                tensorflow_traced(),
            ):
                # Keras hands it down to every layer inside that does not say otherwise.
                output = layer(*args, **{"training": False, **kwargs})
    except Exception as error:  # Whatever a user's own class raises.
        raise ModelError(
            f"Expected a call made of layers and keras.ops that runs on symbolic tensors. "
            f"Received: '{layer.name}' of type {type(layer).__name__}, where {_where(error)}: "
            f"{_first_line(error)} Use keras.ops throughout, and keras.ops.where "
            "in place of Python's control flow on values."
        ) from error
    # Before a function is made, which older Keras refuses to make of what goes in a circle.
    _check_untouched(layer, tensors)
    output = keras.tree.map_structure(lambda t: _symbolic_output(t, layer, weights), output)
    variables = {id(tensor): variable for tensor, variable in weights.values()}
    inputs = [*tensors, *(tensor for tensor, _ in weights.values())]
    with _names_apart(layer, inputs, output):
        function = _function(inputs, keras.tree.flatten(output))
    values = _weight_values(function, {id(t) for t in tensors}, variables)
    shown = {id(v) for operation in function.operations for v in _variables(operation)}
    read = {id(t) for operation in function.operations for t in _read(operation)}
    shown |= {id(variables[key]) for key in read if key in variables}
    shown |= {id(variables[id(t)]) for t in _tensors(output) if id(t) in variables}
    hidden = {id(v): v.path for v in layer.variables if id(v) not in shown and _is_float(v)}
    return function, output, values, hidden


def _first_line(error: Exception) -> str:
    """What an error says, without what Keras writes around it."""
    text = str(error)
    inner = re.search(r"\x1b\[1m(.*?)\x1b\[0m", text, re.DOTALL)
    # What a layer inside a layer says stands in what Keras writes around both.
    said = re.split(r"\x1b\[1m|Error encountered:", inner.group(1) if inner else text)[-1]
    lines = said.strip().splitlines()
    return lines[0] if lines else f"{type(error).__name__}."


def _read(operation: Any) -> list[Any]:
    return [t for call in operation._inbound_nodes for t in call.input_tensors]


def _symbolic_output(value: Any, layer: Any, weights: dict[int, tuple[Any, Any]]) -> Any:
    """An output as a symbolic tensor: of a constant, the tensor of a variable that holds it."""
    if isinstance(value, keras.KerasTensor):
        return value
    if not keras.ops.is_tensor(value) and not isinstance(value, np.ndarray | keras.Variable):
        raise ModelError(
            f"Expected tensors as outputs of '{layer.name}'. Received: {type(value).__name__}. "
            "Return tensors from its call, or lists and dicts of them."
        )
    variable = value
    if not isinstance(value, keras.Variable):
        variable = keras.Variable(np.asarray(value), trainable=False, name="constant")
    dtype = variable.dtype
    tensor = keras.Input(batch_shape=variable.shape, dtype=dtype)
    weights[id(variable)] = tensor, variable
    return tensor


# Held while attributes of Keras's classes, or limits of Python, are other than they are: by one
# thread at a time.
PATCHING = threading.RLock()
_MISSING = object()


@contextlib.contextmanager
def _patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Sets attributes meanwhile, and leaves exactly what it found; so it may be nested.

    Args:
        changes: a class, module or layer, the name of an attribute of its own, and the value.
    """
    kept: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in changes:
            kept.append((owner, name, vars(owner).get(name, _MISSING)))
            _set(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(kept):
            _set(owner, name, value)


def _set(owner: Any, name: str, value: Any) -> None:
    """Sets or deletes an attribute; a layer does not track what it is given so."""
    home: Any = type(owner) if inspect.isclass(owner) or inspect.ismodule(owner) else object
    if value is _MISSING:
        home.__delattr__(owner, name)
    else:
        home.__setattr__(owner, name, value)


@contextlib.contextmanager
def _as_inputs(owners: list[Any], made: dict[int, tuple[Any, Any]]) -> Iterator[None]:
    """Lets symbolic tensors stand for the float variables of `owners` meanwhile.

    `made` receives variable and tensor, by the identity of the variable.
    """

    def swapped(value: Any, owner: Any) -> Any:
        if isinstance(value, keras.Variable) and _is_float(value):
            if id(value) not in made:
                dtype = owner.compute_dtype if value._autocast else value.dtype
                dtype = dtype if keras.backend.is_float_dtype(dtype) else value.dtype
                tensor = keras.Input(batch_shape=value.shape, dtype=dtype)
                # Users read these of a variable, and so of what stands for it.
                tensor.value, tensor.trainable, tensor.path = tensor, value.trainable, value.path
                made[id(value)] = tensor, value
            return made[id(value)][0]
        if isinstance(value, list | tuple) and any(isinstance(v, keras.Variable) for v in value):
            # TensorFlow keeps a tuple of a layer in a proxy, which is no class to make one of.
            new = [swapped(v, owner) for v in value]
            make = getattr(value, "_make", tuple if isinstance(value, tuple) else type(value))
            return make(new)
        if isinstance(value, dict) and any(isinstance(v, keras.Variable) for v in value.values()):
            return {key: swapped(v, owner) for key, v in value.items()}
        return value

    internal = {"_trainable_variables", "_non_trainable_variables", "_metrics", "_layers"}
    changes = [
        (owner, name, new)
        for owner in owners
        for name, value in vars(owner).items()
        if name not in internal and (new := swapped(value, owner)) is not value
    ]
    with _patched(*changes):
        yield


_OF_WEIGHTS = "depends on weights alone (let the layer that has them have a regularizer)"


@contextlib.contextmanager
def _asides_noted(layer: Any, inside: Sequence[Any], notes: _Notes) -> Iterator[None]:
    """Lets calls add losses and update metrics meanwhile, though Keras takes no symbolic ones.

    `notes` receive who does what, but for layers that stay layers: they go on doing it, or are
    opened later.
    """
    parts = list(parts_of(layer))
    stay = {id(part) for part in parts} - {id(part) for part in inside}

    def note(part: Any, aside: str) -> None:
        if id(part) not in stay:
            notes.asides.append(f"'{part.name}' {aside} in its call")

    def without_update(part: Any, metric: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: note(part, f"updates its metric '{metric.name}'")

    def note_loss(part: Any, loss: Any) -> None:
        if id(part) in stay:
            return
        for value in keras.tree.flatten(loss):
            symbolic = isinstance(value, keras.KerasTensor)
            notes.losses.append(SeenLoss(part, value, problem="" if symbolic else _OF_WEIGHTS))

    updates = [
        (metric, "update_state", without_update(part, metric))
        for part in parts
        for metric in part._metrics
    ]
    with _patched((keras.layers.Layer, "add_loss", note_loss), *updates):
        yield


@contextlib.contextmanager
def losses_noted() -> Iterator[list[tuple[Any, Any]]]:
    """Receives who adds which loss, in place of the layer itself."""
    found: list[tuple[Any, Any]] = []

    def note(part: Any, loss: Any) -> None:
        found.extend((part, value) for value in keras.tree.flatten(loss))

    with PATCHING, _patched((keras.layers.Layer, "add_loss", note)):
        yield found


@contextlib.contextmanager
def _calls_inlined(
    opened: Sequence[Any], twins: Mapping[int, Any], notes: _Notes
) -> Iterator[None]:
    """Lets calls of layers show what they do in place of themselves.

    Keras does the rest of a call as ever: it builds, hands on masks and `training`. It only records
    no call of theirs, which may return anything. What a user's subclass of a stock layer calls of
    that layer is recorded as a stock layer.

    Args:
        opened: the layers.
        twins: the stock layer that each is beside its own `call`, or `None`, by its identity.
        notes: receive the penalties of their outputs, which Keras makes of no symbolic tensor.
    """
    keys = {id(part) for part in opened}
    stock = {type(twin) for twin in twins.values() if twin is not None}
    held = [(part, twins.get(id(part))) for part in opened]
    states = {id(part): _state(part, twin) for part, twin in held if twin is not None}
    home: Any = sys.modules[keras.layers.Layer.__module__]
    record = home.Node

    def recorded(operation: Any, **call: Any) -> Any:
        if id(operation) in keys:
            return None
        return record(operation=operation, **_as_read(operation, call))

    def called_through(part: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outputs = part.call(*args, **kwargs)
            penalty = part.activity_regularizer
            if penalty is not None:
                notes.losses += [SeenLoss(part, t, penalty) for t in _tensors(outputs)]
            return outputs

        return call

    with _patched(
        (home, "Node", recorded),
        *((part, "symbolic_call", called_through(part)) for part in opened),
        *((cls, "call", _to_twins(cls.call, twins, states)) for cls in stock),
    ):
        yield


def _as_read(operation: Any, call: dict[str, Any]) -> dict[str, Any]:
    """What Keras records of a call, without the mask that MultiHeadAttention does not read.

    It takes the query's mask off the query, whatever a caller gives.
    """
    if getattr(type(operation), "call", None) is not keras.layers.MultiHeadAttention.call:
        return call
    args, kwargs = call["call_args"], call["call_kwargs"]
    given = call_signature(operation).bind_partial(*args, **kwargs).arguments
    borne = borne_mask(given["query"])
    if (mask := given.get("query_mask")) is None or mask is borne:
        return call
    first = dict(zip(given, args[:1], strict=False))
    others = {name: value for name, value in given.items() if name not in first}
    return {**call, "call_args": args[:1], "call_kwargs": {**others, "query_mask": borne}}


@contextlib.contextmanager
def _masks_noted(opened: Sequence[Any], notes: _Notes) -> Iterator[None]:
    """Notes the masks that opened layers give to their outputs, as no call of theirs is recorded.

    Args:
        opened: layers inside the one that is traced.
        notes: receive the masks.
    """

    def noted(part: Any) -> Callable[..., Any]:
        give = part._set_mask_metadata

        def given(inputs: Any, outputs: Any, previous_mask: Any) -> None:
            bare = [t for t in _tensors(outputs) if borne_mask(t) is None]
            give(inputs, outputs, previous_mask)
            notes.masks |= {id(t): m for t in bare if (m := borne_mask(t)) is not None}
            notes.masked += [t for t in bare if id(t) in notes.masks]

        return given

    with _patched(*((part, "_set_mask_metadata", noted(part)) for part in opened)):
        yield


def _to_twins(
    call: Any, twins: Mapping[int, Any], states: Mapping[int, Mapping[str, Any]]
) -> Callable[..., Any]:
    """`call` of a stock class, by which a layer that has a twin calls the twin.

    It does not where the user's `call` has set what the stock one reads; `states` has what that
    was.
    """

    @functools.wraps(call)
    def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
        twin = twins.get(id(layer))
        if twin is None:
            return call(layer, *args, **kwargs)
        before, now = states[id(layer)], _state(layer, twin)
        if now.keys() != before.keys() or any(now[key] is not before[key] for key in now):
            return call(layer, *args, **kwargs)
        return twin(*args, **kwargs)

    return called


# What a subclass of a stock layer may write anew without changing what the stock `call` computes.
_FREE_TO_CHANGE = frozenset(
    "call build get_config from_config get_build_config build_from_config compute_output_shape "
    "compute_output_spec compute_mask add_weight".split()
)


def _stock_twin(layer: Any) -> Any:
    """The stock layer that a user's subclass of one is beside its own `call`, with its variables.

    `None` where the stock `call` may compute something else for the subclass.
    """
    mro = type(layer).__mro__
    place = next((i for i, cls in enumerate(mro) if cls.__module__.startswith("keras.")), 0)
    stock, own = mro[place], mro[:place]
    if not own or getattr(keras.layers, stock.__name__, None) is not stock or not layer.weights:
        return None
    if not layer.built or "call" not in {name for cls in own for name in vars(cls)}:
        return None
    changed = {name for cls in own for name in vars(cls) if not name.startswith("__")}
    if any(hasattr(stock, name) for name in changed - _FREE_TO_CHANGE):
        return None
    if any("build" not in _names_in(vars(cls)["build"]) for cls in own if "build" in vars(cls)):
        return None  # Its weights are not those that the stock class makes of its config.
    fresh = stock.__new__(stock)
    keras.layers.Layer.__init__(fresh)
    twin = object.__new__(stock)
    told = {name: value for name, value in vars(fresh).items() if "call" in name}
    nodes: dict[str, Any] = {"_inbound_nodes": [], "_outbound_nodes": []}
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stock.__name__).lower()
    # What the subclass holds besides is read by its own `call` alone.
    held = {id(value) for value in keras.tree.flatten(list(_state(layer, twin).values()))}
    tracked = {key: [v for v in vars(layer)[key] if id(v) in held] for key in _TRACKED}
    vars(twin).update({**vars(layer), **told, **nodes, **tracked, "name": name})
    twin.activity_regularizer = None  # A penalty is of what the subclass makes.
    return twin


# Where a layer lists what it holds.
_TRACKED = ("_trainable_variables", "_non_trainable_variables", "_layers", "_seed_generators")


def _state(layer: Any, twin: Any) -> dict[str, Any]:
    """What a layer keeps in the attributes of its stock class."""
    stock: Any = type(twin)
    names = _attributes(stock)
    return {key: value for key, value in vars(layer).items() if key in names}


@functools.cache
def _attributes(stock: Any) -> frozenset[str]:
    """The attributes in which a stock class keeps its own state: all that its methods set."""
    mro = stock.__mro__
    own = mro[: mro.index(keras.layers.Layer)]
    methods = (getattr(f, "fset", f) for cls in own for f in vars(cls).values())
    codes = [inspect.unwrap(f).__code__ for f in methods if inspect.isfunction(f)]
    steps = (step for code in codes for step in dis.get_instructions(code))
    return frozenset(str(step.argval) for step in steps if step.opname == "STORE_ATTR")


def _names_in(function: Any) -> tuple[str, ...]:
    """The global names and attributes that a function reads; none of what is no function."""
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())


@contextlib.contextmanager
def masks_told() -> Iterator[None]:
    """Leaves out what Keras told the user when the model was built: which layer drops a mask."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not support masking")
        yield


def unmasked(values: Any) -> Any:
    """The same values, which bear no masks any more."""
    for value in keras.tree.flatten(values):
        if borne_mask(value) is not None:
            set_keras_mask(value, None)
    return values


@contextlib.contextmanager
def bearing(pairs: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Lets values bear masks meanwhile.

    Args:
        pairs: a value and its mask.
    """
    before = [(value, borne_mask(value)) for value, _ in pairs]
    try:
        for value, mask in pairs:
            set_keras_mask(value, mask)
        with masks_told():
            yield
    finally:
        for value, mask in before:
            set_keras_mask(value, mask)


@contextlib.contextmanager
def _keys_of_tensors() -> Iterator[None]:
    """Lets symbolic tensors be indexed as the tensors are that a call is written for.

    Keras's own take no `x[1:]`, `x[None]` or `x[...]`, no integers of NumPy and no boolean array.
    """
    home: Any = keras.KerasTensor
    index = home.__getitem__

    def indexed(tensor: Any, key: Any) -> Any:
        if isinstance(key, np.ndarray) and key.dtype == bool and key.ndim == 1:
            return keras.ops.take(tensor, np.flatnonzero(key), axis=0)
        parts = tuple(key) if isinstance(key, list | tuple) else (key,)
        return index(tensor, tuple(_plain_key(part) for part in parts))

    with _patched((home, "__getitem__", indexed)):
        yield


@contextlib.contextmanager
def _arrays_give_way() -> Iterator[None]:
    """Lets `array * x` be the symbolic tensor's product, as it is that of a tensor of a backend.

    NumPy would ask the tensor for its numbers.
    """
    with _patched((keras.KerasTensor, "__array_ufunc__", None)):
        yield


@contextlib.contextmanager
def _sums_broadcast() -> Iterator[None]:
    """Lets `x + y` of symbolic tensors be that of the tensors that a call is written for.

    Keras makes its own `add` of it, which takes some operands for a bias of the channels.
    """
    sums = {
        "__add__": lambda tensor, other: broadcast_sum(tensor, other),
        "__radd__": lambda tensor, other: broadcast_sum(other, tensor),
    }
    with _patched(*((keras.KerasTensor, name, function) for name, function in sums.items())):
        yield


class _AbsentError(AttributeError, TypeError):
    """What TensorFlow's tensors have and symbolic ones lack.

    Of a TypeError TensorFlow takes that the tensor is none of its own, and asks for another way to
    compute its function; of an AttributeError it does not.
    """


def _absent(owner: Any, name: str) -> Any:
    kind = "shape" if isinstance(owner, tuple) else "symbolic tensor"
    raise _AbsentError(f"A {kind} has no attribute {name!r}.")


class _Shape(tuple[Any, ...]):
    """A shape that also answers as TensorFlow's does, for which `call` may have been written."""

    @property
    def rank(self) -> int:
        return len(self)

    @property
    def ndims(self) -> int:
        return len(self)

    @property
    def dims(self) -> list[Any]:
        return list(self)

    def as_list(self) -> list[Any]:
        return list(self)

    def num_elements(self) -> int:
        return math.prod(self)

    def is_fully_defined(self) -> bool:
        return None not in self

    __getattr__ = _absent

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return _Shape(part) if isinstance(key, slice) else part


@contextlib.contextmanager
def _sizes_known() -> Iterator[None]:
    """Lets shapes, and `keras.ops.ndim` and `size`, be those of the tensors of a backend.

    Keras makes symbolic numbers of the latter, by which Python can neither branch nor count.
    """
    functions: Any = sys.modules[keras.ops.ndim.__module__]
    home: Any = keras.KerasTensor
    shape = home.shape
    with _patched(
        (functions.Ndim, "symbolic_call", lambda operation, x: len(x.shape)),
        (functions.Size, "symbolic_call", lambda operation, x: math.prod(x.shape)),
        (home, "shape", property(lambda tensor: _Shape(shape.fget(tensor)), shape.fset)),
        (home, "get_shape", lambda tensor: tensor.shape),
        (home, "__getattr__", _absent),
    ):
        yield


def _plain_key(part: Any) -> Any:
    if isinstance(part, slice):
        return slice(*(_plain_key(bound) for bound in (part.start, part.stop, part.step)))
    if isinstance(part, bool) or not hasattr(part, "__index__") or np.ndim(part):
        return part
    return operator.index(part)


@contextlib.contextmanager
def _shapes_told(layer: Any) -> Iterator[None]:
    """Lets each EinsumDense tell the shape of its output for the input at hand.

    Keras has it tell what it was built for, where an axis may have had no size yet.
    """
    parts = [part for part in parts_of(layer) if type(part) is keras.layers.EinsumDense]

    def told(part: Any) -> Callable[[Any], Any]:
        def shape(input_shape: Any) -> Any:
            inputs, rest = part.equation.split(",")
            kernel, output = rest.split("->")
            sizes = dict(zip(kernel, part.kernel.shape, strict=True))
            free = len(input_shape) - len(inputs.replace("...", ""))
            letters = inputs.replace("...", "0123456789"[:free])
            sizes |= dict(zip(letters, input_shape, strict=True))
            return tuple(sizes[c] for c in output.replace("...", "0123456789"[:free]))

        return shape

    with _patched(*((part, "compute_output_shape", told(part)) for part in parts)):
        yield


def called_as_run(layer: Any, *args: Any) -> Any:
    """What a layer returns of symbolic tensors, as its `call` returns it when it is run.

    Keras asks `compute_output_shape` first. A cell may leave its states out there, as
    `keras.layers.RNN` reads none but what its `call` returns.
    """
    run = functools.partial(keras.Operation.compute_output_spec, layer)
    with PATCHING, _patched((layer, "compute_output_spec", run)):
        return layer(*args)


@contextlib.contextmanager
def _names_apart(layer: Any, inputs: Iterable[Any], outputs: Any) -> Iterator[None]:
    """Gives all that computes `outputs` names of its own meanwhile, as Keras demands of a function.

    These are the layers inside `layer`, and those that its call makes: one that is called for each
    block may make a layer of the same name each time. Keras numbers names of inputs anew in each
    thread, and after `keras.backend.clear_session()`.
    """
    makers = [tensor._keras_history.operation for tensor in inputs]
    every = (*parts_of(layer), *makers, *operations_between((), outputs))
    parts = {id(part): part for part in every}
    changes = [
        (part, "name", f"kqat_{index}_{part.name}") for index, part in enumerate(parts.values())
    ]
    with _patched(*changes):
        yield


def _is_stock(layer: Any) -> bool:
    return getattr(keras.layers, type(layer).__name__, None) is type(layer)


# Operations that make a constant of a tensor's shape.
_FILLED = {"ZerosLike": 0, "OnesLike": 1}


def _function(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """A `keras.Function`, some of whose inputs may be read by nothing."""
    give_readers(inputs)
    return keras.Function(inputs, outputs)


def give_readers(inputs: Iterable[Any]) -> None:
    """Gives each input that nothing reads a reader, which leads to no output.

    Keras 3.10 to 3.13 refuse to make a function or model of inputs without one.
    """
    for tensor in inputs:
        if not tensor._keras_history.operation._outbound_nodes:
            keras.ops.stop_gradient(tensor)


def _weight_values(function: Any, given: set[int], variables: dict[int, Any]) -> dict[int, Any]:
    """Values of all tensors that no input reaches, by identity.

    A variable's own tensor stands for the variable; what is computed from variables is a new
    variable, trainable as they are: one, however often the same is computed, as in each step of a
    loop.
    """
    live = set(given)
    found: dict[int, Any] = dict(variables)
    computed: dict[int, Any] = {}
    wanted: dict[int, Any] = {}
    values: dict[int, np.ndarray] = {}
    constants: list[Any] = []  # the tensors of `values`
    inverted: list[tuple[Any, Any, Any]] = []  # one less a tensor, the tensor, and what subtracts
    numbers = _ValueNumbers()
    once: dict[int, Any] = {}  # number -> the variable that holds the value
    for call in _calls(function):
        tensors = _tensors((call.arguments.args, call.arguments.kwargs))
        if type(call.operation).__name__ in _FILLED:
            # It reads the shape alone.
            filled = _FILLED[type(call.operation).__name__]
            values.update((id(t), np.full(t.shape, filled, t.dtype)) for t in call.outputs)
            constants += call.outputs
            computed.update((id(t), []) for t in call.outputs)
        elif any(id(t) in live for t in tensors):
            live.update(id(t) for t in call.outputs)
            wanted.update((id(t), t) for t in tensors if id(t) in computed)
        else:
            sources = [v for t in tensors for v in computed.get(id(t), [variables.get(id(t))])]
            sources += getattr(call.operation, "variables", [])
            computed.update((id(t), [v for v in sources if v is not None]) for t in call.outputs)
            numbers.note(call)
            if (other := _taken_off_one(call, values)) is not None:
                inverted.append((call.outputs[0], other, call.operation))
    wanted.update((id(t), t) for t in function.outputs if id(t) in computed)
    for key in [key for key in wanted if key in values]:
        del wanted[key]
        found[key] = keras.Variable(values[key], trainable=False, name="constant")
    if wanted:
        inputs = [*(t for t in function.inputs if id(t) in variables), *constants]
        known = {**variables, **values}
        # In mixed precision the call rounds what it computes of variables; they train as they are.
        results = values_between(
            inputs, list(wanted.values()), [_in_full(known[id(t)], t.dtype) for t in inputs]
        )
        for (key, _), value in zip(wanted.items(), results, strict=True):
            if (known_before := once.get(numbers.of(key))) is not None:
                found[key] = known_before
                continue
            sources = list({id(v): v for v in computed[key]}.values())
            name = "_".join(v.name for v in sources[:1]) or "constant"
            trained = any(v.trainable for v in sources)
            made = keras.Variable(np.asarray(value), trainable=trained, name=name)
            once[numbers.of(key)] = found[key] = made_of(sources, made)
    for tensor, other, operation in inverted:
        known_before = found.get(id(other), once.get(numbers.of(id(other))))
        if id(tensor) in found and known_before is not None:
            complements(found[id(tensor)], known_before, operation)
    return {**dict.fromkeys(computed), **found}


def _taken_off_one(call: Any, constants: Mapping[int, np.ndarray]) -> Any:
    """The tensor of which a call computes one less it; `None` where it computes something else."""
    args = call.arguments.args
    if type(call.operation).__name__ != "Subtract" or len(args) != 2:
        return None
    one, other = args
    one = constants.get(id(one), one)
    if isinstance(one, keras.KerasTensor) or not isinstance(other, keras.KerasTensor):
        return None
    alike = tuple(call.outputs[0].shape) == tuple(other.shape)
    return other if alike and bool(np.all(np.asarray(one) == 1)) else None


class _ValueNumbers:
    """Value numbering of what is computed of weights: the same function of the same has one number.

    An operation of which not all options are plain numbers or texts, and a layer, makes new ones.
    """

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._made: dict[int, int] = {}  # identity of a tensor -> its number

    def of(self, tensor: int) -> int:
        """The number of a tensor, which is given by its identity."""
        return self._made.get(tensor, -1 - tensor)

    def note(self, call: Any) -> None:
        """Notes what a call of an operation makes."""
        plain = int, float, str, bool, type(None)
        options = {k: v for k, v in vars(call.operation).items() if k[0] != "_" and k != "name"}
        given = keras.tree.flatten((call.arguments.args, call.arguments.kwargs))
        parts = [self.of(id(v)) if isinstance(v, keras.KerasTensor) else v for v in given]
        known = all(isinstance(v, plain) for v in (*keras.tree.flatten(options), *parts))
        is_layer = isinstance(call.operation, keras.layers.Layer)
        kind = type(call.operation) if known and not is_layer else id(call)
        for place, tensor in enumerate(call.outputs):
            # A number of Python is another one where its type is.
            key = kind, place, repr(options), repr(parts)
            self._made[id(tensor)] = self._numbers.setdefault(key, len(self._numbers))


def _in_full(value: Any, dtype: Any) -> Any:
    """A value in a type, but in float32 for a type of fewer bits."""
    return keras.ops.cast(value, "float32" if is_half(dtype) else dtype)


def _first_of_batch(variable: Any, batch: int, layer: Any) -> Any:
    """A value without the batch axis along which it was repeated."""
    if variable is None or not len(variable.shape) or variable.shape[0] % batch:
        return variable
    array = without_batch(np.asarray(variable), batch)
    if array is None:
        raise ModelError(
            f"Expected weights that are the same for all samples in '{layer.name}' of type "
            f"{type(layer).__name__}. Received: {variable.name} of shape {tuple(variable.shape)}, "
            "which was computed with the batch size. Compute it without that."
        )
    made = keras.Variable(array, trainable=variable.trainable, name=variable.name)
    return made_of([variable], made)


def without_batch(array: np.ndarray, batch: int) -> np.ndarray | None:
    """The part of a constant that belongs to one sample; `None` if samples differ."""
    parts = array.reshape(batch, -1, *array.shape[1:])
    return parts[0] if bool(np.all(parts == parts[:1])) else None


def _variables(operation: Any) -> list[Any]:
    """The variables of a layer, and those that an operation's calls are given."""
    given = [
        v
        for call in operation._inbound_nodes
        for v in keras.tree.flatten((call.arguments.args, call.arguments.kwargs))
        if isinstance(v, keras.Variable)
    ]
    return [*getattr(operation, "variables", ()), *given]


def _is_float(variable: Any) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(variable.dtype))


def _where(error: Exception) -> str:
    """The last line of the user's own code that led to `error`."""
    inside = {str(Path(str(module.__file__)).parent) for module in (keras, np)}
    inside |= {str(Path(__file__).parent)}
    library = Path(inspect.__file__).parent  # Packages may lie in a folder of it.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.startswith(folder) for folder in inside)
        and "tensorflow" not in frame.filename
        and Path(frame.filename).parent != library
    ]
    if not frames:
        return "Keras says"
    return (
        f"line {frames[-1].lineno} of {Path(frames[-1].filename).name}, `{frames[-1].line}`, says"
    )


def calls_in_order(
    function: Any, known: Collection[int], masks: Mapping[int, Any], made_masks: Mapping[int, Any]
) -> Iterator[tuple[Any, dict[str, Any], dict[int, Any], str | None]]:
    """The calls of `function`, each after those whose tensors or masks it reads.

    Beside each stand the masks that Keras hands to it though it records none, those that its
    arguments bear, by their identity, where layers inside it read them, and the Masking layer that
    it belongs to.

    Args:
        function: a Functional model or a `keras.Function`.
        known: identities of tensors, to which the caller adds a call's outputs before the next.
        masks: those that inputs of `function` bear.
        made_masks: those that layers opened inside it gave to what they return.

    Raises:
        ModelError: if a mask cannot be followed to what it is computed from.
    """
    calls = _calls(function)
    read = _masks_read(calls, masks, made_masks)
    inputs = [*function.inputs, *masks.values()]
    if wanted := read.tensors():
        # What computes a mask leads to no output.
        calls = _calls_between(inputs, [*function.outputs, *wanted])
    calls = _needed(calls, function.outputs, read)
    _check_followed(calls, read, {id(t) for t in inputs})
    while calls:
        waiting = []
        for call in calls:
            if all(id(t) in known for t in read.by(call)):
                given, borne = read.given.get(id(call), {}), read.borne.get(id(call), {})
                yield call, given, borne, read.makers.get(id(call))
            else:
                waiting.append(call)
        assert len(waiting) < len(calls), "a mask that depends on its own reader"
        calls = waiting


def _needed(calls: list[Any], outputs: Sequence[Any], read: "_MasksRead") -> list[Any]:
    """Those of `calls` that lead to outputs or to a mask that is read.

    The others made a mask when the model was built, in whose place another stands.
    """
    makers = {id(t): call for call in calls for t in call.outputs}
    waiting, needed = list(outputs), set()
    while waiting:
        call = makers.get(id(waiting.pop()))
        if call is not None and id(call) not in needed:
            needed.add(id(call))
            waiting += read.by(call)
    return [call for call in calls if id(call) in needed]


def _check_followed(calls: list[Any], read: "_MasksRead", inputs: Collection[int]) -> None:
    """Checks that all masks come from the inputs.

    Raises:
        ModelError: if one does not; names what makes it and what reads it.
    """
    for call in calls:
        for tensor in read.by(call):
            if hasattr(tensor, "mask_maker") and id(tensor) not in inputs:
                raise ModelError(
                    f"Expected masks that are computed from a model's own inputs. Received: one "
                    f"that comes out of a custom layer or a model inside the model, "
                    f"'{tensor.mask_maker}', and cannot be followed there; "
                    f"'{call.operation.name}' reads it. Call the layer that makes the mask "
                    "(mask_zero, Masking) in the outer model, make it of the layer's inputs alone, "
                    "or stop it behind that layer: keras.layers.Reshape hands none on."
                )


def _calls(function: Any) -> list[Any]:
    by_depth = function._nodes_by_depth
    ordered = (call for depth in sorted(by_depth, reverse=True) for call in by_depth[depth])
    return [call for call in ordered if not call.is_input]


def infer_by_default(model: Any) -> None:
    """Lets a functional model that is called without `training` infer, as all its layers do.

    `call` of Keras's Resizing and its kin has `training=True` for a default, which Keras records
    and hands on to all layers behind: their statistics and ranges would move. What the model is
    called with still goes before.
    """
    for call in _calls(model):
        if call.arguments.kwargs.get("training"):
            call.arguments.kwargs["training"] = False


def masks_of(function: Any, tensors: Sequence[Any]) -> list[Any]:
    """The masks that tensors inside a function bear when it runs, symbolic; `None` for none."""
    live = _masks_read(_calls(function), {}).live
    return [live.get(id(tensor)) for tensor in tensors]


def mask_function(inputs: Sequence[Any], mask: Any) -> Any:
    """A functional model that makes a symbolic mask of a model's inputs.

    It is `None` where something else than operations on these inputs makes the mask.
    """
    fresh = [
        keras.Input(t.shape[1:], dtype=t.dtype, name=f"input_{i}") for i, t in enumerate(inputs)
    ]
    made = _remade(inputs, mask, fresh)
    return None if made is None else keras.Model(fresh, made, name="mask")


def _remade(inputs: Sequence[Any], mask: Any, given: Sequence[Any]) -> Any:
    """A symbolic mask of `inputs`, made of `given` instead; `None` as for `mask_function`."""
    calls = _calls_between(inputs, mask)
    known = {id(t): new for t, new in zip(inputs, given, strict=True)}
    made_here = {id(t) for call in calls for t in call.outputs}
    read = _tensors([mask, *((c.arguments.args, c.arguments.kwargs) for c in calls)])
    if any(isinstance(call.operation, keras.layers.Layer) for call in calls) or not all(
        id(t) in known or id(t) in made_here for t in read
    ):
        return None
    for call in calls:
        arguments = call.arguments.args, call.arguments.kwargs
        args, kwargs = keras.tree.map_structure(lambda t: known.get(id(t), t), arguments)
        made = _tensors(call.operation(*args, **kwargs))
        known.update((id(t), new) for t, new in zip(call.outputs, made, strict=True))
    return known[id(mask)]


@dataclasses.dataclass(frozen=True)
class _MasksRead:
    """The masks of a function's calls.

    Attributes:
        given: call -> the masks that tensors bring along: of one tensor `mask`, of several
            `x_mask`.
        borne: call -> the masks that layers inside it take off its arguments, by these.
        live: the mask that each tensor bears in the end.
        makers: call -> the name of the Masking layer whose mask it helps to make.
    """

    given: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    borne: dict[int, dict[int, Any]] = dataclasses.field(default_factory=dict)
    live: dict[int, Any] = dataclasses.field(default_factory=dict)
    makers: dict[int, str] = dataclasses.field(default_factory=dict)
    _by: dict[int, list[Any]] = dataclasses.field(default_factory=dict)

    def by(self, call: Any) -> list[Any]:
        """The symbolic tensors that a call reads, masks among them; asked when all are known."""
        if id(call) not in self._by:
            arguments = {**call.arguments.kwargs, **self.given.get(id(call), {})}
            borne = self.borne.get(id(call), {})
            self._by[id(call)] = _tensors([call.arguments.args, arguments, list(borne.values())])
        return self._by[id(call)]

    def tensors(self) -> list[Any]:
        """All masks that are read."""
        return _tensors([list(found.values()) for found in self.given.values()]) + [
            mask for found in self.borne.values() for mask in found.values()
        ]


def _masks_read(
    calls: list[Any], masks: Mapping[int, Any], returned: Mapping[int, Any] = MappingProxyType({})
) -> _MasksRead:
    """The masks of calls, the first of which read tensors with `masks`.

    `returned` are those of tensors that an opened layer, of which there is no call, returned.

    Keras does this when a model runs, call by call: MultiHeadAttention takes the masks off the
    tensors that it reads, so that those who come later see none. What symbolic tensors bear is
    what they had before any call ran.
    """
    result = _MasksRead(live={**returned, **masks})
    live = result.live
    # Tensors whose mask, as it was made when the model was built, hides nothing.
    unhidden: set[int] = set()

    def mask_of(tensor: Any) -> Any:
        return live.get(id(tensor))

    for call in calls:
        layer = call.operation
        if not isinstance(layer, keras.layers.Layer):
            continue
        given = _given(call)
        named = {"mask", *(f"{key}_mask" for key in given)}
        tensors = {k: v for k, v in given.items() if k not in named and _tensors(v)}
        parameters = call_signature(layer).parameters
        found = {}
        for key, value in tensors.items():
            name = "mask" if len(tensors) == 1 else f"{key}_mask"
            mask = keras.tree.map_structure(mask_of, value)
            # What was there when the model was built is recorded, made as Keras makes it.
            recorded = given.get(name)
            implicit = recorded is None or recorded is borne_mask(value)
            if name in parameters and implicit and (_tensors(mask) or id(value) in unhidden):
                found[name] = mask
        result.given[id(call)] = found
        first: Any = next(iter(given.values()), None)
        before = keras.tree.map_structure(mask_of, first)
        read = _tensors(list(given.values()))
        borne = {id(t): m for t in read if (m := mask_of(t)) is not None}
        if inner_function(layer) is not None:
            masks_given = keras.tree.flatten(given.get("mask"))
            if _tensors(masks_given):
                pairs = zip(_tensors(first), masks_given, strict=True)
                borne = {id(t): m for t, m in pairs if m is not None}
            inside = _masks_of_inner(layer, _given_inside(layer, first), borne)
        elif _opens_for_masks(layer, borne):
            inside = _masks_inside(call, found, mask_of)
        else:
            inside = None
        if inside is not None:
            after = inside.after
            if inside.reads and borne:
                result.borne[id(call)] = borne
            live.update((id(t), None) for t in inside.taken)
        elif type(layer) is keras.layers.Concatenate and _are_steps(first, before):
            after = [_mask_of_joined(first, before, layer.axis)]
            unhidden |= {id(call.outputs[0])} if after == [None] else set()
        else:
            after = _masks_by_layer(call, first, before, mask_of)
            if isinstance(layer, keras.layers.Masking):
                made = _calls_between(call.input_tensors, after)
                result.makers.update((id(maker), layer.name) for maker in made)
        live.update(
            (id(t), returned.get(id(t)) if m is None else m)
            for t, m in zip(call.outputs, after, strict=False)
        )
        if isinstance(layer, keras.layers.MultiHeadAttention):
            live.update((id(t), None) for t in _tensors(list(tensors.values())))
    return result


# A layer that sets its mask in `call`, which no symbolic call runs. Keras 3.10 has it not yet.
_SETS_MASK_IN_CALL = tuple(
    kind for name in ("ReversibleEmbedding",) if (kind := getattr(keras.layers, name, None))
)


def _masks_by_layer(call: Any, first: Any, before: Any, mask_of: Callable[[Any], Any]) -> list[Any]:
    """The masks of a call's outputs that the layer's `compute_mask` makes.

    Args:
        call: of the layer.
        first: its first argument.
        before: the masks of that.
        mask_of: gives the mask that a tensor bears.
    """
    if isinstance(call.operation, _SETS_MASK_IN_CALL) and not _is_reversed(call):
        return [keras.layers.Embedding.compute_mask(call.operation, first)]
    read = _tensors(list(_given(call).values()))
    if all(mask_of(t) is borne_mask(t) for t in read):
        return [borne_mask(t) for t in call.outputs]
    if call.operation.supports_masking:
        return keras.tree.flatten(call.operation.compute_mask(first, before))
    return []


@dataclasses.dataclass(frozen=True)
class _Inside:
    """What a custom layer, or a model inside, does with masks.

    Attributes:
        after: the masks of the outputs.
        reads: whether a layer inside reads a mask of its arguments.
        taken: arguments that bear none any more.
    """

    after: list[Any]
    reads: bool
    taken: list[Any] = dataclasses.field(default_factory=list)


def _masks_of_inner(layer: Any, given: list[Any], borne: Mapping[int, Any]) -> _Inside:
    """What a Functional model inside does with masks; the symbolic outputs of its call bear none.

    Args:
        layer: the model.
        given: what it is called on.
        borne: the masks of that.
    """
    function = inner_function(layer)
    if len(given) != len(function.inputs):  # It is refused later, by name.
        return _Inside([], False)
    masks = {
        id(i): _input_like(borne[id(t)])
        for i, t in zip(function.inputs, given, strict=True)
        if id(t) in borne
    }
    read = _masks_read(_calls(function), masks)
    pairs = list(zip(function.inputs, given, strict=True))
    inner = [*function.inputs, *masks.values()]
    outer = [*given, *(borne[id(t)] for i, t in pairs if id(i) in masks)]
    return _Inside(
        _handed_on(read, function.outputs, inner, outer, layer, None),
        True,
        [t for i, t in pairs if id(i) in masks and read.live[id(i)] is None],
    )


def _given_inside(model: Any, first: Any) -> list[Any]:
    """What a Functional model inside is called on, in the order of its inputs.

    Args:
        model: the model.
        first: argument of its call.
    """
    function = inner_function(model)
    if isinstance(first, dict):
        named = isinstance(function.input, dict)
        keys = sorted(function.input) if named else [t.name for t in function.inputs]
        if set(keys) <= set(first):
            return _tensors([first[key] for key in keys])
    return _tensors(first)


def _input_like(mask: Any) -> Any:
    return keras.Input(mask.shape[1:], dtype=mask.dtype)


def _masks_inside(call: Any, found: Mapping[str, Any], mask_of: Callable[[Any], Any]) -> _Inside:
    """What a custom layer does with masks: layers inside it may read and make them.

    Args:
        call: of the layer.
        found: the masks that Keras hands to it.
        mask_of: gives the mask that a tensor bears.
    """
    layer, args = call.operation, call.arguments.args
    kwargs = {**call.arguments.kwargs, **found}
    outer = with_masks(_tensors((args, kwargs)), mask_of)
    try:
        opened = open_call(layer, args, kwargs, mask_of=mask_of)
    except ModelError:  # It is refused later, by name, or stays float.
        inside = _masks_when_run(layer, args, kwargs, outer, mask_of)
    else:
        read = _masks_read(_calls(opened.function), opened.masks)
        outputs = keras.tree.flatten(opened.output)
        pairs = zip(opened.tensors, outer, strict=True)
        inside = _Inside(
            _handed_on(read, outputs, opened.tensors, outer, layer, opened.batch),
            _reads_masks(opened.function, opened.masks),
            [t for i, t in pairs if id(i) in opened.masks and read.live[id(i)] is None],
        )
    if not layer.supports_masking or all(mask is not None for mask in inside.after):
        return inside
    first = next(iter(_given(call).values()), None)
    made = _masks_by_layer(call, first, keras.tree.map_structure(mask_of, first), mask_of)
    made += [None] * len(inside.after)
    after = [b if a is None else a for a, b in zip(inside.after, made, strict=False)]
    return dataclasses.replace(inside, after=after)


def _handed_on(
    read: _MasksRead,
    outputs: Sequence[Any],
    inner: Sequence[Any],
    outer: Sequence[Any],
    layer: Any,
    batch: int | None,
) -> list[Any]:
    """The masks of a layer's outputs, made of what it is called on.

    Where that cannot be there is one that no input leads to: who reads it is refused.

    Args:
        read: the masks inside.
        outputs: inside.
        inner: the inputs inside, masks among them.
        outer: what stands for them outside.
        layer: whose outputs they are.
        batch: the number that stands for the batch size inside.
    """
    after = []
    for mask in (read.live.get(id(t)) for t in outputs):
        made = None if mask is None else _remade(inner, mask, outer)
        if mask is not None and (made is None or (batch and made.shape[0] == batch)):
            made = _input_like(mask)
            made.mask_maker = layer.name
        after.append(made)
    return after


def _reads_masks(
    function: Any, masks: Mapping[int, Any], made: Mapping[int, Any] = MappingProxyType({})
) -> bool:
    """Whether masks of a function's inputs, or those `made` inside, lead to its outputs."""
    if not masks and not made:
        return False
    wanted = _masks_read(_calls(function), masks, made).tensors()
    if {id(t) for t in wanted} & {id(mask) for mask in made.values()}:
        return True
    calls = _calls_between(function.inputs, [*function.outputs, *wanted])
    read = _tensors([wanted, *((c.arguments.args, c.arguments.kwargs) for c in calls)])
    return bool({id(t) for t in read} & {id(mask) for mask in masks.values()})


def _masks_when_run(
    layer: Any, args: Any, kwargs: Any, given: list[Any], mask_of: Callable[[Any], Any]
) -> _Inside:
    """As `_masks_inside`, of a layer that cannot be traced: it runs on two samples.

    Args:
        layer: the layer.
        args: of its call.
        kwargs: of its call.
        given: the tensors among them.
        mask_of: gives the mask that a tensor bears.
    """
    generator = np.random.default_rng(0)

    def run(shown: bool) -> list[Any]:
        values = {}
        for tensor in given:
            shape = [size or 2 for size in tensor.shape]
            number: Any = generator.normal(size=shape)
            if not keras.backend.is_float_dtype(tensor.dtype):
                number = number > 0
            values[id(tensor)] = keras.ops.convert_to_tensor(number, tensor.dtype)
        masked = [t for t in given if mask_of(t) is not None]
        pairs = [(values[id(t)], keras.ops.equal(values[id(mask_of(t))], 1)) for t in masked]
        if shown:
            pairs = [(value, keras.ops.ones_like(mask)) for value, mask in pairs]
        filled = keras.tree.map_structure(lambda x: values.get(id(x), x), (args, kwargs))
        with keras.StatelessScope(), bearing(pairs):
            return keras.tree.flatten(layer(*filled[0], **filled[1]))

    try:
        outputs = run(shown=False)
        generator = np.random.default_rng(0)
        alike = all(np.array_equal(*pair) for pair in zip(outputs, run(shown=True), strict=True))
    except Exception:  # Whatever a user's own class raises.
        return _Inside([], True)
    after = []
    for output in outputs:
        mask = borne_mask(output)
        if mask is not None:
            mask = _input_like(mask)
            mask.mask_maker = layer.name
        after.append(mask)
    return _Inside(after, not alike)


def _are_steps(values: Any, masks: Any) -> bool:
    """Whether values have masks that say nothing about their last axis, or none."""
    return isinstance(values, list | tuple) and all(
        mask is None or len(mask.shape) == len(value.shape) - 1
        for value, mask in zip(values, masks, strict=True)
    )


def _mask_of_joined(values: Sequence[Any], masks: Sequence[Any], axis: int) -> Any:
    """The mask of sequences that are joined, as Keras's, of masks alone.

    Along the features, a step counts where it counts in any; it always does where a sequence has no
    mask. Along the steps, all steps of such a sequence count.
    """
    known = [mask for mask in masks if mask is not None]
    axis %= len(values[0].shape)
    if not known:
        return None
    if axis == len(values[0].shape) - 1:
        return functools.reduce(keras.ops.logical_or, known) if len(known) == len(masks) else None
    pairs = zip(values, masks, strict=True)
    parts = [_all_true(value.shape, known[0], axis) if m is None else m for value, m in pairs]
    return keras.ops.concatenate(parts, axis=axis)


def _all_true(shape: Sequence[int | None], mask: Any, axis: int) -> Any:
    """A mask of values of a shape, of which all steps count.

    Args:
        shape: of the values.
        mask: another, whose shape differs along `axis` at most.
        axis: along which the masks are joined.
    """
    if mask.shape[axis] != shape[axis]:
        column = mask[(slice(None),) * axis + (slice(0, 1),)]
        mask = keras.ops.concatenate([column] * (shape[axis] or 1), axis=axis)
    return keras.ops.logical_or(mask, keras.ops.logical_not(mask))


def is_of_users(layer: Any) -> bool:
    """Whether a layer's class is neither Keras's nor kqat's."""
    return not type(layer).__module__.startswith(("keras.", "kqat.")) and not _is_stock(layer)


def _opens_for_masks(layer: Any, borne: Mapping[int, Any]) -> bool:
    """Whether what a layer does with masks shows in its call alone; `borne` are its arguments'."""
    if is_of_users(layer):
        return bool(borne) or _makes_masks(layer)
    return bool(borne) and takes_masks_off(layer)


def takes_masks_off(layer: Any) -> bool:
    """Whether the call of a stock layer that merges takes the masks off the values that it merges.

    Keras's Multiply, Maximum and Minimum pass over the steps of an input that its mask hides.
    MultiHeadAttention, which does so too, has parameters for what it takes.
    """
    merges = keras.layers.Multiply | keras.layers.Maximum | keras.layers.Minimum
    return isinstance(layer, merges)


def _makes_masks(layer: Any) -> bool:
    """Whether a custom layer may give its outputs a mask of its own making."""
    if any(
        isinstance(part, keras.layers.Masking) or getattr(part, "mask_zero", False)
        for part in parts_of(layer)
    ):
        return True
    own = [cls for cls in type(layer).__mro__ if not cls.__module__.startswith("keras.")]
    codes = [f.__code__ for cls in own for f in vars(cls).values() if inspect.isfunction(f)]
    return any({"_keras_mask", "set_keras_mask"} & set(code.co_names) for code in codes)


def _given(call: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = call_signature(call.operation)
    # Keras lets a caller hand `training` to a layer that takes none.
    kwargs = {k: v for k, v in call.arguments.kwargs.items() if k != "training"}
    return signature.bind_partial(*call.arguments.args, **kwargs).arguments


def attach_masks(layer: Any, args: Any, kwargs: Any) -> None:
    """Gives values the masks that stand beside them; Keras's MultiHeadAttention reads no others."""
    given = call_signature(layer).bind_partial(*args, **kwargs).arguments
    for name, value in given.items():
        if (mask := given.get(f"{name}_mask")) is not None:
            value._keras_mask = mask


def told_output_shape(layer: keras.layers.Lambda) -> Any:
    """The `output_shape` that a Lambda was given: a shape, a function of one, or `None`."""
    return layer._output_shape


def passes_mask_by(layer: Any) -> bool:
    """Whether a layer takes a mask and computes the same without it."""
    if isinstance(layer, keras.layers.Lambda):
        return "mask" not in inspect.signature(layer.function).parameters
    if isinstance(layer, keras.layers.TimeDistributed):
        return "mask" not in call_signature(layer.layer).parameters
    return False


def _tensors(structure: Any) -> list[Any]:
    return [t for t in keras.tree.flatten(structure) if isinstance(t, keras.KerasTensor)]


_COMPARISONS = ("Equal", "Greater", "GreaterEqual", "Less", "LessEqual", "NotEqual")
_IN_32_BITS = {"float64": "float32", "int64": "int32"}


def typed_inputs(opened: Opened) -> list[tuple[Any, str]]:
    """Inputs with their types: what an Embedding reads holds indexes, int32 or bool.

    Beside Embeddings, only comparisons may read it, as an Embedding's own mask is one. Numbers of
    64 bits are taken in 32, as kernels for indexes and Keras's float32 have them.
    """
    readers: dict[int, list[Any]] = {id(t): [] for t in opened.tensors}
    for operation in opened.function.operations:
        for call in operation._inbound_nodes:
            for tensor in call.input_tensors:
                readers.get(id(tensor), []).append(call)
    typed = []
    for tensor in opened.tensors:
        kinds = [
            "Embedding"
            if isinstance(call.operation, keras.layers.Embedding) and not _is_reversed(call)
            else type(call.operation).__name__
            for call in readers[id(tensor)]
        ]
        indexes = "Embedding" in kinds and {"Embedding", *_COMPARISONS}.issuperset(kinds)
        given = _IN_32_BITS.get(str(tensor.dtype), str(tensor.dtype))
        typed.append((tensor, "int32" if indexes and given != "bool" else given))
    return typed


def with_constants(function: Any, *specs: Any) -> Any:
    """The `ConcreteFunction` that TensorFlow traces of a function, its variables made constants.

    TensorFlow has no public function for that.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    # Without AutoGraph, which would take a branch on all numbers for one on each.
    whole = tf.function(function, autograph=False)
    return convert_variables_to_constants_v2(whole.get_concrete_function(*specs))


def frozen_function(function: Any, shape: tuple[int | None, ...]) -> tuple[bytes, str, str]:
    """The serialized `GraphDef` of a function of one float32 tensor; its input's and output's name.

    Its variables are made constants.
    """
    import tensorflow as tf

    fixed = with_constants(function, tf.TensorSpec(shape, tf.float32))
    graph = fixed.graph.as_graph_def().SerializeToString()
    return graph, fixed.inputs[0].name, fixed.outputs[0].name


def option(operation: Any, name: str, given: Any = None) -> Any:
    """An option of an operation; `given` where Keras before 3.12 has it in the call."""
    return getattr(operation, name, given)


def depth_to_space(x: Any, block_size: int) -> Any:
    """`keras.ops.depth_to_space` of channels last; TensorFlow's before Keras 3.14."""
    return _blocks("depth_to_space", x, block_size)


def space_to_depth(x: Any, block_size: int) -> Any:
    """`keras.ops.space_to_depth` of channels last; TensorFlow's before Keras 3.14."""
    return _blocks("space_to_depth", x, block_size)


def _blocks(name: str, x: Any, block_size: int) -> Any:
    if hasattr(keras.ops, name):
        return getattr(keras.ops, name)(x, block_size, data_format="channels_last")
    import tensorflow as tf

    return getattr(tf.nn, name)(x, block_size)


def maker_name(tensor: Any) -> str:
    """Name of the layer or operation that makes a symbolic tensor."""
    return str(tensor._keras_history.operation.name)


def layer_behind(tensor: Any, name: str) -> Any:
    """The nearest layer called `name` among those that make a symbolic tensor, or `None`."""
    waiting, seen = [tensor], set()
    while waiting:
        history = getattr(waiting.pop(0), "_keras_history", None)
        if history is None or (id(history.operation), history.node_index) in seen:
            continue
        if history.operation.name == name:
            return history.operation
        seen.add((id(history.operation), history.node_index))
        nodes = history.operation._inbound_nodes
        if history.node_index < len(nodes):
            waiting += nodes[history.node_index].input_tensors
    return None


def maker_of(tensor: Any) -> tuple[Any, list[Any]]:
    """The layer or operation that makes a symbolic tensor, and its inputs; `None` for others."""
    history = getattr(tensor, "_keras_history", None)
    if history is None:
        return None, []
    nodes = history.operation._inbound_nodes
    made = history.node_index < len(nodes)
    return history.operation, list(nodes[history.node_index].input_tensors) if made else []


def operations_between(inputs: Any, outputs: Any) -> list[Any]:
    """The layers and operations that compute `outputs` from `inputs`, in the order they run."""
    operations = (call.operation for call in _calls_between(inputs, outputs))
    return list({id(operation): operation for operation in operations}.values())


def values_between(
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    values: Sequence[Any],
    used: Callable[[Any], Any] = lambda operation: operation,
) -> list[Any]:
    """The values of symbolic tensors where `inputs`, from which they are computed, have `values`.

    `used` is what is called in the place of a layer or operation. `keras.Function` does it as well,
    but before Keras 3.14 only for inputs of a model.
    """
    known = dict(zip(map(id, inputs), values, strict=True))
    for call in _calls_between(inputs, outputs):
        args, kwargs = keras.tree.map_structure(
            lambda x: known.get(id(x), x), (call.arguments.args, call.arguments.kwargs)
        )
        if isinstance(call.operation, keras.layers.MultiHeadAttention):
            attach_masks(call.operation, args, kwargs)
        results = keras.tree.flatten(unmasked(used(call.operation)(*args, **kwargs)))
        known.update((id(t), y) for t, y in zip(call.outputs, results, strict=True))
    return [known[id(t)] for t in outputs]


def _calls_between(inputs: Any, outputs: Any) -> list[Any]:
    """The calls that compute `outputs` from `inputs`, in the order of a `keras.Function`."""
    return calls_to(outputs, {id(t) for t in _tensors(inputs)})


def calls_to(outputs: Any, given: Collection[int]) -> list[Any]:
    """As `_calls_between`; `given` are the identities of the inputs."""
    first_seen: dict[int, int] = {}
    after_inputs: list[Any] = []
    waiting = [(call, False) for call in reversed(_makers(_tensors(outputs), given))]
    while waiting:
        call, inputs_done = waiting.pop()
        if inputs_done:
            after_inputs.append(call)
        elif id(call) not in first_seen:
            first_seen[id(call)] = len(first_seen)
            waiting.append((call, True))
            waiting += [(c, False) for c in reversed(_makers(call.input_tensors, given))]
    depths: dict[int, int] = {}
    for call in reversed(after_inputs):
        depth = depths.setdefault(id(call), 0)
        for maker in _makers(call.input_tensors, given):
            depths[id(maker)] = max(depths.get(id(maker), 0), depth + 1)
    return sorted(after_inputs, key=lambda c: (-depths[id(c)], first_seen[id(c)]))


def _makers(tensors: Iterable[Any], given: Collection[int]) -> list[Any]:
    """The calls that make symbolic tensors, without inputs of a model and what is given."""
    made = [t._keras_history for t in tensors if id(t) not in given]
    calls = (h.operation._inbound_nodes[h.node_index] for h in made)
    return [call for call in calls if not isinstance(call.operation, keras.layers.InputLayer)]


def inner_function(layer: Any) -> Any:
    """The Functional inside a Sequential, or a Functional itself; `None` for anything else.

    It is `None` as well for a user's subclass of either whose `call` is his own.
    """
    function = _functional(layer)
    return None if function is None or _has_own_call(layer) else function


def _functional(layer: Any) -> Any:
    function = getattr(layer, "_functional", None) or layer
    return function if hasattr(function, "_nodes_by_depth") else None


def moves_batch(function: Any) -> bool:
    """Whether operations of a Functional put something else than the batch on its first axis.

    Window partitions do, where they are written outside of a layer: `(batch, windows, …)` becomes
    `(batch * windows, …)`. Only a batch of fixed size tells where it went.
    """
    if any(None in t.shape[1:] for t in function.inputs):
        return False
    return any(
        None in t.shape[1:] or _is_merged(call, t)
        for call in _calls(function)
        if not isinstance(call.operation, keras.layers.Layer)
        for t in call.outputs
    )


def _is_merged(call: Any, made: Any) -> bool:
    """Whether a reshaping changes how many numbers a sample has."""
    if type(call.operation).__name__ != "Reshape" or len(call.input_tensors) != 1:
        return False
    given = call.input_tensors[0].shape
    return (
        made.shape[:1] == given[:1] == (None,)
        and None not in given[1:]
        and (math.prod(made.shape[1:]) != math.prod(given[1:]))
    )


def _has_own_call(model: Any) -> bool:
    """Whether the `call` of a model is that of a user's class."""
    owner = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    return not owner.__module__.startswith("keras.")


def average_anew(optimizer: Any, variables: Sequence[keras.Variable]) -> None:
    """Lets an optimizer with `use_ema=True` average these variables from their values now on.

    Args:
        optimizer: any, also one in a `LossScaleOptimizer`, or `None`.
        variables: those that were given other values than the optimizer's.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not variables or not getattr(optimizer, "use_ema", False) or not optimizer.built:
        return
    changed = {id(variable) for variable in variables}
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(optimizer._trainable_variables, averages, strict=True):
        if id(variable) in changed and average is not None:
            average.assign(variable)


# The module that files of Keras 3 name for a Functional model, a class that has no public name.
FUNCTIONAL_MODULE = "keras.src.models.functional"
