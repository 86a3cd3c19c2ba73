"""Verification sees what is wrong with a file, and says what it could not look at."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from kqat.base.errors import ExportError, RuntimeUnavailableError
from kqat.freezing.frozen_model import FrozenModel
from tests.coverage.cases import inputs_of
from tests.tflite_export.small_models import constants, operators, quantized
from tflite_export import flatbuffer
from tflite_export.flatbuffer.tree import ModelT
from tflite_export.verification import verifier
from tflite_export.verification.report import (
    Exactness,
    LayerReport,
    OutputAgreement,
    Report,
    RuntimeReport,
    SiteDifference,
)
from tflite_export.verification.verifier import DEFAULT_RUNTIMES

REFERENCE = "litert_reference"


@dataclasses.dataclass(frozen=True)
class Net:
    """conv → pool → softmax head, frozen, and its file."""

    frozen: FrozenModel
    blob: bytes
    x: np.ndarray


def call(x: Any) -> Any:
    x = L.Conv2D(4, 3, activation="relu", name="conv")(x)
    return L.Dense(5, "softmax", name="head")(
        L.Flatten(name="flat")(L.MaxPooling2D(name="pool")(x))
    )


@pytest.fixture(scope="module")
def net() -> Net:
    keras.utils.set_random_seed(0)
    qat, x = quantized((8, 8, 3), call)
    frozen = kqat.freeze(qat)
    return Net(frozen, tflite_export.convert(frozen), x)


def verified(net: Net, change: Callable[[ModelT], None] | None = None) -> RuntimeReport:
    """What the reference kernels show of the file, changed first."""
    model = flatbuffer.read(net.blob)
    if change is not None:
        change(model)
    blob = flatbuffer.write(model)
    return tflite_export.verify(net.frozen, blob, net.x, runtimes=[REFERENCE]).on(REFERENCE)


def large(part: RuntimeReport) -> set[str]:
    return {site.name for site in part.sites if site.max_steps > 1}


def test_a_right_file_is_right_everywhere(net: Net) -> None:
    report = tflite_export.verify(net.frozen, net.blob, net.x, samples=40)
    assert (report.model_name, report.samples) == ("net", 40)
    assert report.size_bytes == len(net.blob)
    assert report.is_full_integer
    assert report.operators == {
        "CONV_2D": 1, "FULLY_CONNECTED": 1, "MAX_POOL_2D": 1, "SOFTMAX": 1
    }  # fmt: skip
    assert [part.runtime for part in report.runtimes] == list(DEFAULT_RUNTIMES)
    for part in report.runtimes:
        assert part.problem is None and part.unmatched == () and part.max_steps <= 1
        assert {site.name: site.operator for site in part.sites} == {
            "x": "input", "conv_relu": "CONV_2D", "pool": "MAX_POOL_2D",
            "head": "FULLY_CONNECTED", "head_softmax": "SOFTMAX",
        }  # fmt: skip
        assert part.sites[0].elements == 40 * 8 * 8 * 3
    assert [part.arena_bytes is None for part in report.runtimes] == [True, True, False]


def test_outputs_are_compared_with_those_of_the_qat_model(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if freezing had made another function of it, of which the file is right."""
    keras.utils.set_random_seed(1)
    other, _ = quantized((8, 8, 3), call)
    monkeypatch.setattr(verifier, "freeze", lambda qat: net.frozen)
    (part,) = tflite_export.verify(other, net.blob, net.x, runtimes=[REFERENCE]).runtimes
    assert part.is_right and part.max_steps <= 1
    assert part.outputs[0].equal_fraction < 0.5 < verified(net).outputs[0].equal_fraction


def test_a_flipped_weight_shows_in_its_layer_alone(net: Net) -> None:
    def flip(model: ModelT) -> None:
        _, data = constants(model, operators(model).index("CONV_2D"))[0]
        changed = data.copy()
        changed[0, 1, 1, 1] = -changed[0, 1, 1, 1] - 1
        replace(model, operators(model).index("CONV_2D"), changed)

    part = verified(net, flip)
    # The layers behind it are fed what the runtime computed: they are right.
    assert large(part) == {"conv_relu"}
    assert part.outputs[0].max_steps > 1


def replace(model: ModelT, operator: int, data: np.ndarray) -> None:
    """Gives the operator's first constant other values."""
    tensor, _ = constants(model, operator)[0]
    model.buffers[tensor.buffer].data = np.frombuffer(data.tobytes(), np.uint8)


def test_a_changed_weight_scale_shows_in_its_layer(net: Net) -> None:
    def stretch(model: ModelT) -> None:
        for tensor, _ in constants(model, operators(model).index("FULLY_CONNECTED")):
            tensor.quantization.scale = tensor.quantization.scale * np.float32(1.1)

    assert large(verified(net, stretch)) == {"head"}


def test_a_changed_activation_scale_shows_as_a_value_that_is_not_there(net: Net) -> None:
    def stretch(model: ModelT) -> None:
        graph = model.subgraphs[0]
        tensor = graph.tensors[graph.operators[-1].inputs[0]]
        tensor.quantization.scale = tensor.quantization.scale * np.float32(1.1)

    part = verified(net, stretch)
    assert part.unmatched == ("head",)
    # The softmax of what the frozen model has there is another one.
    assert large(part) == {"head_softmax"}


def test_sites_that_share_a_tensor_are_compared_there() -> None:
    """The converter drops Flatten and Reshape that undo each other: one tensor for three sites."""

    def round_trip(x: Any) -> Any:
        x = L.Conv2D(4, 3, name="conv")(x)
        x = L.Reshape((6, 6, 4), name="back")(L.Flatten(name="flat")(x))
        return L.Conv2D(2, 1, name="last")(x)

    qat, x = quantized((8, 8, 3), round_trip)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, runtimes=[REFERENCE])
    assert report.operators == {"CONV_2D": 2}
    part = report.on(REFERENCE)
    assert part.unmatched == ()
    assert [site.name for site in part.sites] == ["x", "back", "last"]
    assert part.max_steps <= 1


def test_sites_that_compute_the_same_are_compared_at_the_one_that_is_left() -> None:
    """The converter makes one operator of two equal ones, as NASNet has them."""

    def twice(x: Any) -> Any:
        x = L.Conv2D(4, 3, name="conv")(x)
        return L.Multiply(name="last")([L.Activation("tanh", name=name)(x) for name in "ab"])

    qat, x = quantized((8, 8, 3), twice)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, runtimes=[REFERENCE])
    assert report.operators == {"CONV_2D": 1, "MUL": 1, "TANH": 1}
    part = report.on(REFERENCE)
    assert part.unmatched == ()
    assert [site.name for site in part.sites] == ["x", "conv", "a", "b", "last"]
    assert part.max_steps <= 1


def test_the_operator_is_the_one_that_computed() -> None:
    """Dense on three axes ends in a RESHAPE that no layer asked for."""
    qat, x = quantized((5, 8), lambda x: L.Dense(4, name="dense")(x))
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, runtimes=[REFERENCE])
    operators = {site.name: site.operator for site in report.on(REFERENCE).sites}
    assert operators == {"x": "input", "dense": "FULLY_CONNECTED"}


def test_exact_ties_are_told_apart() -> None:
    """An average of two integers lies between two steps every other time."""
    qat, x = quantized((8, 3), lambda x: L.AveragePooling1D(2, name="pool")(x))
    report = tflite_export.verify(qat, tflite_export.convert(qat), x)
    for part in report.runtimes:
        row = part.by_operator()["AVERAGE_POOL_2D"]
        assert row.max_steps == 1
        assert 0 < row.differing == row.ties < row.elements / 2


def test_a_runtime_that_refuses_is_reported() -> None:
    """LiteRT's reference kernels have no int8 ELU."""
    qat, x = quantized((8,), lambda x: L.ELU()(x))
    report = tflite_export.verify(qat, tflite_export.convert(qat), x)
    problem = report.on(REFERENCE).problem
    assert problem is not None and "Expected runtime 'litert_reference' to run" in problem
    assert report.on(REFERENCE).sites == ()
    assert report.on("litert").problem is report.on("tflite_micro").problem is None
    assert "litert_reference: did not run" in str(report)


def test_a_runtime_that_is_absent_is_reported(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise RuntimeUnavailableError("Expected TFLite Micro to be installed.")

    monkeypatch.setattr(verifier, "run", absent)
    report = tflite_export.verify(net.frozen, net.blob, net.x)
    problems = [part.problem for part in report.runtimes]
    assert problems == ["Expected TFLite Micro to be installed."] * 3


def test_names_of_runtimes_are_checked(net: Net) -> None:
    for options, match in (
        ({"runtimes": []}, "a runtime to compare on"),
        ({"samples": 2.5}, "whole number above 0. Received: 2.5"),
        ({"samples": 0}, "whole number above 0. Received: 0"),
    ):
        with pytest.raises(ExportError, match=match):
            tflite_export.verify(net.frozen, net.blob, net.x, **options)
    with pytest.raises(ExportError, match=r"a runtime in .*Received: runtime='tflite'"):
        tflite_export.verify(net.frozen, net.blob, net.x, runtimes=["tflite"])


def test_bytes_that_are_no_file_are_refused(net: Net) -> None:
    with pytest.raises(ExportError, match="Expected a TFLite"):
        tflite_export.verify(net.frozen, b"no file", net.x)
    with pytest.raises(ExportError, match="Expected the bytes of a"):
        tflite_export.verify(net.frozen, "a.tflite", net.x)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((4, 8, 8)),
        np.zeros((0, 8, 8, 3)),
        np.zeros((8, 8, 3)),
        [np.zeros((4, 8, 8, 3))] * 2,
        {"y": np.zeros((4, 8, 8, 3))},
        [],
        iter([np.zeros((4, 8, 8, 3))]),
    ],
    ids=["rank", "none", "one sample", "two inputs", "other name", "no input", "generator"],
)
def test_data_that_do_not_fit_are_refused(net: Net, data: Any) -> None:
    with pytest.raises(ExportError, match=r"shapes \[\('samples', 8, 8, 3\)\].*\['x'\]"):
        tflite_export.verify(net.frozen, net.blob, data)


def test_data_that_are_not_finite_are_refused_by_name(net: Net) -> None:
    """An integer stands for none of them: the report ended in an error of Python."""
    data = np.zeros((4, 8, 8, 3))
    data[2, 0, 0, 0] = np.nan
    for frozen in (net.frozen, None):
        with pytest.raises(
            ExportError, match=r"'x'. Received: NaN or infinity in 1 of .* sample 2"
        ):
            tflite_export.verify(frozen, net.blob, data, runtimes=[REFERENCE])
    tflite_export.verify(net.frozen, net.blob, data, runtimes=[REFERENCE], samples=2)
    with pytest.raises(ExportError, match=r"Expected numbers for input 'x'. Received: dtype <U"):
        tflite_export.verify(net.frozen, net.blob, data.astype(str))


def test_lists_and_dicts_serve_models_of_many_inputs() -> None:
    b, a = keras.Input((3,), name="b"), keras.Input((2,), name="a")
    model = keras.Model([b, a], L.Dense(2, name="dense")(L.Concatenate(name="both")([b, a])))
    x = inputs_of(model, 8)
    qat = kqat.quantize_model(model, calibration_data=x)
    blob = tflite_export.convert(qat)
    rows = [
        tflite_export.verify(qat, blob, data, runtimes=[REFERENCE]).on(REFERENCE)
        for data in (x, {"a": x[1], "b": x[0]})
    ]
    assert rows[0] == rows[1]
    assert rows[0].outputs[0].max_steps <= 1
    for wrong in ({"a": x[1]}, {"a": x[1], "b": x[0], "labels": x[0]}):
        with pytest.raises(ExportError, match=r"for the inputs .* Received: data for"):
            tflite_export.verify(qat, blob, wrong, runtimes=[REFERENCE])


def test_two_inputs_of_one_scale_are_told_apart() -> None:
    x, y = keras.Input((4,), name="x"), keras.Input((4,), name="y")
    model = keras.Model([x, y], [L.Maximum()([x, y]), L.Rescaling(2.0)(y)])
    data = inputs_of(model, 8)
    qat = kqat.quantize_model(model, calibration_data=data)
    report = tflite_export.verify(qat, tflite_export.convert(qat), data, runtimes=[REFERENCE])
    assert {site.name for site in report.on(REFERENCE).sites} > {"x", "y"}
    assert report.on(REFERENCE).unmatched == ()
    assert report.on(REFERENCE).max_steps <= 1


@pytest.mark.parametrize("io_type", ["uint8", "float32"])
def test_files_with_other_inputs_and_outputs_are_compared_alike(net: Net, io_type: str) -> None:
    blob = tflite_export.convert(
        net.frozen, inference_input_type=io_type, inference_output_type=io_type
    )
    report = tflite_export.verify(net.frozen, blob, net.x, runtimes=[REFERENCE])
    part, plain = report.on(REFERENCE), verified(net)
    assert [(s.name, s.differing) for s in part.sites] == [
        (s.name, s.differing) for s in plain.sites
    ]
    assert part.unmatched == ()
    # A float output is not on the grid; the Keras model's is, and may be a step away.
    assert part.outputs[0].top1_agreement == plain.outputs[0].top1_agreement
    assert report.is_full_integer == (io_type == "uint8")


def test_the_report_goes_through_json(net: Net, tmp_path: Path) -> None:
    report = tflite_export.verify(net.frozen, net.blob, net.x, runtimes=["tflite_micro"])
    report.save(tmp_path / "report.json")
    table = json.loads((tmp_path / "report.json").read_text())
    assert table == json.loads(json.dumps(dataclasses.asdict(report)))
    assert rebuilt(table) == report


def rebuilt(table: dict[str, Any]) -> Report:
    parts = []
    for part in table.pop("runtimes"):
        sites = tuple(SiteDifference(**site) for site in part.pop("sites"))
        outputs = tuple(OutputAgreement(**output) for output in part.pop("outputs"))
        names = {key: tuple(part.pop(key)) for key in ("unmatched", "lacks")}
        if (exact := part.pop("exact")) is not None:
            exact = Exactness(**{**exact, "unknown": tuple(exact["unknown"])})
        ends = {"outputs": outputs, "exact": exact, **names}
        parts.append(RuntimeReport(sites=sites, **ends, **part))
    layers = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in table.pop("layers")]
    notes = tuple(table.pop("notes"))
    return Report(runtimes=tuple(parts), layers=tuple(layers), notes=notes, **table)


def test_the_report_fits_a_terminal() -> None:
    name = "a_rather_long_name_of_a_layer_in_a_nested_model_of_a_model"
    site = SiteDifference(
        name=name, operator="RESIZE_NEAREST_NEIGHBOR", elements=1_234_567_890, max_steps=255,
        differing=1_234_567, ties=1_000_000,
    )  # fmt: skip
    agreement = OutputAgreement(name=name, max_steps=255, equal_fraction=1.0, top1_agreement=1.0)
    part = RuntimeReport(
        runtime="tflite_micro", sites=(site,), unmatched=(name, name), outputs=(agreement,),
        arena_bytes=1 << 30,
    )  # fmt: skip
    refused = RuntimeReport(runtime=REFERENCE, problem="Expected a runtime. " * 20)
    report = Report(
        model_name=name, size_bytes=1 << 30, samples=64, float_operators=12,
        operators={f"OP_{i}": 9 for i in range(40)}, runtimes=(part, refused),
    )  # fmt: skip
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(str(report).split())
    for said in (name, "1,234,567,890", "255", "81 % halfway", "top-1 agreement 100.0 %", "39"):
        assert said in text


def _sequence(x: Any) -> Any:
    """Of one Conv1D, one DepthwiseConv1D and one Dense no tensor has the layer's own shape."""
    x = L.Conv1D(8, 3, padding="same", activation="relu", name="plain")(x)
    x = L.DepthwiseConv1D(3, name="depthwise")(x)
    x = L.Conv1D(8, 3, dilation_rate=2, padding="causal", name="dilated")(x)
    return L.Dense(3, name="head")(L.Flatten(name="flat")(L.Dense(4, name="rows")(x)))


@pytest.mark.parametrize("policy", ["int16x8", pytest.param("w4a8", marks=pytest.mark.slow)])
def test_every_layer_with_weights_has_a_row_with_its_work(policy: str) -> None:
    qat, x = quantized((32, 4), _sequence, policy)
    blob = tflite_export.convert(qat, target="tflite_micro")
    report = tflite_export.verify(qat, blob, x[:4], runtimes=[REFERENCE])
    rows = {row.name.removesuffix("_relu"): row for row in report.layers if row.macs}
    assert set(rows) == {"plain", "depthwise", "dilated", "rows", "head"}
    macs = {"plain": 32 * 8 * 12, "depthwise": 30 * 8 * 3, "dilated": 30 * 8 * 24}
    macs |= {"rows": 30 * 32, "head": 360}
    assert {name: row.macs for name, row in rows.items()} == macs
    assert sum(row.macs for row in report.layers) == report.macs
    # Small matrices are not worth two RESHAPEs.
    assert rows["plain"].weight_bits == (4 if policy == "w4a8" else 8)
    assert all(row.weight_bits in (4, 8) for row in rows.values())
    constants = tflite_export.inspect(blob).constant_bytes
    assert sum(row.constant_bytes for row in report.layers) == constants


def test_a_kernel_that_a_runtime_lacks_is_a_note() -> None:
    qat, x = quantized((4, 4, 2), lambda x: L.ELU(name="elu")(L.Conv2D(2, 1, name="conv")(x)))
    blob = tflite_export.convert(qat)
    report = tflite_export.verify(qat, blob, x[:2], runtimes=[REFERENCE, "litert_builtin"])
    part = report.on(REFERENCE)
    assert part.problem and part.lacks == ("ELU",) and part.is_right
    assert report.on("litert_builtin").is_right and not report.on("litert_builtin").lacks
    assert "has no kernel for ELU" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("lengthen", [True, False])
def test_damaged_shapes_are_told(net: Net, lengthen: bool) -> None:
    for index in range(len(flatbuffer.read(net.blob).subgraphs[0].tensors)):
        model = flatbuffer.read(net.blob)
        tensor = model.subgraphs[0].tensors[index]
        tensor.shape = [2, *tensor.shape[1:]] if lengthen else []
        try:
            blob = flatbuffer.write(model)
            report = tflite_export.verify(net.frozen, blob, net.x[:2], runtimes=[REFERENCE])
        except ExportError:
            continue
        assert report.runtimes[0].runtime == REFERENCE


def test_approximating_kernels_are_allowed_their_steps() -> None:
    site = SiteDifference(
        name="t", operator="TANH", elements=4, max_steps=2, differing=1, ties=0, allowed_steps=2
    )
    assert RuntimeReport(runtime=REFERENCE, sites=(site,)).is_right
    plain = dataclasses.replace(site, allowed_steps=1)
    assert not RuntimeReport(runtime=REFERENCE, sites=(plain,)).is_right


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_product_that_the_converter_removes_is_compared_where_its_factor_is(seed: int) -> None:
    """A fresh LayerNormalization multiplies by one and adds zero: no operator is left of that."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4, 4, 12))
    hidden = keras.layers.LayerNormalization(name="norm")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(24)(hidden))
    x = np.random.default_rng(seed).normal(size=(64, 4, 4, 12)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x)
    assert [part.unmatched for part in report.runtimes] == [()] * len(report.runtimes)


def cancelling(x: Any) -> Any:
    """Sums whose values cancel, so that floats leave 1e-7 of a step of their inputs."""
    centered = L.Subtract(name="centered")([x, ops.mean(x, axis=1, keepdims=True)])
    return [
        L.GlobalAveragePooling1D(name="pooled")(centered),
        ops.sum(centered, axis=1),
        L.Subtract(name="means")([ops.mean(x, (1, 2)), ops.mean(ops.mean(x, 1), -1)]),
        L.Subtract(name="same")([L.Activation("sigmoid")(x), 1.0 - ops.sigmoid(-x)]),
    ]


@pytest.mark.slow
def test_sums_whose_values_cancel_are_within_a_step() -> None:
    keras.utils.set_random_seed(0)
    qat, x = quantized((12, 8), cancelling)
    report = tflite_export.verify(qat, tflite_export.convert(qat), x, samples=8)
    assert {part.runtime: part.max_steps for part in report.runtimes if part.max_steps > 1} == {}
    assert all(part.problem is None for part in report.runtimes)


def test_a_scale_of_one_is_no_operator_and_is_compared_all_the_same() -> None:
    """Behind roundings of a runtime's own, its site holds what the tensor before it does."""
    x = keras.Input((6, 8), name="x")
    y = L.RMSNormalization(name="norm")(L.Dense(8, name="dense")(x))
    model = keras.Model(x, L.Dense(3, name="head")(y))
    data = np.random.default_rng(0).normal(size=(64, 6, 8)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=data)
    report = tflite_export.verify(qat, tflite_export.convert(qat), data, samples=64)
    (unit,) = [s for s in report.on(REFERENCE).sites if s.name in ("norm", "norm_unit")][:1]
    assert unit.differing > 0, "else every runtime's values are Keras's"
    assert [part.unmatched for part in report.runtimes] == [(), (), ()]


@pytest.mark.parametrize("wrong", ["swapped", "an input"])
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_outputs_that_are_other_values_are_told(two_outputs: Net, wrong: str, kind: str) -> None:
    net = two_outputs
    blob = tflite_export.convert(net.frozen, inference_output_type=kind)
    assert not tflite_export.verify(net.frozen, blob, net.x, runtimes=[REFERENCE]).notes
    model = flatbuffer.read(blob)
    graph = model.subgraphs[0]
    first, second = graph.outputs
    graph.outputs = [second, first] if wrong == "swapped" else [graph.inputs[0], second]
    report = tflite_export.verify(
        net.frozen, flatbuffer.write(model), net.x, runtimes=[REFERENCE], samples=2
    )
    assert "where it has the output" in report.notes[0]
    assert not report.on(REFERENCE).sites  # The command ends with exit code 1.


@pytest.fixture(scope="module")
def two_outputs() -> Net:
    """Two Dense layers over one input, of as many values each as the input."""
    x = keras.Input((4,), name="x")
    model = keras.Model(x, [L.Dense(4, name="one")(x), L.Dense(4, "relu", name="two")(x)])
    data = np.random.default_rng(0).uniform(-1, 1, (512, 4)).astype(np.float32)
    frozen = kqat.freeze(kqat.quantize_model(model, calibration_data=data))
    return Net(frozen, b"", data[:8])
