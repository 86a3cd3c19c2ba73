"""The rules of DESIGN.md that no linter knows: import order, public names, sizes, module names."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kqat", "tflite_export", "recipes", "benchmarks", "docs", "tests")

# Lowest room first. A room may import those before it; a new room takes its place here.
ROOMS = {
    "kqat": (
        "errors", "saving", "targets", "edge_tpu", "spec", "numerics", "batchnorm", "quantizers",
        "config", "primitives", "elementwise", "marking", "lstm", "recurrence", "decompositions",
        "encoding",
        "masks", "products", "attention", "normalization", "sequences", "recurrent", "refusals",
        "rules", "fusing", "registry", "operands", "reducing", "rearranging", "networks",
        "operations", "opening", "tracing", "expanding", "reporting", "assigning", "weight_grids",
        "crossing", "joining", "planning", "layers", "looping", "wrapping", "calibration",
        "schedule", "folding", "freezing", "algorithms", "interop", "fitting", "api", "annotating",
        "__init__", "cli",
    ),
    "tflite_export": (
        "checking", "children", "sharing", "flatbuffer", "op_table", "inspection", "lowering",
        "markers", "packing", "interpolation", "lookup", "lstm_kernel", "fused_lstm", "naming",
        "clamps", "flattening", "pointwise", "quantizing", "halves", "huffman", "codec",
        "compression", "feeding", "runtimes", "vela", "page", "report", "foreign", "profiling",
        "edge_tpu", "targets", "verification", "exporting", "c_source", "__init__",
    ),
}  # fmt: skip
# Who may import a package of ours, by folder or file.
IMPORTERS = {
    "kqat": FOLDERS,
    "tflite_export": ("kqat/cli.py", "tflite_export", "recipes", "benchmarks", "docs", "tests"),
    "recipes": ("recipes", "benchmarks", "tests"),
    "benchmarks": ("benchmarks", "tests"),
    "docs": ("docs", "tests"),
    "tests": ("tests",),
}
KERAS_INSIDE = ("keras.src", "tensorflow.python")
# The rooms that know Keras's internals, and the file that names what it forbids.
MAY_NAME_KERAS_INSIDE = ("kqat/opening.py", "kqat/tracing.py", "tests/test_structure.py")
MAX_FILE_LINES = 400
MAX_BODY_LINES = 60


def sources(*folders: str) -> dict[str, ast.Module]:
    """Every Python file below the folders, parsed, by its path below the repository's root."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def imported(tree: ast.Module) -> Iterator[str]:
    """Each module of ours that is imported, wherever: `kqat.spec` for `from kqat import spec`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in FOLDERS:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in FOLDERS)


def room(module: str) -> str:
    """The room of a path without suffix or of a module: quantizers for `kqat.quantizers.minmax`."""
    parts = module.replace("/", ".").split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_its_place(package: str) -> None:
    rooms = {room(path.removesuffix(".py")) for path in sources(package)}
    assert rooms - set(ROOMS[package]) == set()


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downwards(package: str) -> None:
    place = {name: index for index, name in enumerate(ROOMS[package])}
    upwards = [
        f"{path} imports {module}"
        for path, tree in sources(package).items()
        for module in imported(tree)
        if module.split(".")[0] == package
        and (own := room(path.removesuffix(".py"))) != (other := room(module))
        # A name that is no room comes from the package itself, which lies above its rooms.
        and place.get(own, 0) <= place.get(other, place["__init__"])
    ]
    assert upwards == []


def test_packages_are_imported_only_by_those_above_them() -> None:
    wrong = [
        f"{path} imports {module}"
        for path, tree in sources(*FOLDERS).items()
        for module in imported(tree)
        if not {path, path.split("/")[0]} & set(IMPORTERS[module.split(".")[0]])
    ]
    assert wrong == []


def test_keras_internals_stay_in_tracing() -> None:
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
        for path, tree in sources("kqat", "tflite_export", "recipes").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and ast.unparse(node.value) not in ("self", "cls", "super()")
        and path not in MAY_NAME_KERAS_INSIDE
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ROOMS)
def test_all_lists_the_public_names(package: str) -> None:
    module = face(package)
    public = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not (inspect.ismodule(value) and value.__name__.startswith(f"{package}."))
    ]
    assert sorted(module.__all__) == sorted(public)


@pytest.mark.parametrize("package", ROOMS)
def test_public_objects_have_docstrings(package: str) -> None:
    module = face(package)
    public = {name: getattr(module, name) for name in module.__all__}
    bare = [
        name
        for name, value in public.items()
        if isinstance(value, type | FunctionType)
        # Python itself describes a dataclass without a docstring: by its signature.
        and (value.__doc__ or f"{name}(").startswith(f"{name}(")
    ]
    assert module.__doc__
    assert bare == []


def test_no_file_is_long() -> None:
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in sources(*FOLDERS)}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_long() -> None:
    lines = {
        f"{path}:{node.name}": body_lines(node)
        for path, tree in sources(*FOLDERS).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: count for name, count in lines.items() if count > MAX_BODY_LINES} == {}


def test_module_names_say_what_is_inside() -> None:
    empty = {"utils", "common", "helpers"}
    assert [path for path in sources(*FOLDERS) if empty & {*Path(path).with_suffix("").parts}] == []


def face(package: str) -> ModuleType:
    """The package as its users import it."""
    path = ROOT / package / "__init__.py"
    if not path.exists() or not path.read_text():
        pytest.skip(f"{package}/__init__.py is not written yet")
    return importlib.import_module(package)


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, from its first statement after the docstring."""
    statements = node.body[1:] if ast.get_docstring(node) else node.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0
