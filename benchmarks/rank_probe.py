"""How many axes does each operator take on each runtime? Each cell is a file that was run.

    python -m benchmarks.rank_probe [--only PRELU] [--write]

TensorFlow's own converter makes an int8 file of one operator for each number of axes from 1 to 6,
and each runtime runs it. Where it makes none (it keeps GATHER, comparisons and others float, or
turns them into other operators), kqat makes the file, for 2 axes and more: the batch is one. A
number of axes for which there is no file is skipped. `--write` puts what was found where the
repository keeps it (benchmarks/rank_probe.json), from which `kqat.devices.MOST_AXES` is.
"""

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kqat.base import RuntimeUnavailableError, write_file
from tflite_export import flatbuffer
from tflite_export.runtimes import random_inputs, run

TABLE = Path(__file__).with_suffix(".json")
RANKS = range(1, 7)
RUNTIMES = ("litert_reference", "litert", "tflite_micro")
Call = Callable[..., Any]


def _calls() -> dict[str, Call]:
    """Operator -> what makes it, of one tensor with any number of axes."""
    import tensorflow as tf

    def padded(x: Any, **options: Any) -> Any:
        return tf.pad(x, [[0, 0]] * (len(x.shape) - 1) + [[1, 1]], **options)

    def slope(x: Any) -> Any:
        # Of as many axes as the value without its batch: the converter knows no other.
        numbers = np.linspace(0.1, 0.4, x.shape[-1], dtype=np.float32)
        alpha = tf.constant(numbers.reshape([*[1] * (len(x.shape) - 2), -1]))
        return tf.nn.relu(x) + -alpha * tf.nn.relu(-x)

    last = {"axis": -1}
    return {
        "PRELU": slope,
        "STRIDED_SLICE": lambda x: x[..., ::2],
        "ADD": lambda x: x + 0.5 * x,
        "SUB": lambda x: 0.3 - x,
        "MUL": lambda x: x * x,
        "SQUARED_DIFFERENCE": lambda x: tf.math.squared_difference(x, 0.5 * x),
        "RELU": tf.nn.relu,
        "LEAKY_RELU": lambda x: tf.nn.leaky_relu(x, 0.3),
        "ELU": tf.nn.elu,
        "HARD_SWISH": lambda x: x * tf.nn.relu6(x + 3.0) * (1 / 6),
        "LOGISTIC": tf.sigmoid,
        "TANH": tf.tanh,
        "SOFTMAX": tf.nn.softmax,
        "LOG_SOFTMAX": tf.nn.log_softmax,
        "L2_NORMALIZATION": lambda x: tf.math.l2_normalize(x, -1),
        "MAXIMUM": lambda x: tf.maximum(x, 0.1),
        "MINIMUM": lambda x: tf.minimum(x, 0.1),
        "CONCATENATION": lambda x: tf.concat([x, x], -1),
        "RESHAPE": lambda x: tf.reshape(x, [-1, *x.shape[1:], 1] if len(x.shape) < 6 else [-1]),
        "TRANSPOSE": lambda x: tf.transpose(x, list(reversed(range(len(x.shape))))),
        "PAD": padded,
        "PADV2": lambda x: padded(x, constant_values=0.25),
        "MIRROR_PAD": lambda x: padded(x, mode="REFLECT"),
        "PACK": lambda x: tf.stack([x, x], 0),
        "UNPACK": lambda x: tf.unstack(x, axis=0)[0],
        "GATHER": lambda x: tf.gather(x, [1, 0, 2], axis=len(x.shape) - 1),
        "SELECT_V2": lambda x: tf.where(x > 0.1, x, -x),
        "MEAN": lambda x: tf.reduce_mean(x, **last),
        "REDUCE_MAX": lambda x: tf.reduce_max(x, **last),
        "REDUCE_MIN": lambda x: tf.reduce_min(x, **last),
        "REDUCE_PROD": lambda x: tf.reduce_prod(x, **last),
        "ARG_MAX": lambda x: tf.argmax(x, output_type=tf.int32, **last),
        "ARG_MIN": lambda x: tf.argmin(x, output_type=tf.int32, **last),
        "GREATER": lambda x: x > 0.1,
        "EQUAL": lambda x: tf.equal(x, 0.25),
        "LOGICAL_NOT": lambda x: tf.logical_not(x > 0.1),
        "CAST": lambda x: tf.cast(x > 0.1, tf.int32),
        "BATCH_MATMUL": lambda x: tf.matmul(x, x, transpose_b=True),
        "FULLY_CONNECTED": lambda x: tf.tensordot(
            x, tf.constant(np.linspace(-1, 1, 4 * x.shape[-1], dtype=np.float32).reshape(-1, 4)), 1
        ),
        "GELU": tf.nn.gelu,
        "EXP": tf.exp,
    }


def _own_calls() -> dict[str, Call]:
    """Operator -> what kqat makes it of, of one symbolic tensor with any number of axes."""
    from keras import layers, ops

    def of_rows(function: Call) -> Call:
        return lambda x: layers.Embedding(5, 1)(function(x, axis=-1))

    def where(compare: Call) -> Call:
        return lambda x: ops.where(compare(x), x, -x)

    return {
        "GATHER": lambda x: ops.take(x, [1, 0, 2], axis=-1),
        "SELECT_V2": where(lambda x: x > 0.1),
        "REDUCE_MIN": lambda x: ops.min(x, axis=-1),
        "REDUCE_PROD": lambda x: ops.prod(x, axis=-1),
        "ARG_MAX": of_rows(ops.argmax),
        "ARG_MIN": of_rows(ops.argmin),
        "GREATER": where(lambda x: x > 0.1),
        "EQUAL": where(lambda x: ops.equal(x, 0.25)),
        "LOGICAL_NOT": where(lambda x: ops.logical_not(x > 0.1)),
        "CAST": lambda x: layers.Activation("softplus")(x),
        "BATCH_MATMUL": lambda x: ops.matmul(x, ops.swapaxes(x, -1, -2)),
        "FULLY_CONNECTED": lambda x: layers.Dense(4)(x),
        "L2_NORMALIZATION": lambda x: layers.UnitNormalization()(x),
    }


def own_operator(call: Call, rank: int) -> bytes | None:
    """kqat's file of `call` for a value of `rank` axes; `None` where it makes none."""
    import keras

    import kqat
    from tflite_export import convert

    if rank < 2:
        return None
    shape = [*[3, 2, 2, 2][: rank - 2], 4]
    data = np.random.default_rng(0).uniform(-1, 1, (32, *shape)).astype(np.float32)
    x = keras.Input(shape)
    try:
        return convert(kqat.quantize_model(keras.Model(x, call(x)), calibration_data=data))
    except Exception:
        return None


def one_operator(call: Call, rank: int) -> bytes | None:
    """An int8 file of `call` for a value of `rank` axes; `None` if the converter refuses."""
    import tensorflow as tf

    shape = [*[1, 3, 2, 2, 2][: rank - 1], 4]
    data = np.random.default_rng(0).uniform(-1, 1, (8, *shape)).astype(np.float32)
    try:
        function = tf.function(call, input_signature=[tf.TensorSpec(shape, tf.float32)])
        concrete = function.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], function)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row] for row in data)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.int8
        return converter.convert()
    except Exception:
        return None


def _reads(blob: bytes, operator: str, rank: int) -> bool:
    """Whether a file has the operator, for a value of so many axes."""
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    ranks = [
        max(len(flatbuffer.tensor_shape(graph.tensors[int(t)])) for t in one.inputs if int(t) >= 0)
        for one in graph.operators
        if flatbuffer.op_name(model, one) == operator
    ]
    return rank in ranks


def probe(only: str | None = None) -> dict[str, dict[str, list[int]]]:
    """Operator -> runtime -> the numbers of axes at which it ran."""
    found: dict[str, dict[str, list[int]]] = {}
    own = _own_calls()
    for operator, call in _calls().items():
        if only not in (None, operator):
            continue
        rows: dict[str, list[int]] = {"made": [], **{runtime: [] for runtime in RUNTIMES}}
        for rank in RANKS:
            blob = one_operator(call, rank)
            if blob is None or not _reads(blob, operator, rank):
                blob = own_operator(own[operator], rank) if operator in own else None
            if blob is None or not _reads(blob, operator, rank):
                continue
            rows["made"].append(rank)
            inputs = random_inputs(flatbuffer.read(blob), 1)
            for runtime in RUNTIMES:
                with contextlib.suppress(RuntimeUnavailableError):
                    run(blob, inputs, runtime=runtime, timeout_seconds=60)
                    rows[runtime].append(rank)
        found[operator] = rows
        print(operator, rows, flush=True)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = probe(options.only)
    if options.write:
        kept = json.loads(TABLE.read_text()) if options.only and TABLE.exists() else {}
        write_file(TABLE, (json.dumps({**kept, **found}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
