"""How many bytes a file has at each width of weights, packed and encoded.

    python -m benchmarks.file_sizes [--network mobilenet_v2] [--policies int8 ternary] [--out DIR]

The networks are those of `benchmarks.networks`, with weights as they are initialized; what a width
costs in accuracy is for `recipes` to say. Each file is run on the runtimes that it is for, in
lockstep with the model that it was made of. Columns: the file for all targets, for LiteRT, for
TFLite Micro, and for TFLite Micro with `compress`; below, the arena's use on this host.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kqat
import tflite_export
from benchmarks.networks import NETWORKS
from kqat.base import write_file
from kqat.config import PRESETS

POLICIES = ("int8", "w4a8", "w3a8", "w2a8", "ternary", "binary")
LITERT = ("litert_reference", "litert_builtin", "litert")
# Column -> the target, what `compress` is, and the runtimes that the file is for.
WAYS: dict[str, tuple[str | None, str | None, tuple[str, ...]]] = {
    "all targets": (None, None, (*LITERT, "tflite_micro")),
    "litert": ("litert", None, LITERT),
    "micro": ("tflite_micro", None, ("tflite_micro",)),
    "lookup": ("tflite_micro", "lookup", ("tflite_micro",)),
    "smallest": ("tflite_micro", "smallest", ("tflite_micro",)),
}
SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Size:
    """One file: its bytes, the largest difference in lockstep, the arena where it was measured."""

    policy: str
    way: str
    size_bytes: int
    max_steps: int
    arena_bytes: int | None
    problems: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> list[Size]:
    """Measures with command-line arguments; returns what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet8")
    parser.add_argument("--policies", nargs="+", choices=sorted(PRESETS), default=POLICIES)
    parser.add_argument("--out", type=Path, help="where file_sizes.json goes (default nowhere)")
    options = parser.parse_args(argv)
    network = NETWORKS[options.network]
    keras.utils.set_random_seed(0)
    data = np.random.default_rng(0).normal(size=(SAMPLES, *network.input_shape))
    model = normalized(network.build(keras), data.astype(np.float32))
    found: list[Size] = []
    print(f"{options.network}: bytes (largest difference in lockstep, output steps)")
    print(f"{'':<10}" + "".join(f"{way:>15}" for way in WAYS), flush=True)
    for policy in options.policies:
        rows = measure(model, policy, data.astype(np.float32))
        found += rows
        print(f"{policy:<10}" + "".join(_cell(row) for row in rows))
        arenas = (f"{row.arena_bytes:,}" if row.arena_bytes else "" for row in rows)
        print(f"{'  arena':<10}" + "".join(f"{arena + '    ':>15}" for arena in arenas), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        rows_json = [dataclasses.asdict(row) for row in found]
        write_file(options.out / "file_sizes.json", json.dumps(rows_json, indent=1).encode())
    return found


def normalized(model: keras.Model, data: np.ndarray) -> keras.Model:
    """`model` with BatchNormalization that knows the data; else deep ones hand on nothing."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(data, training=True)
    return model


def measure(model: keras.Model, policy: Any, data: np.ndarray) -> list[Size]:
    """The files of a float model under one policy."""
    frozen = kqat.freeze(kqat.quantize_model(model, policy, calibration_data=data))
    rows = []
    for way, (target, compress, runtimes) in WAYS.items():
        blob = tflite_export.convert(frozen, target=target, compress=compress)
        parts = tflite_export.verify(frozen, blob, data, runtimes=runtimes, samples=2).runtimes
        rows.append(
            Size(
                policy=str(policy),
                way=way,
                size_bytes=len(blob),
                max_steps=max(part.max_steps for part in parts),
                arena_bytes=next((p.arena_bytes for p in parts if p.arena_bytes), None),
                problems=tuple(f"{p.runtime}: {p.problem}" for p in parts if p.problem),
            )
        )
    return rows


def _cell(row: Size) -> str:
    said = "refused" if row.problems else f"({row.max_steps})"
    return f"{f'{row.size_bytes:,} {said}':>15}"


if __name__ == "__main__":
    main()
