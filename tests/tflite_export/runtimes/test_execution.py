"""The runtimes room: four kernel sets behind one signature, and none that takes us along."""

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import interpreter as litert

from kqat.base.errors import ExportError, RuntimeUnavailableError
from tflite_export import flatbuffer
from tflite_export.runtimes import child_programs, execution

needs_micro = pytest.mark.skipif(
    not execution.supports("tflite_micro"), reason="tflite-micro is not installed"
)
RUNTIMES = [
    pytest.param(name, marks=needs_micro if name == "tflite_micro" else ())
    for name in execution.RUNTIMES
]


def _convert(
    function: Callable, *shapes: tuple[int, ...], int8: bool = False, owner: Any = None
) -> bytes:
    signature = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    concrete = tf.function(function, input_signature=signature).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], owner or tf.Module())
    converter.experimental_enable_resource_variables = True
    if int8:
        rng = np.random.default_rng(0)
        batches = [[rng.normal(size=s).astype(np.float32) for s in shapes] for _ in range(8)]
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: iter(batches)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return converter.convert()


@pytest.fixture(scope="module")
def image() -> bytes:
    """CONV_2D with ReLU, DEPTHWISE_CONV_2D, CONV_2D, int8: (1, 8, 8, 3) → (1, 4, 4, 5)."""
    rng = np.random.default_rng(1)
    first, second, third = (
        tf.constant(rng.normal(size=shape).astype(np.float32))
        for shape in ((3, 3, 3, 8), (3, 3, 8, 1), (1, 1, 8, 5))
    )

    def network(x: tf.Tensor) -> tf.Tensor:
        x = tf.nn.relu(tf.nn.conv2d(x, first, 2, "SAME"))
        x = tf.nn.depthwise_conv2d(x, second, [1, 1, 1, 1], "SAME")
        return tf.nn.conv2d(x, third, 1, "SAME")

    return _convert(network, (1, 8, 8, 3), int8=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_softmax_that_aborts_leaves_this_process_alone(runtime: str) -> None:
    blob = _convert(tf.nn.softmax, (1, 512), int8=True)
    apart = np.full((1, 512), -128, np.int8)
    apart[0, 0] = 127
    assert execution.run(blob, [apart], runtime=runtime).outputs[0][0, 0] > 0
    equal = np.zeros((1, 512), np.int8)
    if runtime in ("litert_reference", "tflite_micro"):
        with pytest.raises(RuntimeUnavailableError, match="SIGABRT"):
            execution.run(blob, [equal], runtime=runtime)
    else:
        assert np.max(execution.run(blob, [equal], runtime=runtime).outputs[0]) <= -127


@pytest.fixture(scope="module")
def pairs() -> bytes:
    """x, y of batch 2 and a scalar s → x - y, sum(x), y · s, float: only order can go wrong."""
    blob = _convert(lambda x, y, s: (x - y, tf.reduce_sum(x), y * s), (2, 3), (2, 3), ())

    def order(model: flatbuffer.ModelT) -> None:
        graph = model.subgraphs[0]
        index = {flatbuffer.tensor_name(t): i for i, t in enumerate(graph.tensors)}
        graph.inputs = [index[f"serving_default_{name}:0"] for name in "xys"]
        result = {flatbuffer.op_name(model, o): o.outputs[0] for o in graph.operators}
        graph.outputs = [result[name] for name in ("SUB", "SUM", "MUL")]

    return _edited(blob, order)


@pytest.fixture(scope="module")
def counter() -> bytes:
    """Adds its input to a variable that starts at 5, and returns it."""
    module = tf.Module()
    module.total = tf.Variable(tf.fill((1, 2), 5.0))
    return _convert(lambda x: module.total.assign_add(x) + 0.0, (1, 2), owner=module)


@pytest.fixture(scope="module")
def gelu() -> bytes:
    return _convert(tf.nn.gelu, (1, 4))


@pytest.fixture
def resnet(shared: Path) -> bytes:
    return (shared / "models/mlperf_tiny/ic/pretrainedResnet_quant.tflite").read_bytes()


@pytest.fixture
def photos(shared: Path) -> np.ndarray:
    with np.load(shared / "data/cifar10_lossless_4000train.npz") as data:
        return (data["x"][:64].astype(np.int16) - 128).astype(np.int8)


def _pixels(count: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(2).integers(-128, 128, (count, side, side, 3), dtype=np.int8)


def _edited(blob: bytes, edit: Callable[[flatbuffer.ModelT], object]) -> bytes:
    model = flatbuffer.read(blob)
    edit(model)
    return flatbuffer.write(model)


def _double_batch(model: flatbuffer.ModelT) -> None:
    for tensor in model.subgraphs[0].tensors:
        if flatbuffer.tensor_data(model, tensor) is None:
            tensor.shape = [2, *tensor.shape[1:]]


def _lockstep(blob: bytes, inputs: list[np.ndarray], runtime: str) -> list[tuple[str, int, float]]:
    """(op, greatest steps, fraction) of difference to LiteRT's reference kernels, of every
    operator that both fed with the same values."""
    ours = execution.run(blob, inputs, runtime=runtime, tensors="all").tensors
    theirs = execution.run(blob, inputs, runtime="litert_reference", tensors="all").tensors
    assert ours.keys() == theirs.keys()
    model, found = flatbuffer.read(blob), []
    for operator in model.subgraphs[0].operators:
        fed = [index for index in operator.inputs if index in ours]
        if all(np.array_equal(ours[index], theirs[index]) for index in fed):
            (result,) = operator.outputs
            steps = np.abs(ours[result].astype(int) - theirs[result])
            name = flatbuffer.op_name(model, operator)
            found.append((name, int(steps.max()), float(np.mean(steps > 0))))
    return found


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("tensors", ["outputs", "all"])
def test_outputs_follow_the_files_order(pairs: bytes, runtime: str, tensors: Any) -> None:
    rng = np.random.default_rng(3)
    x, y = (rng.integers(-9, 9, (6, 3)).astype(np.float32) for _ in range(2))
    scalar = np.array([1, -2, 4], np.float32)
    model = flatbuffer.read(pairs)
    sums = x.reshape(3, 6).sum(axis=1)
    expected = [x - y, sums, y * np.repeat(scalar, 2)[:, None]]
    result = execution.run(pairs, [x, y, scalar], runtime=runtime, tensors=tensors)
    np.testing.assert_equal(list(result.outputs), expected)
    if tensors == "all":
        indices = [*model.subgraphs[0].inputs, *model.subgraphs[0].outputs]
        seen = [result.tensors[index] for index in indices]
        np.testing.assert_equal(seen, [x, y, scalar, *expected])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_tensors_have_all_samples_and_leave_the_outputs_alone(
    image: bytes, runtime: str
) -> None:
    x = _pixels(5)
    few = execution.run(image, [x], runtime=runtime)
    many = execution.run(image, [x], runtime=runtime, tensors="all")
    graph = flatbuffer.read(image).subgraphs[0]
    results = {int(index) for operator in graph.operators for index in operator.outputs}
    assert few.tensors == {}
    assert many.tensors.keys() == results | {int(graph.inputs[0])}
    for index, array in many.tensors.items():
        tensor = graph.tensors[index]
        assert array.shape == (5, *flatbuffer.tensor_shape(tensor)[1:])
        assert array.dtype == flatbuffer.tensor_dtype(tensor)
    np.testing.assert_array_equal(many.tensors[graph.inputs[0]], x)
    np.testing.assert_array_equal(many.tensors[graph.outputs[0]], few.outputs[0])
    np.testing.assert_array_equal(many.outputs[0], few.outputs[0])
    assert many.arena_bytes == few.arena_bytes
    assert (few.arena_bytes is None) == (runtime != "tflite_micro")


@pytest.mark.parametrize(
    ("runtime", "resolver"),
    [
        ("litert_reference", "BUILTIN_REF"),
        ("litert_builtin", "BUILTIN_WITHOUT_DEFAULT_DELEGATES"),
        ("litert", "BUILTIN"),
    ],
)
def test_litert_runs_the_kernels_that_were_named(
    image: bytes, runtime: str, resolver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the kernels compute depends on the CPU, so only the choice itself can be compared.
    used, make = [], litert.Interpreter

    def interpreter(**options: Any) -> litert.Interpreter:
        used.append(options["experimental_op_resolver_type"])
        return make(**options)

    monkeypatch.setattr(litert, "Interpreter", interpreter)
    execution.run(image, [_pixels(3)], runtime=runtime)
    assert used == [litert.OpResolverType[resolver]]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_samples_do_not_see_each_other(image: bytes, runtime: str) -> None:
    x = _pixels(4)
    together = execution.run(image, [x], runtime=runtime).outputs[0]
    in_pairs = execution.run(_edited(image, _double_batch), [x], runtime=runtime).outputs[0]
    alone = [execution.run(image, [x[i : i + 1]], runtime=runtime).outputs[0] for i in range(4)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    np.testing.assert_array_equal(together, in_pairs)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_resource_variables_start_anew_for_every_sample(counter: bytes, runtime: str) -> None:
    x = np.array([[1, 2], [3, 4], [3, 4]], np.float32)
    result = execution.run(counter, [x], runtime=runtime, tensors="all")
    np.testing.assert_array_equal(result.outputs[0], x + 5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_lstm_state_starts_anew_for_every_sample(shared: Path, runtime: str) -> None:
    blob = (shared / "models/tflm/trained_lstm_int8.tflite").read_bytes()
    x = np.random.default_rng(4).integers(-128, 128, (1, 28, 28), dtype=np.int8)
    first, second = execution.run(blob, [x.repeat(2, axis=0)], runtime=runtime).outputs[0]
    np.testing.assert_array_equal(first, second)


# One rounding of the accumulator differs: reference and micro kernels round halves away from
# zero, ruy (builtin, x86) halves of negatives up, XNNPACK once. DESIGN.md bounds it.
@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_convolutions_differ_from_the_reference_by_a_rounding(image: bytes, runtime: str) -> None:
    found = _lockstep(image, [_pixels(64)], runtime)
    assert found[0][0] == "CONV_2D"
    assert all(steps <= 1 and fraction < 0.01 for _, steps, fraction in found)


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_resnet_differs_from_the_reference_by_a_rounding(
    resnet: bytes, photos: np.ndarray, runtime: str
) -> None:
    found = _lockstep(resnet, [photos], runtime)
    convolutions = [(steps, share) for op, steps, share in found if op == "CONV_2D"]
    assert convolutions
    assert all(steps <= 1 and share < 0.01 for steps, share in convolutions)


def test_builtin_equals_reference_where_nothing_is_negative(
    resnet: bytes, photos: np.ndarray
) -> None:
    # The first two convolutions end in a ReLU; the third is the first that does not.
    found = _lockstep(resnet, [photos], "litert_builtin")
    assert [steps for _, steps, _ in found[:2]] == [0, 0]


@needs_micro
def test_micro_equals_reference_bit_for_bit_up_to_the_dense_layer(
    resnet: bytes, photos: np.ndarray
) -> None:
    found = _lockstep(resnet, [photos], "tflite_micro")
    # LiteRT's FULLY_CONNECTED rounds halves of negatives up, TFLite Micro's away from zero.
    assert [op for op, steps, _ in found if steps] in ([], ["FULLY_CONNECTED"])
    assert len(found) >= 15


@needs_micro
def test_hello_world_on_micro_and_reference(shared: Path) -> None:
    blob = (shared / "models/tflm/hello_world_int8.tflite").read_bytes()
    found = _lockstep(blob, [np.arange(-128, 128, dtype=np.int8)[:, None]], "tflite_micro")
    # As above: 9 of the 4,096 values of the first layer are halves of negatives.
    assert found[0][0] == "FULLY_CONNECTED"
    assert all(steps <= 1 and fraction < 0.01 for _, steps, fraction in found)


@needs_micro
def test_person_detect_runs_where_its_runtime_still_takes_it(shared: Path) -> None:
    blob = (shared / "models/tflm/person_detect.tflite").read_bytes()
    x = np.random.default_rng(5).integers(-128, 128, (2, 96, 96, 1), dtype=np.int8)
    result = execution.run(blob, [x], runtime="tflite_micro", tensors="all")
    assert result.outputs[0].shape == (2, 2)
    with pytest.raises(RuntimeUnavailableError, match=r"'litert'.*quantized_dimension must be"):
        execution.run(blob, [x], runtime="litert")


@needs_micro
@pytest.mark.parametrize("given_bytes", [0, 5001, 1 << 20])
def test_arena_figure_is_the_files_own(image: bytes, given_bytes: int) -> None:
    figure = execution.tflite_micro_arena_bytes(image, given_bytes=given_bytes)
    assert figure == execution.run(image, [_pixels(2)], runtime="tflite_micro").arena_bytes
    # Its largest two tensors at least: 8·8·3 input and 4·4·8 first result.
    assert 8 * 8 * 3 + 4 * 4 * 8 < figure < 16384
    # And it is enough, give or take the scratch that planning needs.
    assert execution.tflite_micro_arena_bytes(image, given_bytes=2 * figure) == figure


@needs_micro
def test_larger_arenas_are_tried_for_a_full_one_only(
    image: bytes, gelu: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_LARGEST_ARENA_BYTES", 1024)
    with pytest.raises(RuntimeUnavailableError, match=r"missing: \d+"):
        execution.tflite_micro_arena_bytes(image, given_bytes=256)
    monkeypatch.setattr(execution, "_LARGEST_ARENA_BYTES", 1 << 62)
    with pytest.raises(RuntimeUnavailableError, match="Didn't find op for builtin opcode 'GELU'"):
        execution.tflite_micro_arena_bytes(gelu)


@needs_micro
def test_micro_crashes_are_errors(image: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    def drop_bias(model: flatbuffer.ModelT) -> None:
        for operator in model.subgraphs[0].operators:
            operator.inputs = [*operator.inputs[:2], -1]

    with pytest.raises(RuntimeUnavailableError, match=r"Received: 'SIG[A-Z]+, saying"):
        execution.run(_edited(image, drop_bias), [_pixels(1)], runtime="tflite_micro")
    os.write(2, b"still mine")
    assert capfd.readouterr() == ("", "still mine")


@needs_micro
def test_micro_says_which_type_it_lacks(image: bytes) -> None:
    def widen(model: flatbuffer.ModelT) -> None:
        graph = model.subgraphs[0]
        graph.tensors[graph.operators[0].outputs[0]].type = 7

    with pytest.raises(RuntimeUnavailableError, match=r"CONV_2D .*failed to prepare"):
        execution.run(_edited(image, widen), [_pixels(1)], runtime="tflite_micro")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_custom_ops_are_refused_by_name(gelu: bytes, runtime: str) -> None:
    def rename(model: flatbuffer.ModelT) -> None:
        code = model.operatorCodes[0]
        code.deprecatedBuiltinCode = code.builtinCode = 32
        code.customCode = "NoSuchOp"

    with pytest.raises(RuntimeUnavailableError, match=rf"{runtime}.*(NoSuchOp|CUSTOM)"):
        execution.run(_edited(gelu, rename), [np.zeros((1, 4), np.float32)], runtime=runtime)


def test_micro_names_its_extra_where_it_is_absent(
    image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    assert not execution.supports("tflite_micro")
    assert execution.supports("litert")
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "kqat\[tflm\]"'):
        execution.run(image, [_pixels(1)], runtime="tflite_micro")
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "kqat\[tflm\]"'):
        execution.tflite_micro_arena_bytes(image)


_TWO, _ONE = np.zeros((2, 3), np.float32), np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([], r"one array per model input, \['\S+x:0', '\S+y:0', '\S+s:0'\].*Received: 0 arrays"),
        ([_TWO, _TWO.astype(np.int8), _ONE], r"dtype=float32 for model input '\S+y:0'.*dtype=int8"),
        ([_TWO[:, :2], _TWO, _ONE], r"\(samples, 3\) for model input '\S+x:0'.*shape=\(2, 2\)"),
        ([_TWO[0], _TWO, _ONE], r"\(samples, 3\) for model input '\S+x:0'.*shape=\(3,\)"),
        ([_TWO[:1], _TWO, _ONE], r"positive multiple of 2.*shape=\(1, 3\)"),
        ([_TWO[:0], _TWO[:0], _ONE[:0]], r"positive multiple of 2.*shape=\(0, 3\)"),
        ([_TWO, _TWO, _ONE[0]], r"for model input '\S+s:0'.*shape=\(\)"),
        ([_TWO, _TWO.repeat(2, axis=0), _ONE], r"as many samples.*x:0': 1, \S+y:0': 2, "),
        ([_TWO, _TWO * np.nan, _ONE], r"numbers for model input '\S+y:0'.*NaN"),
    ],
)
def test_wrong_inputs_are_named(pairs: bytes, inputs: list[np.ndarray], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        execution.run(pairs, inputs, runtime="litert_reference")


def test_the_child_s_program_needs_nothing_of_this_package(image: bytes, tmp_path: Path) -> None:
    """It is a file that this Python runs by its path, from anywhere, with the package installed
    or not.
    """
    request = execution._request(image, [_pixels(3)], renew=np.array(False))
    program = [child_programs.__file__, "litert", "BUILTIN_REF", str(8 << 30)]
    child = subprocess.run(
        [sys.executable, *program],
        input=request,
        capture_output=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONSAFEPATH": "1"},
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    with np.load(io.BytesIO(child.stdout)) as answer:
        outputs = {name: answer[name] for name in answer.files}
    (expected,) = execution.run(image, [_pixels(3)], runtime="litert_reference").outputs
    assert set(outputs) == {"output_0"}
    np.testing.assert_array_equal(outputs["output_0"], expected)
    imported = [line for line in Path(program[0]).read_text().splitlines() if "import " in line]
    assert imported and not [line for line in imported if "tflite_export" in line or "kqat" in line]


def test_wrong_names_are_refused(image: bytes) -> None:
    with pytest.raises(ExportError, match="runtime='onnx'"):
        execution.run(image, [_pixels(1)], runtime="onnx")
    with pytest.raises(ExportError, match="tensors='some'"):
        execution.run(image, [_pixels(1)], runtime="litert", tensors="some")  # type: ignore[arg-type]


def test_other_files_are_refused() -> None:
    with pytest.raises(ExportError, match="Expected a TFLite file"):
        execution.run(b"no model", [], runtime="litert")


@pytest.mark.skipif(not tf.__version__.startswith("2.21."), reason="phones.md says it of 2.21")
def test_the_interpreter_inside_tensorflow_multiplies_tensors_wrongly() -> None:
    blob = _convert(lambda x: tf.matmul(x, x, transpose_b=True), (1, 24, 16), int8=True)
    x = np.random.default_rng(2).integers(-128, 128, (1, 24, 16)).astype(np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated.
        interpreter = tf.lite.Interpreter(model_content=blob)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    theirs = interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).astype(int)
    right, fast = (
        execution.run(blob, [x], runtime=runtime).outputs[0].astype(int)
        for runtime in ("litert_reference", "litert")
    )
    assert np.max(np.abs(fast - right)) <= 1
    assert np.max(np.abs(theirs - right)) > 1
