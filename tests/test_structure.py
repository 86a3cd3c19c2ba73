"""Where code may live: import order, faces of sub-packages, Keras's internals, public names."""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

from docs import rooms

ROOT = Path(__file__).parents[1]
FOLDERS = ("kqat", "tflite_export", "recipes", "benchmarks", "docs", "tests")

# Lowest first: a sub-package imports those before it only, and from each through its face.
SUBPACKAGES = {
    "kqat": (
        "base", "grids", "kernels", "devices", "graph", "config", "parts", "rewrites", "registry",
        "planning", "tfmot", "training", "freezing", "analysis",
    ),
    "tflite_export": (
        "kernels", "flatbuffer", "runtimes", "integer_model", "lowering", "integer_pass",
        "weight_storage", "devices", "verification", "firmware",
    ),
}  # fmt: skip
# The modules of a package that stand above its sub-packages, lowest first.
TOP = {
    "kqat": (
        "api", "annotate", "old_operations", "old_files", "device_model", "policy_search",
        "__init__", "terminal", "input_files", "cli", "__main__",
    ),
    "tflite_export": ("exporter", "__init__"),
}  # fmt: skip
# What of kqat the exporter may see: the seam.
SEAM = ("base", "devices", "freezing", "grids", "kernels")
# Who may import a package of ours, by folder or file.
IMPORTERS = {
    "kqat": FOLDERS,
    "tflite_export": (
        "kqat/cli.py", "kqat/device_model.py", "kqat/policy_search.py", "tflite_export", "recipes",
        "benchmarks", "docs", "tests",
    ),
    "recipes": ("recipes", "benchmarks", "tests"),
    "benchmarks": ("benchmarks", "tests"),
    "docs": ("docs", "tests"),
    "tests": ("tests", "benchmarks/fingerprints.py"),
}  # fmt: skip
KERAS_INSIDE = ("keras.src", "tensorflow.python")
# The one file that knows Keras's internals, and the file that names what it forbids.
MAY_NAME_KERAS_INSIDE = ("kqat/graph/keras_internals.py", "tests/test_structure.py")


def sources(*folders: str) -> list[str]:
    """The path below the repository's root of every Python file below the folders."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path.relative_to(ROOT).as_posix() for path in paths]


# The names alone are kept: the trees of all files together would take too much memory.
@functools.cache
def imported(path: str) -> tuple[str, ...]:
    """Each module or name of ours that a file imports, wherever: `kqat.grids.QuantSpec`."""
    found: list[str] = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(name for name in found if name.split(".")[0] in FOLDERS)


def imports_within(package: str) -> Iterator[tuple[str, str, str]]:
    """File, its place and the imported name, for each import of `package` from inside itself.

    A place is the sub-package, or the module where a file stands above all of them.
    """
    for path in sources(package):
        own = place(package, path.removesuffix(".py").replace("/", "."))
        for name in imported(path):
            if name.split(".")[0] == package:
                yield path, own, name


def place(package: str, module: str) -> str:
    """`grids` for `kqat.grids.spec`, `api` for `kqat.api`, `__init__` for `kqat` or its names."""
    second = (*module.split("."), "__init__")[1]
    return second if second in (*SUBPACKAGES[package], *TOP[package]) else "__init__"


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_every_module_has_its_place(package: str) -> None:
    found = {Path(path).parts[1].removesuffix(".py") for path in sources(package)}
    assert found == {*SUBPACKAGES[package], *TOP[package]}


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_imports_run_downwards(package: str) -> None:
    order = (*SUBPACKAGES[package], *TOP[package])
    upwards = [
        f"{path} imports {name}"
        for path, own, name in imports_within(package)
        if order.index(own) < order.index(place(package, name))
    ]
    assert upwards == []


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_subpackages_import_one_another_through_faces(package: str) -> None:
    around = [
        f"{path} imports {name}"
        for path, own, name in imports_within(package)
        if (other := place(package, name)) in SUBPACKAGES[package]
        and other != own
        and not is_of_face(package, other, name)
    ]
    assert around == []


def is_of_face(package: str, subpackage: str, name: str) -> bool:
    """Whether `name` is a sub-package or listed in its `__all__`."""
    face = importlib.import_module(f"{package}.{subpackage}")
    parts = name.split(".")[2:]
    return not parts or (len(parts) == 1 and parts[0] in face.__all__)


def test_the_exporter_sees_the_seam_only() -> None:
    beyond = [
        f"{path} imports {name}"
        for path in sources("tflite_export")
        for name in imported(path)
        if name.split(".")[0] == "kqat"
        and not (
            (subpackage := place("kqat", name)) in SEAM and is_of_face("kqat", subpackage, name)
        )
    ]
    assert beyond == []


def test_packages_are_imported_only_by_those_above_them() -> None:
    wrong = [
        f"{path} imports {module}"
        for path in sources(*FOLDERS)
        for module in imported(path)
        if not {path, path.split("/")[0]} & set(IMPORTERS[module.split(".")[0]])
    ]
    assert wrong == []


def test_keras_internals_stay_in_one_file() -> None:
    wrong = [
        f"{path} names {inside}"
        for path in sources(*FOLDERS)
        for inside in KERAS_INSIDE
        if inside in (ROOT / path).read_text() and path not in MAY_NAME_KERAS_INSIDE
    ]
    assert wrong == []


def test_private_attributes_are_read_by_their_owner_only() -> None:
    wrong = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in sources("kqat", "tflite_export", "recipes")
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and ast.unparse(node.value) not in ("self", "cls", "super()")
        and path not in MAY_NAME_KERAS_INSIDE
    ]
    assert wrong == []


FACES = [
    *SUBPACKAGES,
    *(f"{package}.{name}" for package, names in SUBPACKAGES.items() for name in names),
]


@pytest.mark.parametrize("package", FACES)
def test_a_face_says_what_it_is_for_and_lists_its_names(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    if package in SUBPACKAGES:
        return  # Its names are in its stub: the test below.
    public = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not (inspect.ismodule(value) and value.__name__.startswith(f"{package}."))
    ]
    # A face may also show a whole module of the sub-package.
    shown = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    assert sorted(shown) == sorted(public)


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_the_stub_of_a_lazy_face_is_true(package: str) -> None:
    """Each name that type checkers see is there at run time, from a face, and no other is."""
    module = importlib.import_module(package)
    stub = ast.parse((ROOT / package / "__init__.pyi").read_text())
    listed = next(
        ast.literal_eval(node.value)
        for node in stub.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert sorted(listed) == module.__all__ and set(listed) <= {*dir(module)}
    for name in listed:
        assert getattr(module, name) is not None
    around = [
        name
        for name in imported(f"{package}/__init__.pyi")
        if name.split(".")[0] == package
        and (subpackage := place(package, name)) in SUBPACKAGES[package]
        and not is_of_face(package, subpackage, name)
    ]
    assert around == []


@pytest.mark.parametrize("package", SUBPACKAGES)
def test_public_objects_have_docstrings(package: str) -> None:
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    bare = [
        name
        for name, value in public.items()
        if isinstance(value, type | FunctionType)
        # Python itself describes a dataclass without a docstring: by its signature.
        and (value.__doc__ or f"{name}(").startswith(f"{name}(")
    ]
    assert bare == []


def test_module_names_say_what_is_inside() -> None:
    empty = {"utils", "common", "helpers"}
    assert [path for path in sources(*FOLDERS) if empty & {*Path(path).with_suffix("").parts}] == []


def test_the_listing_of_modules_is_up_to_date() -> None:
    assert rooms.PAGE.read_text() == rooms.with_listing(rooms.PAGE.read_text())
