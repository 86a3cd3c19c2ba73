"""A `.tflite` without its Keras model: what each runtime makes of it, and whether they agree.

Nothing is known about its writer, so LiteRT too runs in a child here: a hostile file may end the
process, ask for all memory, or never end.
"""

import inspect
import io
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kqat.base import ExportError, RuntimeUnavailableError
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT
from tflite_export.runtimes import (
    as_type,
    exit_name,
    has_grid,
    random_inputs,
    real,
    run,
    run_python,
    supports,
    tflite_micro_arena_bytes,
)
from tflite_export.verification.report import OutputAgreement, RuntimeReport

TIMEOUT_SECONDS = 120.0
MEMORY_BYTES = 8 << 30


def compare_runtimes(
    blob: bytes, data: Any, runtimes: Sequence[str], samples: int
) -> tuple[tuple[RuntimeReport, ...], int]:
    """Runs a file on each runtime; outputs are compared with those of the first that ran it.

    Args:
        blob: the file.
        data: an array, or a list or dict of them, of the file's input types or of floats; `None`
            for random inputs.
        runtimes: names from `RUNTIMES`.
        samples: how many samples are run.

    Returns:
        A report for each runtime, without lockstep, and the number of samples.

    Raises:
        ExportError: if the file cannot be read, or the data do not fit it.
    """
    model = flatbuffer.read(blob)
    feeds = random_inputs(model, samples) if data is None else _feeds(model, data, samples)
    reports: list[RuntimeReport] = []
    first: Sequence[np.ndarray] | None = None
    for runtime in runtimes:
        try:
            outputs, arena = _run(blob, feeds, runtime)
        except RuntimeUnavailableError as error:
            reports.append(RuntimeReport(runtime=runtime, problem=str(error)))
            continue
        agreements = () if first is None else _agreement(model, first, outputs)
        first = first or outputs
        reports.append(RuntimeReport(runtime=runtime, outputs=agreements, arena_bytes=arena))
    return tuple(reports), len(feeds[0]) if feeds else 0


def _run(
    blob: bytes, feeds: list[np.ndarray], runtime: str
) -> tuple[Sequence[np.ndarray], int | None]:
    if supports(runtime) and runtime != "tflite_micro":
        return _run_apart(blob, feeds, runtime), None
    outputs = run(blob, feeds, runtime=runtime).outputs
    return outputs, tflite_micro_arena_bytes(blob)


def _run_apart(blob: bytes, feeds: list[np.ndarray], runtime: str) -> list[np.ndarray]:
    """The outputs of each sample, (samples, …), as a child computes them."""
    request = io.BytesIO()
    arrays: dict[str, Any] = {f"feed_{i}": feed for i, feed in enumerate(feeds)}
    np.savez(request, blob=np.frombuffer(blob, np.uint8), count=np.array(len(feeds)), **arrays)
    program = f"{inspect.getsource(_serve)}\n_serve()"
    arguments = ["-c", program, runtime, str(MEMORY_BYTES)]
    try:
        child = run_python(arguments, request=request.getvalue(), timeout_seconds=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(
            f"Expected runtime {runtime!r} to run the file within {TIMEOUT_SECONDS:g} s. Received: "
            "no answer. Use a smaller file, or fewer samples."
        ) from error
    if child.returncode != 0:
        words = textwrap.shorten(child.stderr.decode(errors="replace"), 600)
        raise RuntimeUnavailableError(
            f"Expected runtime {runtime!r} to run the file. Received: "
            f"{exit_name(child.returncode)}, saying: {words!r}."
        )
    with np.load(io.BytesIO(child.stdout)) as answer:
        return [answer[f"output_{i}"] for i in range(len(answer.files))]


def _serve() -> None:
    """Is the child's whole program: the job on stdin, its outputs on stdout, words on stderr."""
    import io
    import os
    import resource
    import sys
    from typing import Any

    import numpy as np
    from ai_edge_litert import interpreter as litert

    sys.excepthook = lambda kind, error, trace: print(error, file=sys.stderr)
    # Kernels may print to stdout.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    runtime, memory_bytes = sys.argv[1], int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds = litert.OpResolverType
    resolver = {
        "litert_reference": kinds.BUILTIN_REF,
        "litert_builtin": kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        "litert": kinds.BUILTIN,
    }[runtime]
    job = dict(np.load(io.BytesIO(sys.stdin.buffer.read())))
    feeds = [job[f"feed_{i}"] for i in range(job["count"])]
    rows = []
    interpreter = litert.Interpreter(
        model_content=job["blob"].tobytes(), num_threads=1, experimental_op_resolver_type=resolver
    )
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()
    batch = int(details[0]["shape"][0]) if details and len(details[0]["shape"]) else 1
    for start in range(0, len(feeds[0]) if feeds else 1, max(batch, 1)):
        interpreter.reset_all_variables()
        for detail, feed in zip(details, feeds, strict=True):
            value = feed[start : start + max(batch, 1)].reshape(detail["shape"])
            interpreter.set_tensor(detail["index"], value)
        interpreter.invoke()
        outputs = interpreter.get_output_details()
        rows.append([interpreter.get_tensor(output["index"]) for output in outputs])
    joined: dict[str, Any] = {
        f"output_{i}": np.concatenate([np.atleast_1d(row[i]) for row in rows])
        for i in range(len(rows[0]))
    }
    np.savez(answer, **joined)
    answer.flush()


def _feeds(model: ModelT, data: Any, samples: int) -> list[np.ndarray]:
    tensors = [model.subgraphs[0].tensors[i] for i in model.subgraphs[0].inputs]
    names = [flatbuffer.tensor_name(tensor) for tensor in tensors]
    if isinstance(data, Mapping):
        if set(data) != set(names):
            raise ExportError(f"Expected data for the inputs {names}. Received: {sorted(data)}.")
        data = [data[name] for name in names]
    arrays = [np.asarray(x) for x in (data if isinstance(data, list | tuple) else [data])]
    if len(arrays) != len(tensors):
        raise ExportError(
            f"Expected one array for each input {names}. Received: {len(arrays)} arrays."
        )
    feeds = []
    for array, tensor in zip(arrays, tensors, strict=True):
        given = array[:samples] if array.ndim else array
        is_own = given.dtype == flatbuffer.tensor_dtype(tensor)
        feeds.append(given if is_own else as_type(given.astype(np.float32), tensor))
    return feeds


def _agreement(
    model: ModelT, first: Sequence[np.ndarray], results: Sequence[np.ndarray]
) -> tuple[OutputAgreement, ...]:
    rows = []
    graph = model.subgraphs[0]
    for index, expected, found in zip(graph.outputs, first, results, strict=True):
        tensor = graph.tensors[index]
        if expected.dtype.kind != "f" and has_grid(tensor):
            steps = np.abs(found.astype(np.int64) - expected.astype(np.int64))
        else:
            a, b = (np.asarray(x, np.float64) for x in (expected, found))
            spread = float(np.ptp(a)) / 255 or 1.0
            steps = np.abs(np.rint((b - a) / spread))
        values = [real(x, tensor) if has_grid(tensor) else x for x in (expected, found)]
        classes = values[0].ndim == 2 and values[0].shape[1] > 1
        agree = float(np.mean(values[0].argmax(-1) == values[1].argmax(-1))) if classes else None
        rows.append(
            OutputAgreement(
                name=flatbuffer.tensor_name(tensor),
                max_steps=int(steps.max(initial=0)),
                equal_fraction=float(np.mean(steps == 0)),
                top1_agreement=agree,
            )
        )
    return tuple(rows)
