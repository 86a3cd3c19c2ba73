"""File against model: what `verify` runs, compares and tells."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.base import ExportError, RuntimeUnavailableError, flat_data, tracked
from kqat.freezing import FrozenModel, freeze
from tflite_export import flatbuffer
from tflite_export.devices import check_file
from tflite_export.flatbuffer import ModelT, inspect_model
from tflite_export.runtimes import check_finite, run
from tflite_export.verification.end_to_end import agreement_with_model, model_outputs
from tflite_export.verification.exactness import exactness
from tflite_export.verification.layer_profile import (
    GridUse,
    layer_reports,
    static_reports,
    work_of,
)
from tflite_export.verification.lockstep import compare
from tflite_export.verification.missing_kernels import did_not_run
from tflite_export.verification.report import LayerReport, Report, RuntimeReport
from tflite_export.verification.site_tensors import SiteTensors
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
        qat: the QAT model, or the frozen one; `None` for a file whose model is not at hand. The
            file's outputs are compared with those of the model that is given: only those of the
            QAT model are what was trained.
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
        ExportError: if the file cannot be read, `data` does not fit the model's inputs, or there
            is no sample or no runtime to compare on.
    """
    model = flatbuffer.read(blob)
    if not _is_count(samples):
        raise ExportError(f"Expected samples to be a whole number above 0. Received: {samples!r}.")
    if not runtimes:
        raise ExportError(
            f"Expected a runtime to compare on, of {list(DEFAULT_RUNTIMES)}. Received: none."
        )
    frozen = qat if isinstance(qat, FrozenModel) or qat is None else freeze(qat)
    inspection = inspect_model(model, len(blob))
    notes = [] if frozen is None else _differences_of_ends(frozen, model)
    layers: tuple[LayerReport, ...] = ()
    if frozen is None or notes:
        parts, count = compare_runtimes(blob, data, runtimes, samples)
        layers = static_reports(inspection)
        notes.append("no lockstep: outputs are compared with those of the first runtime that ran")
    else:
        inputs = _inputs(data, frozen, samples)
        assert qat is not None
        # Of the model that was trained, so that a fault of freezing shows too.
        expected = model_outputs(qat, inputs)
        found = [
            _verify_on(runtime, frozen, model, blob, inputs, expected)
            for runtime in tracked(runtimes, "running on each runtime")
        ]
        parts, count = tuple(part for part, _ in found), len(inputs[0])
        uses = next((uses for _, uses in found if uses), ())
        work = work_of(model, [use.tensor for use in uses])
        layers = layer_reports(inspection, uses, work, parts)
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
    if not notes:
        names = [frozen.output_names[i] for i in SiteTensors(model, frozen).misplaced_outputs()]
        notes += [
            f"not made of '{frozen.model.name}': where it has the output '{name}', the file has "
            "one of its other outputs or inputs"
            for name in names
        ]
    return notes


def _is_count(value: Any) -> bool:
    # A truth value is a number of Python's, too.
    return type(value) is not bool and isinstance(value, numbers.Integral) and int(value) > 0


def _inputs(data: Any, frozen: FrozenModel, samples: int) -> list[np.ndarray]:
    names = frozen.input_names
    shapes = [tuple(t.shape[1:]) for t in frozen.model.inputs]
    wanted = f"data of shapes {[('samples', *s) for s in shapes]} for the inputs {list(names)}"
    data = flat_data(data, len(names), frozen.graph.input_struct)
    if isinstance(data, Mapping):
        if set(data) != set(names):
            raise ExportError(f"Expected {wanted}. Received: data for {list(data)}.")
        data = [data[name] for name in names]
    arrays = [np.asarray(x) for x in (data if isinstance(data, list | tuple) else [data])]
    if [x.shape[1:] for x in arrays] != shapes or not all(len(x) for x in arrays):
        remedy = " Give arrays; of batches, np.concatenate([*batches])."
        is_array = all(x.ndim for x in arrays)
        raise ExportError(
            f"Expected {wanted}. Received: {[x.shape for x in arrays]}.{'' if is_array else remedy}"
        )
    for array, name in zip(arrays, names, strict=True):
        check_finite(array[:samples], name)
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in frozen.model.inputs]
    kinds = [np.float32 if keras.backend.is_float_dtype(d) else d for d in dtypes]
    return [x[:samples].astype(kind) for x, kind in zip(arrays, kinds, strict=True)]


def _verify_on(
    runtime: str,
    frozen: FrozenModel,
    model: ModelT,
    blob: bytes,
    inputs: list[np.ndarray],
    expected: list[np.ndarray],
) -> tuple[RuntimeReport, Sequence[GridUse]]:
    tensors = SiteTensors(model, frozen)
    try:
        result = run(blob, tensors.feeds(inputs), runtime=runtime, tensors="all")
    except RuntimeUnavailableError as error:
        return did_not_run(runtime, model, error), ()
    found = compare(frozen, tensors, result.tensors, runtime, inputs)
    part = RuntimeReport(
        runtime=runtime,
        sites=found.differences,
        unmatched=found.unmatched,
        outputs=agreement_with_model(frozen, expected, tensors, model, result.outputs),
        arena_bytes=result.arena_bytes,
        exact=exactness(model, result.tensors, runtime),
    )
    return part, found.uses
