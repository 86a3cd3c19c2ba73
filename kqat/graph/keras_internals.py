"""Models and layers as functions of symbolic tensors, which Keras records call by call.

A Functional model is one already. A subclassed model, or a custom layer, becomes one by running
its `call` (not `__call__`) on symbolic tensors.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import operator
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kqat.base import ModelError
from kqat.graph.batch_axis import BatchFirst
from kqat.graph.tensorflow_calls import tensorflow_traced


@dataclasses.dataclass(frozen=True)
class Opened:
    """A function of symbolic tensors, with the structures in which it takes and returns them.

    `tensors` are the inputs in the function's order, and `weights` the values that no input of the
    model reaches, by the identity of their symbolic tensor: variables that `call` reads, and what
    it computes from them. `batch` is the number that stood for the batch size. `owners` says by
    which path a layer inside is reached. `fresh` says that its operations were made just now, and
    will bear other names the next time. `sequence` says that it is a Sequential: what `training`
    stands in its calls is not the user's, but that of the call in which it was built.
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


def open_model(model: Any) -> Opened:
    if not isinstance(model, keras.Model):
        legacy = any(base.__module__.startswith("tf_keras") for base in type(model).__mro__)
        raise ModelError(
            f"Expected a keras.Model (Keras 3). Received: {type(model).__module__}."
            f"{type(model).__name__}."
            + (
                " It is a Keras 2 (tf_keras) model: kqat.load_model(model) makes a Keras 3 model "
                "of it."
                if legacy
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
            return open_call(model, (function.input,), {})
        return opened_function(function, model)
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise ModelError(
            f"Expected a subclassed model that was called on data of one argument. Received: "
            f"'{model.name}' of type {type(model).__name__}, of whose input Keras recorded no "
            f"shape{_control_flow(model)}. Call it once on data, or use keras.Model(x, "
            "model.call(x)) with x = keras.Input(shape)."
        )
    return open_call(model, (_inputs_of_shape(shape),), {})


def input_struct(model: Any) -> Any:
    """A model's inputs, as symbolic tensors in the structure that it takes; `()` if unknown."""
    function = inner_function(model)
    if function is not None:
        return function.input
    shape = (model.get_build_config() or {}).get("input_shape")
    return () if shape is None else _inputs_of_shape(shape)


def opened_function(function: Any, model: Any) -> Opened:
    """A Functional model, which is open already, or the one inside a Sequential."""
    sequence = isinstance(model, keras.Sequential)
    return Opened(function, function.input, function.output, function.inputs, sequence=sequence)


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


def _inputs_of_shape(shape: Any) -> Any:
    """Symbolic inputs in the structure of `shape`, named as its keys are."""
    if isinstance(shape, dict):
        return {key: keras.Input(s[1:], name=key) for key, s in shape.items()}
    if all(isinstance(s, list | tuple) for s in shape):
        return [keras.Input(s[1:], name=f"input_{i}") for i, s in enumerate(shape)]
    return keras.Input(shape[1:], name="input")


def open_call(
    layer: Any, args: Any, kwargs: Any, inlined: Callable[[Any], bool] = lambda layer: False
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

    Raises:
        ModelError: if it does not compute on them; quotes the line that does not.
    """
    given = {id(t): t for t in _tensors((args, kwargs))}
    batch = _batch_size(layer, list(given.values()))
    fresh = {
        key: keras.Input(batch_shape=_of_batch(t, batch), dtype=t.dtype, name=name)
        for (key, t), name in zip(given.items(), _input_names(given.values()), strict=True)
    }
    args, kwargs = keras.tree.map_structure(lambda x: fresh.get(id(x), x), (args, kwargs))
    inside = [part for part in parts_of(layer) if part is layer or inlined(part)]
    tensors = list(fresh.values())
    read = {id(v): v for v in keras.tree.flatten((args, kwargs)) if isinstance(v, keras.Variable)}
    stand_ins = {key: keras.Input(batch_shape=v.shape, dtype=v.dtype) for key, v in read.items()}
    args, kwargs = keras.tree.map_structure(lambda x: stand_ins.get(id(x), x), (args, kwargs))
    given_weights = {key: (stand_ins[key], v) for key, v in read.items()}
    function, output, weights, hidden = _called(layer, args, kwargs, tensors, inside, given_weights)
    if hidden:
        # A layer that the graph does not show, whose variables are read from outside, or which
        # looks up constants.
        owners = [p for p in parts_of(layer) if any(id(v) in hidden for v in _own_variables(p))]
        inside = [*inside, *owners]
        function, output, weights, _ = _called(layer, args, kwargs, tensors, inside, given_weights)
    if _is_moved(function, batch, weights):
        function, output, weights = _with_batch_first(
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
    )


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
) -> tuple[Any, Any, dict[int, Any]]:
    """The function, its output structure and the weights among its outputs, the batch first."""
    runs = BatchFirst(batch, weights, f"{layer.name}' of type '{type(layer).__name__}")
    runs.run(_calls(function), tensors)
    made = {key: tensor for key, (tensor, _) in runs.known.items()}
    for tensor in _tensors(output):
        if id(tensor) in made and tensor.shape[0] != batch:
            raise ModelError(
                f"Expected outputs with the batch alone on their first axis. Received: "
                f"'{layer.name}' of type {type(layer).__name__}, one of whose outputs has the "
                f"shape {tuple(tensor.shape)}, where {batch} stands for the batch. Undo inside it "
                "what moved the batch."
            )
    output = keras.tree.map_structure(lambda t: made.get(id(t), t), output)
    held = {id(t): t for t in _tensors(output) if id(t) in weights}
    with _names_apart(layer, output):
        function = _function([*tensors, *held.values()], keras.tree.flatten(output))
    return function, output, {key: weights[key] for key in held}


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


def parts_of(layer: Any) -> list[Any]:
    """`layer` and all layers inside it, in an order that copies share."""
    return list({id(part): part for part in layer._flatten_layers()}.values())


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
) -> tuple[Any, Any, dict[int, Any], dict[int, str]]:
    """`layer.call` with the variables of `inside` as symbolic tensors.

    `given` are variables among the arguments, each with the symbolic tensor that stands for it.

    Returns:
        The function of `tensors` and of the variables, the output structure, values of tensors
        that depend on variables alone, and the variables that were read without being seen.
    """
    weights: dict[int, tuple[Any, Any]] = dict(given)
    try:
        with (
            _as_inputs(inside, weights),
            _calls_inlined(layer, inside),
            _shapes_told(layer),
            _keys_of_tensors(),
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
    with _names_apart(layer, output):
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
    lines = (inner.group(1) if inner else text).strip().splitlines()
    return lines[0] if lines else f"{type(error).__name__}."


def _read(operation: Any) -> list[Any]:
    return [t for call in operation._inbound_nodes for t in call.input_tensors]


def _symbolic_output(value: Any, layer: Any, weights: dict[int, tuple[Any, Any]]) -> Any:
    """An output as a symbolic tensor: of a constant, the tensor of a variable that holds it."""
    if isinstance(value, keras.KerasTensor):
        return value
    if not keras.ops.is_tensor(value) and not isinstance(value, np.ndarray | keras.Variable):
        raise ModelError(
            f"Expected tensors as outputs of '{layer.name}'. Received: {type(value).__name__}."
        )
    variable = value
    if not isinstance(value, keras.Variable):
        variable = keras.Variable(np.asarray(value), trainable=False, name="constant")
    dtype = variable.dtype
    tensor = keras.Input(batch_shape=variable.shape, dtype=dtype)
    weights[id(variable)] = tensor, variable
    return tensor


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
            return type(value)(swapped(v, owner) for v in value)
        if isinstance(value, dict) and any(isinstance(v, keras.Variable) for v in value.values()):
            return {key: swapped(v, owner) for key, v in value.items()}
        return value

    kept: list[tuple[Any, str, Any]] = []
    internal = {"_trainable_variables", "_non_trainable_variables", "_metrics", "_layers"}
    try:
        for owner in owners:
            for name, value in list(vars(owner).items()):
                if name in internal:
                    continue
                new = swapped(value, owner)
                if new is not value:
                    kept.append((owner, name, value))
                    object.__setattr__(owner, name, new)
        yield
    finally:
        for owner, name, value in kept:
            object.__setattr__(owner, name, value)


@contextlib.contextmanager
def _calls_inlined(layer: Any, inside: list[Any]) -> Iterator[None]:
    """Lets a call of `layer`, and of those of `inside`, show what it does in place of itself.

    Keras does the rest of a call as ever: it builds, hands on masks and `training`. It only records
    no call of theirs, which may return anything.
    """
    opened = {id(part): part for part in inside if part is layer or not _is_stock(part)}
    home: Any = sys.modules[keras.layers.Layer.__module__]
    record = home.Node

    def recorded(operation: Any, **call: Any) -> Any:
        return None if id(operation) in opened else record(operation=operation, **call)

    def called_through(part: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: part.call(*args, **kwargs)

    try:
        home.Node = recorded
        for part in opened.values():
            object.__setattr__(part, "symbolic_call", called_through(part))
        yield
    finally:
        home.Node = record
        for part in opened.values():
            object.__delattr__(part, "symbolic_call")


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

    try:
        home.__getitem__ = indexed
        yield
    finally:
        home.__getitem__ = index


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

    try:
        for part in parts:
            object.__setattr__(part, "compute_output_shape", told(part))
        yield
    finally:
        for part in parts:
            object.__delattr__(part, "compute_output_shape")


@contextlib.contextmanager
def _names_apart(layer: Any, outputs: Any) -> Iterator[None]:
    """Gives all that computes `outputs` names of its own meanwhile, as Keras demands of a function.

    These are the layers inside `layer`, and those that its call makes: one that is called for each
    block may make a layer of the same name each time.
    """
    parts = {id(part): part for part in (*parts_of(layer), *operations_between((), outputs))}
    names = [(part, part.name) for part in parts.values()]
    try:
        for index, (part, name) in enumerate(names):
            object.__setattr__(part, "name", f"kqat_{index}_{name}")
        yield
    finally:
        for part, name in names:
            object.__setattr__(part, "name", name)


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
    variable, trainable as they are.
    """
    live = set(given)
    found: dict[int, Any] = dict(variables)
    computed: dict[int, Any] = {}
    wanted: dict[int, Any] = {}
    values: dict[int, np.ndarray] = {}
    constants: list[Any] = []  # the tensors of `values`
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
    wanted.update((id(t), t) for t in function.outputs if id(t) in computed)
    for key in [key for key in wanted if key in values]:
        del wanted[key]
        found[key] = keras.Variable(values[key], trainable=False, name="constant")
    if wanted:
        inputs = [*(t for t in function.inputs if id(t) in variables), *constants]
        known = {**variables, **values}
        results = values_between(
            inputs, list(wanted.values()), [keras.ops.cast(known[id(t)], t.dtype) for t in inputs]
        )
        for (key, _), value in zip(wanted.items(), results, strict=True):
            sources = list({id(v): v for v in computed[key]}.values())
            name = "_".join(v.name for v in sources[:1]) or "constant"
            trained = any(v.trainable for v in sources)
            found[key] = keras.Variable(np.asarray(value), trainable=trained, name=name)
    return {**dict.fromkeys(computed), **found}


def _first_of_batch(variable: Any, batch: int, layer: Any) -> Any:
    """A value without the batch axis along which it was repeated."""
    if variable is None or not len(variable.shape) or variable.shape[0] % batch:
        return variable
    array = without_batch(np.asarray(variable), batch)
    if array is None:
        raise ModelError(
            f"Expected weights that are the same for all samples in '{layer.name}' of type "
            f"{type(layer).__name__}. Received: {variable.name} of shape {tuple(variable.shape)}, "
            "which was computed with the batch size."
        )
    return keras.Variable(array, trainable=variable.trainable, name=variable.name)


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
    return keras.backend.is_float_dtype(variable.dtype)


def _where(error: Exception) -> str:
    """The last line of the user's own code that led to `error`."""
    inside = {str(Path(str(module.__file__)).parent) for module in (keras, np)}
    inside |= {str(Path(__file__).parent)}
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.startswith(folder) for folder in inside)
        and "tensorflow" not in frame.filename
    ]
    if not frames:
        return "Keras says"
    return (
        f"line {frames[-1].lineno} of {Path(frames[-1].filename).name}, `{frames[-1].line}`, says"
    )


def calls_in_order(function: Any, known: Collection[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The calls of `function`, each after those whose tensors or masks it reads.

    Beside each stand the masks that Keras hands to it though it records none.

    Args:
        function: a Functional model or a `keras.Function`.
        known: identities of tensors, to which the caller adds a call's outputs before the next.

    Raises:
        ModelError: if a mask comes out of a model inside the model.
    """
    calls = _calls(function)
    masks, _ = _masks_read(calls)
    given = [t for found in masks.values() for t in _tensors(found)]
    if given:
        # What computes a mask leads to no output.
        calls = _calls(_reaching(function, given))
    while calls:
        waiting = []
        for call in calls:
            found = masks.get(id(call), {})
            arguments = (call.arguments.args, call.arguments.kwargs, found)
            if all(id(t) in known for t in _tensors(arguments)):
                yield call, found
            else:
                waiting.append(call)
        assert len(waiting) < len(calls), "a mask that depends on its own reader"
        calls = waiting


def _calls(function: Any) -> list[Any]:
    by_depth = function._nodes_by_depth
    ordered = (call for depth in sorted(by_depth, reverse=True) for call in by_depth[depth])
    return [call for call in ordered if not call.is_input]


def _reaching(function: Any, masks: list[Any]) -> Any:
    try:
        return keras.Function(function.inputs, [*function.outputs, *masks])
    except ValueError as error:
        raise ModelError(
            "Expected masks that are computed from a model's own inputs. Received: one that comes "
            "out of a custom layer or a model inside the model. Call the layer that makes the mask "
            "(mask_zero, Masking) in the outer model, or leave it out."
        ) from error


def masks_of(function: Any, tensors: Sequence[Any]) -> list[Any]:
    """The masks that tensors inside a function bear when it runs, symbolic; `None` for none."""
    _, live = _masks_read(_calls(function))
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
    try:
        calls = _calls(keras.Function(list(inputs), mask))
    except ValueError:
        return None
    if any(isinstance(call.operation, keras.layers.Layer) for call in calls):
        return None
    known = {id(t): new for t, new in zip(inputs, given, strict=True)}
    for call in calls:
        arguments = call.arguments.args, call.arguments.kwargs
        args, kwargs = keras.tree.map_structure(lambda t: known.get(id(t), t), arguments)
        made = _tensors(call.operation(*args, **kwargs))
        known.update((id(t), new) for t, new in zip(call.outputs, made, strict=True))
    return known[id(mask)]


def _masks_read(calls: list[Any]) -> tuple[dict[int, dict[str, Any]], dict[int, Any]]:
    """Call -> the masks that tensors bring along: of one tensor `mask`, of several `x_mask`.

    The second dict has the mask that each tensor bears, by its identity.

    Keras does this when a model runs, call by call: MultiHeadAttention takes the masks off the
    tensors that it reads, so that those who come later see none. What symbolic tensors bear is
    what they had before any call ran.
    """
    live: dict[int, Any] = {}
    masks: dict[int, dict[str, Any]] = {}

    def mask_of(tensor: Any) -> Any:
        return live.get(id(tensor))

    for call in calls:
        layer = call.operation
        if not isinstance(layer, keras.layers.Layer):
            continue
        given = _given(call)
        tensors = {k: v for k, v in given.items() if _tensors(v)}
        if _tensors(keras.tree.map_structure(mask_of, list(tensors.values()))):
            _check_reads_no_mask(layer)
        parameters = inspect.signature(layer.call).parameters
        found = {}
        for key, value in tensors.items():
            name = "mask" if len(tensors) == 1 else f"{key}_mask"
            mask = keras.tree.map_structure(mask_of, value)
            if name in parameters and given.get(name) is None and _tensors(mask):
                found[name] = mask
        masks[id(call)] = found
        first = next(iter(given.values()), None)
        before = keras.tree.map_structure(mask_of, first)
        read = _tensors(list(given.values()))
        if inner_function(layer) is not None:
            after = _masks_of_inner(inner_function(layer), read)
        elif type(layer) is keras.layers.Concatenate and layer.axis in (-1, 2):
            after = [_mask_of_joined(before)]
        elif _may_hand_out_mask(layer):
            after = _unknown_masks(call)
        elif all(mask_of(t) is getattr(t, "_keras_mask", None) for t in read):
            after = [getattr(t, "_keras_mask", None) for t in call.outputs]
        elif layer.supports_masking:
            after = keras.tree.flatten(layer.compute_mask(first, before))
        else:
            after = []
        live.update((id(t), m) for t, m in zip(call.outputs, after, strict=False))
        if isinstance(layer, keras.layers.MultiHeadAttention):
            live.update((id(t), None) for t in _tensors(list(tensors.values())))
    return masks, live


def _masks_of_inner(function: Any, given: list[Any]) -> list[Any]:
    """The masks of the outputs of a model inside, made of what it is called on.

    The symbolic outputs of its call bear none. What it bears when it runs is what its layers made.
    Where a layer makes a mask, there is a stand-in, as for `_unknown_masks`.
    """
    after = []
    for mask in masks_of(function, keras.tree.flatten(function.outputs)):
        made = None if mask is None else _remade(function.inputs, mask, given)
        after.append(_stand_in(mask) if made is None and mask is not None else made)
    return after


def _stand_in(mask: Any) -> Any:
    """A mask that no input leads to: who reads it is refused."""
    return keras.Input(mask.shape[1:], dtype="bool")


def _mask_of_joined(masks: Any) -> Any:
    """The mask of sequences that are joined along their features, as Keras's, of masks alone.

    A step counts where it counts in any; it always does where a sequence has no mask.
    """
    known = [mask for mask in keras.tree.flatten(masks) if mask is not None]
    if len(known) < len(masks):
        return None
    return functools.reduce(keras.ops.logical_or, known)


def _may_hand_out_mask(layer: Any) -> bool:
    """Whether a custom layer, of which Keras knows no mask, has a layer inside that makes one."""
    if _is_stock(layer) or layer.supports_masking:
        return False
    return any(
        isinstance(part, keras.layers.Masking) or getattr(part, "mask_zero", False)
        for part in parts_of(layer)
    )


def _unknown_masks(call: Any) -> list[Any]:
    """Stand-ins for the masks that layers inside a custom layer make."""
    try:
        opened = open_call(call.operation, call.arguments.args, call.arguments.kwargs)
    except ModelError:  # It is refused later, by name, or stays float.
        return []
    masks = masks_of(opened.function, keras.tree.flatten(opened.output))
    return [None if mask is None else _stand_in(mask) for mask in masks]


def _check_reads_no_mask(layer: Any) -> None:
    """Refuses a custom layer that takes masks off its inputs itself.

    Raises:
        ModelError: if its own code does that.
    """
    if _is_stock(layer):
        return
    own = [cls for cls in type(layer).__mro__ if not cls.__module__.startswith("keras.")]
    functions = [f for cls in own for f in vars(cls).values() if inspect.isfunction(f)]
    for function in functions:
        code = function.__code__
        if {"_keras_mask", "get_keras_mask"} & {*code.co_names, *map(str, code.co_consts)}:
            raise ModelError(
                f"Expected masks as arguments. Received: layer '{layer.name}' of type "
                f"{type(layer).__name__}, whose {function.__name__} takes the mask off its "
                "input, where no one sees it. Let call have an argument `mask`: Keras hands it "
                f"over. Or leave the layer float with policy={{'{layer.name}': None}}."
            )


def _given(call: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(call.operation.call)
    # Keras lets a caller hand `training` to a layer that takes none.
    kwargs = {k: v for k, v in call.arguments.kwargs.items() if k != "training"}
    return signature.bind_partial(*call.arguments.args, **kwargs).arguments


def attach_masks(layer: Any, args: Any, kwargs: Any) -> None:
    """Gives values the masks that stand beside them; Keras's MultiHeadAttention reads no others."""
    given = inspect.signature(layer.call).bind_partial(*args, **kwargs).arguments
    for name, value in given.items():
        if (mask := given.get(f"{name}_mask")) is not None:
            value._keras_mask = mask


def passes_mask_by(layer: Any) -> bool:
    """Whether a layer takes a mask and computes the same without it."""
    if isinstance(layer, keras.layers.Lambda):
        return "mask" not in inspect.signature(layer.function).parameters
    if isinstance(layer, keras.layers.TimeDistributed):
        return "mask" not in inspect.signature(layer.layer.call).parameters
    return False


def _tensors(structure: Any) -> list[Any]:
    return [t for t in keras.tree.flatten(structure) if isinstance(t, keras.KerasTensor)]


def typed_inputs(opened: Opened) -> list[tuple[Any, str]]:
    """Inputs with their types: what only an Embedding reads holds indexes, and so is int32."""
    readers: dict[int, list[Any]] = {id(t): [] for t in opened.tensors}
    for operation in opened.function.operations:
        for call in operation._inbound_nodes:
            for tensor in call.input_tensors:
                readers.get(id(tensor), []).append(operation)
    typed = []
    for tensor in opened.tensors:
        operations = readers[id(tensor)]
        indexes = operations and all(isinstance(o, keras.layers.Embedding) for o in operations)
        # TFLite has no float64 inputs; numbers of that type are converted as Keras does.
        floats = "float32" if tensor.dtype == "float64" else str(tensor.dtype)
        typed.append((tensor, "int32" if indexes else floats))
    return typed


def frozen_function(function: Any, shape: tuple[int | None, ...]) -> tuple[bytes, str, str]:
    """What TensorFlow traces of a function of one float32 tensor, its variables made constants.

    The serialized `GraphDef`, and the names of its input and output tensors. TensorFlow has no
    public function for the constants of a `ConcreteFunction`.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    # Without AutoGraph, which would take a branch on all numbers for one on each.
    whole = tf.function(function, autograph=False)
    fixed = convert_variables_to_constants_v2(
        whole.get_concrete_function(tf.TensorSpec(shape, tf.float32))
    )
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
    inputs: Sequence[Any], outputs: Sequence[Any], values: Sequence[Any]
) -> list[Any]:
    """The values of symbolic tensors where `inputs`, from which they are computed, have `values`.

    `keras.Function` does it as well, but before Keras 3.14 only for inputs of a model.
    """
    known = dict(zip(map(id, inputs), values, strict=True))
    for call in _calls_between(inputs, outputs):
        args, kwargs = keras.tree.map_structure(
            lambda x: known.get(id(x), x), (call.arguments.args, call.arguments.kwargs)
        )
        results = keras.tree.flatten(call.operation(*args, **kwargs))
        known.update((id(t), y) for t, y in zip(call.outputs, results, strict=True))
    return [known[id(t)] for t in outputs]


def _calls_between(inputs: Any, outputs: Any) -> list[Any]:
    """The calls that compute `outputs` from `inputs`, in the order of a `keras.Function`."""
    given = {id(t) for t in _tensors(inputs)}
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
    """The Functional inside a Sequential, or a Functional itself; `None` for anything else."""
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


# The module that files of Keras 3 name for a Functional model, a class that has no public name.
FUNCTIONAL_MODULE = "keras.src.models.functional"
