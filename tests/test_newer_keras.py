"""A test is skipped for what its Keras lacks only where the test itself asks for it."""

from collections.abc import Callable

import keras
import pytest
from keras import layers, ops

from kqat.graph import keras_internals
from tests.newer_keras import NEWER, missing


@pytest.fixture
def _old_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras, "__version__", "3.10.0")
    monkeypatch.delattr(layers, "RMSNormalization", raising=False)
    monkeypatch.delattr(ops, "depth_to_space", raising=False)
    monkeypatch.delattr(ops, "relu", raising=False)


def _found(function: Callable[[], object]) -> str | None:
    with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError)) as caught:
        function()
    return missing(caught.value)


def _wrapped() -> None:
    try:
        ops.depth_to_space(None, 2)
    except AttributeError as error:
        raise RuntimeError("as kqat wraps what a user's call raises") from error


@pytest.mark.usefixtures("_old_keras")
def test_what_a_newer_keras_brought_is_named() -> None:
    assert _found(lambda: ops.depth_to_space(None, 2)) == "depth_to_space"
    assert _found(_wrapped) == "depth_to_space"


def test_an_option_of_a_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Keras itself refuses it, for the test: of a layer or in a signature."""
    monkeypatch.setattr(keras, "__version__", "3.10.0")
    monkeypatch.setitem(NEWER, "no_such_option", "3.99")

    def call(known: int) -> None: ...

    options = {"no_such_option": 1}
    assert _found(lambda: layers.Dense(1, **options)) == "no_such_option"
    assert _found(lambda: call(1, **options)) == "no_such_option"


@pytest.mark.usefixtures("_old_keras")
def test_other_faults_stay_faults() -> None:
    # An old name, a name misspelt, a name that this version has (3.9), and one that kqat asks for.
    assert _found(lambda: ops.relu(None)) is None
    assert _found(lambda: layers.Desne(3)) is None
    assert _found(lambda: layers.RMSNormalization()) is None
    assert _found(lambda: keras_internals._blocks("no_such_name", None, 2)) is None


def test_a_keras_that_has_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras, "__version__", "3.15.1")
    monkeypatch.delattr(ops, "depth_to_space", raising=False)
    assert _found(lambda: ops.depth_to_space(None, 2)) is None
