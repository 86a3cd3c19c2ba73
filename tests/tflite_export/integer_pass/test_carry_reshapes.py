"""RESHAPEs are carried across operators that compute number by number, where fewer are left."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L

from tests.newer_keras import needs_tensorflow
from tests.tflite_export.integer_pass.test_drop_reshapes import STEPS, same_without
from tests.tflite_export.small_models import operators, quantized
from tflite_export import flatbuffer
from tflite_export.flatbuffer.edit import add_tensor, new_operator, new_reshape
from tflite_export.integer_pass.carry_reshapes import carry_reshapes
from tflite_export.integer_pass.draft import Draft
from tflite_export.integer_pass.drop_reshapes import join_reshapes
from tflite_export.kernels.weight_layout import TENSOR_TYPES, quantization
from tflite_export.runtimes.execution import run

FLAT, IMAGE, COLUMN, MANY = (1, 4, 4), (1, 1, 4, 4), (1, 4, 1, 4), (1, 1, 1, 4, 4)


class Net:
    """A file by hand, of one input; each method returns the tensor of what it computes."""

    def __init__(self) -> None:
        model, graph = schema.ModelT(), schema.SubGraphT()
        model.version, model.buffers, model.subgraphs = 3, [schema.BufferT()], [graph]
        model.operatorCodes, graph.tensors, graph.operators = [], [], []
        self.model, self.graph = model, graph
        self.reshaped: set[str] = set()  # names of what RESHAPEs write
        self.x = self.tensor(FLAT)
        graph.inputs = [self.x]

    def tensor(self, shape: tuple[int, ...], data: np.ndarray | None = None) -> int:
        """Of int8, or a constant."""
        kind = TENSOR_TYPES[np.dtype(np.int8) if data is None else data.dtype]
        grid = quantization([0.05], [3], 0)
        name = f"tensor_{len(self.graph.tensors)}"
        return add_tensor(self.model, shape, kind, name=name, grid=grid, data=data)

    def __call__(self, name: str, *inputs: int) -> int:
        """An operator whose result has the shape of its first input."""
        result = self.tensor(flatbuffer.tensor_shape(self.graph.tensors[inputs[0]]))
        self.graph.operators.append(new_operator(self.model, name, [*inputs], [result]))
        return result

    def name(self, tensor: int) -> str:
        return flatbuffer.tensor_name(self.graph.tensors[tensor])

    def numbers(self, *shape: int) -> int:
        return self.tensor(shape, np.arange(np.prod(shape), dtype=np.int8).reshape(shape))

    def reshape(self, x: int, shape: tuple[int, ...]) -> int:
        result = self.tensor(shape)
        self.graph.operators.append(new_reshape(self.model, x, result))
        self.reshaped.add(self.name(result))
        return result

    def conv(self, x: int, image: tuple[int, ...] = IMAGE) -> int:
        """As a Conv1D: an operator on images between two RESHAPEs."""
        return self.reshape(self.turn(self.reshape(x, image)), FLAT)

    def turn(self, x: int) -> int:
        """What does not compute number by number: it takes two axes of 4 for each other."""
        shape = flatbuffer.tensor_shape(self.graph.tensors[x])
        axes = np.arange(len(shape), dtype=np.int32)
        last = [axis for axis in axes if shape[axis] == 4]
        axes[last] = last[::-1]
        return self("TRANSPOSE", x, self.tensor(axes.shape, axes))


def stack(net: Net, x: int) -> list[int]:
    """As in speaker recognition; the input of the first block is no image."""
    for _ in range(2):
        x = net("RELU", net("ADD", x, net.conv(net.conv(x))))
    return [net.conv(x)]


def with_constants(net: Net, x: int) -> list[int]:
    """One number for all, one for each channel, and one for each step and channel."""
    x = net("PRELU", net("ADD", net.conv(x), net.numbers()), net.numbers(4))
    return [net.conv(net("SUB", x, net.numbers(4, 4)))]


def with_columns(net: Net, x: int) -> list[int]:
    """The axis of size 1 stands between those of the constant, which would repeat otherwise."""
    return [net.conv(net("ADD", net.conv(x, COLUMN), net.numbers(4, 4)), COLUMN)]


def of_many_axes(net: Net, x: int) -> list[int]:
    """No kernel of TFLite Micro repeats numbers along so many."""
    return [net.conv(net("ADD", net.conv(x, MANY), net.numbers(4)), MANY)]


def output_inside(net: Net, x: int) -> list[int]:
    y = net("ADD", net.conv(x), net.conv(net("RELU", x)))
    return [y, net.conv(net("RELU", y))]


def idle_end(net: Net, x: int) -> list[int]:
    """The sum has images behind it; the RELU has none, and needs the sum's rows."""
    y = net("ADD", net.conv(x), net.conv(net("RELU", x)))
    return [y, net("RELU", y)]


def rows_between(net: Net, x: int) -> list[int]:
    """One image in the end for the rows of three outputs."""
    y = net.conv(x)
    first = net("RELU", y)
    second = net("RELU", first)
    return [y, first, second, net.conv(net("RELU", second))]


def read_as_rows(net: Net, x: int) -> list[int]:
    y = net.conv(x)
    return [net.turn(y), net.turn(net("RELU", y))]


def of_no_image(net: Net, x: int) -> list[int]:
    """One of the two that are added is no image, so the sum is none either."""
    y = net("ADD", net.conv(x), net.turn(x))
    return [net.conv(net("MAXIMUM", y, y))]


@pytest.mark.parametrize(
    ("call", "whole", "without"),
    [
        (stack, 6, 2),
        (with_constants, 4, 2),
        (with_columns, 4, 4),
        (of_many_axes, 4, 4),
        (output_inside, 6, 3),
        (idle_end, 4, 2),
        (rows_between, 4, 4),
        (read_as_rows, 2, 2),
        (of_no_image, 4, 4),
    ],
)
def test_values_are_the_same_with_fewer_reshapes(
    call: Callable[[Net, int], list[int]], whole: int, without: int
) -> None:
    feed = np.random.default_rng(0).integers(-128, 128, (8, *FLAT[1:])).astype(np.int8)
    counts, names, outputs, values = [], [], [], []
    for passes in ((join_reshapes,), (join_reshapes, carry_reshapes)):
        net = Net()
        net.graph.outputs = call(net, net.x)
        for step in passes:
            step(Draft(net.model, cast(Any, None), frozenset()))
        counts.append(operators(net.model).count("RESHAPE"))
        found = run(flatbuffer.write(net.model), [feed], runtime="litert_reference", tensors="all")
        outputs.append(found.outputs)
        names.append([net.name(output) for output in net.graph.outputs])
        values.append({net.name(i): x.ravel() for i, x in found.tensors.items() if net.name(i)})
    assert counts == [whole, without]
    assert names[0] == names[1]
    for theirs, ours in zip(*outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # What computes keeps its name, for numbers that have another shape at most.
    assert values[0].keys() - values[1].keys() <= net.reshaped
    for name, numbers in values[1].items():
        np.testing.assert_array_equal(numbers, values[0][name])


def conv(x: Any, **options: Any) -> Any:
    return L.Conv1D(4, 3, padding="same", **options)(x)


def residual(x: Any) -> Any:
    for _ in range(2):
        x = L.ReLU()(L.Add()([x, conv(conv(x, activation="relu"))]))
    return L.GlobalAveragePooling1D()(conv(x))


def gated(x: Any) -> Any:
    """A table, a constant, and a value of one step for all steps, as in squeeze-and-excitation."""
    y = L.Activation("gelu")(conv(x)) + np.linspace(-1, 1, 48, dtype=np.float32).reshape(1, 12, 4)
    gate = L.Dense(4, activation="sigmoid")(L.GlobalAveragePooling1D(keepdims=True)(y))
    return conv(L.Multiply()([y, gate]))


def ended(x: Any) -> Any:
    """The sum is an output; what the other sum is made of is read as it is, too."""
    y, z = conv(x), conv(x)
    return [L.Add(name="sum")([y, z]), L.Dense(3)(L.Subtract()([y, conv(z)]))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "policy", "batch_size", "whole", "without"),
    [
        (residual, "w4a8", 1, 6, 2),
        (residual, "int16x8", 2, 6, 2),
        (gated, "int8", 1, 4, 3),
        (gated, "int16x8", 1, 4, 3),
        (ended, "int8", 1, 4, 3),
        (residual, {"re_lu": None}, 1, 6, 2),
    ],
)
def test_models_ship_with_fewer_reshapes(
    call: Callable[[Any], Any],
    policy: Any,
    batch_size: int,
    whole: int,
    without: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if batch_size > 1:
        needs_tensorflow("2.21", "a batch of more than one with as many RESHAPEs")
    qat, x = quantized(STEPS, call, policy)
    blobs = same_without(carry_reshapes, qat, x[:8], batch_size, monkeypatch)
    found = [operators(flatbuffer.read(blob)).count("RESHAPE") for blob in blobs]
    assert found == [without, whole]
