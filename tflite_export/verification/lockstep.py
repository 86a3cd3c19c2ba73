"""Does the file compute what was trained? Lockstep comparison on every runtime.

Each operator of the `.tflite` is fed the very integers that the runtime computed before it; its
output is compared with what the frozen Keras model computes from the same values. Differences
are stated in output steps, one unit of the output's integer grid. An integer kernel may round
twice where the float graph rounds once, so a right export differs by at most one step, rarely.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import keras
import numpy as np

from kqat.base import ExportError, RuntimeUnavailableError
from kqat.freezing import FrozenModel, Marker, Node, Ref, freeze, is_marker
from kqat.grids import Site
from tflite_export import flatbuffer
from tflite_export.devices import check_file
from tflite_export.flatbuffer import ModelT, inspect_model
from tflite_export.integer_pass import call_layer
from tflite_export.kernels import ACTIVATION_DTYPES
from tflite_export.runtimes import as_type, has_grid, run, tflite_micro_arena_bytes
from tflite_export.runtimes import real as real_values
from tflite_export.verification.layer_profile import (
    GridUse,
    grid_use,
    layer_reports,
    producers,
    static_reports,
)
from tflite_export.verification.report import (
    LayerReport,
    OutputAgreement,
    Report,
    RuntimeReport,
    SiteDifference,
)
from tflite_export.verification.unknown_writer import compare_runtimes

DEFAULT_RUNTIMES = ("litert_reference", "litert", "tflite_micro")


def verify(
    qat: keras.Model | FrozenModel | None,
    blob: bytes,
    data: Any = None,
    *,
    runtimes: Sequence[str] = DEFAULT_RUNTIMES,
    samples: int = 64,
    target: str | None = None,
) -> Report:
    """Runs `blob` against the model that it was made of; raises nothing about what it finds.

    A file of another writer is verified as far as it can be: its structure, its operators, and
    whether the runtimes agree about its outputs. A note in the report says so.

    Args:
        qat: the QAT model, or the frozen one; `None` for a file whose model is not at hand.
        blob: the file that `convert` made of it, or any other.
        data: inputs as the float model takes them: an array of shape `(n, …)`, or a list or
            dict of them for many inputs. Without a model, also inputs of the file's own types,
            or `None` for random ones.
        runtimes: names from `tflite_export.RUNTIMES`. One that is not installed, or
            refuses the file, is reported as such.
        samples: how many samples of `data` are compared.
        target: a name from `tflite_export.TARGETS`; what of the file does not fit it is noted, and
            for an Ethos-U the report has what Vela says.

    Raises:
        ExportError: if the file cannot be read, or `data` does not fit the model's inputs.
    """
    frozen = qat if isinstance(qat, FrozenModel) or qat is None else freeze(qat)
    model = flatbuffer.read(blob)
    inspection = inspect_model(model, len(blob))
    notes = [] if frozen is None else _differences_of_ends(frozen, model)
    layers: tuple[LayerReport, ...] = ()
    if frozen is None or notes:
        parts, count = compare_runtimes(blob, data, runtimes, samples)
        layers = static_reports(inspection)
        notes.append("no lockstep: outputs are compared with those of the first runtime that ran")
    else:
        inputs = _inputs(data, frozen, samples)
        found = [_verify_on(runtime, frozen, model, blob, inputs) for runtime in runtimes]
        parts, count = tuple(part for part, _ in found), len(inputs[0])
        uses = next((uses for _, uses in found if uses), ())
        layers = layer_reports(inspection, uses, producers(model), parts)
    notes += inspection.decoding_notes()
    estimated, misfits = check_file(blob, inspection, target)
    return Report(
        model_name=inspection.description if frozen is None else frozen.model.name,
        size_bytes=len(blob),
        samples=count,
        operators=inspection.counts(),
        float_operators=inspection.float_operators,
        runtimes=parts,
        layers=layers,
        macs=inspection.macs,
        estimate=estimated,
        notes=(*notes, *misfits),
    )


def _differences_of_ends(frozen: FrozenModel, model: ModelT) -> list[str]:
    """Why the file cannot have been made of the model, if its inputs or outputs say so."""
    graph = model.subgraphs[0]
    notes = []
    for what, tensors, indices in (
        ("inputs", frozen.model.inputs, graph.inputs),
        ("outputs", frozen.model.outputs, graph.outputs),
    ):
        ours = [math.prod(t.shape[1:]) for t in tensors]
        shapes = [flatbuffer.tensor_shape(graph.tensors[i]) for i in indices]
        # The batch may be larger, and a matrix stand for more axes.
        if len(ours) != len(shapes) or any(
            math.prod(s) % n for s, n in zip(shapes, ours, strict=True)
        ):
            expected = [tuple(t.shape[1:]) for t in tensors]
            notes.append(
                f"not made of '{frozen.model.name}', whose {what} have shapes {expected}: those of "
                f"the file are {shapes}"
            )
    return notes


def _inputs(data: Any, frozen: FrozenModel, samples: int) -> list[np.ndarray]:
    names = frozen.input_names
    if isinstance(data, Mapping):
        data = [data.get(name) for name in names]
    arrays = [np.asarray(x) for x in (data if isinstance(data, list | tuple) else [data])]
    shapes = [tuple(t.shape[1:]) for t in frozen.model.inputs]
    if [x.shape[1:] for x in arrays] != shapes or not all(len(x) for x in arrays):
        raise ExportError(
            f"Expected data of shapes {[('samples', *s) for s in shapes]} for the inputs "
            f"{list(names)}. Received: {[x.shape for x in arrays]}."
        )
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in frozen.model.inputs]
    kinds = [np.float32 if keras.backend.is_float_dtype(d) else d for d in dtypes]
    return [x[:samples].astype(kind) for x, kind in zip(arrays, kinds, strict=True)]


def _verify_on(
    runtime: str, frozen: FrozenModel, model: ModelT, blob: bytes, inputs: list[np.ndarray]
) -> tuple[RuntimeReport, Sequence[GridUse]]:
    tensors = _Tensors(model, frozen)
    try:
        result = run(blob, tensors.feed(inputs), runtime=runtime, tensors="all")
        arena = tflite_micro_arena_bytes(blob) if runtime == "tflite_micro" else None
    except RuntimeUnavailableError as error:
        return RuntimeReport(runtime=runtime, problem=str(error)), ()
    lockstep = _Lockstep(frozen, tensors, result.tensors, runtime)
    lockstep.run(inputs)
    outputs = tensors.agreement(frozen, inputs, result.outputs, runtime)
    part = RuntimeReport(
        runtime=runtime,
        sites=tuple(lockstep.differences),
        unmatched=tuple(lockstep.unmatched),
        outputs=outputs,
        arena_bytes=arena,
    )
    return part, lockstep.uses


class _Tensors:
    """Which tensor of the file holds which site's integers."""

    def __init__(self, model: ModelT, frozen: FrozenModel):
        self.model = model
        self.graph = model.subgraphs[0]
        self.producers = {int(o): op for op in self.graph.operators for o in op.outputs}
        self.site_names = {site.name for site in frozen.sites}
        self.by_name: dict[str, list[int]] = {}
        for index, tensor in enumerate(self.graph.tensors):
            self.by_name.setdefault(flatbuffer.tensor_name(tensor), []).append(index)
        self.output_names = dict(zip(_output_sites(frozen), frozen.output_names, strict=True))

    def find(self, index: int, site: Site) -> int | None:
        """The integer tensor of `site`: it bears the site's name, or the model output's."""
        found = list(self.by_name.get(site.name, ()))
        if index in self.output_names:
            # A value inside may have the output's name, as that of a layer's first call has.
            ends = set(map(int, self.graph.outputs))
            found += [t for t in self.by_name.get(self.output_names[index], ()) if t in ends]
        return next((tensor for tensor in found if self._has_grid(tensor, site)), None)

    def operator(self, tensor: int) -> str:
        """The operator that computed a tensor; RESHAPEs that no layer asked for are passed over."""
        producer = self.producers.get(tensor)
        if producer is None:
            return "input"
        name, source = flatbuffer.op_name(self.model, producer), int(producer.inputs[0])
        if name == "RESHAPE" and self._name(source) not in self.site_names:
            return self.operator(source)
        return name

    def _name(self, tensor: int) -> str:
        return flatbuffer.tensor_name(self.graph.tensors[tensor])

    def _has_grid(self, tensor: int, site: Site) -> bool:
        found = self.graph.tensors[tensor]
        if (
            flatbuffer.tensor_dtype(found) != ACTIVATION_DTYPES[site.bits]
            or found.quantization is None
        ):
            return False
        grid = (found.quantization.scale[0], found.quantization.zeroPoint[0])
        return grid == (site.scale, site.zero_point)

    def feed(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Float inputs as the file takes them."""
        return [
            as_type(x, self.graph.tensors[int(t)])
            for x, t in zip(inputs, self.graph.inputs, strict=True)
        ]

    def _step(self, index: int, real: np.ndarray) -> float:
        """One unit of an output: its grid's, or for a float 1/255 of the values' spread."""
        names = {int(o): op for op in self.graph.operators for o in op.outputs}
        if index in names and flatbuffer.op_name(self.model, names[index]) == "DEQUANTIZE":
            index = int(names[index].inputs[0])
        if has_grid(self.graph.tensors[index]):
            return float(self.graph.tensors[index].quantization.scale[0])
        if not np.issubdtype(real.dtype, np.floating):
            return 1.0
        return float(real.max() - real.min()) / 255 or 1.0

    def agreement(
        self,
        frozen: FrozenModel,
        inputs: list[np.ndarray],
        outputs: Sequence[np.ndarray],
        runtime: str,
    ) -> tuple[OutputAgreement, ...]:
        """End to end: the rounded Keras model's outputs against the file's."""
        expected = keras.tree.flatten(_rounded_outputs(frozen, inputs, runtime))
        rows = []
        for name, real, found, t in zip(
            frozen.output_names, expected, outputs, self.graph.outputs, strict=True
        ):
            tensor = self.graph.tensors[int(t)]
            step = self._step(int(t), real)
            value = real_values(found, tensor)
            steps = np.abs(np.rint((value.astype(np.float32) - real.astype(np.float32)) / step))
            classes = value.ndim == 2 and value.shape[1] > 1
            top1 = float(np.mean(value.argmax(-1) == real.argmax(-1))) if classes else None
            rows.append(
                OutputAgreement(
                    name=name,
                    max_steps=int(steps.max()),
                    equal_fraction=float(np.mean(steps == 0)),
                    top1_agreement=top1,
                )
            )
        return tuple(rows)


def _output_sites(frozen: FrozenModel) -> list[int]:
    """Index of the site of each output, -1 for a float one."""
    graph = frozen.graph
    producers = graph.producers()
    layers: list[Any] = [
        producers[ref].layer if ref in producers else None for ref in graph.outputs
    ]
    return [layer.index if is_marker(layer, "site") else -1 for layer in layers]


def _rounded_outputs(frozen: FrozenModel, inputs: list[np.ndarray], runtime: str) -> Any:
    """What the model computes in float arithmetic with every site rounded.

    A fused LSTM too, whose lockstep is with the runtime's own arithmetic: here it shows if that
    computes something else than what was trained.
    """

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(node.layer, Marker):
            return node.layer(*args, **kwargs)
        if node.layer.kind != "site":
            return args[0]
        site = frozen.sites[node.layer.index]
        return keras.ops.convert_to_tensor(site.reals(site.integers(np.asarray(args[0]))))

    outputs = frozen.graph.run([keras.ops.convert_to_tensor(x) for x in inputs], call)
    return keras.tree.map_structure(np.asarray, outputs)


class _Lockstep:
    """One walk over the frozen model, each node fed what the runtime computed before it.

    Layers that hand integers on as they are (Flatten, then Reshape) may share one tensor of the
    file, which bears one's name. The others' sites count as compared with that one.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        tensors: _Tensors,
        found: Mapping[int, np.ndarray],
        runtime: str,
    ):
        self.frozen = frozen
        self.runtime = runtime
        self.tensors = tensors
        self.found = found
        self.aliases: dict[int, int] = {}  # site -> the tensor of one that computes the same
        self._clear()

    def _clear(self) -> None:
        self.differences: list[SiteDifference] = []
        self.uses: list[GridUse] = []
        self.missed: dict[str, int] = {}
        self.held: dict[Ref, int] = {}  # value -> the tensor whose integers it was handed
        self.waiting: dict[Ref, set[str]] = {}  # value -> missed sites whose integers it carries
        self.compared: set[str] = set()  # missed sites that a later site stands for …
        self.used: set[str] = set()  # … and those that were computed with before
        self.values: dict[int, Hashable] = {}  # site -> its grid and what Keras computes there
        self.holders: dict[Hashable, int] = {}  # the same -> the tensor that holds it

    @property
    def unmatched(self) -> list[str]:
        """The sites that were not compared."""
        return [name for name in self.missed if name not in self.compared - self.used]

    def run(self, inputs: list[np.ndarray]) -> None:
        self.frozen.graph.run([keras.ops.convert_to_tensor(x) for x in inputs], self._call)
        # The converter makes one operator of two that compute the same; either name may be left.
        unmatched = [self.missed[name] for name in self.unmatched]
        missed = {index: self.holders.get(self.values[index]) for index in unmatched}
        if merged := {i: tensor for i, tensor in missed.items() if tensor is not None}:
            self.aliases.update(merged)
            self._clear()
            self.run(inputs)

    def _call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        waiting = {name for ref in node.inputs for name in self.waiting.get(ref, ())}
        if is_marker(node.layer, "site"):
            return self._site(node, waiting, args[0])
        held = [self.held[ref] for ref in node.inputs if ref in self.held]
        if (waiting or held) and self.frozen.facts(node).keeps_integers:
            self.waiting.update(dict.fromkeys(node.outputs, waiting))
            self.held.update(dict.fromkeys(node.outputs, held[0]) if held else {})
        else:
            self.used |= waiting
        if isinstance(node.layer, Marker):
            return args[0]
        return call_layer(node.layer, self.runtime, *args, **kwargs)

    def _site(self, node: Node, waiting: set[str], value: Any) -> Any:
        index = node.layer.index
        site = self.frozen.sites[index]
        real = np.asarray(value)
        expected = site.integers(real)
        tensor = self.aliases.get(index, self.tensors.find(index, site))
        grid = (site.scale, site.zero_point, site.bits, expected.shape)
        self.values[index] = (*grid, sha256(expected).digest())
        if tensor is None or tensor not in self.found:
            if self._is_held(node, expected):
                self.held[node.outputs[0]] = self.held[node.inputs[0]]
                return keras.ops.convert_to_tensor(site.reals(expected))
            self.missed[site.name] = index
            self.waiting[node.outputs[0]] = waiting | {site.name}
            return keras.ops.convert_to_tensor(site.reals(expected))
        self.holders[self.values[index]] = tensor
        self.held[node.outputs[0]] = tensor
        self.compared |= waiting
        actual = self.found[tensor].reshape(expected.shape).astype(np.float32)
        steps = np.abs(actual - expected)
        # Float arithmetic on 24 bits leaves an exact tie of an 8-bit value 2**-12 steps from one.
        position = real / site.scale
        tied = np.abs(position - np.floor(position) - 0.5) < 2.0 ** (site.bits - 20)
        self.uses.append(grid_use(site, tensor, real, actual))
        self.differences.append(
            SiteDifference(
                name=site.name,
                operator=self.tensors.operator(tensor),
                elements=steps.size,
                max_steps=int(steps.max(initial=0)),
                differing=int(np.count_nonzero(steps)),
                ties=int(np.count_nonzero(steps * tied)),
            )
        )
        return keras.ops.convert_to_tensor(site.reals(actual))

    def _is_held(self, node: Node, expected: np.ndarray) -> bool:
        """Whether the tensor before holds just these integers, as where no RESHAPE is needed."""
        before = self.held.get(node.inputs[0])
        return before is not None and np.array_equal(self.found[before].ravel(), expected.ravel())
