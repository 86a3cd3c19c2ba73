"""Reads what the markers say and takes them out of a marked float flatbuffer."""

import dataclasses
import math

from kqat.base import LoweringError
from kqat.freezing import Marker
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT, new_operator


@dataclasses.dataclass
class Labels:
    """What each tensor of subgraph 0 is: an integer site, or a float.

    `sites[t]` is the grid of tensor `t`; `named[t]` are the sites whose markers stood on it.
    `floats` are tensors that a precision boundary made float. `tables` pairs placeholder operators
    with the index of the table that is to be looked up there, `lstms` with that of the LSTM.
    """

    sites: dict[int, Site] = dataclasses.field(default_factory=dict)
    named: dict[int, list[Site]] = dataclasses.field(default_factory=dict)
    floats: set[int] = dataclasses.field(default_factory=set)
    tables: list[tuple[OperatorT, int]] = dataclasses.field(default_factory=list)
    lstms: list[tuple[OperatorT, int]] = dataclasses.field(default_factory=list)


def take_markers(model: ModelT, sites: tuple[Site, ...]) -> Labels:
    """Removes the QUANTIZE/DEQUANTIZE pairs of `model`, in place, and labels what they marked.

    A pair on a float becomes a label. Where two labels with different grids, or a label and a
    float, meet at a boundary, a real QUANTIZE or DEQUANTIZE stays.
    """
    reader = _MarkerReader(model, sites)
    for operator in model.subgraphs[0].operators:
        reader.visit(operator)
    reader.finish()
    return reader.labels


def same_grid(a: Site, b: Site) -> bool:
    """Whether two sites have the same integers for the same values."""
    return (a.scale, a.zero_point, a.bits) == (b.scale, b.zero_point, b.bits)


class _MarkerReader:
    """One walk over the operators, in the order in which they run."""

    def __init__(self, model: ModelT, sites: tuple[Site, ...]):
        self.model = model
        self.graph = model.subgraphs[0]
        self.sites = sites
        self.batch_size = flatbuffer.tensor_shape(self.graph.tensors[self.graph.inputs[0]])[0]
        self.labels = Labels()
        self.kept: list[OperatorT] = []
        self.alias: dict[int, int] = {}
        # Marked tensor -> its source, and the marker's kind and index.
        self.pending: dict[int, tuple[int, str, int]] = {}
        self.first: dict[tuple[str, int], int] = {}  # marker -> the tensor on which it first stood
        self.stand_ins: list[OperatorT] = []  # where an LSTM will be
        self.crossing: set[int] = set()  # floats that become integers at the next marker

    def visit(self, operator: OperatorT) -> None:
        operator.inputs = [self.alias.get(int(i), int(i)) for i in operator.inputs]
        name = flatbuffer.op_name(self.model, operator)
        if name == "QUANTIZE":
            output = int(operator.outputs[0])
            params = self.graph.tensors[output].quantization
            kind, index = Marker.read(float(params.scale[0]), int(params.zeroPoint[0]))
            self.pending[output] = (operator.inputs[0], kind, index)
        elif name == "DEQUANTIZE" and operator.inputs[0] in self.pending:
            source, kind, index = self.pending[operator.inputs[0]]
            take = {
                "fence": self._fence, "table": self._table, "site": self._site, "lstm": self._lstm
            }[kind]  # fmt: skip
            take(source, int(operator.outputs[0]), index)
        else:
            self.kept.append(operator)

    def _site(self, source: int, output: int, index: int) -> None:
        if not 0 <= index < len(self.sites):
            raise LoweringError(f"Expected a marker below {len(self.sites)}. Received: {index}.")
        site, known = self.sites[index], self.labels.sites.get(source)
        if not self._has_size(source, site) or self._is_copy("site", index, source):
            self.alias[output] = source
            return
        if source in self.crossing or (known is not None and not same_grid(known, site)):
            self._keep("QUANTIZE", source, output)
            source = output
        elif source != output:
            self.alias[output] = source
        self.labels.sites.setdefault(source, site)
        self.labels.named.setdefault(source, []).append(site)

    def _has_size(self, tensor: int, site: Site) -> bool:
        shape = flatbuffer.tensor_shape(self.graph.tensors[tensor])
        return math.prod(shape) == self.batch_size * math.prod(site.shape)

    def _is_copy(self, kind: str, index: int, source: int) -> bool:
        """Whether the converter put this marker here itself.

        It hands a pair on across MEAN and across moves with several readers. The tensor on which
        an index first stands is the marked one; a copy comes later, or has a size of its own.
        """
        return self.first.setdefault((kind, index), source) != source

    def _table(self, source: int, output: int, index: int) -> None:
        if self._is_copy("table", index, source):
            self.alias[output] = source
            return
        self.labels.tables.append((self._keep("GATHER", source, output), index))

    def _lstm(self, source: int, output: int, index: int) -> None:
        """Puts the LSTM's placeholder where `lowering` let a product stand in for it."""
        self.alias[output] = source
        if self._is_copy("lstm", index, source):
            return
        producers = {int(t): operator for operator in self.kept for t in operator.outputs}

        def before(operator: OperatorT) -> OperatorT:
            return next(producers[int(t)] for t in operator.inputs if int(t) in producers)

        product = producers[source]
        # The converter may have carried the marker across a RESHAPE; of one feature, the product
        # is a MUL.
        while flatbuffer.op_name(self.model, before(product)) != "ABS":
            product = before(product)
        absolute = before(product)
        name, ends = "UNIDIRECTIONAL_SEQUENCE_LSTM", (absolute.inputs[0], product.outputs[0])
        whole = new_operator(self.model, name, [int(ends[0])], [int(ends[1])])
        self.kept = [whole if operator is product else operator for operator in self.kept]
        self.labels.lstms.append((whole, index))
        self.stand_ins.append(absolute)

    def _drop_stand_ins(self) -> None:
        """Drops what stood before a product that is an LSTM now, if nothing else reads it."""
        read = {int(t) for operator in self.kept for t in operator.inputs}
        unread = [id(o) for o in self.stand_ins if int(o.outputs[0]) not in read]
        self.kept = [operator for operator in self.kept if id(operator) not in unread]

    def _fence(self, source: int, output: int, index: int) -> None:
        if source in self.labels.sites:
            self._keep("DEQUANTIZE", source, output)
            self.labels.floats.add(output)
        else:
            # The pair is gone; the marker that follows turns this very tensor into integers.
            self.alias[output] = source
            self.crossing.add(source)
            self.labels.floats.add(source)

    def _keep(self, name: str, source: int, output: int) -> OperatorT:
        self.kept.append(new_operator(self.model, name, [source], [output]))
        return self.kept[-1]

    def finish(self) -> None:
        self._drop_stand_ins()
        graph = self.graph
        graph.operators = self.kept
        graph.outputs = [self.alias.get(int(i), int(i)) for i in graph.outputs]
        for signature in self.model.signatureDefs:
            for entry in signature.outputs:
                entry.tensorIndex = self.alias.get(entry.tensorIndex, entry.tensorIndex)
