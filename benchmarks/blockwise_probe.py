"""Which runtime computes FULLY_CONNECTED with one scale per block of int4 weights.

    python -m benchmarks.blockwise_probe --write

The schema's `BlockwiseQuantization` gives each `BLOCK` weights of a row a scale of their own, in a
tensor of float16 scales. A file with such weights is made of kqat's file of one Dense layer, for
activations of int8 and of float32, and every runtime is asked to run it. `blockwise_probe.json`
keeps what they said. `works` means that the outputs are those of the weights with their scales per
block, computed in NumPy; `wrong`, that they are something else.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from keras import layers

import kqat
import tflite_export
from kqat.base import write_file
from tflite_export import flatbuffer, runtimes

TABLE = Path(__file__).with_suffix(".json")
PACKAGES = ("ai-edge-litert", "tflite-micro")
INPUTS, UNITS, BLOCK = 64, 8, 32
ROWS = 3


def main(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Asks all runtimes and prints what they said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"keep it in {TABLE.name}")
    options = parser.parse_args(arguments)
    found = {
        f"{activations} {runtime}": probe(activations, runtime)
        for activations in ("int8", "float32")
        for runtime in runtimes.RUNTIMES
    }
    text = json.dumps(
        {"versions": {p: importlib.metadata.version(p) for p in PACKAGES}, "cells": found}, indent=1
    )
    if options.write:
        write_file(TABLE, f"{text}\n".encode())
    print(text)
    return found


def probe(activations: str, runtime: str) -> str:
    """`"works"`, `"wrong"`, or why the runtime does not run it."""
    blob, x, expected, step = blockwise_file(activations)
    try:
        if runtime == "tflite_micro":
            (got,) = runtimes.run(blob, [x], runtime=runtime).outputs
        else:  # A kernel may end the process.
            (got,) = runtimes.run_litert_apart(
                blob, [x], runtime=runtime, timeout_seconds=60.0, memory_bytes=1 << 34
            )
    except kqat.KqatError as error:
        words = str(error).split("Received: ", 1)[-1].split()
        return f"refuses: {' '.join(words)[:200]}"
    far = np.abs(got.astype(np.float64) - expected).max() / step
    return "works" if far <= 1.0 else f"wrong: {far:.0f} steps"


def blockwise_file(activations: str) -> tuple[bytes, np.ndarray, np.ndarray, float]:
    """The file, inputs for it, the outputs that are right, and how far they may be off."""
    generator = np.random.default_rng(0)
    x = generator.uniform(-1.0, 1.0, (64, INPUTS)).astype(np.float32)
    keras.utils.set_random_seed(0)
    dense = keras.Sequential([keras.Input((INPUTS,)), layers.Dense(UNITS, use_bias=False)])
    qat = kqat.quantize_model(dense, "w4a8", calibration_data=x)
    model = flatbuffer.read(tflite_export.convert(qat))
    graph = model.subgraphs[0]
    (operator,) = (
        op for op in graph.operators if flatbuffer.op_name(model, op) == "FULLY_CONNECTED"
    )
    ends = *operator.inputs[:2], operator.outputs[0]
    read, weight, written = (graph.tensors[int(index)] for index in ends)
    integers = generator.integers(-7, 8, (UNITS, INPUTS))
    scales = generator.uniform(0.01, 0.1, (UNITS, INPUTS // BLOCK)).astype(np.float16)
    packed = (integers[:, ::2] & 15) | ((integers[:, 1::2] & 15) << 4)
    model.buffers[weight.buffer].data = packed.astype(np.uint8).reshape(-1)
    weight.type = schema.TensorType.INT4
    weight.quantization = schema.QuantizationParametersT()
    details = schema.BlockwiseQuantizationT()
    details.scales = flatbuffer.add_tensor(
        model, scales.shape, schema.TensorType.FLOAT16, name="scales", data=scales
    )
    details.zeroPoints, details.blockSize = -1, BLOCK
    weight.quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
    weight.quantization.details = details
    real = integers * np.repeat(scales.astype(np.float64), BLOCK, axis=1)
    x = x[:ROWS]
    if activations == "float32":
        for tensor in (read, written):
            tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
        expected = x.astype(np.float64) @ real.T
        # Such kernels round the rows of the input to int8.
        return flatbuffer.write(model), x, expected, 0.02 * float(np.abs(expected).max())
    grids = [(t.quantization.scale[0], int(t.quantization.zeroPoint[0])) for t in (read, written)]
    (scale, zero), (out_scale, out_zero) = grids
    q = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8)
    sums = ((q.astype(np.float64) - zero) * scale) @ real.T
    expected = np.clip(np.rint(sums / out_scale) + out_zero, -128, 127)
    return flatbuffer.write(model), q, expected, 1.0


if __name__ == "__main__":
    main()
