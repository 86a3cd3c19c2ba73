"""The command: the road in five steps, what it prints, and how it fails."""

import dataclasses
import importlib.util
import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from click.testing import CliRunner, Result
from keras import layers as L

import kqat
import tflite_export
from kqat import __main__ as command
from kqat import cli
from kqat.cli import main

RUNTIMES_RIGHT = ["litert_reference", "litert", "tflite_micro"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, its data, and what is no model."""
    path = tmp_path_factory.mktemp("cli")
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3), name="x")
    y = L.Activation("mish", name="odd")(L.Conv2D(4, 3, name="conv")(x))
    model = keras.Model(x, L.Dense(5, "softmax", name="class")(L.Flatten()(y)), name="net")
    model.save(path / "float.keras")
    data = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)
    np.save(path / "x.npy", data)
    np.savez(path / "x.npz", x=data)
    (path / "text.keras").write_text("not a model")
    (path / "cut.keras").write_bytes((path / "float.keras").read_bytes()[:-500])
    (path / "bad.json").write_text("{}")
    (path / "ends.py").write_text("import sys; sys.exit(3)")
    with zipfile.ZipFile(path / "float.keras") as whole:
        files = {name: whole.read(name) for name in whole.namelist()}
    parts = {"no_weights": {"config.json", "metadata.json"}, "cut_config": set(files)}
    for name, kept in parts.items():
        with zipfile.ZipFile(path / f"{name}.keras", "w") as archive:
            for part in sorted(kept):
                cut = name == "cut_config" and part == "config.json"
                archive.writestr(part, files[part][:-9] if cut else files[part])
    np.savez(path / "xy.npz", x=data, y=np.zeros(64))
    np.save(path / "objects.npy", np.array([{}], object), allow_pickle=True)
    return path


def run(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="kqat")
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def blob(folder: Path) -> Path:
    """The file that `quantize` and `convert` make, once for all tests."""
    run("quantize", folder / "float.keras", "--data", folder / "x.npy", "-o", folder / "qat.keras")
    said = run("convert", folder / "qat.keras", "-o", folder / "net.tflite", "--target", "cmsis_nn")
    assert "net.tflite: " in said.output and "bytes" in said.output
    return folder / "net.tflite"


def narrow(text: str) -> bool:
    return max(map(len, text.splitlines())) <= 80


def test_a_plan_is_shown_and_kept(folder: Path) -> None:
    said = run(
        "plan", folder / "float.keras", "--policy", "w4a8", "--layer", "class=float",
        "--layer", "cl*=int8", "--target", "edge_tpu", "--json", folder / "plan.json",
        "--draw", folder / "plan.svg",
    )  # fmt: skip
    assert (folder / "plan.svg").read_text().startswith("<svg")
    assert "conv" in said.stdout and "int4/ch" in said.stdout
    assert "rule decides nothing: cl*" in said.stdout
    assert (
        "target edge_tpu: layer 'odd' (CAST, GATHER) runs, but not on the Edge TPU" in said.stdout
    )
    assert narrow(said.stdout)
    assert json.loads((folder / "plan.json").read_text())["target"] == "edge_tpu"


def test_a_model_is_adapted(folder: Path) -> None:
    run("adapt", folder / "float.keras", "--target", "edge_tpu", "-o", folder / "adapted.keras")
    said = run("plan", folder / "adapted.keras", "--target", "edge_tpu")
    assert "target edge_tpu: every layer fits" in said.stdout
    run("adapt", folder / "float.keras", "--data", folder / "x.npy", "-o", folder / "parted.keras")
    loaded = [keras.models.load_model(folder / f"{name}.keras") for name in ("float", "parted")]
    assert len(loaded[1].layers) == len(loaded[0].layers)  # it joins nothing
    neither = run("adapt", folder / "float.keras", "-o", folder / "no.keras", code=2)
    assert "a target, --data, or both" in " ".join(neither.stderr.split())
    assert not list(folder.glob(".*"))


def test_a_file_is_verified(folder: Path, blob: Path) -> None:
    said = run(
        "verify", folder / "qat.keras", blob, "--data", folder / "x.npz", "--samples", 8,
        "--html", folder / "r.html", "--json", folder / "r.json",
    )  # fmt: skip
    assert narrow(said.stdout) and "litert_reference: at most" in said.stdout
    table = json.loads((folder / "r.json").read_text())
    assert [part["runtime"] for part in table["runtimes"]] == RUNTIMES_RIGHT
    assert table["samples"] == 8 and table["model_name"] == "net"
    assert (folder / "r.html").read_text().startswith("<!doctype html>")


def test_ptq_takes_a_float_model_to_a_file(folder: Path) -> None:
    said = run(
        "ptq", folder / "float.keras", "--data", folder / "x.npy", "-o", folder / "ptq.tflite",
        "--layer", "class=w4a8", "--calibration", "minmax", "--target", "tflite_micro",
        "--input-type", "uint8", "--json", "-",
    )  # fmt: skip
    table = json.loads(said.stdout)
    assert table["float_operators"] == 0
    assert table["size_bytes"] == (folder / "ptq.tflite").stat().st_size
    found = json.loads(run("inspect", folder / "ptq.tflite", "--json", "-").stdout)
    assert found["inputs"][0]["dtype"] == "uint8" and found["float_operators"] == 0
    assert len(found["operators"]) == table["operators"] and "arena " in found["arena"]


def test_a_searched_policy_is_one_of_the_other_commands(folder: Path) -> None:
    said = run(
        "search", folder / "float.keras", "--data", folder / "x.npy", "--budget", 0.9,
        "--measure", "mac_bits", "-o", folder / "policy.json", "--json", folder / "search.json",
    )  # fmt: skip
    assert "policy within" in said.stdout and str(folder / "policy.json") in said.stdout
    choices = json.loads((folder / "search.json").read_text())["choices"]
    assert "w4a8" in choices.values() and set(choices) == {"conv", "class"}
    policy = ("--policy", folder / "policy.json")
    plan = json.loads(run("plan", folder / "float.keras", *policy, "--json", "-").stdout)
    bits = {layer["name"]: layer for layer in plan["layers"]}
    four = [name for name, choice in choices.items() if choice == "w4a8"]
    assert all('"bits": 4' in json.dumps(bits[name]) for name in four)


def test_a_missing_kernel_is_no_fault_of_the_file(
    folder: Path, blob: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one runtime lacks it, the code is 0; where all do, nothing was compared: 2."""
    whole = tflite_export.verify

    def lacking(*args: Any, **kwargs: Any) -> Any:
        report = whole(*args, **kwargs)
        part = dataclasses.replace(report.runtimes[0], problem="no MISH", lacks=("MISH",), sites=())
        return dataclasses.replace(report, runtimes=(part, *report.runtimes[1:]))

    monkeypatch.setattr(tflite_export, "verify", lacking)
    files = (folder / "qat.keras", blob, "--data", folder / "x.npy", "--samples", 2)
    run("verify", *files)
    said = run("verify", *files, "--target", "tflite_micro", code=2)
    assert "nothing was compared" in " ".join(said.output.split())


def test_ctrl_c_leaves_no_file_and_has_a_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "save", interrupted)
    before = sorted(folder.iterdir())
    arguments = ("quantize", folder / "float.keras", "--data", folder / "x.npy")
    said = run(*arguments, "-o", folder / "never.keras", code=130)
    assert "Interrupted" in said.output and sorted(folder.iterdir()) == before


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_for_this_command(shell: str) -> None:
    assert "_KQAT_COMPLETE" in run("completion", shell).stdout


def test_a_gap_is_diagnosed(folder: Path, blob: Path) -> None:
    said = run(
        "diagnose", folder / "float.keras", folder / "qat.keras", "--data", folder / "x.npy",
        "--no-remedies", "--html", folder / "d.html", "--json", folder / "d.json",
    )  # fmt: skip
    assert "as SQNR in dB" in said.stdout
    assert json.loads((folder / "d.json").read_text())["remedies"] == []
    assert (folder / "d.html").read_text().startswith("<!doctype html>")


def test_layers_of_ones_own_come_from_code(tmp_path: Path) -> None:
    """Classes that were registered are found as well as those that were not."""
    (tmp_path / "neighbour.py").write_text("FACTOR = 2.0\n")
    code = (
        "import keras, neighbour\n"
        "def twice(x):\n    return neighbour.FACTOR * x\n"
        "class Plain(keras.layers.Layer):\n"
        "    def call(self, x):\n        return twice(x)\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Known(Plain):\n    pass\n"
    )
    (tmp_path / "own.py").write_text(code)
    names: dict[str, Any] = {"__name__": "own"}
    sys.path.insert(0, str(tmp_path))
    try:
        exec(code, names)
    finally:
        sys.path.remove(str(tmp_path))
    own = [names["Plain"](name="plain"), names["Known"](name="known")]
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="d"), *own])
    model.save(tmp_path / "own.keras")
    del keras.saving.get_custom_objects()["mine>Known"]
    plan = ("plan", tmp_path / "own.keras")
    failed = " ".join(run(*plan, code=2).output.split())
    assert "Could not locate" in failed and "as --code FILE" in failed and "{" not in failed
    shown = run(*plan, "--code", tmp_path / "own.py").stdout
    assert "plain" in shown and "known" in shown
    (tmp_path / "changes.py").write_text(f"import sys\nsys.path.insert(0, 'mine')\n{code}")
    before = list(sys.path)
    run(*plan, "--code", tmp_path / "changes.py")
    assert sys.path == ["mine", *before]
    sys.path.remove("mine")
    (tmp_path / "broken.py").write_text("import nosuchmodule\n")
    failed = run(*plan, "--code", tmp_path / "broken.py", code=2).output
    assert "ModuleNotFoundError: No module named 'nosuchmodule'" in " ".join(failed.split())


def test_what_a_diagnosis_advises_is_a_command(folder: Path, blob: Path, tmp_path: Path) -> None:
    assert blob.parent == folder
    qat, x = folder / "qat.keras", folder / "x.npy"
    for option in (("--algorithm", "correct_biases"), ("--calibration", "percentile"), ()):
        run("calibrate", qat, "--data", x, *option, "-o", tmp_path / "mended.keras")
        mended, was = kqat.load_model(tmp_path / "mended.keras"), kqat.load_model(qat)
        pairs = zip(mended.get_weights(), was.get_weights(), strict=True)
        assert any(np.any(a != b) for a, b in pairs) == bool(option)
    both = ("--algorithm", "awq", "--calibration", "mse", "-o", tmp_path / "no.keras")
    assert "Received: both" in run("calibrate", qat, "--data", x, *both, code=2).output
    assert set(cli._ALGORITHMS) == set(kqat.algorithms.__all__)


def test_a_runtime_that_is_not_installed_is_no_fault_of_the_file(
    folder: Path, blob: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "micro" in name else found(name, *a)
    )
    for paths in ((folder / "qat.keras", blob), (blob,)):
        options = ("--data", folder / "x.npy", "--samples", 2) if len(paths) == 2 else ()
        shown = run("verify", *paths, *options, "--html", folder / "n.html").stdout
        assert "tflite_micro: not run. Expected TFLite Micro to be installed." in shown
    assert "tflite_micro did not run" not in (folder / "n.html").read_text()
    assert "arena not measured: TFLite Micro is not installed" in run("inspect", blob).stdout


def test_ctrl_c_while_modules_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "kqat.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "kqat.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        command.run()
    assert end.value.code == 130 and "Interrupted" in capsys.readouterr().err


def test_weights_are_encoded_for_tflite_micro(folder: Path, blob: Path) -> None:
    file, target = folder / "encoded.tflite", ("--target", "tflite_micro")
    encode = ("convert", folder / "qat.keras", "-o", file, "--compress", "smallest")
    assert "only TFLite Micro has the operator" in " ".join(run(*encode, code=2).output.split())
    run(*encode, *target)
    assert file.stat().st_size < blob.stat().st_size
    run("verify", folder / "qat.keras", file, "--data", folder / "x.npy", *target, "--samples", 2)


def test_a_wrong_file_is_told_by_the_exit_code(folder: Path, blob: Path) -> None:
    model = tflite_export.flatbuffer.tree.read(blob.read_bytes())
    for tensor in model.subgraphs[0].tensors:
        if len(tensor.shape) == 2 and tensor.shape[0] == 5:
            tensor.quantization.scale = tensor.quantization.scale * np.float32(1.5)
    (folder / "wrong.tflite").write_bytes(tflite_export.flatbuffer.tree.write(model))
    run("verify", folder / "qat.keras", folder / "wrong.tflite", "--data", folder / "x.npy", code=1)


def test_a_file_of_another_model_is_told_by_the_exit_code(tmp_path: Path) -> None:
    """Its grids are others, so that none of its values can be compared."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((4,)), dense(5, activation="relu"), dense(3)])
    kqat.quantize_model(model, calibration_data=x).save(tmp_path / "qat.keras")
    other = kqat.quantize_model(model, calibration_data=3.0 * x)
    tflite_export.save(tflite_export.convert(other), tmp_path / "other.tflite")
    files = (tmp_path / "qat.keras", tmp_path / "other.tflite")
    assert "not compared" in run("verify", *files, "--data", tmp_path / "x.npy", code=1).stdout


def test_a_file_is_inspected(blob: Path) -> None:
    said = run("inspect", blob, "--target", "cmsis_nn")
    assert narrow(said.stdout)
    for words in ("CONV_2D", "FULLY_CONNECTED", "input 'x': int8 1×8×8×3", "arena "):
        assert words in said.stdout
    assert "cmsis_nn: not on CMSIS-NN, but on the CPU: 1 CAST, 1 GATHER" in said.stdout


@pytest.mark.slow
def test_a_file_becomes_c(folder: Path, blob: Path) -> None:
    said = run("to-c", blob, "-o", folder / "c", "--samples", 1)
    assert "net_main.cc" in said.stdout and "arena" in said.stdout
    assert len(list((folder / "c").iterdir())) == 7
    run("to-c", blob, "-o", folder / "project", "--samples", 1, "--layout", "cmake")
    sizes = {}
    for samples in (1, 3):
        out = folder / f"golden{samples}"
        run("to-c", blob, "-o", out, "--samples", samples, "--data", folder / "x.npy")
        (golden,) = out.glob("*_golden.cc")
        sizes[samples] = len(re.findall(r"-?\d+,", golden.read_text()))
    assert 2.5 < sizes[3] / sizes[1] < 3.5
    assert (folder / "project" / "CMakeLists.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["plan", "text.keras"], "Expected a Keras model. Received: 'text.keras', text."),
        (["plan", "cut.keras"], "which is damaged: File is not a zip file. Copy it again"),
        (["plan", "x.npz"], "Received: 'x.npz', an archive of NumPy arrays"),
        (["plan", "."], "Expected a file, or the folder of a SavedModel. Received: '.', a folder"),
        (["plan", "float.keras", "--layer", "cnov=float"], "none. Did you mean 'conv'? They are"),
        (["plan", "float.keras", "--input-shape", "a,b"], "Expected --input-shape as 96,96,3"),
        (["plan", "float.keras", "--target", "nope"], "'nope' is not one of 'cmsis_nn'"),
        (
            [
                "search",
                "float.keras",
                "--data",
                "x.npy",
                "--budget",
                "1",
                "-o",
                "p.json",
                "--choice",
                "int3",
            ],
            "Expected --choice to be one of int8, int16x8",
        ),
        (["plan", "float.keras", "--code", "absent.py"], "does not exist"),
        (["ptq", "float.keras", "--data", "text.keras", "-o", "a.tflite"], "'text.keras', text"),
        (["ptq", "float.keras", "--data", "xy.npz", "-o", "a.tflite"], "np.savez('inputs.npz', x="),
        (["ptq", "float.keras", "--data", "x.npy", "-o", "no/a.tflite"], "'no', which is none"),
        (["ptq", "float.keras", "--data", "x.npy", "-o", "x.npy"], "the file that is read"),
        (["ptq", "float.keras", "--data", "x.npy", "-o", "-"], "a file that is called '-' is ./-"),
        (["ptq", "float.keras", "--data", "x.npy", "-o", ""], "Expected the name of a file"),
        (["convert", "float.keras", "-o", "a.keras"], "Received: a.keras, a name of Keras models"),
        (["plan", "float.keras", "--code", "ends.py"], "ends the process (3), as one that"),
        (["plan", "no_weights.keras"], "which is damaged: it holds no weights. Copy it again"),
        (["plan", "cut_config.keras"], "which is damaged: 'config.json' in it is no JSON"),
        (["inspect", "float.keras"], "a Keras model. `kqat plan float.keras` shows it"),
        (["to-c", "net.tflite", "folder"], "Expected the directory as -o folder"),
        (["plam", "float.keras"], "No such command 'plam'. Did you mean plan"),
        (["plan", "float.keras", "--policy", "none.json"], "no such file"),
        (
            ["plan", "float.keras", "--policy", "int4"],
            "int8, int16x8, w4a8, w3a8, w2a8, ternary, "
            "binary, float or a .json file. Received: 'int4'. Did you mean 'int8'?",
        ),
        (["plan", "float.keras", "--policy", "bad.json"], "In 'bad.json': Expected the JSON"),
        (["plan", "float.keras", "--layer", "conv"], "Expected --layer PATTERN=PRESET"),
        (["convert", "float.keras", "-o", "a.tflite"], "which is float. Use `kqat quantize` first"),
        (["quantize", "float.keras", "--data", "objects.npy", "-o", "q.keras"], "of Python obj"),
        (["quantize", "float.keras", "--data", "x.npy", "-o", "q.h5"], "ends in .keras"),
        (["inspect", "x.npy"], "Expected a TFLite file"),
        (["inspect", "absent.tflite"], "does not exist"),
        (["to-c", "x.npy", "-o", "c"], "Expected a TFLite file"),
        (["verify", "float.keras", "x.npy"], "Expected --data"),
        (["verify", "float.keras"], "a TFLite file. Received: 'float.keras', a Keras model"),
        (["plan", "net.tflite"], "a TFLite file. `kqat inspect net.tflite` shows"),
        (["convert", "net.tflite", "-o", "a.tflite"], "Expected a Keras model"),
        (["verify", "x.npy", "x.npy", "x.npy"], "Expected one .tflite"),
    ],
)
def test_errors_are_one_message(
    folder: Path, blob: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], match: str
) -> None:
    assert blob.parent == folder
    monkeypatch.chdir(folder)
    said = run(*arguments, code=2)
    assert match in " ".join(said.output.split())
    assert narrow(said.output)
    assert not Path("a.tflite").exists() and not Path("q.keras").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--policy", "int16x8", "--input-type", "int8"], "width that the plan gives it, int16"),
        (["--layer", "class=float", "--output-type", "int8"], "Use --output-type='float32'"),
        (["--target", "edge_tpu", "--input-type", "float32"], "a batch of 1 and int8 or uint8"),
        (["--target", "tflite_micro", "--policy", "int16x8"], "layer 'peak' needs REDUCE_MAX"),
    ],
)
def test_ptq_refuses_before_it_calibrates_what_convert_would_refuse(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], match: str
) -> None:
    monkeypatch.setattr("kqat.api.calibrate_for", lambda *_, **__: pytest.fail("it calibrated"))
    model, data = folder / "float.keras", folder / "x.npy"
    if "peak" in match:
        model, x = folder / "peak.keras", keras.Input((8, 8, 3), name="x")
        keras.Model(x, L.GlobalMaxPooling2D(name="peak")(L.Conv2D(2, 1)(x))).save(model)
    said = run("ptq", model, "--data", data, "-o", folder / "a.tflite", *options, code=2)
    assert match in " ".join(said.output.split())


def test_a_folder_that_may_not_be_written_is_told_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.os, "access", lambda _, mode: mode != os.W_OK)
    said = run("ptq", folder / "float.keras", "--data", folder / "x.npy", "-o", "a.tflite", code=2)
    assert "which is read-only for you" in " ".join(said.output.split())


def test_a_reader_that_has_enough_is_no_error(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `kqat inspect FILE | head -1`."""

    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.terminal, "say", closed)
    monkeypatch.setattr(cli, "say", closed)
    assert run("inspect", blob, code=141).output == ""


def test_a_fault_of_ours_is_called_one(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(content: bytes) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(tflite_export, "inspect", broken)
    said = run("inspect", blob, code=2)
    assert "ZeroDivisionError: oh (unexpected" in " ".join(said.output.split())
    result = CliRunner().invoke(main, ["--debug", "inspect", str(blob)])
    assert isinstance(result.exception, ZeroDivisionError)


def test_it_says_what_it_is() -> None:
    assert run("--version").output == f"kqat, version {kqat.__version__}\n"
    shown = run("--help").output
    assert narrow(shown) and "..." not in shown.partition("Commands:")[2]
    for name in main.commands:
        assert narrow(run(name, "--help").output), name
