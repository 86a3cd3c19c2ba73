"""Drops RESHAPEs that change nothing for who reads them.

FULLY_CONNECTED flattens its input and keeps its axes itself, as a mean or a sum keeps those that it
reduces. Of two RESHAPEs in a row the first is not needed, nor is the second where it gives the
first axes back.
"""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT, OperatorT
from tflite_export.integer_pass.draft import Draft
from tflite_export.kernels import OP_TABLE


def drop_flattening(draft: Draft) -> None:
    """Removes the RESHAPEs of subgraph 0 that only FULLY_CONNECTED reads.

    Without `keep_num_dims` that operator takes an input of two or more axes, whatever their sizes,
    as rows of as many numbers as its weights have (schema.fbs, `FullyConnectedOptions`): its output
    is the same, batch and all. A site that only the dropped tensor was named after is given to the
    tensor that is read in its place.
    """
    model, graph = draft.model, draft.graph
    kept: list[OperatorT] = []
    # From the end, so that of two RESHAPEs in a row both may go.
    for operator in reversed(graph.operators):
        readers = _readers(model, operator)
        if not readers:
            kept.append(operator)
            continue
        source = int(operator.inputs[0])
        for reader in readers:
            reader.inputs = [source, *reader.inputs[1:]]
        draft.hand_name_on(int(operator.outputs[0]), source)
    graph.operators = kept[::-1]


def keep_axes(draft: Draft) -> None:
    """Removes the RESHAPEs of subgraph 0 that give an operator's result its input's axes back.

    The operator does so itself by an option: the same numbers in the same order. FULLY_CONNECTED
    gives rows, or with `keep_num_dims` rows along the input's other axes (schema.fbs,
    `FullyConnectedOptions`). As the axes are the input's, and the rows as many as its numbers fill,
    its last axis is a row. A mean or another reduction drops axes, or with `keep_dims` keeps them
    with a size of 1 (`ReducerOptions`), as squeeze and excite asks for by a Reshape layer.
    """
    model, graph = draft.model, draft.graph
    for operator in list(graph.operators):
        reshapes = _that_give_axes_back(model, operator)
        if not reshapes:
            continue
        flat, (kept, *others) = int(operator.outputs[0]), (int(r.outputs[0]) for r in reshapes)
        operator.outputs = [kept]
        setattr(operator.builtinOptions, _KEEPS[type(operator.builtinOptions)], True)
        draft.hand_name_on(flat, kept)
        for reader in graph.operators:
            reader.inputs = [kept if int(i) in others else int(i) for i in reader.inputs]
        # By identity, as two operators may be equal in all that they hold.
        gone = {id(reshape) for reshape in reshapes}
        graph.operators = [other for other in graph.operators if id(other) not in gone]
    _keep_axes_between(draft)


def join_reshapes(draft: Draft) -> None:
    """Makes one of two RESHAPEs in a row, or none, in subgraph 0.

    A Conv1D is a convolution of images of one row, between two RESHAPEs. The converter joins those
    that meet between two such layers only where no marker parts them. A site that only a dropped
    tensor was named after is given to the tensor that is read in its place.
    """
    model, graph = draft.model, draft.graph
    outputs = set(map(int, graph.outputs))
    reshapes: dict[int, OperatorT] = {}
    kept: list[OperatorT] = []
    instead: dict[int, int] = {}  # tensor -> the one of the same numbers and shape that is read
    for operator in graph.operators:
        operator.inputs = [instead.get(int(i), int(i)) for i in operator.inputs]
        if flatbuffer.op_name(model, operator) == "RESHAPE":
            before, result = reshapes.get(int(operator.inputs[0])), int(operator.outputs[0])
            if before is not None:
                operator.inputs = [before.inputs[0], *operator.inputs[1:]]
            source = int(operator.inputs[0])
            shapes = [flatbuffer.tensor_shape(graph.tensors[i]) for i in (source, result)]
            if shapes[0] == shapes[1] and result not in outputs:
                instead[result] = source
                draft.hand_name_on(result, source)
                continue
            reshapes[result] = operator
        kept.append(operator)
    read = {int(i) for operator in kept for i in operator.inputs} | outputs
    for operator in reshapes.values():
        source, result = int(operator.inputs[0]), int(operator.outputs[0])
        if result not in read:
            draft.hand_name_on(result, source)
    gone = {id(one) for one in reshapes.values() if int(one.outputs[0]) not in read}
    graph.operators = [operator for operator in kept if id(operator) not in gone]


# The option by which an operator keeps its input's axes, by the kind of its options.
_KEEPS: dict[type, str] = {
    schema.FullyConnectedOptionsT: "keepNumDims",
    schema.ReducerOptionsT: "keepDims",
}


def _that_give_axes_back(model: ModelT, operator: OperatorT) -> list[OperatorT]:
    """All readers of an operator's result if each does no more than that, else none."""
    graph, options = model.subgraphs[0], operator.builtinOptions
    keeps = _KEEPS.get(type(options))
    if keeps is None or getattr(options, keeps):
        return []
    wanted, value = _with_all_axes(model, operator), int(operator.outputs[0])
    outputs = set(map(int, graph.outputs))
    readers = [op for op in graph.operators if value in map(int, op.inputs)]
    if value in outputs:
        return []
    given = [int(reader.outputs[0]) for reader in readers]
    if len(readers) > 1 and outputs & set(given):
        return []  # Each output is a tensor of its own.
    gives_back = all(
        flatbuffer.op_name(model, reader) == "RESHAPE"
        and tuple(flatbuffer.tensor_shape(graph.tensors[result])) == wanted
        for reader, result in zip(readers, given, strict=True)
    )
    return readers if gives_back else []


def _with_all_axes(model: ModelT, operator: OperatorT) -> tuple[int, ...] | None:
    """The shape of an operator's result with its input's axes; `None` where no file says it."""
    tensors = [model.subgraphs[0].tensors[int(i)] for i in operator.inputs[:2]]
    shape = flatbuffer.tensor_shape(tensors[0])
    if isinstance(operator.builtinOptions, schema.FullyConnectedOptionsT):
        return (*shape[:-1], flatbuffer.tensor_shape(tensors[1])[0])
    reduced = flatbuffer.tensor_data(model, tensors[1])
    if reduced is None:
        return None
    gone = {int(axis) % len(shape) for axis in reduced.ravel()}
    return tuple(1 if axis in gone else size for axis, size in enumerate(shape))


def _readers(model: ModelT, operator: OperatorT) -> list[OperatorT]:
    """The readers of a RESHAPE's result if all of them flatten it themselves, else none."""
    graph = model.subgraphs[0]
    value = int(operator.outputs[0])
    if flatbuffer.op_name(model, operator) != "RESHAPE" or value in map(int, graph.outputs):
        return []
    if len(flatbuffer.tensor_shape(graph.tensors[int(operator.inputs[0])])) < 2:
        return []
    readers = [op for op in graph.operators if value in map(int, op.inputs)]
    return readers if all(_flattens(model, op, value) for op in readers) else []


def _flattens(model: ModelT, operator: OperatorT, value: int) -> bool:
    options: Any = operator.builtinOptions
    return (
        flatbuffer.op_name(model, operator) == "FULLY_CONNECTED"
        and not options.keepNumDims
        and value not in map(int, operator.inputs[1:])
    )


def _keep_axes_between(draft: Draft) -> None:
    """As `keep_axes`, where functions of each number stand between two FULLY_CONNECTED or more."""
    outputs = set(map(int, draft.graph.outputs))
    for first in list(draft.graph.operators):
        rows = _Rows(draft, first, outputs)
        if rows.reach() and rows.reshapes:
            rows.give_axes_back()


class _Rows:
    """The values of rows that begin with a FULLY_CONNECTED's and that operators make of these.

    Attributes:
        values: tensors of shape `(rows, n)`.
        products: the FULLY_CONNECTED among the operators.
        reshapes: those that give the rows the axes back that the first operator's input has.
    """

    def __init__(self, draft: Draft, first: OperatorT, outputs: set[int]):
        self.draft, self.first, self.outputs = draft, first, outputs
        self.axes: tuple[int, ...] = ()
        self.values: set[int] = set()
        self.products: list[OperatorT] = []
        self.reshapes: list[OperatorT] = []

    def reach(self) -> bool:
        """Finds them; whether all that reads them can take them with the axes."""
        if not self._multiplies(self.first):
            return False
        shape = self._shape(int(self.first.inputs[0]))
        if len(shape) < 3 or self._shape(int(self.first.inputs[1]))[1] != shape[-1]:
            return False
        self.axes = shape[:-1]
        self.products, self.values = [self.first], {int(self.first.outputs[0])}
        readers = [op for op in self.draft.graph.operators if op is not self.first]
        for operator in readers:  # In the order in which they run.
            read = self.values & set(map(int, operator.inputs))
            if not read:
                continue
            result = int(operator.outputs[0])
            if self._multiplies(operator) and int(operator.inputs[0]) in self.values:
                self.products.append(operator)
            elif self.draft.op_name(operator) == "RESHAPE":
                if not self._gives_axes_back(operator):
                    return False
                self.reshapes.append(operator)
                continue
            elif not self._is_of_each_number(operator):
                return False
            self.values.add(result)
        return not self.values & self.outputs

    def give_axes_back(self) -> None:
        """Leaves out the RESHAPEs: the values have the axes from the first operator on."""
        graph = self.draft.graph
        for operator in self.products:
            options: Any = operator.builtinOptions
            options.keepNumDims = True
        for value in self.values:
            size = self._shape(value)[-1]
            graph.tensors[value].shape = np.asarray((*self.axes, size), np.int32)
            graph.tensors[value].shapeSignature = None
        pairs = [(int(op.inputs[0]), int(op.outputs[0])) for op in self.reshapes]
        # An output of the model stays the tensor that it is: what made it writes it.
        instead = {source: result for source, result in pairs if result in self.outputs}
        instead |= {
            result: instead.get(source, source)
            for source, result in pairs
            if result not in self.outputs
        }
        for dropped, kept in instead.items():
            self.draft.hand_name_on(dropped, kept)
        gone = {id(op) for op in self.reshapes}
        graph.operators = [op for op in graph.operators if id(op) not in gone]
        for operator in graph.operators:
            operator.inputs = [instead.get(int(i), int(i)) for i in operator.inputs]
            operator.outputs = [instead.get(int(i), int(i)) for i in operator.outputs]

    def _gives_axes_back(self, reshape: OperatorT) -> bool:
        source, result = int(reshape.inputs[0]), int(reshape.outputs[0])
        if self._shape(result) != (*self.axes, self._shape(source)[-1]):
            return False
        # Each output of the model is a tensor of its own.
        others = {int(op.outputs[0]) for op in self.reshapes if int(op.inputs[0]) == source}
        return result not in self.outputs or not others & self.outputs

    def _multiplies(self, operator: OperatorT) -> bool:
        options: Any = operator.builtinOptions
        is_dense = self.draft.op_name(operator) == "FULLY_CONNECTED" and not options.keepNumDims
        return is_dense and len(self._shape(int(operator.outputs[0]))) == 2

    def _is_of_each_number(self, operator: OperatorT) -> bool:
        """Whether an operator computes number by number, of such rows and single numbers alone."""
        name, inputs = self.draft.op_name(operator), [int(t) for t in operator.inputs]
        if name == "GATHER":
            return len(self._shape(inputs[0])) == 1 and inputs[1] in self.values
        if name not in OP_TABLE or not OP_TABLE[name].elementwise or len(operator.outputs) != 1:
            return False
        others = [t for t in inputs if t not in self.values]
        shapes = {self._shape(t) for t in (*inputs, int(operator.outputs[0])) if t in self.values}
        result = self._shape(int(operator.outputs[0]))
        numbers = all(int(np.prod(self._shape(t))) == 1 for t in others)
        return numbers and shapes <= {result}

    def _shape(self, tensor: int) -> tuple[int, ...]:
        return flatbuffer.tensor_shape(self.draft.graph.tensors[tensor])
