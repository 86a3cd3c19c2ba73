"""Runs a `.tflite` on LiteRT and on TensorFlow Lite Micro behind one signature.

LiteRT runs in this process. TFLite Micro runs in a child: where a bias or a quantization is
missing, or the arena is full, its kernels end the process by SIGSEGV, SIGFPE or abort(), and its
messages go to the C-level stderr. In a child neither reaches the caller.
"""

import copy
import dataclasses
import importlib.util
import io
import re
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from ai_edge_litert import interpreter as litert

from kqat.base import ExportError, RuntimeUnavailableError
from tflite_export import flatbuffer
from tflite_export.runtimes import child_programs
from tflite_export.runtimes.child_process import exit_name, run_python

RUNTIMES = ("litert_reference", "litert_builtin", "litert", "tflite_micro")

# BUILTIN alone brings the default delegate, XNNPACK.
_OP_RESOLVERS = {
    "litert_reference": litert.OpResolverType.BUILTIN_REF,
    "litert_builtin": litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "litert": litert.OpResolverType.BUILTIN,
}
# Pages that an arena never touches cost nothing, so the first guess may be ample.
_FIRST_ARENA_BYTES = 1 << 26
_LARGEST_ARENA_BYTES = 1 << 30
_SOFTMAX_SUM = 512  # tensorflow/lite/kernels/internal/reference/softmax.h: 31 + 9 - 8 > 31 bits
# TFLite Micro aligns what it allocates to 16 bytes; the rest of an odd size counts as used.
_ARENA_ALIGNMENT = 16
# What the allocator writes when the arena is full. An unsupported operator raises the same Python
# exception, but TFLite Micro writes "Didn't find op for builtin opcode" then.
_ARENA_IS_FULL = re.compile(r"available \d+, missing: \d+")
_ARENA_TOTAL = re.compile(r"Arena allocation total (\d+) bytes")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunResult:
    """What a runtime computed.

    Attributes:
        outputs: one array per model output, in the file's order, of shape (samples, …).
        tensors: index in subgraph 0 → array of shape (samples, …), for the inputs and every
            operator's outputs; empty unless `run` was asked for all. Strings, resources and
            state kept in variable tensors are left out. A tensor whose first dimension is not
            the model's batch size has one entry per batch: (batches, *tensor shape).
        arena_bytes: as of `tflite_micro_arena_bytes`; None on LiteRT.
    """

    outputs: tuple[np.ndarray, ...]
    tensors: dict[int, np.ndarray]
    arena_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """A file, its tree, what to feed it and which tensors to read besides the outputs.

    `feeds` holds an array of shape (batches, *tensor shape) per model input.
    """

    blob: bytes
    model: flatbuffer.ModelT
    feeds: tuple[np.ndarray, ...]
    watched: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        return tuple(map(int, self.model.subgraphs[0].inputs))

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(map(int, self.model.subgraphs[0].outputs))


def supports(runtime: str) -> bool:
    """Returns whether the runtime, a name in `RUNTIMES`, is installed here.

    Raises:
        ExportError: if there is no runtime of that name.
    """
    if runtime not in RUNTIMES:
        raise ExportError(f"Expected a runtime in {RUNTIMES}. Received: runtime={runtime!r}.")
    return runtime in _OP_RESOLVERS or importlib.util.find_spec("tflite_micro") is not None


def run(
    blob: bytes,
    inputs: Sequence[np.ndarray],
    *,
    runtime: str,
    tensors: Literal["outputs", "all"] = "outputs",
    timeout_seconds: float | None = None,
) -> RunResult:
    """Runs subgraph 0 of a `.tflite` file on samples that do not see each other.

    State (variable tensors, resource variables) starts anew at every batch. One thread computes,
    so that equal calls give equal bits.

    Args:
        blob: the file.
        inputs: one array per model input, in the file's order, of the input tensor's dtype and
            shape (samples, *input shape[1:]), `samples` a multiple of the model's batch size
            (the first input's first dimension). For an input without that batch dimension, what
            each batch needs, one after the other; for a scalar, a vector.
        runtime: a name in `RUNTIMES`; "litert" is LiteRT's default CPU path, XNNPACK.
        tensors: "all" reads the intermediate tensors too. XNNPACK shows them only as outputs,
            so there they come from a copy of the file that has them all as outputs; the values
            in `outputs` are always the file's own.
        timeout_seconds: how long TFLite Micro's child may take, by default for ever; LiteRT runs
            in this process, where nothing can stop it (`run_litert_apart`).

    Raises:
        RuntimeUnavailableError: if the runtime is absent, refuses the file, crashes on it or takes
            too long.
        ExportError: if the file cannot be read, or an input's dtype, shape or values are wrong.
    """
    if tensors not in ("outputs", "all"):
        raise ExportError(f"Expected tensors='outputs' or 'all'. Received: tensors={tensors!r}.")
    _check_installed(runtime)
    model = flatbuffer.read(blob)
    watched = _operator_results(model) if tensors == "all" else ()
    job = _Job(blob=bytes(blob), model=model, feeds=_batched(model, inputs), watched=watched)
    arena_bytes = None
    if runtime in _OP_RESOLVERS:
        outputs, seen = _run_litert(job, runtime)
    else:
        outputs, seen, arena_bytes = _run_micro(
            job, _FIRST_ARENA_BYTES, timeout_seconds=timeout_seconds
        )
    fed = zip(job.inputs, job.feeds, strict=True) if tensors == "all" else ()
    arrays = {index: feed.copy() for index, feed in fed} | seen
    batch_size, *_ = flatbuffer.tensor_shape(_inputs(model)[0]) or (1,)
    return RunResult(
        outputs=tuple(_per_sample(array, batch_size) for array in outputs),
        tensors={index: _per_sample(arrays[index], batch_size) for index in sorted(arrays)},
        arena_bytes=arena_bytes,
    )


def tflite_micro_arena_bytes(
    blob: bytes, *, given_bytes: int = _FIRST_ARENA_BYTES, grow: bool = True
) -> int:
    """Returns how many bytes of its arena TFLite Micro uses for a file.

    That is the total which its recording allocator reports after an invocation, on this 64-bit
    host; an MCU's figure differs, since the arena also holds structs full of pointers.

    Args:
        blob: the file.
        given_bytes: the arena to begin with.
        grow: whether an arena that is too small is doubled, or the file counts as refused.

    Raises:
        RuntimeUnavailableError: if TFLite Micro is absent, refuses the file or crashes on it.
        ExportError: if the file cannot be read.
    """
    _check_installed("tflite_micro")
    model = flatbuffer.read(blob)
    shape, dtype = flatbuffer.tensor_shape, flatbuffer.tensor_dtype
    zeros = [np.zeros(shape(tensor) or (1,), dtype(tensor)) for tensor in _inputs(model)]
    job = _Job(blob=bytes(blob), model=model, feeds=_batched(model, zeros))
    return _run_micro(job, given_bytes, _LARGEST_ARENA_BYTES if grow else 0)[2]


def _check_installed(runtime: str) -> None:
    if not supports(runtime):
        raise RuntimeUnavailableError(
            "Expected TFLite Micro to be installed. Received: no module 'tflite_micro'. "
            'Use `pip install "kqat[tflm]"`.'
        )


def _inputs(model: flatbuffer.ModelT) -> list[flatbuffer.TensorT]:
    return [model.subgraphs[0].tensors[index] for index in model.subgraphs[0].inputs]


def _batched(model: flatbuffer.ModelT, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Checks the inputs and cuts each into batches: (samples, …) → (batches, *tensor shape)."""
    tensors = _inputs(model)
    names = [flatbuffer.tensor_name(tensor) for tensor in tensors]
    if not names:
        raise ExportError(
            "Expected a file that has inputs. Received: one without any, so there is nothing to "
            "run it on; `kqat inspect` shows what is in it."
        )
    if len(inputs) != len(names):
        raise ExportError(
            f"Expected one array per model input, {names}. Received: {len(inputs)} arrays. "
            "Use a sequence, even for one input."
        )
    feeds = [_batched_input(t, np.asarray(x)) for t, x in zip(tensors, inputs, strict=True)]
    counts = {name: len(feed) for name, feed in zip(names, feeds, strict=True)}
    if len(set(counts.values())) > 1:
        raise ExportError(
            f"Expected as many samples for every model input. Received: batches={counts}."
        )
    return tuple(feeds)


def _batched_input(tensor: flatbuffer.TensorT, array: np.ndarray) -> np.ndarray:
    name, dtype = flatbuffer.tensor_name(tensor), flatbuffer.tensor_dtype(tensor)
    if array.dtype != dtype:
        raise ExportError(
            f"Expected dtype={dtype} for model input {name!r}. Received: dtype={array.dtype}. "
            "Use values on the input's own grid: quantize them with its scale and zero point."
        )
    shape = flatbuffer.tensor_shape(tensor)
    batch, *rest = shape or (1,)
    whole = array.ndim and array.size and batch and len(array) % batch == 0
    if array.shape[1:] != tuple(rest) or not whole:
        raise ExportError(
            f"Expected shape ({', '.join(map(str, ('samples', *rest)))}) for model input {name!r}, "
            f"samples a positive multiple of {batch}. Received: shape={array.shape}."
        )
    if dtype.kind == "f" and np.isnan(array).any():
        raise ExportError(f"Expected numbers for model input {name!r}. Received: NaN.")
    return array.reshape(len(array) // batch, *shape)


def _per_sample(array: np.ndarray, batch_size: int) -> np.ndarray:
    """Joins (batches, *tensor shape) along the batch, if the tensor's first dimension is one."""
    if array.shape[1:2] != (batch_size,):
        return array
    return array.reshape(-1, *array.shape[2:])


def _operator_results(model: flatbuffer.ModelT) -> tuple[int, ...]:
    """Returns the tensors that operators of subgraph 0 compute and NumPy can hold."""
    graph = model.subgraphs[0]
    results = {int(i) for operator in graph.operators for i in operator.outputs if i >= 0}
    return tuple(i for i in sorted(results) if flatbuffer.is_numeric(graph.tensors[i]))


def _run_litert(job: _Job, runtime: str) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
    """Returns outputs and watched tensors, arrays of shape (batches, *tensor shape)."""
    if runtime == "litert_reference" and wide_softmax(job.model):
        # It may abort; in a child, so that it does not take this process along.
        _run_litert_child(job.blob, [x.reshape(-1, *x.shape[2:]) for x in job.feeds], runtime)
    try:
        if runtime == "litert" and job.watched:
            # A delegate keeps its inner tensors to itself. More outputs could change how it
            # fuses, so the outputs reported are those of the file that ships.
            seen = _invoke_litert(job, _with_watched_as_outputs(job), runtime, job.watched)
            own = _invoke_litert(job, job.blob, runtime, job.outputs)
        else:
            seen = own = _invoke_litert(job, job.blob, runtime, {*job.outputs, *job.watched})
    except ExportError:
        raise
    # LiteRT refuses a file with either of these.
    except (RuntimeError, ValueError) as error:
        raise _refusal(runtime, str(error)) from error
    outputs = [own[index] for index in job.outputs]
    return outputs, {index: own.get(index, seen[index]) for index in job.watched}


def wide_softmax(model: flatbuffer.ModelT) -> int | None:
    """Over how many values a SOFTMAX of int8 runs whose kernel may abort; `None` without one.

    The kernel of LiteRT's reference and of TFLite Micro divides by the sum of the exponentials, of
    which the largest counts as 1, and asserts that the sum is below `_SOFTMAX_SUM`.
    """
    widths = [
        flatbuffer.tensor_shape(graph.tensors[operator.inputs[0]])[-1]
        for graph in model.subgraphs
        for operator in graph.operators
        if flatbuffer.op_name(model, operator) == "SOFTMAX"
        and flatbuffer.tensor_dtype(graph.tensors[operator.inputs[0]]) == np.int8
        and flatbuffer.tensor_shape(graph.tensors[operator.inputs[0]])
    ]
    return max((width for width in widths if width >= _SOFTMAX_SUM), default=None)


def _invoke_litert(
    job: _Job, blob: bytes, runtime: str, indices: Iterable[int]
) -> dict[int, np.ndarray]:
    """Feeds batch by batch; returns the arrays, (batches, *tensor shape), of the tensors asked."""
    batches = len(job.feeds[0])
    seen: dict[int, np.ndarray] = {}
    renew = _keeps_resources(job.model)
    for batch in range(batches):
        if batch == 0 or renew:
            interpreter = litert.Interpreter(
                model_content=blob,
                num_threads=1,
                experimental_op_resolver_type=_OP_RESOLVERS[runtime],
                experimental_preserve_all_tensors=bool(job.watched) and runtime != "litert",
            )
            interpreter.allocate_tensors()
        else:
            interpreter.reset_all_variables()
        for index, feed in zip(job.inputs, job.feeds, strict=True):
            interpreter.set_tensor(index, feed[batch, ...])
        interpreter.invoke()
        for index in indices:
            value = interpreter.get_tensor(index)
            if index not in seen:
                seen[index] = np.empty((batches, *value.shape), value.dtype)
            if seen[index].shape[1:] != value.shape:
                raise ExportError(
                    f"Expected shape {seen[index].shape[1:]} of tensor {index} for all samples. "
                    f"Received: {value.shape}. Use samples whose results have equal shapes."
                )
            seen[index][batch] = value
    return seen


def _keeps_resources(model: flatbuffer.ModelT) -> bool:
    """Whether it has resource variables: LiteRT's reset keeps them, TFLite Micro's zeroes them."""
    operators = (operator for graph in model.subgraphs for operator in graph.operators)
    return any(flatbuffer.op_name(model, o) == "ASSIGN_VARIABLE" for o in operators)


def _with_watched_as_outputs(job: _Job) -> bytes:
    model, graph = copy.copy(job.model), copy.copy(job.model.subgraphs[0])
    graph.outputs = list(dict.fromkeys((*job.outputs, *job.watched)))
    model.subgraphs = [graph, *model.subgraphs[1:]]
    return flatbuffer.write(model)


def _run_micro(
    job: _Job,
    arena_bytes: int,
    largest_bytes: int = _LARGEST_ARENA_BYTES,
    timeout_seconds: float | None = None,
) -> tuple[list[np.ndarray], dict[int, np.ndarray], int]:
    """The outputs and watched tensors on TFLite Micro, and the bytes of the arena that it used.

    The child is run again with twice the arena until one is large enough.
    """
    request = _request(
        job.blob,
        job.feeds,
        outputs=np.array(len(job.outputs)),
        watched=np.array(job.watched, int),
        renew=np.array(_keeps_resources(job.model)),
    )
    while True:
        arena_bytes += -arena_bytes % _ARENA_ALIGNMENT
        child = _run_child(
            "tflite_micro", str(arena_bytes), request=request, timeout_seconds=timeout_seconds
        )
        words = child.stderr.decode(errors="replace").strip()
        if child.returncode == 0:
            break
        if not _ARENA_IS_FULL.search(words) or arena_bytes >= largest_bytes:
            raise _refusal("tflite_micro", f"{exit_name(child.returncode)}, saying: {words}")
        arena_bytes = 2 * max(arena_bytes, _ARENA_ALIGNMENT)
    if (total := _ARENA_TOTAL.search(words)) is None:
        raise _refusal("tflite_micro", f"no arena total in its words: {words}")
    with np.load(io.BytesIO(child.stdout)) as answer:
        outputs = [answer[f"output_{position}"] for position in range(len(job.outputs))]
        seen = {index: answer[f"tensor_{index}"] for index in job.watched}
    return outputs, seen, int(total[1])


def run_litert_apart(
    blob: bytes,
    feeds: Sequence[np.ndarray],
    *,
    runtime: str,
    timeout_seconds: float,
    memory_bytes: int,
) -> list[np.ndarray]:
    """The outputs of a file on LiteRT, computed in a child, as for a file of an unknown writer.

    Args:
        blob: the file.
        feeds: one array per model input, (samples, …).
        runtime: one of the names of LiteRT in `RUNTIMES`.
        timeout_seconds: how long the child may take.
        memory_bytes: how large its address space may become.

    Raises:
        RuntimeUnavailableError: if the runtime refuses the file, crashes on it, or takes too long.
    """
    return _run_litert_child(blob, feeds, runtime, timeout_seconds, memory_bytes)


def _run_litert_child(
    blob: bytes,
    feeds: Sequence[np.ndarray],
    runtime: str,
    timeout_seconds: float | None = None,
    memory_bytes: int = -1,
) -> list[np.ndarray]:
    """As `run_litert_apart`; without a limit of time, and of memory where it is -1."""
    arguments = (_OP_RESOLVERS[runtime].name, str(memory_bytes))
    renew = _keeps_resources(flatbuffer.read(blob))
    request = _request(blob, feeds, renew=np.array(renew))
    child = _run_child(
        "litert", *arguments, request=request, timeout_seconds=timeout_seconds, runtime=runtime
    )
    if child.returncode != 0:
        words = textwrap.shorten(child.stderr.decode(errors="replace"), 600)
        raise RuntimeUnavailableError(
            f"Expected runtime {runtime!r} to run the file. Received: "
            f"{exit_name(child.returncode)}, saying: {words!r}."
        )
    with np.load(io.BytesIO(child.stdout)) as answer:
        return [answer[f"output_{i}"] for i in range(len(answer.files))]


def _request(blob: bytes, feeds: Sequence[np.ndarray], **arrays: np.ndarray) -> bytes:
    """A job for a child, as `child_programs` reads it."""
    request = io.BytesIO()
    arrays |= {f"feed_{i}": feed for i, feed in enumerate(feeds)}
    np.savez(request, blob=np.frombuffer(blob, np.uint8), **arrays)  # type: ignore[arg-type]
    return request.getvalue()


def _run_child(
    kind: str,
    *arguments: str,
    request: bytes,
    timeout_seconds: float | None = None,
    runtime: str = "tflite_micro",
) -> subprocess.CompletedProcess[bytes]:
    try:
        return run_python(
            [child_programs.__file__, kind, *arguments],
            request=request,
            timeout_seconds=timeout_seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(
            f"Expected runtime {runtime!r} to run the file within {timeout_seconds:.3g} s. "
            "Received: no answer; it may never end. Use a smaller file, or fewer samples."
        ) from error


def _refusal(runtime: str, words: str) -> RuntimeUnavailableError:
    # Runtimes report over many lines, and some repeat one complaint for every tensor.
    words = textwrap.shorten(words, width=600)
    return RuntimeUnavailableError(
        f"Expected runtime {runtime!r} to run the file. Received: {words!r}. "
        "Use ops and types that this runtime has kernels for, or another runtime."
    )
