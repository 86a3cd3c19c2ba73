"""What importing kqat and its quick commands load, each seen in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import kqat
import tflite_export

ROOT = Path(__file__).parents[2]


def python(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QAT model and its `.tflite`."""
    path = tmp_path_factory.mktemp("lazy")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="relu")])
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    qat = kqat.quantize_model(model, calibration_data=x)
    qat.save(path / "qat.keras")
    tflite_export.save(tflite_export.convert(qat), path / "net.tflite")
    return path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0), (["--version"], 0), (["verify", "--help"], 0), (["search", "--help"], 0),
        (["completion", "bash"], 0), (["plam"], 2), (["plan", "absent.keras"], 2),
        (["plan", "net.tflite"], 2), (["convert", "--outptu", "x"], 2),
        (["inspect", "net.tflite"], 0), (["inspect", "net.tflite", "--target", "cmsis_nn"], 0),
        (["inspect", "net.tflite", "--json", "-"], 0), (["inspect", "qat.keras"], 2),
    ],
)  # fmt: skip
def test_quick_commands_load_no_framework(folder: Path, arguments: list[str], code: int) -> None:
    program = (
        "import os, sys; from sys import modules; from kqat import cli\n"
        f"os.chdir({str(folder)!r}); sys.argv[1:] = {arguments!r}\n"
        "try:\n    cli.run()\nexcept SystemExit as end:\n"
        "    print([m for m in ('tensorflow', 'keras', 'jax') if m in modules], end.code)"
    )
    assert python("-c", program).stdout.splitlines()[-1] == f"[] {code}"


@pytest.mark.parametrize(
    "program",
    [
        "import kqat; import keras",
        pytest.param("import keras; import kqat", marks=pytest.mark.slow),
        pytest.param("import kqat, tflite_export; import keras", marks=pytest.mark.slow),
        pytest.param("import tflite_export; import keras", marks=pytest.mark.slow),
        # Modules of kqat that import Keras themselves, from the lowest on.
        pytest.param("import kqat.grids; import keras", marks=pytest.mark.slow),
        pytest.param("import kqat.graph; import keras", marks=pytest.mark.slow),
        pytest.param("import kqat; kqat.MinMax; import keras", marks=pytest.mark.slow),
        pytest.param(
            "import tflite_export; tflite_export.convert; import keras", marks=pytest.mark.slow
        ),
        pytest.param(
            "import importlib.util; import kqat; importlib.util.find_spec('keras'); import keras",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_saved_models_load_whoever_is_imported_first(folder: Path, program: str) -> None:
    load = f"model = keras.saving.load_model({str(folder / 'qat.keras')!r}); print(model.name)"
    assert "sequential" in python("-c", f"{program}; {load}").stdout


@pytest.mark.slow
def test_names_are_imported_when_they_are_used() -> None:
    program = (
        "import sys, kqat, tflite_export; from kqat import TARGETS, KqatError\n"
        "assert 'keras' not in sys.modules\n"
        "assert not {'MinMax', 'quantize_model', '__version__'} - {*dir(kqat)}\n"
        "from tflite_export import *\n"
        "import tflite_export.exporter, tflite_export.integer_model.keras_model\n"
        "assert callable(tflite_export.integer_model) and callable(integer_model)\n"
        "try:\n    kqat.quantise_model\nexcept AttributeError as error:\n    print(error)"
    )
    expected = "module 'kqat' has no attribute 'quantise_model'\n"
    assert python("-c", program).stdout == expected


@pytest.mark.slow
def test_nothing_imports_tfmot_or_tf_keras() -> None:
    program = (
        "import sys, kqat, tflite_export\n"
        "for face in kqat, tflite_export:\n"
        "    for name in face.__all__: getattr(face, name)\n"
        "print([m for m in ('tf_keras', 'tensorflow_model_optimization') if m in sys.modules])"
    )
    assert python("-c", program).stdout == "[]\n"
