"""C++ for the firmware engineer: it compiles, its `main` judges, its names are identifiers."""

import re
import subprocess
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers as L

import kqat
import tflite_export
from kqat.base.errors import ExportError
from tests.tflite_export.small_models import quantized
from tflite_export import flatbuffer
from tflite_export.firmware import c_source
from tflite_export.firmware.c_source import c_identifier
from tflite_export.kernels.op_table import OP_TABLE
from tflite_export.runtimes.execution import run

# What the generated code names of TFLite Micro, as its headers of 2026 declare it. The
# interpreter is a stand-in: `Invoke` calls the test's own function.
STUBS = {
    "micro_mutable_op_resolver.h": """
        #pragma once
        enum TfLiteStatus { kTfLiteOk, kTfLiteError };
        namespace tflite {
        template <unsigned int tOpCount> class MicroMutableOpResolver {
         public:
          unsigned int count = 0;
          TfLiteStatus Take() { return ++count <= tOpCount ? kTfLiteOk : kTfLiteError; }
          ADDERS
        };
        }""",
    "micro_interpreter.h": """
        #pragma once
        #include <cstddef>
        #include <cstdint>
        #include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
        #include "tensorflow/lite/schema/schema_generated.h"
        union TfLitePtrUnion { char* raw; const char* raw_const; };
        struct TfLiteTensor { TfLitePtrUnion data; std::size_t bytes; };
        void Invoked(TfLiteTensor* inputs, TfLiteTensor* outputs);
        extern TfLiteTensor stub_inputs[4], stub_outputs[4];
        namespace tflite {
        class MicroProfilerInterface {};
        class MicroInterpreter {
         public:
          template <class R>
          MicroInterpreter(const Model*, const R&, std::uint8_t*, std::size_t,
                           void* = nullptr, MicroProfilerInterface* = nullptr) {}
          TfLiteStatus AllocateTensors() { return kTfLiteOk; }
          TfLiteStatus Reset() { return kTfLiteOk; }
          TfLiteStatus Invoke() { Invoked(stub_inputs, stub_outputs); return kTfLiteOk; }
          TfLiteTensor* input(std::size_t i) { return &stub_inputs[i]; }
          TfLiteTensor* output(std::size_t i) { return &stub_outputs[i]; }
          std::size_t arena_used_bytes() const { return 0; }
        };
        }""",
    "micro_profiler.h": """
        #pragma once
        #include <cstdio>
        #include "tensorflow/lite/micro/micro_interpreter.h"
        namespace tflite {
        class MicroProfiler : public MicroProfilerInterface {
         public:
          void ClearEvents() {}
          void LogCsv() const { std::puts("ticks"); }
        };
        }""",
    "system_setup.h": "#pragma once\nnamespace tflite { void InitializeTarget(); }",
    "../schema/schema_generated.h": """
        #pragma once
        #define TFLITE_SCHEMA_VERSION 3
        namespace tflite {
        struct Model { int version() const { return 3; } };
        inline const Model* GetModel(const void* data) {
          return static_cast<const Model*>(data);
        }
        }""",
}
# What follows `Add` in the names of MicroMutableOpResolver's methods for one operator. Source:
# tensorflow/lite/micro/micro_mutable_op_resolver.h of github.com/tensorflow/tflite-micro at commit
# 90b983c2b3f1480642e040bbd2ddb37b998f3424 (2026-08-20).
RESOLVER_METHODS = """
Abs Add AddN ArgMax ArgMin AssignVariable AveragePool2D BatchMatMul BatchToSpaceNd
BroadcastArgs BroadcastTo CallOnce Cast Ceil CircularBuffer Concatenation Conv2D Cos CumSum
Decode Delay DepthToSpace DepthwiseConv2D Dequantize DetectionPostprocess Div
DynamicUpdateSlice Elu EmbeddingLookup Energy Equal EthosU Exp ExpandDims FftAutoScale Fill
FilterBank FilterBankLog FilterBankSpectralSubtraction FilterBankSquareRoot Floor FloorDiv
FloorMod Framer FullyConnected Gather GatherNd Greater GreaterEqual HardSwish If Irfft
L2Normalization L2Pool2D LeakyRelu Less LessEqual Log LogSoftmax LogicalAnd LogicalNot
LogicalOr Logistic MaxPool2D Maximum Mean Minimum MirrorPad Mul Neg NotEqual OverlapAdd PCAN
Pack Pad PadV2 Prelu Quantize ReadVariable ReduceAll ReduceMax ReduceMin Relu Relu6 Reshape
ResizeBilinear ResizeNearestNeighbor ReverseV2 Rfft Round Rsqrt SelectV2 Shape Sin Slice
Softmax SpaceToBatchNd SpaceToDepth Split SplitV Sqrt Square SquaredDifference Squeeze Stacker
StridedSlice Sub Sum Svdf Tanh Transpose TransposeConv UnidirectionalSequenceLSTM Unpack
VarHandle While Window ZerosLike
""".split()
FLAGS = ("-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


def stubs(folder: Path) -> Path:
    """Writes the stub headers; the resolver has the methods of the real header."""
    methods = " ".join(f"TfLiteStatus Add{m}() {{ return Take(); }}" for m in RESOLVER_METHODS)
    micro = folder / "tensorflow/lite/micro"
    for name, text in STUBS.items():
        path = (micro / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("ADDERS", methods))
    return folder


def compiler(*arguments: Any) -> None:
    done = subprocess.run(
        ["g++", *FLAGS, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def net() -> tuple[bytes, np.ndarray]:
    def call(x: Any) -> Any:
        x = L.Conv2D(4, 3, activation="relu", name="conv")(x)
        x = L.Activation("gelu")(L.MaxPooling2D()(x))
        return L.Dense(5, "softmax", name="last")(L.Flatten()(x))

    keras.utils.set_random_seed(0)
    qat, x = quantized((8, 8, 3), call)
    model = flatbuffer.read(tflite_export.convert(qat))
    # Keras allows no such name, other writers do.
    model.subgraphs[0].tensors[model.subgraphs[0].outputs[0]].name = "1 class*/ é\\\n??".encode()
    return flatbuffer.write(model), x


@pytest.fixture(scope="module")
def source(
    net: tuple[bytes, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> tflite_export.CSource:
    folder = tmp_path_factory.mktemp("c")
    return tflite_export.to_c(net[0], folder / "new", name="9 lives!", samples=3)


def test_it_is_valid_cpp11(source: tflite_export.CSource, tmp_path: Path) -> None:
    names = ["model.h", "model.cc", "ops.h", "golden.h", "golden.cc", "main.cc", "io.h"]
    assert [path.name for path in source.files] == [f"n_9_lives_{name}" for name in names]
    sources = [path for path in source.files if path.suffix == ".cc"]
    compiler("-fsyntax-only", "-I", stubs(tmp_path), *sources)
    assert max(len(line) for p in source.files for line in p.read_text().splitlines()) <= 100


def test_the_array_is_the_file(source: tflite_export.CSource, net: tuple[bytes, Any]) -> None:
    text = source.files[1].read_text()
    found = bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})", text))
    assert found == net[0]
    assert "alignas(16)" in text
    assert f"kModelSize = {len(net[0])};" in source.files[0].read_text()


def test_the_resolver_has_exactly_the_operators(
    source: tflite_export.CSource, net: tuple[bytes, Any]
) -> None:
    model = flatbuffer.read(net[0])
    used = {flatbuffer.op_name(model, o) for o in model.subgraphs[0].operators}
    assert set(source.operators) == used
    assert {"CONV_2D", "CAST", "ADD", "GATHER", "FULLY_CONNECTED", "SOFTMAX"} <= used
    text = source.files[2].read_text()
    assert f"MicroMutableOpResolver<{len(used)}>" in text
    assert text.count("resolver.Add") == len(used)
    assert "AddConv2D()" in text and "AddMaxPool2D()" in text


# Where the name is not the operator's in camel case, and operators that LiteRT alone has.
OTHERS = {
    "BATCH_MATMUL": "BatchMatMul",
    "CIRCULAR_BUFFER": "CircularBuffer",
    "CUMSUM": "CumSum",
    "PADV2": "PadV2",
    "TFLM_DECODE": "Decode",
    "TFLite_Detection_PostProcess": "DetectionPostprocess",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTM",
    "ethos-u": "EthosU",
}
LITERT_ALONE = {"GELU", "REDUCE_PROD", "SELECT", "TOPK_V2"}


def test_the_methods_are_those_of_the_header() -> None:
    for operator, method in OTHERS.items():
        assert c_source._adder(operator) == f"Add{method}"
    for operator in OP_TABLE:
        known = c_source._adder(operator).removeprefix("Add") in RESOLVER_METHODS
        assert known == (operator not in LITERT_ALONE), operator
    # As the header pairs them.
    for operator, method in (
        ("CONV_2D", "AddConv2D"), ("L2_POOL_2D", "AddL2Pool2D"), ("SELECT_V2", "AddSelectV2"),
        ("SPACE_TO_BATCH_ND", "AddSpaceToBatchNd"), ("RELU6", "AddRelu6"), ("ADD_N", "AddAddN"),
    ):  # fmt: skip
        assert c_source._adder(operator) == method
        assert method.removeprefix("Add") in RESOLVER_METHODS


@pytest.mark.parametrize("wrong", [False, True])
def test_main_tells_right_outputs_from_wrong(
    source: tflite_export.CSource, tmp_path: Path, wrong: bool
) -> None:
    fake = tmp_path / "fake.cc"
    fake.write_text(
        f"""
        #include <cstring>
        #include "n_9_lives_golden.h"
        #include "tensorflow/lite/micro/micro_interpreter.h"
        #include "tensorflow/lite/micro/system_setup.h"
        namespace golden = n_9_lives::golden;
        static char fed[192], given[5];
        TfLiteTensor stub_inputs[4] = {{{{{{fed}}, 192}}}};
        TfLiteTensor stub_outputs[4] = {{{{{{given}}, 5}}}};
        void tflite::InitializeTarget() {{}}
        void Invoked(TfLiteTensor* inputs, TfLiteTensor* outputs) {{
          for (std::size_t i = 0; i < golden::kSamples; ++i) {{
            if (std::memcmp(inputs->data.raw, golden::input::x + 192 * i, 192)) continue;
            std::memcpy(outputs->data.raw, golden::output::dense_class + 5 * i, 5);
            if ({int(wrong)} && i == 1) outputs->data.raw[4] ^= 1;
          }}
        }}""".replace("dense_class", identifier_of_output(source))
    )
    sources = [path for path in source.files if path.suffix == ".cc"]
    folder = source.files[0].parent
    compiler("-I", stubs(tmp_path), "-I", folder, "-o", tmp_path / "a", fake, *sources)
    done = subprocess.run([tmp_path / "a"], capture_output=True, text=True, timeout=600)
    assert done.returncode == int(wrong)
    assert f"n_9_lives: {int(wrong)} values differ in 3 samples" in done.stdout


def identifier_of_output(source: tflite_export.CSource) -> str:
    found = re.findall(r"int8_t (\w+)\[kSamples \* 5\]", source.files[3].read_text())
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_golden_outputs_are_those_of_the_interpreter(
    net: tuple[bytes, np.ndarray], tmp_path: Path
) -> None:
    blob, _ = net
    x = np.arange(2 * 192, dtype=np.int64).reshape(2, 8, 8, 3).astype(np.int8)
    source = tflite_export.to_c(blob, tmp_path, inputs=[x])
    (expected,) = run(blob, [x], runtime="tflite_micro").outputs
    text = source.files[4].read_text()
    numbers = [int(n) for n in re.findall(r"(?m)^    (.*),$", text) for n in n.split(",")]
    np.testing.assert_array_equal(numbers, [*x.ravel(), *expected.ravel()])
    with pytest.raises(ExportError, match="Expected dtype=int8"):
        tflite_export.to_c(blob, tmp_path, inputs=[x.astype(np.int32)])


@pytest.mark.slow
def test_golden_inputs_may_be_floats(net: tuple[bytes, np.ndarray], tmp_path: Path) -> None:
    """They are rounded to the input's grid, and beyond it clipped."""
    blob, x = net
    grid = tflite_export.inspect(blob).inputs[0]
    real = np.concatenate([x[:1], 1.5 * x[1:2]]).astype(np.float64)
    on_grid = np.clip(
        np.floor(real.astype(np.float32) / grid.scale + 0.5) + grid.zero_point, -128, 127
    )
    given = [real, on_grid.astype(np.int8)]
    texts = [
        tflite_export.to_c(blob, tmp_path / str(i), inputs=[one]).files[4].read_text()
        for i, one in enumerate(given)
    ]
    assert texts[0] == texts[1]
    with pytest.raises(kqat.ExportError, match=r"golden input .*integers of the grid as int8"):
        tflite_export.to_c(blob, tmp_path / "2", inputs=[on_grid.astype(np.float32)])


def test_the_arena_is_enough_and_hardly_more(source: tflite_export.CSource, net: Any) -> None:
    arena = tflite_export.runtimes.execution.tflite_micro_arena_bytes
    arena(net[0], given_bytes=source.arena_bytes, grow=False)
    with pytest.raises(
        tflite_export.runtimes.execution.RuntimeUnavailableError, match="failed to allocate"
    ):
        arena(net[0], given_bytes=source.arena_bytes - c_source.ARENA_STEP_BYTES, grow=False)
    assert f"kArenaSize = {source.arena_bytes};" in source.files[2].read_text()


@pytest.mark.slow
def test_names_that_collide_are_numbered(tmp_path: Path) -> None:
    a, b = keras.Input((3,), name="in-1"), keras.Input((3,), name="in.1")
    model = keras.Model([a, b], L.Add(name="sum")([L.Dense(2)(a), L.Dense(2)(b)]))
    x = [np.ones((8, 3), np.float32)] * 2
    qat = kqat.quantize_model(model, calibration_data=x)
    blob = tflite_export.convert(qat, inference_output_type="float32")
    source = tflite_export.to_c(blob, tmp_path, name="while")
    text = source.files[4].read_text()
    assert re.findall(r"const (\w+ \w+)\[", text) == ["int8_t in_1", "int8_t in_1_2", "float sum"]
    sources = [path for path in source.files if path.suffix == ".cc"]
    compiler("-fsyntax-only", "-I", stubs(tmp_path), *sources)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float_literals_are_decimal_and_exact(number: float) -> None:
    text = c_source._literal(np.float32(number))
    assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?f", text)
    assert "." in text or "e" in text
    assert np.float32(text.removesuffix("f")) == np.float32(number)


@pytest.mark.slow
@given(st.lists(st.text(max_size=12), max_size=6))
def test_identifiers_are_valid_and_distinct(names: list[str]) -> None:
    taken: set[str] = set()
    found = [c_identifier(name, taken) for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*", name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv2d/relu:0", "conv2d_relu_0"), ("1x1", "n_1x1"), ("class", "n_class"),
        ("naïve", "naive"), ("_Under__score_", "Under_score"), ("", "unnamed"), ("层", "unnamed"),
    ],
)  # fmt: skip
def test_identifiers_stay_readable(name: str, expected: str) -> None:
    assert c_identifier(name, set()) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.int64(-(2**63)), "INT64_MIN"), (np.int64(2**63 - 1), "9223372036854775807LL"),
        (np.int64(-(2**31)), "-2147483648LL"), (np.int32(-(2**31)), "INT32_MIN"),
        (np.int32(2**31 - 1), "2147483647"), (np.int8(-128), "-128"), (np.uint8(255), "255"),
        (np.float32(0.1), "0.100000001f"), (np.bool_(True), "true"),
    ],
)  # fmt: skip
def test_literals_are_of_the_tensor_s_own_type(value: Any, text: str) -> None:
    """-2**63 and -2**31 are expressions in C++: their digits alone are of a wider type, or none."""
    assert c_source._literal(value) == text


@pytest.mark.slow
def test_nothing_is_written_where_something_fails(
    net: tuple[bytes, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for options, match in (({"samples": 0}, "at least 1"), ({"samples": True}, "at least 1")):
        with pytest.raises(ExportError, match=match):
            tflite_export.to_c(net[0], tmp_path, **options)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        tflite_export.to_c(net[0], tmp_path, samples=1)
    assert list(tmp_path.iterdir()) == []
