"""Finds ranges from typical data, so that training starts at post-training quality."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kqat.base import CalibrationError, flat_data, tracked
from kqat.graph import (
    Graph,
    Node,
    Ref,
    fill,
    fits,
    has_open_sizes,
    input_keys,
    input_shapes,
    input_struct,
    trace,
    with_input_shapes,
)
from kqat.grids import CalibrationMethod, Fixed, calibration_method
from kqat.parts import ConstantRows, IndexOperation, reads_rows
from kqat.training.activation_quantizer import ActivationQuantizer
from kqat.training.build import all_layers, check_quantized
from kqat.training.finite_numbers import check_finite
from kqat.training.method_choice import (
    CANDIDATES,
    Choice,
    KeptSamples,
    best,
    noisy_roundings,
)
from kqat.training.observation import Observer
from kqat.training.range_checks import (
    LARGEST_NOISE,
    Concern,
    ValueNames,
    as_text,
    coarse_kernels,
    concerns,
    lost_output,
    refused_scales,
    unlike_channels,
)
from kqat.training.weight_wrapper import QuantizeWrapper, rounded_once, uncorrected

BATCH_SIZE = 32
DEFAULT_METHOD = "auto"
# With fewer bits of the weights, any network loses as much until it is trained.
FEWEST_BITS = 4
# So many samples without an end may be a generator that never ends: ranges need some hundred.
MANY_SAMPLES = 10_000
# Of the width of what was seen: sums of another batch size differ by less.
BEYOND = 1e-4


class CalibrationWarning(UserWarning):
    """Calibration data, or the ranges that came of them, look wrong."""


def calibrate(
    model: keras.Model, data: Any, *, method: str | CalibrationMethod = DEFAULT_METHOD
) -> None:
    """Finds the ranges of a QAT model from `data`, and corrects its biases; weights do not move.

    Each range is an estimate over all data: neither their order nor how they come in batches
    changes it. Weights are rounded meanwhile and activations are not, so one bad range
    cannot spoil the later ones. What was calibrated or trained before is replaced; where anything
    fails, all ranges stay as they were.

    Rounding moves the mean of an output channel. Of layers that add a bias (Dense, EinsumDense,
    convolutions) it is moved back by the bias of the file, as 64 of the samples show it; the
    layer's own bias does not change, and `kqat.strip` gives the float model back. A model that was
    trained keeps the correction that it was trained with.

    A layer whose config names a method (`QuantizeConfig(activation_range=kqat.Percentile())`) is
    calibrated by that, all others by `method`; but what enters or leaves the model, and the states
    of recurrent layers, cover all that was seen.

    Args:
        model: a QAT model.
        data: an array of shape `(samples, …)`; a list or dict of such arrays for many inputs; or
            an iterable of batches (a `tf.data.Dataset`, a generator) that ends, or a function that
            returns one, such as a converter's `representative_dataset`. A batch is a tensor,
            a list or dict of tensors, or a tuple `(inputs, targets…)` as in `fit`. Some hundred
            samples of all kinds that the device will meet.
        method: `"minmax"`, `"percentile"`, `"mse"`, `"entropy"`, or such an object; `"auto"` tries
            the first three on 64 of the samples, and takes a narrower one only where the outputs
            gain half a decibel (see `kqat.training.method_choice`).

    Raises:
        ModelError: if `model` is no QAT model.
        CalibrationError: if data are empty, misshapen or not finite, naming the input; if the
            model computes from them what is not finite, naming the place; if there is no such
            method.

    Warns:
        CalibrationWarning: once, where the data or the ranges look wrong.
    """
    calibrate_for(model, data, method, stacklevel=3)


def calibrate_for(
    model: keras.Model, data: Any, method: str | CalibrationMethod, *, stacklevel: int
) -> None:
    """As `calibrate`, for a caller whose own caller is `stacklevel` - 1 frames away."""
    check_method(method)
    graph = trace(model)
    check_quantized(model, "to calibrate")
    check_finite(model, CalibrationError, ranges=False, purpose="to calibrate")
    methods = CANDIDATES if method == DEFAULT_METHOD else (calibration_method(method),)
    corrects = _is_untrained(model)
    with _unchanging_weights(model, corrects):
        observer, kept = observed(graph, data)
        tensors = as_tensors(kept.batch(), graph)
        choice = best(graph, observer, tensors, methods, corrects=corrects)
        lost = list(_lost(graph, tensors, choice, corrects))
    lost += coarse_kernels(graph, observer, choice.noise)
    lost += unlike_channels(graph, choice.unrounded, choice.ranges)
    take_over(model, choice, corrects=corrects)
    doubtful = [*concerns(graph, observer, choice.ranges), *refused_scales(graph), *lost]
    if doubtful:
        warnings.warn(as_text(model.name, doubtful), CalibrationWarning, stacklevel=stacklevel)


def _lost(
    graph: Graph, tensors: Sequence[Any], choice: Choice, corrects: bool
) -> Iterator[Concern]:
    """Outputs of which rounding left little; nothing of weights with so few bits that it must."""
    wrappers = [n.layer for n in graph.nodes if isinstance(n.layer, QuantizeWrapper)]
    bits = [spec.bits for wrapper in wrappers for spec in wrapper.weight_specs.values()]
    noisy = {ref: noise for ref, noise in choice.noise.items() if noise > LARGEST_NOISE}
    if not noisy or min(bits, default=8) < FEWEST_BITS:
        return
    roundings = noisy_roundings(graph, tensors, choice, LARGEST_NOISE, corrects=corrects)
    names = ValueNames(graph)
    for ref, noise in noisy.items():
        before = graph.computing([ref])
        first = next((node for node in roundings if node in before), None)
        place = "" if first is None else names.of(first.layer, first.kwargs.get("site", 0))
        yield lost_output(graph.output_names[graph.outputs.index(ref)], noise, place)


def take_over(model: keras.Model, choice: Choice, *, corrects: bool) -> None:
    """Gives a QAT model the ranges that were chosen, and the corrections if there are any."""
    for quantizer, ranges in choice.ranges.items():
        quantizer.start(ranges)
    if corrects:
        for wrapper in _wrappers(model):
            wrapper.correct(choice.corrections.get(wrapper))


def beyond_calibration(model: keras.Model, data: Any) -> tuple[int, int]:
    """How many values of a calibrated QAT model reach beyond what their ranges were found from.

    On the calibration data themselves none does.

    Args:
        model: a QAT model, which is not changed.
        data: as for `calibrate`.

    Returns:
        How many of the roundings see a value beyond, and of how many that is known.

    Raises:
        CalibrationError: as `calibrate`.
    """
    graph = trace(model)
    with _unchanging_weights(model, corrects=_is_untrained(model)):
        observer, _ = observed(graph, data)
    beyond = known = 0
    for (quantizer, site), record in observer.records.items():
        seen = quantizer.seen(site)
        if seen is None:
            continue
        least, most = seen
        found, room = record.whole(), BEYOND * (most - least)
        known += 1
        beyond += found.low < least - room or found.high > most + room
    return beyond, known


def _is_untrained(model: keras.Model) -> bool:
    """Whether weights are still those of the float model, whose means outputs should have.

    Training goes by the means of the rounded network, which are not to be moved afterwards.
    """
    corrected = [wrapper for wrapper in _wrappers(model) if wrapper.is_corrected]
    if corrected and all(wrapper.is_as_corrected for wrapper in corrected):
        return True
    quantizers = [la for la in all_layers(model) if isinstance(la, ActivationQuantizer)]
    return not any(
        quantizer.is_calibrated()
        for quantizer in quantizers
        if not isinstance(quantizer.range_method, Fixed)
    )


def _wrappers(model: keras.Model) -> list[QuantizeWrapper]:
    return [layer for layer in all_layers(model) if isinstance(layer, QuantizeWrapper)]


@contextlib.contextmanager
def _unchanging_weights(model: keras.Model, corrects: bool) -> Iterator[None]:
    """Inside, weights do not change, and each is rounded once.

    Where `corrects` says that means will be corrected, the former correction takes no part.
    """
    wrappers = _wrappers(model)
    with rounded_once(wrappers), uncorrected(wrappers if corrects else ()):
        yield


def check_method(method: Any) -> None:
    """Checks what `calibrate` is given as `method`.

    Raises:
        CalibrationError: if it is no calibration method.
    """
    if method != DEFAULT_METHOD:
        calibration_method(method)


def observed(graph: Graph, data: Any) -> tuple[Observer, KeptSamples]:
    """All that flows at the quantizers of a QAT model's graph, and some of the samples.

    Nothing of the model is changed.

    Raises:
        CalibrationError: as for `calibrate`.
    """
    observer, kept = Observer(graph), KeptSamples()
    for batch, real in tracked(
        _whole_batches(batches(data, graph)), "calibrating", _batch_count(data, graph)
    ):
        observer.run(as_tensors(batch, graph, real, observer.samples), real)
        kept.offer(batch, real)
    _check_some(observer.samples, graph)
    return observer, kept


def _batch_count(data: Any, graph: Graph) -> int | None:
    """How many whole batches the data make; `None` where only reading them can tell."""
    if callable(data) or isinstance(data, keras.utils.PyDataset):
        return None
    arrays = _as_arrays(data, graph.input_keys, graph.input_struct)
    first = None if arrays is None else arrays[0]
    samples = len(first) if isinstance(first, list) else next(iter(getattr(first, "shape", ())), 0)
    return -(-samples // BATCH_SIZE) or None


def _whole_batches(
    portions: Iterable[list[np.ndarray]],
) -> Iterator[tuple[list[np.ndarray], int]]:
    """The same samples in batches of `BATCH_SIZE`, and how many samples of each are real.

    Kernels sum in another order for another batch size, so the last batch is filled up with its
    own samples. Where all samples are less than one batch, they are one batch as they are.
    """
    waiting: list[list[np.ndarray]] = []
    count, full = 0, False
    for portion in portions:
        while len(portion[0]):
            taken = min(BATCH_SIZE - count, len(portion[0]))
            waiting.append([x[:taken] for x in portion])
            portion = [x[taken:] for x in portion]
            count += taken
            if count == BATCH_SIZE:
                yield _joined(waiting), count
                waiting, count, full = [], 0, True
    if count:
        last = _joined(waiting)
        if full:
            last = [x[np.arange(BATCH_SIZE) % count] for x in last]
        yield last, count


def _joined(portions: list[list[np.ndarray]]) -> list[np.ndarray]:
    if len(portions) == 1:
        return portions[0]
    return [np.concatenate(arrays) for arrays in zip(*portions, strict=True)]


def run_batches(
    graph: Graph, batches: Iterable[list[np.ndarray]], call: Callable[..., Any]
) -> None:
    """Runs `graph` on batches; `call` as for `Graph.run`.

    Raises:
        CalibrationError: if there is not one sample, or a value is not finite, naming the input.
    """
    samples = 0
    for batch in batches:
        if len(batch[0]):
            graph.run(as_tensors(batch, graph, before=samples), call)
            samples += len(batch[0])
    _check_some(samples, graph)


def _check_some(samples: int, graph: Graph) -> None:
    if not samples:
        raise CalibrationError(
            f"Expected at least one sample of calibration data for the inputs "
            f"{list(graph.input_keys)}. Received: none. Give some hundred typical inputs; a "
            "generator that was read before gives nothing."
        )


def some_samples(data: Any, graph: Graph, most: int) -> list[np.ndarray]:
    """At most `most` samples of `data`, evenly spread, as one array per input; as for `calibrate`.

    Raises:
        CalibrationError: if data are misshapen, or there are none.
    """
    found = [batch for batch in batches(data, graph) if len(batch[0])]
    _check_some(len(found), graph)
    arrays = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    count = len(arrays[0])
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    return [x[chosen] for x in arrays]


def batches(data: Any, graph: Graph) -> Iterator[list[np.ndarray]]:
    """Batches of one array per input, of the inputs' shapes; `data` as for `calibrate`.

    Raises:
        CalibrationError: if data are misshapen, naming the input.
    """
    data = _made(data)
    arrays = _as_arrays(data, graph.input_keys, graph.input_struct)
    if arrays is None:
        _check_ends(data)
        endable, samples = _says_its_length(data), 0
        for batch in data:
            inputs = batch[0] if isinstance(batch, tuple) and batch else batch
            # tf.data turns the lists of its elements into tuples.
            inputs = list(inputs) if isinstance(inputs, tuple) else inputs
            found = _as_arrays(inputs, graph.input_keys, graph.input_struct)
            if found is None:
                raise CalibrationError(
                    f"Expected batches of arrays for the inputs {list(graph.input_keys)}. "
                    f"Received: a batch of type {type(inputs).__name__}."
                )
            checked = _checked(found, graph)
            if not endable and samples < MANY_SAMPLES <= samples + len(checked[0]):
                warnings.warn(
                    f"Calibration read {MANY_SAMPLES:,} samples of a {type(data).__name__} that "
                    "does not say where it ends, and reads on. If it has no end, interrupt it and "
                    "give some hundred samples: itertools.islice(batches, 20), or data.take(20).",
                    CalibrationWarning,
                    stacklevel=2,
                )
            samples += len(checked[0])
            yield checked
        return
    whole = _checked(arrays, graph)
    for start in range(0, len(whole[0]), BATCH_SIZE):
        yield [x[start : start + BATCH_SIZE] for x in whole]


def of_fixed_shape(model: Any, shapes: Any, data: Any) -> Any:
    """`model`, or the same of the given sizes; else of the data's sizes where it leaves them open.

    Raises:
        ModelError: if the given shapes do not fit the model.
        CalibrationError: if the data are not those of the model's inputs.
    """
    if shapes is None and data is not None and isinstance(model, keras.Model) and model.built:
        declared = input_shapes(model)
        if has_open_sizes(declared):
            shapes = shapes_of(data, input_keys(model), input_struct(model))
            for key, shape in (shapes or {}).items():
                if not fits(shape, declared[key]):
                    raise CalibrationError(
                        f"Expected calibration data of shape {('samples', *declared[key])} for "
                        f"input '{key}' of model '{model.name}', where None is any size. Received: "
                        f"{('samples', *shape)}."
                    )
    return model if shapes is None else with_input_shapes(model, shapes)


def shapes_of(
    data: Any, keys: Sequence[str], structure: Any = None
) -> dict[str, tuple[int, ...]] | None:
    """The shape of each input's samples in `data`, which is as for `calibrate`.

    `None` where only reading can tell, and what is read is gone: in a generator.
    """
    made = _made(data)
    arrays = _as_arrays(made, keys, structure)
    if arrays is None:
        batches = iter(made)
        if batches is data:
            return None
        first = next(batches, None)
        inputs = first[0] if isinstance(first, tuple) and first else first
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        arrays = _as_arrays(inputs, keys, structure)
    if arrays is None:
        return None
    return {key: tuple(np.shape(x)[1:]) for key, x in zip(keys, arrays, strict=True)}


def _made(data: Any) -> Any:
    """What a function of no arguments makes, such as a converter's `representative_dataset`."""
    made = data() if callable(data) and not isinstance(data, Iterable) else data
    if isinstance(made, keras.utils.PyDataset) and not isinstance(made, Iterable):
        # Keras before 3.12 does not iterate over it.
        _check_ends(made)
        return (made[index] for index in range(made.num_batches))
    return made


def _check_ends(data: Any) -> None:
    """Refuses what says of itself that it never ends: a repeated `tf.data.Dataset`, a `PyDataset`.

    Raises:
        CalibrationError: if it does.
    """
    cardinality = getattr(data, "cardinality", None)
    endless = callable(cardinality) and int(cardinality()) == -1
    if isinstance(data, keras.utils.PyDataset):
        endless = data.num_batches is None
    if endless:
        raise CalibrationError(
            f"Expected calibration data that end. Received: an endless {type(data).__name__}. "
            "Give some hundred samples of it: data.take(…) of a Dataset, or arrays."
        )


def _says_its_length(data: Any) -> bool:
    cardinality = getattr(data, "cardinality", None)
    return int(cardinality()) >= 0 if callable(cardinality) else hasattr(data, "__len__")


def _as_arrays(data: Any, keys: Sequence[str], structure: Any) -> list[Any] | None:
    """One array-like per model input, or `None` where `data` is an iterable of batches."""
    names = list(keys)
    data = flat_data(data, len(names), structure)
    if isinstance(data, Mapping):
        if set(names) != set(data):
            raise CalibrationError(
                f"Expected calibration data for the inputs {names}. Received: {list(data)}."
            )
        return [data[name] for name in names]
    if isinstance(data, list):
        if len(data) != len(names):
            raise CalibrationError(
                f"Expected a list of {len(names)} arrays, one per input {names}. "
                f"Received: {len(data)}. A list of samples is one array by np.stack(data); batches "
                "come as an iterator, iter(data)."
            )
        return data
    if hasattr(data, "__array__") and hasattr(data, "shape"):
        if len(names) != 1:
            raise CalibrationError(
                f"Expected a list or dict of arrays for the inputs {names}. Received: one array. "
                "A tuple is taken as (inputs, targets)."
            )
        return [data]
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"Expected an array, a list or dict of arrays, an iterable of batches, or a function "
            f"that returns one, as calibration data for the inputs {names}. Received: "
            f"{type(data).__name__}."
        )
    return None


def _checked(batch: list[Any], graph: Graph) -> list[np.ndarray]:
    """The inputs' values as arrays.

    Raises:
        CalibrationError: if shapes are not the inputs', or the numbers of samples differ.
    """
    arrays = [
        _array(x, ref.shape, name)
        for x, ref, name in zip(batch, graph.inputs, graph.input_keys, strict=True)
    ]
    sizes = [len(x) for x in arrays]
    if len(set(sizes)) != 1:
        raise CalibrationError(
            f"Expected as many samples for every input of {list(graph.input_keys)}. "
            f"Received: {sizes} samples."
        )
    return arrays


def _array(x: Any, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise CalibrationError(
            f"Expected an array for input '{name}'. Received: rows of different lengths ({error})."
        ) from error
    if array.ndim != len(shape) or array.shape[1:] != shape[1:]:
        raise CalibrationError(
            f"Expected calibration data of shape {('samples', *shape[1:])} for input '{name}'. "
            f"Received: {array.shape}.{_remedy(array.shape, shape[1:])}"
        )
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise CalibrationError(
            f"Expected real numbers for input '{name}'. Received: dtype {array.dtype}."
        )
    return array


def _remedy(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> str:
    """What makes the shape right that was given, where that is plain."""
    if found == wanted:
        return " That is one sample: give x[np.newaxis], or a Dataset's data.batch(32)."
    if wanted[-1:] == (1,) and found[1:] == wanted[:-1]:
        return " Give x[..., np.newaxis]."
    if len(found) == len(wanted) + 2 and found[2:] == wanted:
        return " Those are batches of batches: give a Dataset's data.unbatch()."
    return ""


def _indexes(array: np.ndarray, name: str, tables: list[Any]) -> np.ndarray:
    """An input of indexes, all of which the tables that it is looked up in have a row for.

    Raises:
        CalibrationError: if they have not. A runtime reads beside the table, or stops.
    """
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise CalibrationError(
            f"Expected whole numbers for input '{name}'. Received: fractions. Give indexes."
        )
    for table in tables:
        outside = array[(array < 0) | (array >= table.input_dim)]
        if outside.size and isinstance(table, ConstantRows):
            raise CalibrationError(
                f"Expected 0 to {table.input_dim - 1} in input '{name}', which '{table.name}' "
                f"turns into quantities. Received: {outside.flat[0]}. Give the input a float type, "
                "or look its numbers up in an Embedding."
            )
        if outside.size:
            raise CalibrationError(
                f"Expected 0 to {table.input_dim - 1} in input '{name}', as layer '{table.name}' "
                f"has {table.input_dim} rows. Received: {outside.flat[0]}. Give the Embedding an "
                "input_dim above the largest index."
            )
    return array


def _tables(graph: Graph, ref: Ref) -> list[Any]:
    """The layers that look up rows at the very integers of `ref`, at all of them.

    What looks up a part of them, as one column of users and films, is checked when it is computed.
    """
    found: list[Any] = []
    waiting, consumers = [ref], graph.consumers()
    while waiting:
        for node in consumers[waiting.pop()]:
            layer = getattr(node.layer, "layer", node.layer)  # of a QuantizeWrapper
            if reads_rows(layer, node.kwargs):
                found.append(layer)
            elif not isinstance(layer, IndexOperation):
                waiting += [
                    output
                    for output in node.outputs
                    if output.holds_indexes and _numbers(output) >= _numbers(ref)
                ]
    return found


def _numbers(ref: Ref) -> int:
    return math.prod(size or 1 for size in ref.shape[1:])


def _check_computed(graph: Graph, tensors: list[Any], before: int) -> None:
    """Checks that tables have a row for the integers that are computed of the model's inputs.

    Raises:
        CalibrationError: if they have not.
    """
    whole = {ref for ref in graph.inputs if ref.holds_indexes}
    steps: list[Node] = []
    tables: list[Node] = []
    for node in graph.nodes if whole else ():
        if not whole.issuperset(node.inputs):
            continue
        layer = getattr(node.layer, "layer", node.layer)  # of a QuantizeWrapper
        if reads_rows(layer, node.kwargs):
            tables.append(node)
        elif all(ref.holds_indexes for ref in node.outputs):
            steps.append(node)
            whole.update(node.outputs)
    tables = [node for node in tables if node.inputs[0] not in graph.inputs]
    if not tables:
        return
    known = dict(zip(graph.inputs, tensors, strict=True))
    needed = set(graph.computing([node.inputs[0] for node in tables]))
    for node in steps:
        if node not in needed:  # Masks, which may be most of what is computed of whole numbers.
            continue
        args, kwargs = fill((node.args, node.kwargs), known.__getitem__)
        known.update(
            zip(node.outputs, keras.tree.flatten(node.layer(*args, **kwargs)), strict=True)
        )
    for node in tables:
        layer = getattr(node.layer, "layer", node.layer)
        indexes = np.asarray(keras.ops.convert_to_numpy(known[node.inputs[0]]))
        outside = np.argwhere((indexes < 0) | (indexes >= layer.input_dim))
        if outside.size:
            wrong, sample = indexes[tuple(outside[0])], before + int(outside[0][0])
            raise CalibrationError(
                f"Expected integers from 0 to {layer.input_dim - 1} for '{layer.name}', which has "
                f"{layer.input_dim} rows. Received: {wrong}, computed of the model's inputs in "
                f"sample {sample} (counted from 0). Give data in their range, or clip the integers "
                "in the model."
            )


def as_tensors(
    batch: list[np.ndarray], graph: Graph, real: int | None = None, before: int = 0
) -> list[Any]:
    """The batch as the model takes it; its first `real` samples are the user's, or all.

    `before` is the number of samples in the batches before it.

    Raises:
        CalibrationError: if it holds what is no finite float32, or an index that a table lacks.
    """
    tensors = []
    for array, ref, name in zip(batch, graph.inputs, graph.input_keys, strict=True):
        if ref.holds_indexes:
            indexes = _indexes(array, name, _tables(graph, ref))
            tensors.append(keras.ops.convert_to_tensor(indexes, ref.dtype))
            continue
        with np.errstate(over="ignore"):
            floats = array.astype(np.float16 if ref.dtype == "float16" else np.float32)
        finite = np.isfinite(floats)
        if not finite.all():
            sample = before + int(np.argwhere(~finite)[0][0])
            raise CalibrationError(
                f"Expected finite calibration data for input '{name}'. Received: NaN or infinity "
                f"in {np.count_nonzero(~finite[:real])} of {array[:real].size} values, as "
                f"{ref.dtype}, first in sample {sample} (counted from 0). Clean the data."
            )
        tensors.append(keras.ops.convert_to_tensor(floats, ref.dtype))
    _check_computed(graph, tensors, before)
    return tensors
