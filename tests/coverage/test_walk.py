"""Every public layer and function of Keras is in a table: how it ships, or why it cannot.

A new release of Keras that brings a new one fails here, until somebody decides about it.
"""

import inspect
from typing import Any

import keras
import numpy as np
import pytest

from docs import coverage
from kqat.registry.layer_table import AUGMENTING, LAYERS
from kqat.registry.operation_table import OPERATIONS
from kqat.registry.refusals import LAYER_REASONS, OPERATION_REASONS
from tests.newer_keras import needs_keras


@pytest.fixture
def _newest_keras() -> None:
    needs_keras("3.15", "what the tables are complete for")


# Functions that are another function's second name, or whose operation bears another.
SAME = {
    "abs": "Absolute",
    "extract_patches_3d": "ExtractPatches",
    "fft2": "FFT2",
    "hard_swish": "HardSilu",
    "rgb_to_grayscale": "RGBToGrayscale",
    "swish": "Silu",
}
# `Activation` has a table of its own.
BESIDE = {"Activation"}


def _public(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _operation(function: str) -> str:
    camel = "".join(part.capitalize() for part in function.split("_"))
    return SAME.get(function, camel)


@pytest.mark.usefixtures("_newest_keras")
def test_every_layer_has_a_row_or_a_reason() -> None:
    classes = {value.__name__ for value in _public(keras.layers).values() if inspect.isclass(value)}
    rows = {cls.__name__ for cls in LAYERS} | BESIDE
    assert classes - rows - set(LAYER_REASONS) == set()
    assert rows & set(LAYER_REASONS) == set()
    assert set(LAYER_REASONS) - classes == set()


@pytest.mark.usefixtures("_newest_keras")
def test_every_function_has_a_row_or_a_reason() -> None:
    both = {**_public(keras.ops.image), **_public(keras.ops)}
    functions = {name for name, value in both.items() if inspect.isfunction(value)}
    rows = {name for name in functions if _operation(name) in OPERATIONS}
    assert functions - rows - set(OPERATION_REASONS) == set()
    assert rows & set(OPERATION_REASONS) == set()
    assert set(OPERATION_REASONS) - functions == set()


@pytest.mark.usefixtures("_newest_keras")
def test_every_row_is_a_function_of_keras() -> None:
    known = {_operation(name) for name in (*dir(keras.ops), *dir(keras.ops.image))}
    # What the function `relu` is in a layer ReLU with options.
    assert set(OPERATIONS) - known == {"ReLU"}


@pytest.mark.parametrize("table", [LAYER_REASONS, OPERATION_REASONS])
def test_a_reason_ends_a_sentence_about_it(table: dict[str, str]) -> None:
    assert all(text and not text.endswith(".") and text[0].islower() for text in table.values())


@pytest.mark.usefixtures("_newest_keras")
def test_the_document_is_what_the_tables_say() -> None:
    """Where it is not: `python -m docs.coverage`."""
    assert coverage.PATH.read_text() == coverage.text()


FACTORS = {
    **dict.fromkeys(
        (
            "RandomBrightness RandomColorDegeneration RandomContrast RandomHue RandomRotation "
            "RandomSaturation RandomSharpness RandomZoom"
        ).split(),
        (0.1,),
    ),
    "RandomPosterization": (4,),
    "RandomTranslation": (0.1, 0.1),
}


@pytest.mark.parametrize("layer", AUGMENTING)
def test_augmentation_vanishes_in_inference(layer: type) -> None:
    x = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 3)).astype(np.float32)
    made = layer(*FACTORS.get(layer.__name__, ()))
    np.testing.assert_array_equal(made(x, training=False), x)
