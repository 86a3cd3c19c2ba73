"""What every test starts from: a quiet TensorFlow, the same seed, float32, and the shared data."""

import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Both are read once, when TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import hypothesis
import keras
import numpy as np
import pytest

from recipes import data
from tests.newer_keras import skip_if_missing

# The first call of a function pays for TensorFlow's tracing, which hypothesis would call too slow;
# the same examples each time keep a failure in CI a failure here.
hypothesis.settings.register_profile("kqat", deadline=None, derandomize=True)
hypothesis.settings.load_profile("kqat")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds Python, NumPy and Keras, and undoes what a test does to Keras's settings."""
    # Without freeing memory, which takes longer than most tests.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    for generator, state in _generators_of_modules():
        generator.bit_generator.state = state
    yield
    # Behind the test: the fixtures of the next module are made before its first test starts.
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def pytest_collection_finish() -> None:
    """What stays until the end is not looked through each time that Python collects garbage."""
    gc.collect()
    gc.freeze()


@functools.cache
def _generators_of_modules() -> list[tuple[np.random.Generator, dict[str, Any]]]:
    """The generators that test modules share between their tests, as they were after collection.

    What a test draws must not depend on which tests ran before it in the same process.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("tests.")]
    values = [value for module in modules for value in vars(module).values()]
    generators = {id(v): v for v in values if isinstance(v, np.random.Generator)}
    return [(g, dict(g.bit_generator.state)) for g in generators.values()]


@pytest.fixture(autouse=True)
def _children_use_keras_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes what tfmot leaves to child processes when a test module imports it, and a test too.

    With it, `tf.keras` is tf_keras in every process that a test starts.
    """
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")  # Undone after the test, whoever sets it.
    monkeypatch.delenv("TF_USE_LEGACY_KERAS")


@pytest.fixture
def shared() -> Path:
    """The folder of shared data and models; skips the test where it is not on this machine."""
    if not data.available():
        pytest.skip(f"no data/ and models/ in {data.root()}; KQAT_DATA names another folder")
    return data.root()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skips a test that uses what only a newer Keras has."""
    try:
        return (yield)
    except Exception as error:
        skip_if_missing(error)
        raise


# The same where its fixtures use it.
pytest_runtest_setup = pytest_runtest_call
