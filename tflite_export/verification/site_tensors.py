"""Which tensor of a file holds the integers of which site of the frozen model."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kqat.base import ExportError
from kqat.freezing import FrozenModel, is_marker
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.flatbuffer import ModelT
from tflite_export.integer_model import Step, read_program
from tflite_export.kernels import ACTIVATION_DTYPES
from tflite_export.runtimes import as_type, has_grid

_CARRIERS = ("DEQUANTIZE", "QUANTIZE", "RESHAPE")


class SiteTensors:
    """The tensors of subgraph 0, by what they hold.

    Attributes:
        places: site, by its index, -> the tensor that holds its integers; only those that were
            found, by name and grid.
    """

    def __init__(self, model: ModelT, frozen: FrozenModel):
        self._model = model
        self._graph = model.subgraphs[0]
        self._producers = {int(o): op for op in self._graph.operators for o in op.outputs}
        self._site_names = {site.name for site in frozen.sites}
        self._by_name: dict[str, list[int]] = {}
        for index, tensor in enumerate(self._graph.tensors):
            self._by_name.setdefault(flatbuffer.tensor_name(tensor), []).append(index)
        self._output_sites = _output_sites(frozen)
        ends = dict(zip(self._output_sites, frozen.output_names, strict=True))
        found = {i: self._find(site, ends.get(i)) for i, site in enumerate(frozen.sites)}
        self.places = {i: tensor for i, tensor in found.items() if tensor is not None}

    def misplaced_outputs(self) -> list[int]:
        """Positions of outputs at which the file has an input, or what is another output's value.

        Where the value of an output was not found, nothing is known of it.
        """
        ends = [self.places.get(site) for site in self._output_sites]
        others = {int(t) for t in self._graph.inputs} | {t for t in ends if t is not None}
        return [
            position
            for position, (place, index) in enumerate(zip(ends, self._graph.outputs, strict=True))
            if place is not None
            and place not in (sources := self._sources(int(index)))
            and others & set(sources)
        ]

    def _sources(self, tensor: int) -> list[int]:
        """A tensor, and what it was before its numbers were moved or given another type."""
        found = [tensor]
        while (producer := self._producers.get(found[-1])) is not None:
            if flatbuffer.op_name(self._model, producer) not in _CARRIERS:
                break
            found.append(int(producer.inputs[0]))
        return found

    def _find(self, site: Site, output_name: str | None) -> int | None:
        """The integer tensor of `site`: it bears the site's name, or the model output's."""
        named = self._by_name.get(site.name, [])
        outputs = set(map(int, self._graph.outputs))
        # A value inside, or another output, may have this output's name, as that of another call
        # of its layer has: two clips by one layer have one grid, too.
        own = self._by_name.get(output_name, []) if output_name is not None else []
        found = [t for t in own if t in outputs]
        found += sorted(named, key=outputs.__contains__)
        return next((tensor for tensor in found if self._has_grid(tensor, site)), None)

    def _has_grid(self, tensor: int, site: Site) -> bool:
        found = self._graph.tensors[tensor]
        grid = found.quantization
        if flatbuffer.tensor_dtype(found) != ACTIVATION_DTYPES[site.bits] or grid is None:
            return False
        if any(part is None or len(part) == 0 for part in (grid.scale, grid.zeroPoint)):
            return False  # a damaged file
        return (grid.scale[0], grid.zeroPoint[0]) == (site.scale, site.zero_point)

    def operator(self, tensor: int) -> str:
        """The operator that computed a tensor; RESHAPEs that no layer asked for are passed over."""
        producer = self._producers.get(self._before_reshapes(tensor))
        return "input" if producer is None else flatbuffer.op_name(self._model, producer)

    def step(self, tensor: int) -> Step | None:
        """That operator with its tensors and options; `None` for an input, and for an odd file."""
        return self._steps.get(self._before_reshapes(tensor))

    @functools.cached_property
    def _steps(self) -> dict[int, Step]:
        try:
            steps = read_program(self._model).steps
        except ExportError:
            return {}
        return {output.index: step for step in steps for output in step.outputs}

    def _before_reshapes(self, tensor: int) -> int:
        producer = self._producers.get(tensor)
        if producer is None or flatbuffer.op_name(self._model, producer) != "RESHAPE":
            return tensor
        source = int(producer.inputs[0])
        if flatbuffer.tensor_name(self._graph.tensors[source]) in self._site_names:
            return tensor
        return self._before_reshapes(source)

    def feeds(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float inputs as the file takes them."""
        ends = zip(inputs, self._graph.inputs, strict=True)
        return [as_type(x, self._graph.tensors[int(t)]) for x, t in ends]

    def output_step(self, index: int, real: np.ndarray) -> float:
        """One unit of an output: its grid's, or for a float 1/255 of the values' spread."""
        producer = self._producers.get(index)
        if producer is not None and flatbuffer.op_name(self._model, producer) == "DEQUANTIZE":
            index = int(producer.inputs[0])
        tensor = self._graph.tensors[index]
        if has_grid(tensor):
            return float(tensor.quantization.scale[0])
        if not np.issubdtype(real.dtype, np.floating):
            return 1.0
        return float(real.max() - real.min()) / 255 or 1.0


def _output_sites(frozen: FrozenModel) -> list[int]:
    """Index of the site of each output, -1 for a float one."""
    producers = frozen.graph.producers()
    found = [producers.get(ref) for ref in frozen.graph.outputs]
    layers: list[Any] = [None if node is None else node.layer for node in found]
    return [layer.index if is_marker(layer, "site") else -1 for layer in layers]
