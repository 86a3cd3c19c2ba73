"""`register_with_keras`: lets Keras load saved QAT models, without importing Keras for it.

`keras.saving.load_model` finds a class by its registered name, so the modules that register classes
must have been imported. They import Keras, which takes seconds; so they are imported when it is.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from kqat.base.lazy_face import call_when_bound


def register_with_keras(package: str, modules: Sequence[str]) -> None:
    """Imports `modules` of `package` now if Keras is loaded, or else right after it is."""
    if "keras" in sys.modules and not _begun("keras"):
        _import(modules)
    else:
        sys.meta_path.insert(0, _AfterKeras(package, modules))


class _AfterKeras:
    """Sees to it that the modules are imported once Keras is."""

    def __init__(self, package: str, modules: Sequence[str]) -> None:
        self._package = package
        self._modules = modules
        self._looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Python calls it for each module that is not loaded yet; `None` leaves it to others."""
        if name != "keras" or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        # A new one each time, so that it may be changed.
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._register()

            loader.exec_module = execute_and_register
        return spec

    def _register(self) -> None:
        """Imports the modules; later, if it is a module of the package that imported Keras."""
        inside = f"{self._package}."
        if any(name.startswith(inside) and _begun(name) for name in [*sys.modules]):
            call_when_bound(self._package, self._register)
        else:
            _import(self._modules)


def _begun(name: str) -> bool:
    """Whether a module's code is running: it has begun to be imported, and has not ended."""
    return bool(getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False))


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
