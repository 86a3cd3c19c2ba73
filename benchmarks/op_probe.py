"""Which runtime runs which operator? Each cell is a file that was made and run, never a belief.

    python -m benchmarks.op_probe --out out/op_probe [--only CONV_2D] [--write]

For each operator of `OP_TABLE`, each kind of weights and each runtime a model of that
one operator goes through our own converter, which here packs what it can, and is run:

works    no value differs from the float graph by more than one output step, in lockstep, or by
         what the kernel is known to approximate (`APPROXIMATE`)
wrong    it runs, and differs by more
refuses  the runtime says no, crashes or does not answer; each runs in a child first

What runs is also held against `kqat.kernels`, operator by operator: no integer may differ, but for
`NOT_EXACT`.

`--write` puts the table where the repository keeps it (benchmarks/op_probe.json), with the versions
of the runtimes; with `--only`, that operator's cells alone are replaced there.
`tests/benchmarks/test_op_probe.py` runs a sample again, and all of it when slow. A new precision is
one row in `precisions`, a new operator one in `MODELS`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import kqat
from benchmarks.forked_children import forked_children
from kqat import devices
from kqat.base import write_file
from kqat.devices import INT16
from kqat.parts import Matmul
from tflite_export import exporter, inspect
from tflite_export.kernels import OP_TABLE
from tflite_export.runtimes import RUNTIMES
from tflite_export.verification import compare_runtimes, verify

TABLE = Path(__file__).with_suffix(".json")
SAMPLES = 16
PACKAGES = ("ai-edge-litert", "tflite-micro", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Precision:
    """A kind of model: the policy that makes it, and what its file must hold."""

    activations: str
    weights: str | None
    scales: str | None
    config: kqat.QuantizeConfig


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One finding: an operator at a precision on a runtime.

    `differing` counts the integers that are not those of `kqat.kernels`, `None` where it does not
    run; `words` are the runtime's own.
    """

    operator: str
    activations: str
    weights: str
    scales: str
    runtime: str
    result: str
    max_steps: int | None = None
    differing: int | None = None
    words: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What was probed, without what was found."""
        return self.operator, self.activations, self.weights, self.scales, self.runtime


ACTIVATIONS = {
    "int8": kqat.QuantizeConfig().activation,
    "int16": kqat.QuantSpec(bits=16, symmetric=True),
}


def _weighted(activations: str, bits: int) -> list[Precision]:
    def config(axis: Any) -> kqat.QuantizeConfig:
        spec = kqat.QuantSpec(bits=bits, symmetric=True, narrow_range=True, axis=axis)
        return kqat.QuantizeConfig(weights=spec, activation=ACTIVATIONS[activations])

    return [
        Precision(activations, f"int{bits}", "per axis", config("channel")),
        Precision(activations, f"int{bits}", "per tensor", config(None)),
    ]


def precisions(operator: str) -> list[Precision]:
    """What an operator is probed at: int16 where `kqat.devices.targets.INT16` has a row."""
    widths = [width for width in ACTIVATIONS if width == "int8" or operator in INT16]
    if not OP_TABLE[operator].has_trained_weights:
        return [
            Precision(width, None, None, kqat.QuantizeConfig(activation=ACTIVATIONS[width]))
            for width in widths
        ]
    # Two bits are probed where some runtime takes them at all.
    kinds = [(w, bits) for w in widths for bits in (8, 4, 2) if bits > 2 or w == "int8"]
    return [row for width, bits in kinds for row in _weighted(width, bits)]


# Operator and activations -> the steps by which its kernel may be off.
APPROXIMATE = {(op, f"int{bits}"): steps for (op, bits), steps in devices.APPROXIMATE.items()}

# Where `kqat.kernels` does not follow a kernel to the last integer: operator, activations, weights,
# and why. Nothing of it ships.
NOT_EXACT = {
    ("PRELU", "int8", "int4"): "the kernels read packed slopes as bytes",
    ("PRELU", "int8", "int2"): "the kernels read packed slopes as bytes",
    ("DEPTHWISE_CONV_2D", "int16", "int4"): "LiteRT reads packed weights as bytes",
}
# The same of one runtime, which no default of ours runs: it multiplies before it takes the zero
# point off, and floats differ in their last bit.
NOT_EXACT_ON = {("DEQUANTIZE", "int8", "litert_builtin")}

# Of an operator that only a policy of its own makes.
FUSED = {
    "UNIDIRECTIONAL_SEQUENCE_LSTM": [
        Precision("int8", None, None, kqat.QuantizeConfig(recurrence="fused"))
    ]
}

Build = Callable[[], keras.Model]
IMAGE, ROWS, VECTOR = (6, 8, 4), (6, 8), (8,)


AROUND = ((0, 0), (1, 1), (1, 1), (0, 0))


def _max_behind_padding(x: Any) -> Any:
    return layers.MaxPooling2D(3, strides=1)(ops.pad(x, AROUND, constant_values=-np.inf))


def _one(shape: tuple[int, ...], call: Callable[[Any], Any]) -> Build:
    def build() -> keras.Model:
        x = keras.Input(shape, name="x")
        return keras.Model(x, call(x), name="probe")

    return build


def _two(
    call: Callable[[Any], Any], a: tuple[int, ...] = IMAGE, b: tuple[int, ...] = IMAGE
) -> Build:
    def build() -> keras.Model:
        inputs = [keras.Input(a, name="a"), keras.Input(b, name="b")]
        return keras.Model(inputs, call(inputs), name="probe")

    return build


def _activation(name: str) -> Build:
    return _one(IMAGE, lambda x: layers.Activation(name)(x))


def _softmax(name: str) -> Build:
    return _one(VECTOR, lambda x: layers.Activation(name)(x))


def _chosen_by(compare: Callable[[Any, Any], Any]) -> Build:
    """A comparison, and the operator that carries out what it decides."""
    return _two(lambda x: ops.where(compare(x[0], x[1]), x[0], x[1]))


def _recurrent(activation: str = "tanh") -> Build:
    return _one(
        ROWS, lambda x: layers.SimpleRNN(4, return_sequences=True, activation=activation)(x)
    )


def _masked() -> keras.Model:
    """A recurrence that keeps its state where a whole number is zero."""
    numbers = keras.Input(ROWS[:1], dtype="int32", name="numbers")
    x = keras.Input(ROWS, name="x")
    y = layers.SimpleRNN(4, "relu")(x, mask=ops.not_equal(numbers, 0))
    return keras.Model([numbers, x], y, name="probe")


# Operator -> a model whose file holds it.
MODELS: dict[str, Build] = {
    "CONV_2D": _one(IMAGE, lambda x: layers.Conv2D(6, 3, padding="same")(x)),
    "DEPTHWISE_CONV_2D": _one(IMAGE, lambda x: layers.DepthwiseConv2D(3)(x)),
    "FULLY_CONNECTED": _one(VECTOR, lambda x: layers.Dense(6)(x)),
    "TRANSPOSE_CONV": _one(IMAGE, lambda x: layers.Conv2DTranspose(5, 3, strides=2)(x)),
    "PRELU": _one(IMAGE, lambda x: layers.PReLU("random_uniform", shared_axes=[1, 2])(x)),
    "ADD": _two(lambda x: layers.Add()(x)),
    "SUB": _two(lambda x: layers.Subtract()(x)),
    "MUL": _two(lambda x: layers.Multiply()(x)),
    "SQUARED_DIFFERENCE": _two(lambda x: ops.square(layers.Subtract()(x))),
    "MAXIMUM": _two(lambda x: layers.Maximum()(x)),
    "MINIMUM": _two(lambda x: layers.Minimum()(x)),
    "CONCATENATION": _two(lambda x: layers.Concatenate()(x)),
    "BATCH_MATMUL": _two(lambda x: Matmul()(x), (6, 8), (8, 5)),
    "RELU": _activation("relu"),
    "LEAKY_RELU": _one(IMAGE, lambda x: layers.LeakyReLU()(x)),
    "ELU": _activation("elu"),
    "HARD_SWISH": _activation("hard_silu"),
    "GELU": _activation("gelu"),
    "EXP": _activation("exponential"),
    "LOGISTIC": _activation("sigmoid"),
    "TANH": _activation("tanh"),
    "SOFTMAX": _softmax("softmax"),
    "LOG_SOFTMAX": _softmax("log_softmax"),
    "MEAN": _one(IMAGE, lambda x: layers.GlobalAveragePooling2D()(x)),
    "REDUCE_MAX": _one(IMAGE, lambda x: layers.GlobalMaxPooling2D()(x)),
    "MAX_POOL_2D": _one(IMAGE, lambda x: layers.MaxPooling2D()(x)),
    "AVERAGE_POOL_2D": _one(IMAGE, lambda x: layers.AveragePooling2D(2)(x)),
    "RESHAPE": _one(IMAGE, lambda x: layers.Reshape((4, 48))(x)),
    "TRANSPOSE": _one(IMAGE, lambda x: layers.Permute((2, 3, 1))(x)),
    "PAD": _one(IMAGE, lambda x: layers.ZeroPadding2D()(x)),
    "PADV2": _one(IMAGE, _max_behind_padding),
    "MIRROR_PAD": _one(IMAGE, lambda x: ops.pad(x, AROUND, "reflect")),
    "STRIDED_SLICE": _one(IMAGE, lambda x: layers.Cropping2D(1)(x)),
    "RESIZE_BILINEAR": _one(IMAGE, lambda x: layers.UpSampling2D(2, interpolation="bilinear")(x)),
    "RESIZE_NEAREST_NEIGHBOR": _one(IMAGE, lambda x: layers.UpSampling2D(2)(x)),
    "L2_NORMALIZATION": _one(IMAGE, lambda x: layers.UnitNormalization()(x)),
    "DEPTH_TO_SPACE": _one(IMAGE, lambda x: ops.depth_to_space(x, 2)),
    "SPACE_TO_DEPTH": _one(IMAGE, lambda x: ops.space_to_depth(x, 2)),
    "GATHER": _one(IMAGE, lambda x: ops.take(x, np.array([3, 0, 2]), axis=1)),
    "REDUCE_MIN": _one(IMAGE, lambda x: ops.min(x, axis=(1, 2))),
    "REDUCE_PROD": _one((4, 8), lambda x: ops.prod(x, axis=1)),
    "TOPK_V2": _one(ROWS, lambda x: ops.top_k(x, 3)[0]),
    "ARG_MAX": _one(ROWS, lambda x: ops.argmax(x, axis=-1)),
    "ARG_MIN": _one(ROWS, lambda x: ops.argmin(x, axis=-1)),
    "DIV": _one(ROWS, lambda x: ops.argmax(x, axis=-1) // 3),
    "LOGICAL_AND": _chosen_by(lambda a, b: ops.logical_and(a > b, b > 0.5)),
    "LOGICAL_OR": _chosen_by(lambda a, b: ops.logical_or(a > b, b > 0.5)),
    # The converter turns a negated comparison, or a choice by it, into others.
    "LOGICAL_NOT": _two(lambda x: ops.logical_not(ops.logical_and(x[0] > x[1], x[1] > 0.5))),
    # What a recurrence begins and ends with.
    "CAST": _one(VECTOR, lambda x: ops.cast(x > 0.5, "float32")),
    "UNPACK": _recurrent(),
    "PACK": _recurrent(),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _one(ROWS, lambda x: layers.LSTM(4)(x)),
    "SELECT_V2": _chosen_by(ops.greater),
    **{
        name: _chosen_by(compare)
        for name, compare in (
            ("EQUAL", ops.equal),
            ("NOT_EQUAL", ops.not_equal),
            ("GREATER", ops.greater),
            ("GREATER_EQUAL", ops.greater_equal),
            ("LESS", ops.less),
            ("LESS_EQUAL", ops.less_equal),
        )
    },
    # What the ends of a file become of an input of bytes, and of an output of floats.
    "QUANTIZE": _activation("relu"),
    "DEQUANTIZE": _activation("relu"),
}
INT16_MODELS: dict[str, Build] = {
    # The int16 kernel of TANH approximates.
    "UNPACK": _recurrent("relu"),
    "PACK": _recurrent("relu"),
    # Comparisons of quantities have kernels of 8 bits only.
    "SELECT_V2": _masked,
    # No end of a file turns bytes into int16; a scale that a kernel fixes meets another one here.
    "QUANTIZE": _one(VECTOR, lambda x: layers.Concatenate()([ops.sigmoid(x), x])),
}
WITHOUT_SCALE = ("DEQUANTIZE", "LOGICAL_NOT", "ARG_MAX", "ARG_MIN", "DIV")
# In the table, but never in a file.
SHIPS_AS_ANOTHER = tuple(op for op, rule in OP_TABLE.items() if rule.ships_as)


def main(argv: Sequence[str] | None = None) -> list[Cell]:
    """Probes with command-line arguments; returns the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/op_probe"))
    parser.add_argument("--only", choices=sorted(MODELS), help="one operator (default all)")
    parser.add_argument("--write", action="store_true", help="replace the repository's table")
    options = parser.parse_args(argv)
    operators = [options.only] if options.only else probed_operators()
    cells = []
    with forked_children():
        for operator in operators:
            found = list(probe(operator))
            cells += found
            print(f"{operator:<24} {_summary(found)}", flush=True)
    text = to_json(cells)
    options.out.mkdir(parents=True, exist_ok=True)
    write_file(options.out / "op_probe.json", text.encode())
    if options.write:
        others = [c for c in read_table() if c.operator not in operators] if options.only else []
        write_file(TABLE, to_json([*others, *cells]).encode())
    print(f"{len(cells)} cells: {_summary(cells)}")
    return cells


def probed_operators() -> list[str]:
    """The operators of `OP_TABLE` that a file may hold, in the table's order.

    Raises:
        AssertionError: if one has no model to be probed with.
    """
    operators = [name for name, rule in OP_TABLE.items() if rule.ships_as is None]
    if missing := [name for name in operators if name not in MODELS]:
        raise AssertionError(
            f"Expected a model in MODELS for each row of OP_TABLE. Received: none for {missing}. "
            "Add one whose file holds the operator."
        )
    return operators


def probe(operator: str) -> Iterator[Cell]:
    """The cells of one operator: each of its precisions on each runtime."""
    for probed in files(operator):
        for runtime in RUNTIMES:
            yield _cell(operator, probed, runtime)


@dataclasses.dataclass(frozen=True, eq=False)
class Probed:
    """A file of one operator at one precision, its model and the data it is tried on."""

    precision: Precision
    frozen: kqat.FrozenModel
    blob: bytes
    data: Any


def files(operator: str) -> Iterator[Probed]:
    """The operator's files, one for each precision."""
    for precision in FUSED.get(operator) or precisions(operator):
        if operator == "PRELU" and precision.scales == "per axis":
            continue  # The kernel has one scale for its slopes, and the policy says so.
        keras.utils.set_random_seed(0)
        wide = precision.activations == "int16"
        model = (INT16_MODELS if wide else MODELS).get(operator, MODELS[operator])()
        data = _data(model)
        config = precision.config
        if operator == "PRELU":
            # One spec for all weights leaves slopes 8 bits; those that are named get fewer.
            slopes: Any = config.weights
            config = dataclasses.replace(config, weights={"alpha": slopes})
        frozen = kqat.freeze(kqat.quantize_model(model, config, calibration_data=data))
        blob = exporter.assemble(
            frozen,
            [_input_type(operator, tensor, wide) for tensor in model.inputs],
            [_output_type(operator, tensor) for tensor in frozen.model.outputs],
            runtimes=frozenset(),
            tables_computed=frozenset(table.index for table in frozen.tables),
        )
        _check_holds(operator, precision, blob)
        yield Probed(precision, frozen, blob, data)


def _input_type(operator: str, tensor: Any, wide: bool) -> str | None:
    if tensor.dtype == "int32":
        return "int32"
    return "uint8" if operator == "QUANTIZE" and not wide else None


def _output_type(operator: str, tensor: Any) -> str | None:
    if not keras.backend.is_float_dtype(tensor.dtype):
        return "int32"  # Indexes and truth values have no scale.
    return "float32" if operator == "DEQUANTIZE" else None


def _data(model: keras.Model) -> Any:
    generator = np.random.default_rng(0)

    def values(tensor: Any) -> np.ndarray:
        size = (SAMPLES, *tensor.shape[1:])
        if tensor.dtype == "int32":
            return generator.integers(0, 3, size).astype(np.int32)
        return generator.normal(size=size).astype(np.float32)

    arrays = [values(tensor) for tensor in model.inputs]
    return arrays if len(arrays) > 1 else arrays[0]


def _check_holds(operator: str, precision: Precision, blob: bytes) -> None:
    """Raises where the file is not of the operator and the weights that the cell is about."""
    found = [o for o in inspect(blob).operators if o.name == operator]
    types = {o.weight_dtype for o in found}
    if not found or (precision.weights and types != {precision.weights}):
        raise AssertionError(f"{operator} at {precision} became {inspect(blob).counts()}, {types}")


def _cell(operator: str, probed: Probed, runtime: str) -> Cell:
    precision, frozen, blob, data = probed.precision, probed.frozen, probed.blob, probed.data
    cell = Cell(
        operator=operator,
        activations=precision.activations,
        weights=precision.weights or "",
        scales=precision.scales or "",
        runtime=runtime,
        result="refuses",
    )
    # A child first: a kernel that a runtime lacks may end the process.
    (alone,), _ = compare_runtimes(blob, None, [runtime], 1)
    if alone.problem is not None:
        return dataclasses.replace(cell, words=_own_words(alone.problem))
    part = verify(frozen, blob, data, runtimes=[runtime], samples=SAMPLES).on(runtime)
    if part.problem is not None:
        return dataclasses.replace(cell, words=_own_words(part.problem))
    # From end to end steps add up; but a value without a scale has no other measure.
    ends = [o.max_steps for o in part.outputs] if operator in WITHOUT_SCALE else []
    steps = max([part.max_steps, *ends])
    most = APPROXIMATE.get((operator, precision.activations), 1)
    result = "works" if steps <= most and part.sites else "wrong"
    differing = None if part.exact is None or part.exact.unknown else part.exact.differing
    return dataclasses.replace(cell, result=result, max_steps=steps, differing=differing)


def _own_words(problem: str) -> str:
    words = problem.split("Received: ", 1)[-1].split(" Use ops and types", 1)[0]
    return " ".join(words.split())


def _summary(cells: Sequence[Cell]) -> str:
    results = [cell.result for cell in cells]
    kinds = ("works", "refuses", "wrong")
    return ", ".join(f"{results.count(kind)} {kind}" for kind in kinds if kind in results)


def to_json(cells: Sequence[Cell]) -> str:
    """The table as text, one cell a line, sorted."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    rows = [json.dumps(dataclasses.asdict(cell), ensure_ascii=False) for cell in sorted(cells)]
    body = ",\n".join(rows)
    return f'{{"versions": {json.dumps(versions)},\n"cells": [\n{body}\n]}}\n'


def read_table(path: Path = TABLE) -> list[Cell]:
    """The cells of a table that `--write` wrote."""
    return [Cell(**row) for row in json.loads(path.read_text())["cells"]]


if __name__ == "__main__":
    main()
