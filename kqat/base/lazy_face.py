"""`lazy_face`: the public names of a package, each imported when it is first used (PEP 562)."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# Where a package keeps the functions that wait for its next sub-package.
_WAITING = "_waiting_for_subpackage"


class _Face(ModuleType):
    """A package whose public names are not hidden by sub-packages of the same names.

    `tflite_export.integer_model` is a function, and the sub-package that holds it: Python would
    bind the latter to the name whenever something imports from it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__all__):
            super().__setattr__(name, value)
        if isinstance(value, ModuleType):
            for function in vars(self).pop(_WAITING, ()):
                function()


def call_when_bound(package: str, function: Callable[[], None]) -> None:
    """Calls a function when the next sub-package has been imported, and so bound to its name."""
    vars(sys.modules[package]).setdefault(_WAITING, []).append(function)


def lazy_face(
    package: str, file: str
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """What a package assigns to `__all__`, `__getattr__` and `__dir__`.

    Args:
        package: its name.
        file: its `__init__.py`. The stub `__init__.pyi` beside it says which module has which name,
            in lines `from module import name`.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    module = sys.modules[package]
    module.__class__ = _Face

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, original = homes[name]
        value = getattr(importlib.import_module(str(home)), original)
        vars(module)[name] = value
        return value

    return sorted(homes), get, lambda: sorted({*vars(module), *homes})
