"""A `.tflite` as C++ for the firmware engineer: model, operators, arena, golden vectors, a check.

The golden outputs and the arena size come from TFLite Micro's own interpreter, run here on the
very bytes that the array holds.
"""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from kqat.base import ExportError, RuntimeUnavailableError, write_files
from tflite_export import flatbuffer
from tflite_export.flatbuffer import DECODE, ModelT, TensorT
from tflite_export.kernels import OP_TABLE
from tflite_export.runtimes import as_type, has_grid, random_inputs, run, tflite_micro_arena_bytes

TEMPLATES = ("model.h", "model.cc", "ops.h", "golden.h", "golden.cc", "main.cc", "io.h")
_PLAIN = {template: f"{{name}}_{template}" for template in TEMPLATES}
# Layout -> template -> path below the folder, with the model's name in its place. Of a layout
# without `main`, main.cc is a function that the application calls.
LAYOUTS: dict[str, dict[str, str]] = {
    "plain": _PLAIN,
    "cmake": {**_PLAIN, "cmake.CMakeLists.txt": "CMakeLists.txt"},
    "zephyr": {
        **{t: f"{'src' if t.endswith('.cc') else 'include'}/{p}" for t, p in _PLAIN.items()},
        "main.cc": "src/{name}_check.cc",
        "check.h": "include/{name}_check.h",
        "zephyr.CMakeLists.txt": "CMakeLists.txt",
        "zephyr.Kconfig": "Kconfig",
        "zephyr.module.yml": "zephyr/module.yml",
    },
    "arduino": {
        # Arduino compiles no .cc.
        **{t: f"src/{p.replace('.cc', '.cpp')}" for t, p in _PLAIN.items()},
        "main.cc": "src/{name}_check.cpp",
        "check.h": "src/{name}_check.h",
        "arduino.umbrella.h": "src/{name}.h",
        "arduino.library.properties": "library.properties",
        "arduino.sketch.ino": "examples/{name}_check/{name}_check.ino",
    },
}
# The recording allocator's total leaves out the scratch memory of preparing kernels, some hundred
# bytes on the files that were measured. Larger arenas are tried in steps of this many.
ARENA_STEP_BYTES = 256
_ARENA_TRIES = 64
_VALUES_PER_LINE = 12
# `OpRule.resolver_method` of operators that the op table does not have: those that only files of
# other writers hold, and custom ones.
_ADDERS = {
    "CUMSUM": "AddCumSum",
    "PADV2": "AddPadV2",
    DECODE: "AddDecode",
    "CIRCULAR_BUFFER": "AddCircularBuffer",
    "TFLite_Detection_PostProcess": "AddDetectionPostprocess",
    "ethos-u": "AddEthosU",
}
_C_TYPES = {
    "int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t", "int32": "int32_t",
    "int64": "int64_t", "float32": "float", "bool": "bool",
}  # fmt: skip
_KEYWORDS = frozenset(
    "alignas alignof and asm auto bitand bitor bool break case catch char class compl const "
    "constexpr continue decltype default delete do double else enum explicit export extern false "
    "float for friend goto if inline int long main mutable namespace new noexcept not nullptr "
    "operator or private protected public register reinterpret_cast return short signed sizeof "
    "static static_assert struct switch template this throw true try typedef typeid typename union "
    "unsigned using virtual void volatile wchar_t while xor".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CSource:
    """What `to_c` wrote.

    Attributes:
        files: the paths written, those of `TEMPLATES` first, in their order.
        operators: the TFLite operators that the resolver registers, sorted.
        arena_bytes: the arena in the files: the least multiple of 256 bytes, counted from what
            TFLite Micro says that it uses, with which the model runs on this 64-bit host.
    """

    files: tuple[Path, ...]
    operators: tuple[str, ...]
    arena_bytes: int


@dataclasses.dataclass(frozen=True)
class _Port:
    """A model input or output as the templates see it; `values` holds (samples, elements)."""

    name: str
    identifier: str
    c_type: str
    values: np.ndarray
    scale: str | None
    zero_point: int

    @property
    def elements(self) -> int:
        return int(self.values.shape[1])

    @property
    def lines(self) -> list[str]:
        return _lines([_literal(v) for v in self.values.ravel()])


def to_c(
    blob: bytes,
    directory: str | os.PathLike[str],
    *,
    name: str = "model",
    layout: str = "plain",
    inputs: Sequence[np.ndarray] | None = None,
    samples: int = 2,
    seed: int = 0,
) -> CSource:
    """Writes `blob` as C++11 for TFLite Micro: `NAME_model`, `_ops`, `_io`, `_golden`, `_main.cc`.

    `NAME_main.cc` runs the golden inputs on the device and compares every output; compiled with
    `NAME_PROFILE` (in capitals) it prints the ticks of each operator. `NAME_io.h` has the scale of
    each input and output, and functions that turn real values into its integers and back. It is
    C++ and not C, as TFLite Micro itself is, whose newest headers ask for C++17.

    Args:
        blob: the file.
        directory: where to write; made if it is missing. All files are written, or none.
        name: of the model; files and identifiers begin with it, made a C identifier.
        layout: `"plain"`: the sources alone; `"cmake"`: with a CMakeLists.txt for a library of the
            model and a program on the host; `"zephyr"`: a Zephyr module; `"arduino"`: an Arduino
            library with a sketch. The last two have a function `NAME_check()` for `main`.
        inputs: golden inputs, as for `tflite_export.runtimes.run`; one array (samples, …) per model
            input, in its dtype, or in floats, which are rounded to the input's grid. Without,
            random ones.
        samples: how many random ones; so many batches for a file whose batch is larger than one.
        seed: of the random ones.

    Raises:
        ExportError: if the file cannot be read, has an operator or a type without a place in C++,
            or the inputs do not fit it.
        RuntimeUnavailableError: if TFLite Micro is absent or does not run the file.
        OSError: if the files cannot be written.
    """
    blob = bytes(blob)
    model = flatbuffer.read(blob)
    operators = _operators(model)
    _check_types(model)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ExportError(f"Expected at least 1 golden sample. Received: samples={samples!r}.")
    feeds = random_inputs(model, samples, seed) if inputs is None else _in_types(model, inputs)
    outputs = run(blob, feeds, runtime="tflite_micro").outputs
    arena_bytes = _least_arena_bytes(blob)
    if layout not in LAYOUTS:
        raise ExportError(f"Expected one of {sorted(LAYOUTS)}. Received: layout={layout!r}.")
    paths = LAYOUTS[layout]
    own = c_identifier(name, set())
    ports = _ports(model, feeds, outputs)
    text = {
        "name": own,
        "guard": own.upper(),
        "size_bytes": len(blob),
        "data_lines": _lines([f"0x{byte:02x}" for byte in blob]),
        "operators": operators,
        "adders": [_adder(operator) for operator in operators],
        "arena_bytes": arena_bytes,
        "inputs": ports[0],
        "outputs": ports[1],
        "samples": int(ports[0][0].values.shape[0]),
        "has_check": "check.h" in paths,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    templates = _environment()
    files = {
        folder / path.format(name=own): templates.get_template(f"{template}.j2")
        .render(text)
        .encode()
        for template, path in paths.items()
    }
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_files(files)
    return CSource(files=tuple(files), operators=operators, arena_bytes=arena_bytes)


def _in_types(model: flatbuffer.ModelT, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays with their floats on the grids of the file's inputs; `run` checks the rest."""
    tensors = [model.subgraphs[0].tensors[index] for index in model.subgraphs[0].inputs]
    feeds = [np.asarray(x) for x in inputs]
    if len(feeds) != len(tensors):
        return feeds
    return [
        _rounded(x.astype(np.float32), tensor) if x.dtype.kind == "f" and has_grid(tensor) else x
        for x, tensor in zip(feeds, tensors, strict=True)
    ]


def _rounded(x: np.ndarray, tensor: TensorT) -> np.ndarray:
    """Floats on the grid of an input.

    Raises:
        ExportError: if they are far outside of it, as integers are that somebody saved as floats.
    """
    limits = np.iinfo(flatbuffer.tensor_dtype(tensor))
    scale, zero_point = float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])
    low, high = (scale * (end - zero_point) for end in (limits.min, limits.max))
    width = high - low
    if x.size and (x.max() > high + width or x.min() < low - width):
        raise ExportError(
            f"Expected floats of about {low:.4g} to {high:.4g} in golden input "
            f"'{flatbuffer.tensor_name(tensor)}'. Received: {x.min():.4g} to {x.max():.4g}. Give "
            f"integers of the grid as {limits.dtype}."
        )
    return as_type(x, tensor)


def c_identifier(name: str, taken: set[str]) -> str:
    """`name` as a C++ identifier that is not in `taken`; takes it.

    Accents are dropped, other odd characters become one underscore. Names that C++ reserves (double
    or leading underscores, keywords) do not come out.
    """
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_") or "unnamed"
    if plain[0].isdigit() or plain in _KEYWORDS:
        plain = f"n_{plain}"
    unique, number = plain, 2
    while unique in taken:
        unique, number = f"{plain}_{number}", number + 1
    taken.add(unique)
    return unique


def _environment() -> jinja2.Environment:
    # Nothing is escaped: `c_identifier` and `_comment` have made the names harmless.
    return jinja2.Environment(
        loader=jinja2.PackageLoader("tflite_export.firmware"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _operators(model: ModelT) -> tuple[str, ...]:
    found = {flatbuffer.op_name(model, o) for graph in model.subgraphs for o in graph.operators}
    for operator in found:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", operator) and operator not in _ADDERS:
            raise ExportError(
                "Expected operators that MicroMutableOpResolver has a method for. Received: the "
                f"custom operator {operator!r}. Register it by hand."
            )
    return tuple(sorted(found))


def _adder(operator: str) -> str:
    """The resolver's method: AddConv2D for CONV_2D."""
    own = OP_TABLE[operator].resolver_method if operator in OP_TABLE else _ADDERS.get(operator)
    camel = "".join(part.capitalize() for part in operator.split("_"))
    return own or "Add" + re.sub(r"(\d)d", r"\1D", camel)


def _check_types(model: ModelT) -> None:
    graph = model.subgraphs[0]
    for index in (*graph.inputs, *graph.outputs):
        tensor = graph.tensors[index]
        if 0 in flatbuffer.tensor_shape(tensor):
            raise ExportError(
                f"Expected inputs and outputs with values: C++ has no array of none. Received: "
                f"shape {flatbuffer.tensor_shape(tensor)} of {flatbuffer.tensor_name(tensor)!r}."
            )
        if flatbuffer.tensor_dtype(tensor).name not in _C_TYPES:
            raise ExportError(
                f"Expected inputs and outputs of {sorted(_C_TYPES)}. Received: "
                f"{flatbuffer.tensor_dtype(tensor).name} for {flatbuffer.tensor_name(tensor)!r}."
            )


def _least_arena_bytes(blob: bytes) -> int:
    """The smallest arena that TFLite Micro runs in, in steps from the total that it reports.

    Raises:
        RuntimeUnavailableError: if it does not run in an arena little above that total.
    """
    used = tflite_micro_arena_bytes(blob)
    for tries in range(_ARENA_TRIES):
        given = used + -used % 16 + tries * ARENA_STEP_BYTES
        try:
            tflite_micro_arena_bytes(blob, given_bytes=given, grow=False)
        except RuntimeUnavailableError:
            continue
        return given
    raise RuntimeUnavailableError(
        f"Expected TFLite Micro to run in little more than the {used:,} bytes that it reported. "
        f"Received: refusals up to {given:,} bytes. Measure on the device."
    )


def _ports(
    model: ModelT, feeds: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> tuple[list[_Port], list[_Port]]:
    graph = model.subgraphs[0]
    first = flatbuffer.tensor_shape(graph.tensors[graph.inputs[0]]) or (1,)
    invocations = len(feeds[0]) // first[0]
    sides = []
    for indices, arrays in ((graph.inputs, feeds), (graph.outputs, outputs)):
        taken: set[str] = set()
        side = []
        for index, array in zip(indices, arrays, strict=True):
            name = flatbuffer.tensor_name(graph.tensors[index])
            values = np.asarray(array).reshape(invocations, -1)
            c_type = _C_TYPES[values.dtype.name]
            scale, zero = _grid_of(graph.tensors[index])
            identifier = c_identifier(name, taken)
            side.append(_Port(_comment(name), identifier, c_type, values, scale, zero))
        sides.append(side)
    return sides[0], sides[1]


def _grid_of(tensor: TensorT) -> tuple[str | None, int]:
    """The scale of a tensor of integers as a C++ literal, and its zero point; `None` without."""
    grid = tensor.quantization
    if not has_grid(tensor) or flatbuffer.tensor_dtype(tensor).kind == "f":
        return None, 0
    return _literal(np.float32(grid.scale[0])), int(grid.zeroPoint[0])


def _comment(name: str) -> str:
    """A name that is safe in a C++ comment: it neither ends it nor continues its line."""
    return re.sub(r"[^\x20-\x5b\x5d-\x7e]|\*/|\?\?", "?", name)


def _literal(value: Any) -> str:
    if isinstance(value, np.floating):
        if not np.isfinite(value):
            raise ExportError(
                "Expected finite golden outputs. Received: infinity or NaN. Use other inputs."
            )
        # Nine digits tell every float32 from its neighbours. Hexadecimal ones need C++17.
        digits = f"{float(value):.9g}"
        return f"{digits}f" if set(digits) & {".", "e"} else f"{digits}.0f"
    if isinstance(value, np.bool_):
        return "true" if value else "false"
    if value == np.iinfo(np.int64).min:
        return "INT64_MIN"  # C++ has no literal of it.
    if value == np.iinfo(np.int32).min:
        return "INT32_MIN" if value.dtype.itemsize == 4 else f"{value}LL"
    return f"{value}LL" if value.dtype.itemsize == 8 else str(value)


def _lines(values: Sequence[str]) -> list[str]:
    step = _VALUES_PER_LINE
    return [", ".join(values[start : start + step]) for start in range(0, len(values), step)]
