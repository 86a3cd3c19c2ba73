"""Each layout of the C++ is built and run; its scaling functions equal kqat's for every value.

TFLite Micro is a stand-in, as in `test_c_source`, but where the environment variables
`TFLITE_MICRO_INCLUDE` (folders, joined with `;`) and `TFLITE_MICRO_LIBRARY` name the real one.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras import layers as L

import tflite_export
from kqat.base import ExportError
from tests.tflite_export.firmware.test_c_source import compiler, stubs
from tests.tflite_export.small_models import quantized
from tflite_export import flatbuffer
from tflite_export.runtimes.feeds import as_type, real

SAMPLES, ELEMENTS, CLASSES = 2, 6, 3


def call(x: Any) -> Any:
    return L.Dense(CLASSES, name="classes")(L.Dense(5, activation="relu", name="hidden")(x))


@pytest.fixture(scope="module")
def blob() -> bytes:
    return tflite_export.convert(quantized((ELEMENTS,), call)[0])


def run(*command: Any, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stand_in(folder: Path, name: str = "net") -> Path:
    """A source file whose interpreter answers golden inputs with golden outputs."""
    path = folder / "stand_in.cc"
    path.write_text(
        f"""
        #include <cstring>
        #include "{name}_golden.h"
        #include "tensorflow/lite/micro/micro_interpreter.h"
        #include "tensorflow/lite/micro/system_setup.h"
        namespace golden = {name}::golden;
        static char fed[{ELEMENTS}], given[{CLASSES}];
        TfLiteTensor stub_inputs[4] = {{{{{{fed}}, {ELEMENTS}}}}};
        TfLiteTensor stub_outputs[4] = {{{{{{given}}, {CLASSES}}}}};
        void tflite::InitializeTarget() {{}}
        void Invoked(TfLiteTensor* inputs, TfLiteTensor* outputs) {{
          for (std::size_t i = 0; i < golden::kSamples; ++i) {{
            const void* sample = golden::input::x + {ELEMENTS} * i;
            if (std::memcmp(inputs->data.raw, sample, {ELEMENTS})) continue;
            std::memcpy(outputs->data.raw, golden::output::classes + {CLASSES} * i, {CLASSES});
          }}
        }}"""
    )
    return path


@pytest.mark.slow
def test_cmake_builds_a_program_that_checks_itself(blob: bytes, tmp_path: Path) -> None:
    source = tflite_export.to_c(blob, tmp_path / "net", name="net", layout="cmake")
    assert source.files[-1].name == "CMakeLists.txt"
    project = tmp_path / "project"
    project.mkdir()
    project.joinpath("CMakeLists.txt").write_text(
        f"""
        cmake_minimum_required(VERSION 3.16)
        project(host CXX)
        enable_testing()
        add_library(tflite-micro STATIC {stand_in(tmp_path)})
        target_include_directories(tflite-micro PUBLIC {stubs(tmp_path)} {tmp_path / "net"})
        add_subdirectory({tmp_path / "net"} net)
        """
    )
    build = tmp_path / "build"
    run("cmake", "-S", project, "-B", build, "-DNET_PROFILE=ON", "-DCMAKE_CXX_FLAGS=-Wall -Werror")
    run("cmake", "--build", build)
    assert "100% tests passed" in run("ctest", "--test-dir", build)
    said = run(build / "net" / "net_main")
    assert said.count("ticks") == SAMPLES and "net: 0 values differ in 2 samples" in said


@pytest.mark.skipif(
    "TFLITE_MICRO_LIBRARY" not in os.environ, reason="no library of TFLite Micro is named"
)
def test_the_program_runs_on_the_real_library(tmp_path: Path) -> None:
    """Kernels of TFLite Micro built here give the outputs of those in its wheel."""

    def image(x: Any) -> Any:
        x = L.MaxPooling2D()(L.Conv2D(4, 3, activation="relu", name="conv")(x))
        return L.Dense(CLASSES, "softmax")(L.Flatten()(L.Activation("gelu")(x)))

    made = tflite_export.convert(quantized((8, 8, 3), image)[0])
    source = tflite_export.to_c(made, tmp_path / "net", name="net", layout="cmake")
    build = tmp_path / "build"
    names = ("TFLITE_MICRO_INCLUDE", "TFLITE_MICRO_LIBRARY")
    options = [f"-D{name}={os.environ[name]}" for name in names]
    run("cmake", "-S", tmp_path / "net", "-B", build, "-DNET_PROFILE=ON", *options)
    run("cmake", "--build", build)
    done = subprocess.run([build / "net_main"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "net: 0 values differ in 2 samples" in done.stdout
    ticks = [line.split(",")[1] for line in done.stderr.splitlines() if line[:1].isdigit()]
    assert set(ticks) == set(source.operators)


@pytest.mark.slow
def test_zephyr_builds_the_module(blob: bytes, tmp_path: Path) -> None:
    """With Zephyr's own CMake functions as ordinary ones."""
    module = tmp_path / "net"
    source = tflite_export.to_c(blob, module, name="net", layout="zephyr")
    found = {path.relative_to(module).as_posix() for path in source.files}
    assert {"CMakeLists.txt", "Kconfig", "zephyr/module.yml", "include/net_io.h"} <= found
    project = tmp_path / "project"
    project.mkdir()
    application = tmp_path / "application.cc"
    application.write_text('#include "net_check.h"\nint main() { return net_check(); }\n')
    project.joinpath("CMakeLists.txt").write_text(
        f"""
        cmake_minimum_required(VERSION 3.16)
        project(application CXX)
        set(CONFIG_NET y)
        set(CONFIG_NET_CHECK y)
        set(CMAKE_CXX_STANDARD 17)
        include_directories({stubs(tmp_path)})
        function(zephyr_include_directories)
          foreach(folder ${{ARGV}})
            include_directories(${{CMAKE_CURRENT_SOURCE_DIR}}/${{folder}})
          endforeach()
          get_directory_property(all INCLUDE_DIRECTORIES)
          set_property(GLOBAL PROPERTY folders ${{all}})
        endfunction()
        function(zephyr_library_named name)
          add_library(${{name}} STATIC)
          set_property(GLOBAL PROPERTY library ${{name}})
        endfunction()
        function(zephyr_library_sources)
          get_property(name GLOBAL PROPERTY library)
          target_sources(${{name}} PRIVATE ${{ARGV}})
          get_property(all GLOBAL PROPERTY folders)
          target_include_directories(${{name}} PUBLIC ${{all}})
        endfunction()
        add_subdirectory({module} net)
        add_executable(app {application} {stand_in(tmp_path)})
        target_link_libraries(app PRIVATE net)
        """
    )
    build = tmp_path / "build"
    run("cmake", "-S", project, "-B", build)
    run("cmake", "--build", build)
    assert "0 values differ" in run(build / "app")
    # Each option that the build asks for is one that Kconfig has.
    kconfig = (module / "Kconfig").read_text()
    for option in ("NET", "NET_CHECK", "NET_PROFILE"):
        assert f"config {option}\n" in kconfig
        assert f"CONFIG_{option}" in (module / "CMakeLists.txt").read_text()


def test_arduino_builds_the_library_and_its_sketch(blob: bytes, tmp_path: Path) -> None:
    library = tmp_path / "net"
    source = tflite_export.to_c(blob, library, name="net", layout="arduino")
    sources = sorted((library / "src").glob("*.cpp"))
    assert {path.suffix for path in source.files} == {".cpp", ".h", ".ino", ".properties"}
    sketch = library / "examples/net_check/net_check.ino"
    (tmp_path / "Arduino.h").write_text(
        """
        #include <cstdio>
        struct Port {
          void begin(long) {}
          void println(const char* words) { std::puts(words); }
        };
        extern Port Serial;
        """
    )
    main = tmp_path / "main.cc"
    main.write_text(
        f'#include "Arduino.h"\nPort Serial;\n#include "{sketch}"\n'
        "int main() { setup(); loop(); }\n"
    )
    include = ("-I", stubs(tmp_path), "-I", library / "src", "-I", tmp_path)
    compiler(*include, "-o", tmp_path / "a", main, stand_in(tmp_path), *sources)
    assert "net: right" in run(tmp_path / "a")
    text = (library / "library.properties").read_text()
    keys = {line.split("=")[0] for line in text.splitlines()}
    assert {"name", "version", "author", "maintainer", "sentence", "architectures"} <= keys


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16"])
def test_scaling_is_that_of_python_for_every_value(kind: str, tmp_path: Path) -> None:
    policy = "int16x8" if kind == "int16" else "int8"
    qat, _ = quantized((ELEMENTS,), call, policy)
    types = {} if kind == "int16" else {f"inference_{end}put_type": kind for end in ("in", "out")}
    made = tflite_export.convert(qat, **types)
    tflite_export.to_c(made, tmp_path, name="net")
    graph = flatbuffer.read(made).subgraphs[0]
    given, result = (graph.tensors[int(i[0])] for i in (graph.inputs, graph.outputs))
    assert flatbuffer.tensor_dtype(given).name == kind
    limits, scale = np.iinfo(kind), np.float32(given.quantization.scale[0])
    integers = np.arange(limits.min, limits.max + 1)
    # Every tie and its neighbours, a step beyond the ends, and what no integer stands for.
    ties = (integers.astype(np.float32) - given.quantization.zeroPoint[0] + 0.5) * scale
    edges = [np.nextafter(ties, np.float32(x)) for x in (-np.inf, np.inf)]
    odd = np.array([0, -0.0, 1e30, -1e30, np.inf, -np.inf, 1e-40], np.float32)
    reals = np.concatenate([ties, *edges, ties - scale, ties + scale, odd]).astype(np.float32)
    (tmp_path / "reals").write_bytes(reals.tobytes())
    program = tmp_path / "program.cc"
    program.write_text(
        f"""
        #include <cstdio>
        #include <vector>
        #include "net_io.h"
        int main() {{
          std::vector<float> reals({len(reals)});
          std::FILE* file = std::fopen("{tmp_path}/reals", "rb");
          if (std::fread(reals.data(), 4, reals.size(), file) != reals.size()) return 1;
          std::fclose(file);
          file = std::fopen("{tmp_path}/integers", "wb");
          for (float x : reals) {{
            const auto q = net::input::x::Quantize(x);
            std::fwrite(&q, sizeof(q), 1, file);
          }}
          std::fclose(file);
          file = std::fopen("{tmp_path}/back", "wb");
          for (long q = {limits.min}; q <= {limits.max}; ++q) {{
            const float x = net::output::classes::Dequantize(static_cast<std::{kind}_t>(q));
            std::fwrite(&x, 4, 1, file);
          }}
          std::fclose(file);
          static_assert(net::input::x::kElements == {ELEMENTS}, "");
          return net::input::x::Quantize(NAN) == {limits.min} ? 0 : 1;
        }}"""
    )
    for level in ("-O0", "-O2"):
        compiler(level, "-I", tmp_path, "-o", tmp_path / "a", program)
        run(tmp_path / "a")
        found = np.frombuffer((tmp_path / "integers").read_bytes(), kind)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(found, as_type(reals, given))
        back = np.frombuffer((tmp_path / "back").read_bytes(), np.float32)
        np.testing.assert_array_equal(back, real(integers.astype(kind), result))


def test_an_unknown_layout_is_refused(blob: bytes, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'zephyr'.*Received: layout='mbed'"):
        tflite_export.to_c(blob, tmp_path, layout="mbed")
    assert not list(tmp_path.iterdir())
