"""Writes `docs/coverage.md`: how each layer and function of Keras ships, from the tables.

python -m docs.coverage
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import keras

from kqat.devices import TABLE_OPS, ops_at
from kqat.registry import (
    ACTIVATIONS,
    FUNCTIONS,
    LAYER_REASONS,
    LAYERS,
    NETWORKS,
    OPERATION_REASONS,
    OPERATIONS,
    REDUCING,
    LayerRule,
    Output,
)
from kqat.rewrites import BINARY, REARRANGING
from tflite_export.kernels import missing_kernels

PATH = Path(__file__).with_suffix(".md")
# Heading -> runtime, and width of the activations.
RUNTIMES = {
    "LiteRT": ("litert", 8),
    "TFLite Micro": ("tflite_micro", 8),
    "LiteRT, int16": ("litert", 16),
    "TFLite Micro, int16": ("tflite_micro", 16),
}
HEAD = """# Coverage

How each public layer and function of Keras {version} ships in integers, and on which runtimes.
`python -m docs.coverage` writes this page from the tables of `kqat` and `tflite_export`; a test
checks that it is up to date.

The terms: *own range*: the output has its own quantizer. *Same scale*: the output has the scale of
the input. *Fixed range*: the integer kernel demands this range. *Table*: a lookup table of 256
entries (CAST, ADD, GATHER), exact for any elementwise function. For activations of 16 bits a table
is exact on LiteRT, and elsewhere piecewise linear and at most one step off. *Parts*: several
operators, each followed by a quantizer.

Layers with `data_format="channels_first"`, normalizations over axis 1 and functions of that format
ship as they are with the channels last, with the same weights. The file transposes a value where
it comes in and where its own order is read: at an output, in a Flatten of the other format. In
between all is computed with the channels last. ConvLSTM layers of that format are refused.

Custom layers, `Lambda` and your own functions are traced, and ship as the layers and functions that
they use. An elementwise function ships as one table.
"""


def text() -> str:
    """The document."""
    parts = [
        HEAD.format(version=keras.__version__),
        _section("Layers", "Layer", _layers()),
        _section("Activations", "Activation", _activations()),
        "\n## Functions of `keras.ops`\n\n| Function | How it ships |\n|---|---|\n",
        "".join(f"| `{name}` | {how} |\n" for name, how in _functions()),
        "\n## Without an integer form\n\n",
        "Leave such a layer float with `None` as its config, or move it out of the model.\n\n",
        _reasons("Layer", LAYER_REASONS),
        "\n",
        _reasons("Function", OPERATION_REASONS),
    ]
    return "".join(parts)


Row = tuple[str, str, LayerRule]


def _section(title: str, kind: str, rows: Iterator[Row]) -> str:
    lines = [
        f"\n## {title}\n\n",
        f"| {kind} | How it ships | Operators | {' | '.join(RUNTIMES)} |\n",
        "|---|---|---|" + "---|" * len(RUNTIMES) + "\n",
    ]
    for name, how, rule in rows:
        runs = " | ".join(_runs(rule, *runtime) for runtime in RUNTIMES.values())
        lines.append(f"| `{name}` | {how} | {', '.join(rule.ops)} | {runs} |\n")
    return "".join(lines)


def _runs(rule: LayerRule, runtime: str, bits: int) -> str:
    # A row with CAST uses a lookup table, whose operators run everywhere: they are not missing.
    parts = TABLE_OPS if "CAST" in rule.ops and not rule.table_of_rows else ()
    missing = missing_kernels(
        tuple(op for op in ops_at(rule.ops, bits, 0) if op not in parts), runtime, bits
    )
    if not missing:
        return "yes"
    return "as a table" if rule.is_table(bits) else f"not with {', '.join(missing)}"


def _layers() -> Iterator[Row]:
    public = {
        value for value in vars(keras.layers).values() if inspect.isclass(value) and value in LAYERS
    }
    for layer in sorted(public, key=lambda cls: cls.__name__):
        rule = LAYERS[layer]
        yield layer.__name__, _how(rule), rule


def _activations() -> Iterator[Row]:
    for name, rule in sorted(ACTIVATIONS.items()):
        yield name, _how(rule), rule


def _how(rule: LayerRule) -> str:
    if rule.opens:
        return "traced; ships as what it is made of, or as a table"
    if rule.output is Output.VANISHES and rule.decompose:
        return "no operator, of inputs that it leaves as they are; others are refused"
    if rule.output is Output.VANISHES:
        return "no operator: it changes nothing in inference"
    if rule.table and rule.bounds is not None:
        return "own range, which ends where the function clips: no operator; or a table"
    if rule.table:
        return "own range; its operator, or a table" if rule.ops else "own range; a table"
    if rule.affine:
        return (
            "own range; exact 1×1 depthwise convolution, one operator with a constant, or in the "
            "weights of the layer before or behind it"
        )
    if rule.table_of_rows:
        return "own range; its rows ship on that grid"
    if rule.clamp:
        return "fused activation of the layer before it, or else an operator"
    if rule.output is Output.FIXED and rule.fixed_range is not None:
        low, high = rule.fixed_range
        return f"fixed range [{low:.4g}, {high:.4g}]"
    weights = f"; weights {', '.join(rule.weights)}" if rule.weights else ""
    parts = "; in parts" if rule.decompose and not rule.weights else ""
    return f"{rule.output.value}{weights}{parts}"


def _functions() -> Iterator[tuple[str, str]]:
    rooms = (
        (FUNCTIONS, "table"),
        (
            BINARY,
            "operator of two tensors; a layer or table for a constant; comparisons give booleans",
        ),
        (REARRANGING, "moves values, on the same scale"),
        (REDUCING, "reduces axes other than the batch"),
        (NETWORKS, "as the layer of that name"),
        (OPERATIONS, "as the layers that it is rewritten with"),
    )
    for name in sorted(OPERATIONS):
        yield name, next(how for table, how in rooms if name in table)


def _reasons(kind: str, table: dict[str, str]) -> str:
    """A table with one row for each reason, and all names that share it."""
    names: dict[str, list[str]] = {}
    for name, why in sorted(table.items()):
        names.setdefault(why, []).append(f"`{name}`")
    rows = "".join(f"| {', '.join(found)} | It {why}. |\n" for why, found in names.items())
    return f"| {kind} | Why |\n|---|---|\n{rows}"


if __name__ == "__main__":
    PATH.write_text(text())
    print(f"wrote {PATH.name}: {len(LAYERS)} layers, {len(OPERATIONS)} functions")
