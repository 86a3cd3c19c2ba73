"""What every test starts from: a quiet TensorFlow, the same seed, float32, and the shared data."""

import os
from collections.abc import Iterator
from pathlib import Path

# Both are read once, when TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import hypothesis
import keras
import pytest

from recipes import data
from tests.newer_keras import skip_if_missing

# The first call of a function pays for TensorFlow's tracing, which hypothesis would call too slow;
# the same examples each time keep a failure in CI a failure here.
hypothesis.settings.register_profile("kqat", deadline=None, derandomize=True)
hypothesis.settings.load_profile("kqat")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Seeds Python, NumPy and Keras, and undoes what an earlier test did to Keras's settings."""
    # Without freeing memory, which takes longer than most tests.
    keras.utils.clear_session(free_memory=False)
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)


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
