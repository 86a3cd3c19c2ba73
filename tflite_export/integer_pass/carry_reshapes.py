"""Carries RESHAPEs across operators that compute number by number, where fewer are left then.

A Conv1D is a convolution of images of one row, between two RESHAPEs. What adds two of them up, or
clamps the sum, computes the same numbers in the same order on the images themselves. So the
RESHAPEs behind such layers meet those before the next convolution, and both go.
"""

from collections.abc import Iterable, Sequence

from tflite_export import flatbuffer
from tflite_export.flatbuffer import OperatorT, new_reshape
from tflite_export.integer_pass.draft import Draft
from tflite_export.integer_pass.drop_reshapes import join_reshapes
from tflite_export.kernels import OP_TABLE

Shape = tuple[int, ...]
# Kernels that repeat the numbers of one input for those of another take so many axes everywhere.
_MOST_AXES = 4


def carry_reshapes(draft: Draft) -> None:
    """Lets operators that compute number by number read what a RESHAPE reads, if that saves one.

    Each gets a RESHAPE behind it in return. Of two in a row one or none is left then.
    """
    tensors = draft.graph.tensors
    shapes = dict.fromkeys(
        tuple(flatbuffer.tensor_shape(tensors[int(t[0])]) for t in (op.outputs, op.inputs))
        for op in draft.graph.operators
        if draft.op_name(op) == "RESHAPE"
    )
    for before, after in shapes:
        if before != after and len(after) <= max(len(before), _MOST_AXES):
            _Carrier(draft, before, after).carry()
            join_reshapes(draft)


class _Carrier:
    """The operators that compute on one shape and can as well compute on another.

    Attributes:
        before: the shape of what they read and write.
        after: the other.
        at_hand: value of the shape `before` -> the tensor of its numbers in the shape `after`;
            the value itself where one of them computes it.
    """

    def __init__(self, draft: Draft, before: Shape, after: Shape):
        self.draft, self.graph = draft, draft.graph
        self.before, self.after = before, after
        self.outputs = set(map(int, self.graph.outputs))
        self.at_hand: dict[int, int] = {}
        self.producers = {int(o): op for op in self.graph.operators for o in op.outputs}
        self.readers: dict[int, list[OperatorT]] = {}
        for operator in self.graph.operators:
            for tensor in set(map(int, operator.inputs)):
                self.readers.setdefault(tensor, []).append(operator)

    def carry(self) -> None:
        """Lets them compute on the shape `after` where that saves a RESHAPE."""
        inside = {id(op) for region in self._regions() for op in self._that_save(region)}
        order: list[OperatorT] = []
        for operator in self.graph.operators:
            order.append(operator)
            if id(operator) in inside:
                values, value = self._values(operator), int(operator.outputs[0])
                image = self._image(value)
                operator.inputs = [
                    self.at_hand[int(t)] if int(t) in values else int(t) for t in operator.inputs
                ]
                operator.outputs = [image]
                self.at_hand[value] = image
                order.append(new_reshape(self.draft.model, image, value))
        self.graph.operators = order

    def _regions(self) -> list[list[OperatorT]]:
        """The operators whose values are at hand, or results of others; in order.

        Those that have a value in common are one region.
        """
        regions: list[tuple[list[OperatorT], set[int]]] = []
        for operator in self.graph.operators:
            values = self._values(operator)
            if self._is_reshape(operator, self.after, self.before):
                self.at_hand[int(operator.outputs[0])] = int(operator.inputs[0])
            elif self._is_reshape(operator, self.before, self.after):
                self.at_hand.setdefault(int(operator.inputs[0]), int(operator.outputs[0]))
            elif values and values <= self.at_hand.keys():
                result = int(operator.outputs[0])
                self.at_hand[result] = result
                met = [region for region in regions if region[1] & values]
                regions = [region for region in regions if not region[1] & values]
                operators = [op for region, _ in met for op in region]
                tensors = {result}.union(values, *(known for _, known in met))
                regions.append(([*operators, operator], tensors))
        return [operators for operators, _ in regions]

    def _values(self, operator: OperatorT) -> set[int]:
        """The inputs of the result's shape, if an operator computes number by number; else none."""
        name, inputs = self.draft.op_name(operator), [int(t) for t in operator.inputs]
        if len(operator.outputs) != 1 or self._shape(int(operator.outputs[0])) != self.before:
            return set()
        if name == "GATHER":
            inputs = inputs[1:] if len(self._shape(inputs[0])) == 1 else []  # a table of numbers
        elif name not in OP_TABLE or not OP_TABLE[name].elementwise:
            return set()
        values = {
            t for t in inputs if self._shape(t) == self.before and not self.draft.is_constant(t)
        }
        return values if all(t in values or self._repeats_alike(t) for t in inputs) else set()

    def _repeats_alike(self, tensor: int) -> bool:
        """Whether an input means the same beside either shape: its axes are the last of both."""
        shape = self._shape(tensor)
        own = shape[next((i for i, size in enumerate(shape) if size != 1), len(shape)) :]
        ends = [whole[len(whole) - len(own) :] for whole in (self.before, self.after)]
        return len(shape) <= len(self.after) and ends[0] == ends[1] and len(ends[0]) == len(own)

    def _that_save(self, region: Sequence[OperatorT]) -> list[OperatorT]:
        """A region without the ends that save no RESHAPE; nothing if the whole saves none."""
        inside = {id(operator) for operator in region}
        for operator in reversed(region):
            values, result = self._values(operator), int(operator.outputs[0])
            if not any(id(reader) in inside for reader in self.readers.get(result, ())):
                saved = self._saved({*values, result}, inside)
                inside.remove(id(operator))
                if self._saved(values, inside) < saved:
                    inside.add(id(operator))
        kept = [operator for operator in region if id(operator) in inside]
        around = {t for operator in kept for t in (*self._values(operator), operator.outputs[0])}
        return kept if self._saved(map(int, around), inside) > 0 else []

    def _saved(self, values: Iterable[int], inside: set[int]) -> int:
        """How many RESHAPEs of some values fewer there are if a region need not read them.

        Args:
            values: those that the region reads or writes.
            inside: the identities of its operators.
        """
        saved = 0
        for value in values:
            producer, readers = self.producers.get(value), self.readers.get(value, [])
            if id(producer) in inside:
                given = [r for r in readers if self._is_reshape(r, self.before, self.after)]
                saved += sum(int(reader.outputs[0]) not in self.outputs for reader in given)
            elif producer is not None and self._is_reshape(producer, self.after, self.before):
                saved += 1
            else:
                continue
            is_read = any(
                id(reader) not in inside and self.draft.op_name(reader) != "RESHAPE"
                for reader in readers
            )
            saved -= is_read or value in self.outputs
        return saved

    def _is_reshape(self, operator: OperatorT, given: Shape, result: Shape) -> bool:
        if self.draft.op_name(operator) != "RESHAPE":
            return False
        ends = tuple(self._shape(int(t[0])) for t in (operator.inputs, operator.outputs))
        return ends == (given, result)

    def _shape(self, tensor: int) -> Shape:
        return flatbuffer.tensor_shape(self.graph.tensors[tensor])

    def _image(self, value: int) -> int:
        """A new tensor of the shape `after`, which bears the value's name if that is no output."""
        tensor, grid = self.graph.tensors[value], self.graph.tensors[value].quantization
        image = flatbuffer.add_tensor(self.draft.model, self.after, tensor.type, grid=grid)
        if value not in self.outputs:
            self.graph.tensors[image].name, tensor.name = tensor.name, None
        return image
