"""A `.tflite` without its Keras model: which runtimes run it, and whether their outputs agree.

Nothing is known about its writer, so LiteRT too runs in a child here: a hostile file may end the
process, ask for all memory, or never end.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kqat.base import ExportError, RuntimeUnavailableError, flat_data
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT
from tflite_export.runtimes import (
    as_type,
    random_inputs,
    run,
    run_litert_apart,
    supports,
)
from tflite_export.verification.end_to_end import agreement_of_runtimes
from tflite_export.verification.missing_kernels import did_not_run
from tflite_export.verification.report import RuntimeReport

# For all runtimes together; each has an equal part of what those before it left.
TIMEOUT_SECONDS = 100.0
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
    end = time.monotonic() + TIMEOUT_SECONDS
    for position, runtime in enumerate(runtimes):
        seconds = max((end - time.monotonic()) / (len(runtimes) - position), 0.0)
        try:
            outputs, arena = _run(blob, feeds, runtime, seconds)
        except RuntimeUnavailableError as error:
            reports.append(did_not_run(runtime, model, error))
            continue
        agreements = () if first is None else agreement_of_runtimes(model, first, outputs)
        first = first or outputs
        reports.append(RuntimeReport(runtime=runtime, outputs=agreements, arena_bytes=arena))
    return tuple(reports), len(feeds[0]) if feeds else 0


def _run(
    blob: bytes, feeds: list[np.ndarray], runtime: str, timeout_seconds: float
) -> tuple[Sequence[np.ndarray], int | None]:
    if supports(runtime) and runtime != "tflite_micro":
        outputs = run_litert_apart(
            blob,
            feeds,
            runtime=runtime,
            timeout_seconds=timeout_seconds,
            memory_bytes=MEMORY_BYTES,
        )
        return outputs, None
    result = run(blob, feeds, runtime=runtime, timeout_seconds=timeout_seconds)
    return result.outputs, result.arena_bytes


def _feeds(model: ModelT, data: Any, samples: int) -> list[np.ndarray]:
    tensors = [model.subgraphs[0].tensors[i] for i in model.subgraphs[0].inputs]
    names = [flatbuffer.tensor_name(tensor) for tensor in tensors]
    data = flat_data(data, len(names))
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
