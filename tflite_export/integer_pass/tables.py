"""Elementwise functions as lookup tables: 256 entries at 8 bits, straight pieces at 16 bits.

No runtime has an operator for an integer lookup table, but all have its parts. At 8 bits: CAST to
int32, ADD 128, GATHER; the table holds the function's value for every integer, rounded as in
training. At 16 bits LiteRT gathers from all 65,536 values in the same way. TFLite Micro's GATHER
takes bytes only, so a file for it computes `piecewise_linear.Pieces` in int32, whose numbers are
gathered byte by byte (`benchmarks/op_probe.py` runs the parts).
"""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kqat.devices import LITERT
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, new_operator
from tflite_export.integer_pass.draft import Draft
from tflite_export.integer_pass.piecewise_linear import INTEGERS, Pieces, fit
from tflite_export.kernels import ACTIVATION_DTYPES, TENSOR_TYPES, kernel_version, quantization

_INT32 = schema.TensorType.INT32
# Number of bytes -> by how much an unsigned number of so many bytes comes out too small, since
# each byte from 0 to 255 is stored as int8, 128 less.
_TAKEN_OFF = {count: 128 * sum(256**i for i in range(count)) for count in (1, 2, 3)}


def insert_tables(draft: Draft) -> None:
    """Puts a lookup in the place of each placeholder of `labels.tables`.

    Raises:
        LoweringError: if a function of 16 bits has too many jumps for TFLite Micro.
    """
    graph, sites = draft.graph, draft.sites
    chosen = {id(op): draft.frozen.tables[index] for op, index in draft.labels.tables}
    kept: list[OperatorT] = []
    for operator in graph.operators:
        if id(operator) not in chosen:
            kept.append(operator)
            continue
        table, (source, result) = chosen[id(operator)], (operator.inputs[0], operator.outputs[0])
        grids = sites[source], sites[result]
        dtype = TENSOR_TYPES[ACTIVATION_DTYPES[grids[1].bits]]
        writer = Int32Writer(draft.model, grids[1].name, source, dtype)
        if grids[1].bits == 8 or draft.runtimes <= LITERT:
            _whole(writer, table.lookup(*grids), source, result, grids[1])
        else:
            steps = table.values(grids[0]) / np.float64(grids[1].scale)
            _pieces(writer, fit(steps, table.layer.name), source, result)
        kept += writer.operators
    graph.operators = kept


def _whole(writer: "Int32Writer", table: np.ndarray, source: int, result: int, site: Site) -> None:
    """A GATHER from a table with an entry for every integer."""
    wide = writer.cast(source, name="wide")
    index = writer.by("ADD", wide, len(table) // 2, name="index")
    entries = writer.constant(table, "table")
    writer.tensors[entries].quantization = quantization([site.scale], [site.zero_point], 0)
    writer.gather(entries, index, result)


def _pieces(writer: "Int32Writer", pieces: Pieces, source: int, result: int) -> None:
    """The operators that compute `Pieces.evaluate`."""
    half = INTEGERS // 2
    x = writer.by("ADD", writer.cast(source), half)
    piece = writer.by("DIV", x, pieces.points)
    point = writer.of_two("SUB", x, writer.by("MUL", piece, pieces.points))
    # Two bytes hold a slope plus 2**15, which makes up for most of what storing them as int8 takes
    # off.
    slope = writer.number(pieces.slope + half, 2, piece, "slope")
    slope = writer.by("ADD", slope, _TAKEN_OFF[2] - half)
    line = writer.number(pieces.base, 3, piece, "base")
    line = writer.of_two("ADD", line, writer.of_two("MUL", slope, point))
    line = writer.by("DIV", writer.by("ADD", line, _TAKEN_OFF[3]), 2**pieces.shift)
    offset = -half
    if len(pieces.exceptions) > 1:
        row = writer.by("ADD", writer.number(pieces.rows, 1, piece, "rows"), _TAKEN_OFF[1])
        entry = writer.of_two("ADD", writer.by("MUL", row, pieces.points), point)
        entries = pieces.exceptions.reshape(-1) + half
        line = writer.of_two("ADD", line, writer.number(entries, 2, entry, "exceptions"))
        offset += _TAKEN_OFF[2] - half
    writer.cast(writer.by("ADD", line, offset), result)


class Int32Writer:
    """Writes operators on values of one shape; each method returns the tensor of its result."""

    def __init__(self, model: ModelT, name: str, like: int, dtype: int):
        self.model, self.name, self.dtype = model, name, dtype
        self.tensors = model.subgraphs[0].tensors
        self.shape = self.tensors[like].shape
        self.operators: list[OperatorT] = []

    def cast(self, x: int, result: int | None = None, name: str = "cast") -> int:
        """`x` as int32; or `x`, being int32, as the integers of `result`."""
        options = schema.CastOptionsT()
        given = self.tensors[x].type
        given = self.dtype if given == schema.TensorType.FLOAT32 else given  # Not converted yet.
        options.inDataType = given
        options.outDataType = _INT32 if result is None else self.dtype
        result = self._tensor(name, _INT32) if result is None else result
        return self._append("CAST", [x], result, options)

    def of_two(self, op: str, x: int, y: int, name: str = "") -> int:
        """ADD, SUB, MUL or DIV of int32 tensors."""
        options = getattr(schema, f"{op.title()}OptionsT")()
        return self._append(op, [x, y], self._tensor(name or op.lower(), _INT32), options)

    def by(self, op: str, x: int, number: int, name: str = "") -> int:
        """ADD, SUB, MUL or DIV of an int32 tensor and one number."""
        return self.of_two(op, x, self.constant(np.asarray(number, np.int32), str(number)), name)

    def gather(self, entries: int, index: int, result: int | None = None) -> int:
        """The entries that `index` points to."""
        dtype = self.tensors[entries].type
        result = self._tensor("byte", dtype) if result is None else result
        version = kernel_version("GATHER", 16 if dtype == schema.TensorType.INT16 else 8)
        return self._append("GATHER", [entries, index], result, schema.GatherOptionsT(), version)

    def number(self, values: np.ndarray, count: int, index: int, name: str) -> int:
        """`values[index] - _TAKEN_OFF[count]` of unsigned values of `count` bytes, as int32."""
        result = -1
        for place in reversed(range(count)):
            digits = ((values >> (8 * place)) & 255) - 128
            entries = self.constant(digits.astype(np.int8), f"{name}_{place}")
            byte = self.cast(self.gather(entries, index))
            higher = result
            result = byte if higher < 0 else self.of_two("ADD", self.by("MUL", higher, 256), byte)
        return result

    def constant(self, data: np.ndarray, name: str) -> int:
        """A new constant tensor."""
        kind = TENSOR_TYPES[data.dtype]
        name = f"{self.name}/{name}"
        return flatbuffer.add_tensor(self.model, data.shape, kind, name=name, data=data)

    def _tensor(self, name: str, kind: int) -> int:
        return flatbuffer.add_tensor(self.model, self.shape, kind, name=f"{self.name}/{name}")

    def _append(
        self, op: str, inputs: list[int], result: int, options: Any, version: int = 1
    ) -> int:
        operator = new_operator(self.model, op, inputs, [result], version)
        kind = type(options).__name__.removesuffix("T")
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        operator.builtinOptions = options
        self.operators.append(operator)
        return result
