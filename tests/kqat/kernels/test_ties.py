"""Values next to a half, where the order of float32 operations decides, round as on XNNPACK."""

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.op_probe import files
from kqat.kernels import Grid
from tflite_export import flatbuffer
from tflite_export.integer_model import Step, carry_out, read_program
from tflite_export.runtimes.execution import run
from tflite_export.verification.exactness import exactness

SCALES = 40


@pytest.mark.parametrize(
    "operator", ["MEAN", "FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "MUL"]
)
def test_values_next_to_a_half_are_xnnpacks(operator: str) -> None:
    """The output's scale is chosen so that some sum lies within some float32 of a half."""
    probed = next(f for f in files(operator) if f.precision.activations == "int8")
    model = flatbuffer.read(probed.blob)
    graph = model.subgraphs[0]
    draw = np.random.default_rng(0)
    feeds = []
    for index in graph.inputs:
        tensor = graph.tensors[int(index)]
        # A zero point of its own: some kernels add it up in floats.
        tensor.quantization.zeroPoint = np.array([draw.integers(-100, 100)], np.int64)
        shape = (24, *flatbuffer.tensor_shape(tensor)[1:])
        feeds.append(draw.integers(-128, 128, shape).astype(np.int8))
    step = next(s for s in read_program(model).steps if s.name == operator)
    sums, unit = _sums(step, feeds)
    result = graph.tensors[step.result.index]
    differing = 0
    for number in range(SCALES):
        scale = np.float32(unit * abs(draw.choice(sums)) / (draw.integers(3, 100) + 0.5))
        towards = (np.float32(0), scale, np.float32(9))[number % 3]
        result.quantization.scale = np.array([np.nextafter(scale, towards)], np.float32)
        result.quantization.zeroPoint = np.array([draw.integers(-60, 60)], np.int64)
        blob = flatbuffer.write(model)
        computed = run(blob, feeds, runtime="litert", tensors="all").tensors
        found = exactness(flatbuffer.read(blob), computed, "litert")
        assert found.elements and not found.unknown
        differing += found.differing
    assert differing == 0


def _sums(step: Step, feeds: list[np.ndarray]) -> tuple[np.ndarray, np.float32]:
    """What the operator adds up for its first channel, but for zeros; and the scale of that."""
    scales = [t.on_grid.scale for t in step.inputs[:2] if t is not None and t.grid is not None]
    unit = np.prod(scales, dtype=np.float32)
    if step.name == "MEAN":
        unit /= np.float32(feeds[0][0].size / math.prod(step.result.shape))
    wide = dataclasses.replace(step.result, grid=Grid((unit,), 0, "int32"), dtype="int32")
    values = {
        tensor.index: x[:, np.newaxis]
        for tensor, x in zip(step.inputs, feeds, strict=False)
        if tensor is not None
    }
    found = carry_out(dataclasses.replace(step, outputs=(wide,)), values, "litert")
    first = found[wide.index][..., 0]
    return first[first != 0], unit


@pytest.mark.parametrize("runtime", ["litert_reference", "litert_builtin", "tflite_micro"])
def test_a_wide_product_is_scaled_as_the_kernel_scales_it(runtime: str) -> None:
    """Codes of 16 bits times values that keep their scale, as computed places pick them.

    The product of the two scales, in float32 or in float64, decides the last of the 15 bits.
    """
    probed = next(f for f in files("BATCH_MATMUL") if f.precision.activations == "int16")
    model = flatbuffer.read(probed.blob)
    tensors = model.subgraphs[0].tensors
    step = next(s for s in read_program(model).steps if s.name == "BATCH_MATMUL")
    values = step.given(1).on_grid.scale
    grids = [(step.given(0), 1 / 32767), (step.given(1), values), (step.result, values)]
    for tensor, scale in grids:
        tensors[tensor.index].quantization.scale = np.array([scale], np.float32)
    draw = np.random.default_rng(0)
    shapes = [flatbuffer.tensor_shape(tensors[int(i)])[1:] for i in model.subgraphs[0].inputs]
    feeds = [draw.integers(-(2**15), 2**15, (24, *shape)).astype(np.int16) for shape in shapes]
    blob = flatbuffer.write(model)
    computed = run(blob, feeds, runtime=runtime, tensors="all").tensors
    found = exactness(flatbuffer.read(blob), computed, runtime)
    assert found.elements and found.is_exact


@pytest.mark.parametrize("runtime", ["litert_reference", "litert_builtin", "tflite_micro"])
@pytest.mark.parametrize(
    ("operator", "scales"),
    [
        ("MUL", (0.015106001868844032, 0.009770261123776436, 0.02048499695956707)),
        ("PRELU", (0.013376732356846333, 0.010332619771361351, 0.013541823253035545)),
    ],
)
def test_a_product_is_scaled_as_the_kernel_scales_it(
    operator: str, scales: tuple[float, ...], runtime: str
) -> None:
    """TFLite Micro multiplies scales in float64, LiteRT in float32: some products differ."""
    probed = next(f for f in files(operator) if f.precision.activations == "int8")
    model = flatbuffer.read(probed.blob)
    tensors, inputs = model.subgraphs[0].tensors, model.subgraphs[0].inputs
    step = next(s for s in read_program(model).steps if s.name == operator)
    for tensor, scale in zip((step.given(0), step.given(1), step.result), scales, strict=True):
        given = tensors[tensor.index].quantization
        given.scale, given.zeroPoint = np.array([scale], np.float32), np.array([0])
    # Every integer, or every pair of two, as far as they fill samples.
    every = np.arange(-128, 128).astype(np.int8)
    values = np.stack([np.repeat(every, 256), np.tile(every, 256)])[: len(inputs)]
    (shape,) = {flatbuffer.tensor_shape(tensors[int(i)])[1:] for i in inputs}
    whole = values.shape[1] // math.prod(shape) * math.prod(shape)
    feeds = list(values[:, :whole].reshape(len(inputs), -1, *shape))
    blob = flatbuffer.write(model)
    computed = run(blob, feeds, runtime=runtime, tensors="all").tensors
    found = exactness(flatbuffer.read(blob), computed, runtime)
    assert found.elements > 65000 and found.is_exact
