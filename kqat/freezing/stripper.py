"""QAT model to float model: the quantizers go, the trained weights stay."""

from typing import Any

import keras

from kqat.base import ModelError
from kqat.graph import Graph, Node, Ref, duplicate, rebuild, trace, unique_name
from kqat.parts import (
    PrecisionBoundary,
    Recurrence,
    Requantize,
    clamp_layer,
)
from kqat.training import (
    ActivationQuantizer,
    QuantizedRecurrence,
    QuantizeWrapper,
    all_layers,
    check_quantized,
)


def strip(qat: keras.Model) -> keras.Model:
    """The float model inside a QAT model, with the weights that were trained.

    Args:
        qat: a QAT model; it is not changed.

    Raises:
        ModelError: if `qat` is no QAT model.
    """
    graph = checked_graph(qat)
    stripper = _Stripper(graph)
    return rebuild(graph, stripper.call, qat.name, graph.output_names, graph.output_masks)


def checked_graph(qat: Any) -> Graph:
    graph = trace(qat)
    check_quantized(qat)
    for layer in all_layers(qat):
        mode = getattr(getattr(layer, "layer", layer), "quantization_mode", None)
        if mode is not None:
            raise ModelError(
                f"Expected a QAT model whose weights are floats. Received: '{qat.name}', in which "
                f"Keras quantized '{layer.name}', by quantize({mode!r}). kqat makes the integers "
                "itself: load the model as it was before, and give it to tflite_export.convert."
            )
    return graph


def _is_plumbing(node: Node, output_names: tuple[str, ...]) -> bool:
    """Whether `wrap` put the layer there without an effect on float values."""
    layer = node.layer
    if isinstance(layer, ActivationQuantizer):
        return layer.clamp is None or not node.kwargs.get("observe", True)
    names_output = isinstance(layer, keras.layers.Identity) and layer.name in output_names
    return names_output or isinstance(layer, PrecisionBoundary | Requantize)


class _Stripper:
    """The working state of `strip`: the layer that makes an output bears the output's name.

    Where an output bears a mask, what hands the mask on bears the name.
    """

    def __init__(self, graph: Graph):
        self.output_names = graph.output_names
        self.taken = {*graph.input_names, *graph.output_names}
        self.names: dict[Ref, str] = {}
        self.copies: dict[tuple[int, int], list[Any]] = {}
        producers = graph.producers()
        for ref, name, mask in zip(
            graph.outputs, graph.output_names, graph.output_masks, strict=True
        ):
            if mask is not None:
                continue
            while ref in producers and _is_plumbing(producers[ref], self.output_names):
                ref = producers[ref].inputs[0]
            self.names.setdefault(ref, name)

    def call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        """The node's float value, symbolic; see `kqat.graph.tracer.Graph.run`."""
        layer, output = node.layer, node.outputs[0]
        if _is_plumbing(node, self.output_names):
            return args[0]
        if isinstance(layer, ActivationQuantizer):
            name = self._name(layer.label, output)
            assert layer.clamp is not None, "else it is plumbing"
            return clamp_layer(layer.clamp, name=name)(args[0])
        branch = 0
        if isinstance(layer, QuantizeWrapper):
            branch, kwargs = kwargs.get("branch", 0), layer.layer_options(kwargs)
        if (id(layer), branch) not in self.copies:
            self.copies[id(layer), branch] = self._float_parts(layer, output, branch)
        first, *rest = self.copies[id(layer), branch]
        value = first(*args, **kwargs)
        for part in rest:
            value = part(value)
        return value

    def _name(self, name: str, output: Ref) -> str:
        return self.names.get(output) or unique_name(name, self.taken)

    def _float_parts(self, layer: Any, output: Ref, branch: int) -> list[Any]:
        if isinstance(layer, QuantizedRecurrence):
            config = {**layer.get_config(), "step": strip(layer.step)}
            config["name"] = self._name(config.pop("label"), output)
            return [Recurrence(**config)]
        if not isinstance(layer, QuantizeWrapper):
            return [duplicate(layer, self._name(layer.name, output))]
        if layer.normalization is None:
            return [duplicate(layer.layer, self._name(layer.layer.name, output))]
        norm = layer.normalizations[branch]
        if branch and (id(layer), 0) in self.copies:
            first, *between = self.copies[id(layer), 0][:-1]  # Branches share these.
        else:
            first = duplicate(layer.layer, unique_name(layer.layer.name, self.taken))
            between = [duplicate(p, unique_name(p.name, self.taken)) for p in layer.between]
        return [first, *between, duplicate(norm, self._name(norm.name, output))]
