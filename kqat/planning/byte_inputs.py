"""`uint8` inputs, as a camera gives them: the integers of the file are the bytes themselves.

A `ByteInput` behind such an input says what a byte means. It takes up the casts, Rescalings and
sums and products with one number that stand between the input and the first layer that computes
anything else, so these cost no operator: the input's scale and zero point say the same.
"""

import dataclasses
import math
from collections.abc import Mapping

import keras
import numpy as np

from kqat.base import ModelError, PolicyError
from kqat.config import QuantizeConfig
from kqat.graph import Graph, Node, Ref, fill, refs_in, unique_name
from kqat.grids import INT8_ACTIVATION, MovingAverage
from kqat.parts import ByteInput
from kqat.registry import is_custom

BYTES = "uint8"
Configs = Mapping[str, QuantizeConfig | None]
# What `value * scale + offset` may be written as: Keras operations and layers.
_AFFINE_OPERATIONS = frozenset("Add Cast Divide Multiply Negative Subtract TrueDivide".split())
_AFFINE_LAYERS = (keras.layers.Rescaling, keras.layers.Normalization, keras.layers.Lambda)
# What moves, repeats or picks values, or means of neighbours: scaling may as well come first.
_MOVING_OPERATIONS = frozenset(
    "ExpandDims Flip Fliplr Flipud GetItem Moveaxis Ravel Repeat Reshape Roll Slice Squeeze "
    "Swapaxes Take Tile Transpose".split()
)
_MOVING_LAYERS = (
    keras.layers.CenterCrop, keras.layers.Cropping1D, keras.layers.Cropping2D,
    keras.layers.Cropping3D, keras.layers.Flatten, keras.layers.Identity, keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D, keras.layers.Permute, keras.layers.RandomFlip,
    keras.layers.RepeatVector, keras.layers.Reshape, keras.layers.Resizing,
    keras.layers.UpSampling1D, keras.layers.UpSampling2D,
)  # fmt: skip
# What else leaves bytes bytes: it moves them too, but has a number of its own, or several inputs.
_JOINING_OPERATIONS = frozenset("Concatenate Hstack Pad Split Stack".split())
_JOINING_LAYERS = (
    keras.layers.Concatenate, keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
)  # fmt: skip
_INDEXING = {
    "CategoryEncoding", "Embedding", "MultiHot", "OneHot", "ReversibleEmbedding",
}  # fmt: skip


def read_bytes(
    graph: Graph, configs: Configs, input_configs: Mapping[str, QuantizeConfig]
) -> tuple[Graph, dict[str, QuantizeConfig | None]]:
    """`graph` with a `ByteInput` behind each `uint8` input, and the configs of its nodes.

    A scale of `1 / 127.5` with an offset of -1 has its zero between two bytes. The grid's lies on
    the upper one, so the quantities are half a step lower than the float model's.

    Args:
        graph: of the user's model.
        configs: of its nodes, by name.
        input_configs: those that rules of the policy give to model inputs.

    Raises:
        ModelError: if a layer takes bytes for indexes, or computes with them modulo 256.
        PolicyError: if a rule gives such an input a grid.
    """
    if not any(ref.dtype == BYTES for ref in graph.inputs):
        return graph, dict(configs)
    walk = _Walk(graph, configs)
    for ref, name in zip(graph.inputs, graph.input_names, strict=True):
        if ref.dtype != BYTES:
            continue
        if name in input_configs:
            raise PolicyError(
                f"Expected no rule for input '{name}' of dtype uint8: its bytes are the file's "
                "integers, and the Rescaling behind it says what they mean. Received: a config. "
                "Take the rule out, or make it a float input."
            )
        if walk.consumers[ref]:
            walk.visit(ref, name)
    return walk.rewritten(), walk.configs


class _Walk:
    """The graph, what stands in it for which value, and which nodes are taken up."""

    def __init__(self, graph: Graph, configs: Configs):
        self.graph = graph
        self.consumers = graph.consumers()
        self.outputs = frozenset(graph.outputs)
        self.configs = dict(configs)
        self.taken = {*graph.input_names, *graph.output_names, *(n.name for n in graph.nodes)}
        self.values: dict[Ref, Ref] = {}
        self.absorbed: set[Node] = set()
        self.begin: list[Node] = []

    def visit(self, ref: Ref, name: str) -> None:
        """Puts a `ByteInput` behind an input."""
        scale, zero, absorbed = 1.0, 0, list[Node]()
        found = self._meaning(ref)
        if found is not None:
            step, offset, nodes = found
            # The upper byte of two that are equally near: 128 for a scale of 1 / 127.5.
            nearest = math.floor(-offset / step + 0.501) if step > 0 else -1
            if 0 <= nearest <= 255:
                scale, zero, absorbed = step, nearest, nodes
        self.absorbed.update(absorbed)
        own = unique_name(f"{name}_bytes", self.taken)
        reader = next((self.configs[n.name] for n in absorbed), self._reader_config(ref))
        if reader is not None:
            reader = QuantizeConfig(activation=INT8_ACTIVATION, activation_range=MovingAverage())
        self.configs[own] = reader
        output = Ref(ref.shape, keras.config.floatx())
        self.begin.append(Node(own, ByteInput(scale, zero, name=own), (ref,), {}, (output,)))
        self.values[ref] = output

    def _reader_config(self, ref: Ref) -> QuantizeConfig | None:
        configs = (self.configs[node.name] for node in self.consumers[ref])
        return next((config for config in configs if config is not None), None)

    def _meaning(self, ref: Ref) -> tuple[float, float, list[Node]] | None:
        """What all readers of a value make of it: scale, offset, and the nodes that do so."""
        if ref in self.outputs:
            return None
        found = [self._made_by(node) for node in dict.fromkeys(self.consumers[ref])]
        first = found[0] if found else None
        if first is None:
            return None
        nodes: list[Node] = []
        for one in found:
            if one is None or not np.allclose(one[:2], first[:2], rtol=1e-6, atol=1e-9):
                return None
            nodes += one[2]
        return (*first[:2], nodes)

    def _made_by(self, node: Node) -> tuple[float, float, list[Node]] | None:
        if self.configs[node.name] is None or len(node.inputs) != 1 or len(node.outputs) != 1:
            return None
        output = node.outputs[0]
        if _moves(node):
            return self._meaning(output)
        own = None if output in self.outputs else _affine(node)
        if own is None:
            return None
        behind = self._meaning(output)
        if behind is None:
            return (*own, [node])
        scale, offset, nodes = behind
        return own[0] * scale, own[1] * scale + offset, [node, *nodes]

    def rewritten(self) -> Graph:
        """The graph without the nodes that are taken up, and with floats in place of bytes."""
        nodes = list(self.begin)
        values = self.values
        for node in self.graph.nodes:
            given = [ref for ref in node.inputs if ref in values]
            if node in self.absorbed:
                values[node.outputs[0]] = values.get(node.inputs[0], node.inputs[0])
                continue
            if any(ref.dtype == BYTES for ref in node.inputs):
                _check(node)
                for ref in node.outputs:
                    if ref.dtype == BYTES:
                        values[ref] = Ref(ref.shape, keras.config.floatx())
            if given or any(ref in values for ref in node.outputs):
                args, kwargs = fill((node.args, node.kwargs), lambda ref: values.get(ref, ref))
                outputs = tuple(values.get(ref, ref) for ref in node.outputs)
                node = Node(node.name, node.layer, args, kwargs, outputs)
            nodes.append(node)
        output_struct = fill(self.graph.output_struct, lambda ref: values.get(ref, ref))
        return Graph(
            nodes=tuple(nodes),
            input_struct=self.graph.input_struct,
            output_struct=output_struct,
            input_names=self.graph.input_names,
            output_names=self.graph.output_names,
            losses=tuple(
                dataclasses.replace(one, inputs=tuple(values.get(r, r) for r in one.inputs))
                for one in self.graph.losses
            ),
        )


def _is(node: Node, operations: frozenset[str], classes: tuple[type, ...]) -> bool:
    if isinstance(node.layer, keras.layers.Layer):
        return type(node.layer) in classes
    return type(node.layer).__name__ in operations


def _moves(node: Node) -> bool:
    """Whether a node moves values, and computes with none of them."""
    return _is(node, _MOVING_OPERATIONS, _MOVING_LAYERS)


def _check(node: Node) -> None:
    """Raises where a node does with bytes what it would not do with quantities."""
    kind = type(node.layer).__name__
    if kind in _INDEXING or any(ref.dtype.startswith(("int", "bool")) for ref in node.outputs):
        raise ModelError(
            f"Expected uint8 inputs that hold quantities, as pixels are. Received: '{node.name}' "
            f"of type {kind}, which takes them for indexes. Declare the input int32."
        )
    joins = _is(node, _JOINING_OPERATIONS, _JOINING_LAYERS)
    if any(ref.dtype == BYTES for ref in node.outputs) and not (joins or _moves(node)):
        raise ModelError(
            f"Expected layers that compute with floats behind a uint8 input. Received: "
            f"'{node.name}' of type {kind}, which computes with bytes, modulo 256. Put "
            "keras.layers.Rescaling, or keras.ops.cast(x, 'float32'), before it."
        )


def _affine(node: Node) -> tuple[float, float] | None:
    """Scale and offset of a node that multiplies and adds one number each; else `None`.

    What it computes of random bytes tells, whatever it is made of.
    """
    layer, ref = node.layer, node.inputs[0]
    if not _is(node, _AFFINE_OPERATIONS, _AFFINE_LAYERS):
        is_layer = isinstance(layer, keras.layers.Layer)
        if not is_layer or not is_custom(layer) or layer.variables:
            return None
    shape = tuple(size or 2 for size in ref.shape)
    values = np.random.default_rng(0).integers(0, 256, shape)
    values.flat[0], values.flat[-1] = 0, 255
    if len(refs_in((node.args, node.kwargs))) != 1 or values.size < 2:
        return None
    tensor = keras.ops.convert_to_tensor(values.astype(np.float32), dtype=ref.dtype)
    args, kwargs = fill((node.args, node.kwargs), lambda _: tensor)
    try:
        found = np.asarray(keras.ops.convert_to_numpy(layer(*args, **kwargs)), np.float64)
    except Exception:  # Whatever a user's own class raises: tracing it will say what is wrong.
        return None
    if found.shape != values.shape or node.outputs[0].holds_indexes:
        return None
    scale = (found.flat[-1] - found.flat[0]) / 255
    offset = float(found.flat[0])
    size = float(np.abs(found).max())
    if not np.allclose(found, values * scale + offset, rtol=0, atol=2e-6 * size):
        return None
    return float(scale), offset
