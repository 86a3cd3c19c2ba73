"""What packed weights cost: time and memory of 4-bit weights stored as int4 and as int8.

    python -m benchmarks.packing [--repeats N] [--out packing.json]

One layer on one shape, converted twice for LiteRT from the same QAT model, so that both files
compute the same. They run by turns on one thread; the smaller quarter of the times counts. The
arena is TFLite Micro's, for which the kernels unpack into scratch memory.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from keras import layers

import kqat
import tflite_export
from tflite_export.runtimes import tflite_micro_arena_bytes

CASES: dict[str, tuple[tuple[int, ...], Any]] = {
    "CONV_2D 3x3, 32 to 32 channels, 32x32": (
        (32, 32, 32), lambda: layers.Conv2D(32, 3, padding="same"),
    ),
    "CONV_2D 1x1, 128 to 128 channels, 14x14": ((14, 14, 128), lambda: layers.Conv2D(128, 1)),
    "DEPTHWISE_CONV_2D 3x3, 64 channels, 32x32": (
        (32, 32, 64), lambda: layers.DepthwiseConv2D(3, padding="same"),
    ),
    "FULLY_CONNECTED 1024 to 256": ((1024,), lambda: layers.Dense(256)),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each case and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", help="also write the numbers to this file")
    given = parser.parse_args(argv)
    rows = {name: measured(*case, given.repeats) for name, case in CASES.items()}
    print("| layer | int8 | packed | times as slow | bytes | packed | arena | packed |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        whole, packed = row["unpacked"], row["packed"]
        cells = [f"{1e6 * one['seconds']:.0f} µs" for one in (whole, packed)]
        cells.append(f"{packed['seconds'] / whole['seconds']:.2f}")
        cells += [f"{one[key]:,}" for key in ("bytes", "arena") for one in (whole, packed)]
        print(f"| {name} | {' | '.join(cells)} |")
    if given.out:
        Path(given.out).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measured(shape: tuple[int, ...], make: Any, repeats: int) -> dict[str, dict[str, float]]:
    """Time, bytes and arena of both files."""
    model = keras.Sequential([keras.Input(shape), make()])
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
    qat = kqat.quantize_model(model, "w4a8", calibration_data=x)
    blobs = {
        kind: tflite_export.convert(qat, target="litert", weights=kind)
        for kind in ("unpacked", "packed")
    }
    runs = {kind: _ready(blob) for kind, blob in blobs.items()}
    times: dict[str, list[float]] = {kind: [] for kind in blobs}
    for _ in range(repeats):
        for kind, interpreter in runs.items():
            start = time.perf_counter()
            interpreter.invoke()
            times[kind].append(time.perf_counter() - start)
    # TFLite Micro has no packed FULLY_CONNECTED with scales per channel.
    micro = {
        kind: tflite_export.convert(qat, target="tflite_micro", weights=kind) for kind in blobs
    }
    return {
        kind: {
            "seconds": float(np.mean(np.sort(times[kind])[: max(repeats // 4, 1)])),
            "bytes": len(blobs[kind]),
            "arena": tflite_micro_arena_bytes(micro[kind]),
        }
        for kind in blobs
    }


def _ready(blob: bytes) -> Any:
    interpreter = Interpreter(model_content=blob, num_threads=1)
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        values = np.random.default_rng(0).integers(-128, 128, detail["shape"])
        interpreter.set_tensor(detail["index"], values.astype(np.int8))
    interpreter.invoke()
    return interpreter


if __name__ == "__main__":
    raise SystemExit(main())
