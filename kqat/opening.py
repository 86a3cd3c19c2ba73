"""Models and layers as functions of symbolic tensors, which Keras records call by call.

A Functional model is one already. A subclassed model, or a custom layer, becomes one by running
its `call` (not `__call__`) on symbolic tensors.
"""

import ast
import dataclasses
import inspect
import textwrap
import traceback
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kqat.errors import ModelError


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


def typed_inputs(function: Any) -> list[tuple[Any, str]]:
    """Inputs with their types: what only an Embedding reads counts rows, and so is int32."""
    readers: dict[int, list[Any]] = {id(t): [] for t in function.inputs}
    for operation in function.operations:
        for call in operation._inbound_nodes:
            for tensor in call.input_tensors:
                readers.get(id(tensor), []).append(operation)
    typed = []
    for tensor in function.inputs:
        operations = readers[id(tensor)]
        counts = operations and all(isinstance(o, keras.layers.Embedding) for o in operations)
        typed.append((tensor, "int32" if counts else str(tensor.dtype)))
    return typed


def inner_function(layer: Any) -> Any:
    """The Functional inside a Sequential, or a Functional itself; `None` for anything else."""
    function = getattr(layer, "_functional", None) or layer
    return function if hasattr(function, "_nodes_by_depth") else None
