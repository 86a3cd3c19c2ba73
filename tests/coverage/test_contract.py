"""The contract: what holds for every layer and every graph, from `quantize_model` to the file.

Each case is quantized, trained for a step, saved, converted and verified once; the tests look at
what came of it.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import kqat
import tflite_export
from kqat.base.errors import ExportError, TargetError
from kqat.devices.kernels import KERNELS, LITERT, TABLE_OPS
from kqat.graph.tracer import Graph, trace
from kqat.graph.trial_runs import run_here
from kqat.parts.byte_input import ByteInput
from kqat.parts.elementwise import LearnedPower
from kqat.parts.learned import Learned
from kqat.parts.markers import Requantize, StopGradient
from kqat.parts.recurrence import Recurrence
from kqat.parts.single_op_layers import ConstantRows, Hide, Hold, TopK
from kqat.parts.tied_weight import TiedWeight
from kqat.registry.layer_table import ACTIVATIONS, AUGMENTING, LAYERS, rule_for
from kqat.registry.operation_table import OPERATIONS
from kqat.training.build import all_layers
from tests.coverage import (
    composite_cases,
    custom_cases,
    graph_cases,
    index_cases,
    layer_cases,
    operation_cases,
    recurrent_cases,
)
from tests.coverage.cases import Case, ends, inputs_of
from tests.newer_keras import needs_tensorflow
from tflite_export import exporter, flatbuffer
from tflite_export.devices.checks import check_target
from tflite_export.kernels.op_table import missing_kernels
from tflite_export.runtimes.execution import run
from tflite_export.verification.site_tensors import SiteTensors
from tflite_export.verification.verifier import DEFAULT_RUNTIMES

CASES = (
    *layer_cases.CASES,
    *composite_cases.CASES,
    *graph_cases.CASES,
    *index_cases.CASES,
    *operation_cases.CASES,
    *custom_cases.CASES,
    *recurrent_cases.CASES,
)
# One of each kind; the others are slow.
FAST = (
    "conv2d_bn_relu6",
    "activation_gelu",
    "squeeze_excite",
    "dicts",
    "float_middle",
    "nested",
    "gru",
)
SAMPLES = 64
# The Keras model of a file runs on these.
FEW_SAMPLES = 6

# Lockstep finds one step at most, on no more than this share of an operator's elements, exact
# ties left out (measured over all cases together: 0.24 % of CONV_2D, 0.27 % of TRANSPOSE_CONV) …
USUAL_SHARE = 0.01
# … except on these. "Twice": reference kernels multiply by an integer and round, then shift right
# by k and round again, which moves 2**-(k + 1) of the elements; k is 1 or 2 where a kernel has few
# products to add up. XNNPACK rounds once, but LEAKY_RELU and QUANTIZE multiply by a number of only
# 8 bits behind the point there. `test_reasons` has NumPy copies that are equal bit for bit.
# RESIZE_BILINEAR and HARD_SWISH have fixed-point arithmetic of their own: measured, not copied.
TWICE = {
    "MEAN": 0.35,  # measured: 33 %
    "LEAKY_RELU": 0.20,  # 13 %
    "MUL": 0.05,  # 3.1 %
    "QUANTIZE": 0.05,  # 2.8 %
    "RESIZE_BILINEAR": 0.05,  # 3.0 %
    "HARD_SWISH": 0.04,  # 1.8 %
    "DEPTHWISE_CONV_2D": 0.02,  # 1.3 %, for one product: BatchNormalization on its own
    "BATCH_MATMUL": 0.02,  # 1.0 %
    "REDUCE_PROD": 0.06,  # 3.7 %: it rounds after each factor
}
ONCE = {
    "LEAKY_RELU": 0.10,  # 5.3 %
    "QUANTIZE": 0.45,  # 36 %
    # XNNPACK leaves these two to the kernels of TFLite.
    "HARD_SWISH": 0.04,
    "BATCH_MATMUL": 0.02,
    "REDUCE_PROD": 0.06,
}
SHARES = {"litert_reference": TWICE, "litert": ONCE, "tflite_micro": TWICE}
# A site of few elements says little about a share: that many may differ in any case.
FEW = 3


class Trial:
    """One case on its way. Each station is reached once, when first asked for."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder

    @functools.cached_property
    def model(self) -> keras.Model:
        """The float model."""
        keras.utils.set_random_seed(0)
        return self.case.model()

    @functools.cached_property
    def x(self) -> Any:
        return inputs_of(self.model, SAMPLES)

    @functools.cached_property
    def plan(self) -> kqat.Plan:
        return kqat.plan(self.model, self.case.policy)

    @functools.cached_property
    def trained(self) -> tuple[keras.Model, set[str], set[str]]:
        """The QAT model after a step of training, and the paths of the variables that moved.

        Then of those that moved in a second step, with frozen ranges; the model has not taken it.
        """
        qat = kqat.quantize_model(self.model, self.case.policy, calibration_data=self.x)
        return qat, *steps(qat, self.x, builds=self.case.name not in FAST)

    @property
    def qat(self) -> keras.Model:
        return self.trained[0]

    @functools.cached_property
    def outputs(self) -> list[np.ndarray]:
        """What the QAT model computes of `x`."""
        return outputs(self.qat, self.x)

    @functools.cached_property
    def frozen(self) -> kqat.FrozenModel:
        return kqat.freeze(self.qat)

    @functools.cached_property
    def blob(self) -> bytes:
        return tflite_export.convert(self.frozen, **self.case.io)

    @functools.cached_property
    def report(self) -> tflite_export.Report:
        return tflite_export.verify(self.qat, self.blob, self.x, samples=SAMPLES)

    @functools.cached_property
    def compiles_for(self) -> str:
        """The runtime whose integer model is compiled: another one for every third case.

        Compiling takes many times as long as running.
        """
        ran = [name for name in DEFAULT_RUNTIMES if self.report.on(name).problem is None]
        return ran[CASES.index(self.case) % len(ran)]

    def load(self) -> keras.Model:
        """The model from its `.keras` file, without custom objects."""
        path = self.folder / f"{self.case.name}.keras"
        if not path.exists():
            self.qat.save(path)
        return keras.models.load_model(path)

    def ops(self) -> set[str]:
        """The integer operators of the file that compute; boundaries and tables left out."""
        left_out = {"QUANTIZE", "DEQUANTIZE"}
        if self.frozen.tables:
            left_out |= set(TABLE_OPS)
        return set(self.report.operators) - left_out


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow)
        for case in CASES
    ],
)
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(request.param, tmp_path_factory.mktemp("trial"))


class Snapshots(keras.callbacks.Callback):  # type: ignore[misc]
    """The values of all variables of the model after each epoch, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[dict[str, np.ndarray]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.values.append({v.path: np.array(v) for v in self.model.variables})


def steps(qat: keras.Model, x: Any, builds: bool) -> tuple[set[str], set[str]]:
    """Trains for a step, and for one with frozen ranges; the paths that moved in each.

    The model is left as the first step made it. Both are one `fit`, as tracing it is what costs.
    TensorFlow traces a step twice that makes the optimizer's variables, as it does for users; with
    `builds` they are made before.
    """
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    y = keras.tree.map_structure(lambda t: rng.normal(size=(SAMPLES, *t.shape[1:])), qat.output)
    before = {v.path: np.array(v) for v in qat.variables}
    # What counts has no gradient.
    losses = keras.tree.map_structure(
        lambda t: "mse" if str(t.dtype).startswith("float") else None, qat.output
    )
    qat.compile(keras.optimizers.SGD(0.01), losses)
    if builds:
        qat.optimizer.build(qat.trainable_variables)
    nothing_to_train = (
        contextlib.nullcontext()
        if qat.trainable_weights
        else pytest.warns(UserWarning, match="does not have any trainable weights")
    )
    snapshots = Snapshots()
    callbacks = [kqat.FreezeObservers(1), snapshots]
    with nothing_to_train:
        qat.fit(x, y, batch_size=SAMPLES, epochs=2, verbose=0, callbacks=callbacks)
    first, second = snapshots.values
    for variable in qat.variables:
        variable.assign(first[variable.path])
    return _moved(before, first), _moved(first, second)


def _moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {path for path, value in before.items() if not np.array_equal(value, after[path])}


def outputs(model: keras.Model, x: Any) -> list[np.ndarray]:
    return [np.asarray(y) for y in keras.tree.flatten(model(x, training=False))]


def quantizers(qat: keras.Model) -> Iterator[kqat.ActivationQuantizer]:
    yield from (layer for layer in all_layers(qat) if isinstance(layer, kqat.ActivationQuantizer))


def ranges(qat: keras.Model) -> set[str]:
    """Paths of the variables of all quantizers."""
    return {v.path for layer in quantizers(qat) for v in layer.variables}


def test_inputs_and_outputs_are_those_of_the_float_model(trial: Trial) -> None:
    model, qat = trial.model, trial.qat
    inputs = keras.tree.flatten(ends(model)[0])
    assert [t.name for t in qat.inputs] == [t.name for t in inputs]
    sequential = isinstance(model, keras.Sequential)
    output_names = [model.layers[-1].name] if sequential else trace(model).output_names
    # Names of outputs are names of layers: one that is taken is numbered.
    numbered = [
        name if name not in output_names[:i] else f"{name}_{output_names[:i].count(name) + 1}"
        for i, name in enumerate(output_names)
    ]
    assert qat.output_names == numbered
    for ours, theirs in zip(ends(qat), ends(model), strict=True):
        keras.tree.assert_same_structure(ours, theirs)
    # What the model computes: of adaptive pooling functions, Keras 3.15 foresees other shapes.
    one = keras.tree.map_structure(lambda x: x[:1], trial.x)
    computed = keras.tree.flatten(run_here(model, one))
    for ours, shapes in (
        (ends(qat)[0], [t.shape[1:] for t in inputs]),
        (ends(qat)[1], [tuple(y.shape[1:]) for y in computed]),
    ):
        assert [t.shape[1:] for t in keras.tree.flatten(ours)] == shapes


def test_a_step_of_training_moves_weights_and_ranges(trial: Trial) -> None:
    qat, moved, _ = trial.trained
    normalized = {
        layer.layer.bias.path
        for layer in qat.layers
        if isinstance(layer, kqat.QuantizeWrapper)
        and layer.normalization is not None
        and layer.layer.use_bias
    }
    # What BatchNormalization subtracts again has no gradient but the rounding errors of floats.
    assert {v.path for v in qat.trainable_weights} - moved <= normalized
    counts = {layer.count.path for layer in quantizers(qat) if layer.variables}
    assert counts <= moved


def test_the_saved_model_is_the_model(trial: Trial) -> None:
    loaded = trial.load()
    for ours, theirs in zip(outputs(loaded, trial.x), trial.outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert tflite_export.convert(loaded, **trial.case.io) == trial.blob


def test_frozen_ranges_stay(trial: Trial) -> None:
    qat, _, moved = trial.trained
    assert moved & ranges(qat) == set()
    assert bool(moved) == bool(qat.trainable_weights)


def test_weights_go_through_a_file_of_their_own(trial: Trial) -> None:
    path = trial.folder / "qat.weights.h5"
    trial.qat.save_weights(path)
    other = inputs_of(trial.model, 32, seed=2)
    second = kqat.quantize_model(trial.case.model(), trial.case.policy, calibration_data=other)
    second.load_weights(path)
    for ours, theirs in zip(outputs(second, trial.x), trial.outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_file_holds_the_operators_of_the_case(trial: Trial) -> None:
    found, expected = trial.report.operators, dict(sorted(trial.case.ops.items()))
    if {op for op, _ in {*found.items()} ^ {*expected.items()}} == {"RESHAPE"}:
        if found.get("RESHAPE", 0) < expected.get("RESHAPE", 0):
            needs_tensorflow("2.21", "a file with as many RESHAPEs")
    assert found == expected
    assert trial.report.float_operators == trial.case.floats


def test_the_registry_foresees_the_operators(trial: Trial) -> None:
    if trial.case.floats:
        pytest.skip("the converter chooses the operators of float layers")
    planned = {op for layer in trial.plan.layers for op in layer.ops}
    assert trial.ops() - planned == set()
    assert trial.ops() - foreseen(trace(trial.model), trial.plan) == set()


def foreseen(graph: Graph, plan: kqat.Plan) -> set[str]:
    """Operators in the rows of the user's layers, and of what open ones and steps are made of."""
    ops = set()
    for node in graph.nodes:
        rule = None
        if isinstance(node.layer, keras.layers.Layer):
            rule = rule_for(node.layer, node.name)
            ops |= set(rule.ops)
            activation = getattr(getattr(node.layer, "activation", None), "__name__", "")
            ops |= set(ACTIVATIONS[activation].ops) if activation in ACTIVATIONS else set()
        holds = keras.layers.Wrapper | Recurrence
        own_cell = type(node.layer) is keras.layers.RNN and rule_for(node.layer.cell).opens
        if rule is None or rule.opens or own_cell or isinstance(node.layer, holds):
            ops |= {op for layer in plan.layers if layer.origin == node.name for op in layer.ops}
    return ops


@pytest.mark.parametrize("runtime", DEFAULT_RUNTIMES)
def test_lockstep(trial: Trial, runtime: str) -> None:
    part = trial.report.on(runtime)
    missing = missing_kernels(tuple(trial.ops()), runtime)
    if missing:
        assert part.problem is not None and runtime in part.problem
        return
    assert part.problem is None
    assert part.unmatched == ()
    assert part.max_steps <= 1
    for operator, row in part.by_operator().items():
        share = SHARES[runtime].get(operator, USUAL_SHARE)
        assert row.differing - row.ties <= max(FEW, share * row.elements), row
    # End to end, steps add up: the largest share above, MEAN's, leaves two thirds equal.
    assert all(output.equal_fraction > 0.5 for output in part.outputs)


@pytest.mark.parametrize("runtime", DEFAULT_RUNTIMES)
def test_every_integer_is_that_of_the_kernels(trial: Trial, runtime: str) -> None:
    """The Keras model of the file's arithmetic gives the runtime's outputs, all of them."""
    part = trial.report.on(runtime)
    if part.problem is not None:
        return
    assert part.exact is not None and part.exact.differing == 0, part.exact
    if trial.case.floats and part.exact.unknown:
        # Floats are added up in an order that each runtime chooses.
        with pytest.raises(ExportError, match=r"_2D of floats|FULLY_CONNECTED of floats"):
            tflite_export.integer_model(trial.blob, runtime)
        return
    assert part.exact.unknown == ()
    names, x = trial.frozen.input_names, trial.x
    arrays = [x[name] for name in names] if isinstance(x, dict) else keras.tree.flatten(x)
    tensors = SiteTensors(flatbuffer.read(trial.blob), trial.frozen)
    feeds = tensors.feeds([array[:FEW_SAMPLES] for array in arrays])
    found = run(trial.blob, feeds, runtime=runtime).outputs
    model = tflite_export.integer_model(trial.blob, runtime, inputs="integers", outputs="integers")
    wide = [x.astype("int32") if x.dtype.kind in "iu" else x for x in feeds]
    given = wide[0] if len(wide) == 1 else wide
    if runtime == trial.compiles_for:
        # For any number of samples, as `predict` does.
        computed = [np.asarray(y) for y in keras.tree.flatten(_compiled(model)(given))]
    else:
        computed = outputs(model, given)
    for ours, theirs in zip(computed, found, strict=True):
        np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)


def _compiled(model: keras.Model) -> Any:
    specs = keras.tree.map_structure(
        lambda t: tf.TensorSpec((None, *t.shape[1:]), t.dtype), ends(model)[0]
    )
    return tf.function(model, input_signature=[specs], autograph=False)


def test_micro_refuses_what_it_cannot_run(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernel of the file TFLite Micro lacks, `convert` says so before it converts."""
    needed = trial.ops()
    monkeypatch.setattr(exporter, "lower", _never)
    if missing := missing_kernels(tuple(needed), "tflite_micro"):
        with pytest.raises(TargetError, match=rf"layer '\w+' needs .*{missing[0]}"):
            tflite_export.convert(trial.frozen, target="tflite_micro", **trial.case.io)
        return
    check_target(trial.frozen, "tflite_micro")
    # A layer that stays float has no int8 kernel to lack.
    for op in needed if not trial.case.floats else ():
        with monkeypatch.context() as patch:
            patch.setitem(KERNELS, op, LITERT)
            with pytest.raises(TargetError, match=rf"layer '\w+' needs .*\b{op}\b"):
                tflite_export.convert(trial.frozen, target="tflite_micro", **trial.case.io)


def _never(*args: Any) -> None:
    raise AssertionError("the converter was called")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "operator"), [("gelu", "GELU"), ("exponential", "EXP")])
def test_own_kernels_on_a_target_that_has_them(kind: str, operator: str, tmp_path: Path) -> None:
    """Where a table is not needed."""
    case = next(case for case in CASES if case.name == f"activation_{kind}")
    trial = Trial(case, tmp_path)
    blob = tflite_export.convert(trial.frozen, target="litert")
    report = tflite_export.verify(trial.frozen, blob, trial.x)
    assert report.operators == {operator: 1}
    for runtime in ("litert_reference", "litert"):
        assert report.on(runtime).max_steps <= 1
        assert report.on(runtime).problem is None
    assert report.on("tflite_micro").problem is not None


def test_every_row_has_a_case() -> None:
    nodes = [node.layer for case in CASES for node in trace(case.model()).nodes]
    # `test_walk` tries image augmentation, which is slow, layer by layer. A plan puts Requantize
    # where widths meet (`tests/kqat/planning/test_width_changes.py`) and ByteInput behind uint8
    # inputs (`test_byte_inputs.py` there), attention puts Hide where a mask is, and tracing puts
    # Learned where a weight is a value: the case "class_token". One-hot codes are ConstantRows. A
    # weight that is read in two ways is a TiedWeight: the case "table_read_both_ways". An exponent
    # that is trained makes a LearnedPower: the case "generalized_mean".
    # The operation `stop_gradient`, which has a case, ships as a StopGradient, and what sorts as a
    # TopK: the case "largest".
    # Masks of recurrent layers are tried in `tests/kqat/rewrites/test_masked_recurrence.py`.
    tried = {*(type(layer) for layer in nodes), *AUGMENTING, Requantize, ByteInput, Hide, Learned}
    tried |= {ConstantRows, Hold, LearnedPower, StopGradient, TiedWeight, TopK}
    tried |= {keras.layers.Masking}
    assert set(LAYERS) - tried == set()
    kinds = [
        keras.activations.serialize(layer.activation)
        for layer in nodes
        if isinstance(layer, keras.layers.Activation)
    ]
    assert [name for name in ACTIVATIONS if name not in kinds] == []
    # A Fourier transform needs zeros, and broadcast_to the batch size, which only a layer of the
    # user's has: the case "fourier", and `tests/kqat/registry/test_operation_table.py`. Keras runs
    # conv_transpose there only, too: `tests/kqat/graph/test_tracing_of_calls.py`.
    beside = set(OPERATIONS) - {type(layer).__name__ for layer in nodes}
    assert beside == {"FFT2", "BroadcastTo", "ConvTranspose"}
