"""The programs that run in a child process: one runtime, its job on stdin, its arrays on stdout.

This file is run by its path, and imports nothing of this package: the child need not find the
package, and Keras and TensorFlow would take seconds to import each time.

    python child_programs.py tflite_micro ARENA_BYTES
    python child_programs.py litert RESOLVER MEMORY_BYTES

A job and an answer are what `numpy.savez` makes of arrays. A job holds the file (`blob`), its
inputs (`feed_0`, …), and what the program says. Words, and whatever kernels print, go to stderr.
"""

import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

# NumPy computes nothing here, and the threads that it would start take a tenth of a child's time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

Arrays = Mapping[str, Any]


def run_tflite_micro(job: Arrays, arena_bytes: str) -> Arrays:
    """Runs TFLite Micro in an arena of so many bytes, and prints what it allocated to stderr.

    The job's feeds are (batches, *tensor shape). It also holds `outputs`, how many the file has;
    `watched`, indices of tensors; and `renew`, whether each batch needs a new interpreter. The
    answer has `output_0`, … and `tensor_INDEX`, with one row for each batch.
    """
    from tflite_micro.python.tflite_micro import runtime

    blob, feeds, modes = job["blob"].tobytes(), _feeds(job), runtime.InterpreterConfig

    def start(mode: runtime.InterpreterConfig) -> runtime.Interpreter:
        return runtime.Interpreter(blob, [], int(arena_bytes), mode)

    def invoke(interpreter: runtime.Interpreter, batch: int) -> None:
        for position, feed in enumerate(feeds):
            interpreter.set_input(feed[batch, ...], position)
        interpreter.invoke()

    # One interpreter either records its arena or shows its tensors, never both.
    recorder = start(modes.kAllocationRecording)
    invoke(recorder, 0)
    recorder.print_allocations()
    mode = modes.kPreserveAllTensors if job["watched"].size else modes.kAllocationRecording
    rows: list[dict[str, Any]] = []
    for batch in range(len(feeds[0])):
        if batch == 0 or job["renew"]:
            reader = start(mode)
        else:
            reader.reset()
        invoke(reader, batch)
        row = {f"output_{i}": reader.get_output(i).copy() for i in range(int(job["outputs"]))}
        for i in job["watched"]:
            row[f"tensor_{i}"] = reader.GetTensor(i, 0)["tensor_data"].copy()
        rows.append(row)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def run_litert(job: Arrays, resolver: str, memory_bytes: str) -> Arrays:
    """Runs LiteRT with a resolver of `OpResolverType`, in an address space of so many bytes.

    The space has no limit of its own where `memory_bytes` is -1.
    The job's feeds are (samples, …); `renew` says whether each batch needs a new interpreter. The
    answer has `output_0`, … of all samples.
    """
    import resource

    from ai_edge_litert import interpreter as litert

    if int(memory_bytes) >= 0:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    feeds, rows = _feeds(job), []

    def start() -> litert.Interpreter:
        interpreter = litert.Interpreter(
            model_content=job["blob"].tobytes(),
            num_threads=1,
            experimental_op_resolver_type=litert.OpResolverType[resolver],
        )
        interpreter.allocate_tensors()
        return interpreter

    interpreter = start()
    details = interpreter.get_input_details()
    batch = max(int(details[0]["shape"][0]) if details and len(details[0]["shape"]) else 1, 1)
    for first in range(0, len(feeds[0]) if feeds else 1, batch):
        if first and job["renew"]:
            interpreter = start()
        interpreter.reset_all_variables()
        for detail, feed in zip(details, feeds, strict=True):
            value = feed[first : first + batch].reshape(detail["shape"])
            interpreter.set_tensor(detail["index"], value)
        interpreter.invoke()
        outputs = interpreter.get_output_details()
        rows.append([interpreter.get_tensor(output["index"]) for output in outputs])
    return {
        f"output_{i}": _of_all_samples([row[i] for row in rows], batch) for i in range(len(rows[0]))
    }


def _of_all_samples(values: list[Any], batch: int) -> Any:
    """One output of all batches, with one entry per batch where its first axis is not the batch."""
    if len({value.shape for value in values}) > 1:
        return np.concatenate(values)
    stacked = np.stack(values)
    return stacked.reshape(-1, *stacked.shape[2:]) if stacked.shape[1:2] == (batch,) else stacked


def _feeds(job: Arrays) -> list[np.ndarray]:
    count = sum(name.startswith("feed_") for name in job)
    return [job[f"feed_{position}"] for position in range(count)]


PROGRAMS: dict[str, Callable[..., Arrays]] = {
    "tflite_micro": run_tflite_micro,
    "litert": run_litert,
}


def main() -> None:
    """Runs the program that the command line names."""
    sys.excepthook = lambda kind, error, trace: print(error, file=sys.stderr)
    # Kernels may print to stdout.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    program, *arguments = sys.argv[1:]
    job = dict(np.load(io.BytesIO(sys.stdin.buffer.read())))
    np.savez(answer, **PROGRAMS[program](job, *arguments))
    answer.flush()


if __name__ == "__main__":
    main()
