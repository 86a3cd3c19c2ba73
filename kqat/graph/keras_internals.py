"""Models and layers as functions of symbolic tensors, which Keras records call by call.

A Functional model is one already. A subclassed model, or a custom layer, becomes one by running
its `call` (not `__call__`) on symbolic tensors.
"""

import ast
import dataclasses
import inspect
import textwrap
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kqat.base import ModelError


@dataclasses.dataclass(frozen=True)
class Opened:
    """A function of symbolic tensors, with the structures in which it takes and returns them.

    `learned` are the variables that it computes with in no layer that the graph shows; `fresh`
    says that its operations were made just now, and will bear other names the next time.
    """

    function: Any
    input: Any
    output: Any
    learned: tuple[Any, ...] = ()
    fresh: bool = False


def open_model(model: Any) -> Opened:
    if not isinstance(model, keras.Model):
        legacy = any(base.__module__.startswith("tf_keras") for base in type(model).__mro__)
        raise ModelError(
            f"Expected a keras.Model (Keras 3). Received: {type(model).__module__}."
            f"{type(model).__name__}."
            + (" It is a Keras 2 (tf_keras) model: rebuild it with Keras 3." if legacy else "")
        )
    if not model.built:
        raise ModelError(
            f"Expected a built model. Received: '{model.name}', which has no weights yet. Begin "
            "it with keras.Input(shape), or call it once on data."
        )
    function = inner_function(model)
    if function is not None:
        return Opened(function, function.input, function.output)
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise ModelError(
            f"Expected a subclassed model that was called on data of one argument. Received: "
            f"'{model.name}' of type {type(model).__name__}, of whose input Keras recorded no "
            f"shape{_control_flow(model)}. Call it once on data, or use keras.Model(x, "
            "model.call(x)) with x = keras.Input(shape)."
        )
    return open_call(model, (_inputs_of_shape(shape),), {})


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


def open_call(layer: Any, args: Any, kwargs: Any) -> Opened:
    """`layer.call` on symbolic arguments.

    Raises:
        ModelError: if it does not compute on them; quotes the line that does not.
    """
    try:
        output = layer.call(*args, **kwargs)
    except Exception as error:  # Whatever a user's own class raises.
        raise ModelError(
            f"Expected a call made of layers and keras.ops that runs on symbolic tensors. "
            f"Received: '{layer.name}' of type {type(layer).__name__}, where {_where(error)}: "
            f"{str(error).strip().splitlines()[0]} Use keras.ops throughout, and keras.ops.where "
            "in place of Python's control flow on values."
        ) from error
    tensors = [t for t in keras.tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
    flat = keras.tree.flatten(output)
    if not all(isinstance(t, keras.KerasTensor) for t in flat):
        raise ModelError(
            f"Expected every output of '{layer.name}' to depend on its input. Received: "
            f"{[type(t).__name__ for t in flat]}."
        )
    function = keras.Function(tensors, flat)
    shown = {id(v) for operation in function.operations for v in _variables(operation)}
    learned = tuple(v for v in layer.variables if id(v) not in shown and _is_float(v))
    return Opened(function, args[0] if len(args) == 1 else list(args), output, learned, True)


def with_learned(structure: Any, learned: tuple[Any, ...], found: set[int]) -> Any:
    """`structure` with a variable for each constant that holds the first rows of a hidden one.

    `Embedding(n, d)(arange(n))` runs at once and leaves but numbers, which have to be trained.
    """

    def named(value: Any) -> Any:
        if not learned or not keras.ops.is_tensor(value) or isinstance(value, keras.KerasTensor):
            return value
        array = np.asarray(value)
        for variable in learned:
            rows = np.asarray(variable).reshape(-1)[: array.size]
            if array.ndim and np.array_equal(rows, array.reshape(-1)):
                found.add(id(variable))
                return keras.Variable(array, trainable=variable.trainable, name=variable.name)
        return value

    return keras.tree.map_structure(named, structure)


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
    masks = _masks_read(calls)
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
            "out of a model inside the model. Call its layers in the outer model, or leave "
            "mask_zero and Masking out."
        ) from error


def _masks_read(calls: list[Any]) -> dict[int, dict[str, Any]]:
    """Call -> the masks that tensors bring along: of one tensor `mask`, of several `x_mask`.

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
        if all(mask_of(t) is getattr(t, "_keras_mask", None) for t in read):
            after = [getattr(t, "_keras_mask", None) for t in call.outputs]
        elif layer.supports_masking:
            after = keras.tree.flatten(layer.compute_mask(first, before))
        else:
            after = []
        live.update((id(t), m) for t, m in zip(call.outputs, after, strict=False))
        if isinstance(layer, keras.layers.MultiHeadAttention):
            live.update((id(t), None) for t in _tensors(list(tensors.values())))
    return masks


def _given(call: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(call.operation.call)
    return signature.bind_partial(*call.arguments.args, **call.arguments.kwargs).arguments


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


def hands_on_mask(model: Any) -> bool:
    """Whether Keras may leave steps of an output out of losses and metrics, by a mask."""
    outputs = getattr(inner_function(model), "outputs", ())
    return any(getattr(t, "_keras_mask", None) is not None for t in outputs)


def _tensors(structure: Any) -> list[Any]:
    return [t for t in keras.tree.flatten(structure) if isinstance(t, keras.KerasTensor)]


def typed_inputs(function: Any) -> list[tuple[Any, str]]:
    """Inputs with their types: what only an Embedding reads holds indexes, and so is int32."""
    readers: dict[int, list[Any]] = {id(t): [] for t in function.inputs}
    for operation in function.operations:
        for call in operation._inbound_nodes:
            for tensor in call.input_tensors:
                readers.get(id(tensor), []).append(operation)
    typed = []
    for tensor in function.inputs:
        operations = readers[id(tensor)]
        indexes = operations and all(isinstance(o, keras.layers.Embedding) for o in operations)
        typed.append((tensor, "int32" if indexes else str(tensor.dtype)))
    return typed


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


def inner_function(layer: Any) -> Any:
    """The Functional inside a Sequential, or a Functional itself; `None` for anything else."""
    function = getattr(layer, "_functional", None) or layer
    return function if hasattr(function, "_nodes_by_depth") else None
