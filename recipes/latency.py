"""Measures the latency of files on LiteRT with one thread, all files in turns."""

from collections.abc import Callable, Mapping

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from recipes.timing import Measured, Seconds, take_turns

# Invocations in one turn: enough that the cost of reading the clock does not matter.
INVOCATIONS = 20


def latencies(blobs: Mapping[str, bytes], rounds: int) -> Measured:
    """The seconds of `INVOCATIONS` inferences of every file, in every round.

    LiteRT's default CPU path (XNNPACK) on one thread; inputs are zeros of the file's own types.
    """
    return take_turns({name: _case(blob) for name, blob in blobs.items()}, rounds, warmup=1)


def _case(blob: bytes) -> Callable[[], Seconds]:
    interpreter = Interpreter(model_content=blob, num_threads=1)
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))

    def run() -> Seconds:
        start = Seconds.now()
        for _ in range(INVOCATIONS):
            interpreter.invoke()
        return Seconds.now().since(start)

    return run
