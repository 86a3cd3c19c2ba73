"""Installs the wheel into a clean environment and takes three networks the whole road there.

    python -m benchmarks.versions [--packages newest|between|oldest|nightly] [--wheel FILE]
    python -m benchmarks.versions --packages oldest --list

Builds the wheel unless one is given, makes a virtual environment of the Python that runs this,
installs the wheel with the packages of the choice, checks that it brings `kqat` and `tflite_export`
and no other package, and runs `smoke.py` and `kqat --help` from a folder that holds nothing else.
docs/versions.md lists what was run. `--list` prints, for pip, what is installed beside kqat.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What is installed beside the wheel, for each choice.
PACKAGES: dict[str, tuple[str, ...]] = {
    "newest": (),
    "between": ("tensorflow==2.19.*", "keras==3.12.*"),
    "nightly": ("tf-nightly", "keras-nightly"),
}


def oldest() -> tuple[str, ...]:
    """TensorFlow, Keras and NumPy at the lower bounds of setup.py, as `package==version.*`."""
    found = dict(
        re.findall(r'"(tensorflow|keras|numpy)>=([\d.]+)"', (ROOT / "setup.py").read_text())
    )
    return tuple(f"{name}=={version}.*" for name, version in found.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", choices=[*PACKAGES, "oldest"], default="newest")
    parser.add_argument("--wheel", type=Path, help="built already; by default it is built")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument("--list", action="store_true", help="print the packages for pip, and end")
    given = parser.parse_args(argv)
    wanted = oldest() if given.packages == "oldest" else PACKAGES[given.packages]
    if given.list:
        print(*wanted)
        return 0
    shutil.rmtree(given.folder, ignore_errors=True)
    elsewhere = given.folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    wheel = (given.wheel or built(given.folder)).resolve()
    check_contents(wheel)
    venv.create(given.folder / "env", with_pip=True)
    python = given.folder / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", *wanted]
    if given.packages == "nightly":
        # They stand for the released packages that the wheel asks for by other names.
        run([*install, "scipy", "jinja2", "click", "rich", "flatbuffers", "ai-edge-litert"])
        run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel])
    else:
        run([*install, wheel])
    shutil.copy(ROOT / "benchmarks" / "smoke.py", elsewhere)
    run([python.parent / "kqat", "--help"], elsewhere)
    run([python, "smoke.py"], elsewhere)
    return 0


def built(folder: Path) -> Path:
    """A wheel of this checkout."""
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT])
    return next(folder.glob("kqat-*.whl"))


def check_contents(wheel: Path) -> None:
    """Checks that a wheel installs our two packages and nothing else at the top."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if top != {"kqat", "tflite_export"}:
        raise SystemExit(f"Expected the packages kqat and tflite_export. Received: {sorted(top)}.")
    missing = {f"{p}/{n}" for p in top for n in ("__init__.pyi", "py.typed")} - {*names}
    if missing:
        raise SystemExit(f"Expected {sorted(missing)} in the wheel. Received: a wheel without.")


def run(command: Sequence[str | Path], folder: Path | None = None) -> None:
    """Runs a program and ends this one if it fails.

    A checkout on PYTHONPATH would be taken for the installed package, by pip too.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=clean, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
