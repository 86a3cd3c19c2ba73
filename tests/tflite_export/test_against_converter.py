"""A second opinion: the file that the TensorFlow converter quantizes itself.

The converter gets the same trained model with the trained ranges on its activations and plain
float weights, and quantizes with `Optimize.DEFAULT`: max-abs weights per channel, for Dense too.
It leaves nothing float in these networks. Both files must hold the same numbers, operator by
operator; RESHAPEs, of which the converter merges some, are left out.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L

import kqat
import tflite_export
from kqat.graph.tracer import Node, trace
from tests.coverage.cases import Case, functional
from tests.newer_keras import needs_tensorflow
from tflite_export import flatbuffer
from tflite_export.flatbuffer.tree import ModelT, OperatorT, TensorT
from tflite_export.runtimes.execution import run

# Scales in units in the last place of float32. Weights are equal; only where BatchNormalization
# folds in has the converter rounded max|w * factor| to float32 before it divides, ours rounds
# scale * |factor| after: either side rounds twice. Activations: ours is (high - low) / 255 in
# float32, as the fake-quant kernel of training has it, the converter's in float64.
ULPS_ACTIVATION, ULPS, ULPS_FOLDED = 1, 0, 2


def _bn(x: Any) -> Any:
    return L.BatchNormalization()(x)


def _mlp(x: Any) -> Any:
    return L.Dense(5)(L.Dense(12, "relu")(L.Dense(16, "relu")(x)))


def _cnn(x: Any) -> Any:
    x = L.MaxPooling2D()(L.ReLU()(_bn(L.Conv2D(8, 3)(x))))
    x = L.ReLU()(_bn(L.Conv2D(12, 3)(x)))
    return L.Dense(5)(L.GlobalAveragePooling2D()(x))


def _separable(x: Any) -> Any:
    x = L.ReLU(6.0)(_bn(L.Conv2D(8, 3, 2, use_bias=False)(x)))
    x = L.ReLU(6.0)(_bn(L.DepthwiseConv2D(3, use_bias=False)(x)))
    return L.ReLU(6.0)(_bn(L.Conv2D(12, 1, use_bias=False)(x)))


def _residual(x: Any) -> Any:
    y = L.Conv2D(4, 3, padding="same", activation="relu")(x)
    return L.ReLU()(L.Add()([x, L.Conv2D(4, 3, padding="same")(y)]))


def _transposed(x: Any) -> Any:
    x = L.Conv2D(6, 3, padding="same", activation="relu")(x)
    return L.Conv2DTranspose(3, 3, 2, padding="same")(x)


def _sequence(x: Any) -> Any:
    return L.Conv1D(6, 3)(L.Conv1D(8, 3, activation="relu")(x))


NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any], bool]] = {
    "mlp": ((16,), _mlp, False),
    "cnn": ((12, 12, 3), _cnn, True),
    "separable": ((12, 12, 3), _separable, True),
    "residual": ((8, 8, 4), _residual, False),
    "transposed": ((6, 6, 4), _transposed, False),
    "sequence": ((12, 3), _sequence, False),
}


class Pair:
    """One network as our file and as the converter's, and some of its inputs."""

    def __init__(self, shape: tuple[int, ...], call: Callable[[Any], Any], folds: bool) -> None:
        keras.utils.set_random_seed(0)
        model = Case(name="net", build=lambda: functional(shape, call), ops={}).model()
        rng = np.random.default_rng(0)
        self.x = rng.normal(scale=2, size=(64, *shape)).astype(np.float32)
        y = rng.normal(size=(64, *model.output.shape[1:]))
        qat = kqat.quantize_model(model, calibration_data=self.x)
        qat.compile(keras.optimizers.SGD(0.01), "mse")
        qat.fit(self.x, y, epochs=2, verbose=0)
        self.ulps = ULPS_FOLDED if folds else ULPS
        self.blobs = tflite_export.convert(qat), converted(qat)
        self.ours, self.theirs = (flatbuffer.read(blob) for blob in self.blobs)

    def operators(self) -> Iterator[tuple[str, OperatorT, OperatorT]]:
        ours, theirs = operators(self.ours), operators(self.theirs)
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        for (name, a), (_, b) in zip(ours, theirs, strict=True):
            yield name, a, b

    def skip_older_dense(self) -> None:
        """The converter of TensorFlow 2.16 gives a Dense one scale, that of 2.19 one per unit."""
        if any(name == "FULLY_CONNECTED" for name, _ in operators(self.ours)):
            needs_tensorflow("2.19", "a Dense per unit by the converter")

    def constants(self, position: int) -> Iterator[tuple[TensorT, TensorT]]:
        """Pairs of constants that operators read as input `position`, where they have scales."""
        for _, a, b in self.operators():
            if len(a.inputs) > position and len(b.inputs) > position:
                x = self.ours.subgraphs[0].tensors[a.inputs[position]]
                y = self.theirs.subgraphs[0].tensors[b.inputs[position]]
                if is_quantized(self.ours, x):
                    yield x, y


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name == "cnn" else pytest.mark.slow) for name in NETWORKS
    ],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(*NETWORKS[request.param])


def converted(qat: keras.Model) -> bytes:
    """The converter's own int8 file of a QAT model: its float layers, means and ranges."""
    graph = trace(qat)
    quantizers = [la for la in qat.layers if isinstance(la, kqat.ActivationQuantizer)]
    ranges = {layer.name: layer.range() for layer in quantizers}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.layer
        if isinstance(layer, kqat.ActivationQuantizer):
            low, high = ranges[layer.name]
            return tf.quantization.fake_quant_with_min_max_vars(layer.clamped(args[0]), low, high)
        if not isinstance(layer, kqat.QuantizeWrapper):
            return layer(*args, **kwargs)
        y = layer.layer(args[0])
        y = y if layer.normalization is None else layer.normalization(y, training=False)
        return y if layer.correction is None else y + layer.correction.value

    archive = keras.export.ExportArchive()
    archive.track(qat)
    spec = tf.TensorSpec((1, *qat.inputs[0].shape[1:]), tf.float32)
    archive.add_endpoint("serve", lambda x: graph.run([x], call), input_signature=[spec])
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serve"])
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.int8
        return converter.convert()


def operators(model: ModelT) -> list[tuple[str, OperatorT]]:
    named = [(flatbuffer.op_name(model, op), op) for op in model.subgraphs[0].operators]
    return [(name, op) for name, op in named if name != "RESHAPE"]


def is_quantized(model: ModelT, tensor: TensorT) -> bool:
    scale = None if tensor.quantization is None else tensor.quantization.scale
    return (
        flatbuffer.tensor_data(model, tensor) is not None and scale is not None and len(scale) > 0
    )


def ulps(a: TensorT, b: TensorT) -> int:
    """The largest difference of the scales of two tensors, in units in the last place."""
    ours, theirs = (np.asarray(t.quantization.scale, np.float32).view(np.int32) for t in (a, b))
    return int(np.abs(ours - theirs).max())


def test_integer_weights_and_biases_are_equal(pair: Pair) -> None:
    pair.skip_older_dense()
    compared = 0
    for position in (1, 2, 3):  # TRANSPOSE_CONV has its bias last
        for ours, theirs in pair.constants(position):
            a, b = (
                flatbuffer.tensor_data(pair.ours, ours),
                flatbuffer.tensor_data(pair.theirs, theirs),
            )
            assert a is not None and b is not None
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
            compared += 1
    assert compared >= 4  # two layers' weights and biases


def test_scales_of_constants_are_equal(pair: Pair) -> None:
    pair.skip_older_dense()
    for position in (1, 2, 3):
        for ours, theirs in pair.constants(position):
            assert len(ours.quantization.scale) == len(theirs.quantization.scale)
            # A bias has the product of two scales, each of which may differ, and is rounded again.
            bias = ours.type == schema.TensorType.INT32
            limit = pair.ulps + (2 * ULPS_ACTIVATION if bias else 0)
            assert ulps(ours, theirs) <= limit, flatbuffer.tensor_name(ours)


def test_activations_have_equal_grids(pair: Pair) -> None:
    graphs = pair.ours.subgraphs[0], pair.theirs.subgraphs[0]
    indices = [tuple(g.inputs[0] for g in graphs)]
    indices += [(a.outputs[0], b.outputs[0]) for _, a, b in pair.operators()]
    for a, b in indices:
        ours, theirs = graphs[0].tensors[a], graphs[1].tensors[b]
        assert ulps(ours, theirs) <= ULPS_ACTIVATION
        assert list(ours.quantization.zeroPoint) == list(theirs.quantization.zeroPoint)


def test_operators_have_equal_versions(pair: Pair) -> None:
    codes = pair.ours.operatorCodes, pair.theirs.operatorCodes
    for name, a, b in pair.operators():
        ours, theirs = codes[0][a.opcodeIndex].version, codes[1][b.opcodeIndex].version
        assert ours == theirs, name


def test_outputs_are_equal(pair: Pair) -> None:
    pair.skip_older_dense()
    source = pair.ours.subgraphs[0].tensors[pair.ours.subgraphs[0].inputs[0]]
    scale, zero = source.quantization.scale[0], source.quantization.zeroPoint[0]
    x = np.clip(np.floor(pair.x / scale + 0.5) + zero, -128, 127).astype(np.int8)
    ours, theirs = (
        run(blob, [x], runtime="litert_reference").outputs[0].astype(int) for blob in pair.blobs
    )
    # A scale that differs in its last place moves a value across a rounding once in a while.
    assert np.abs(ours - theirs).max() <= 1
    assert np.mean(ours != theirs) <= 0.001
