"""Every recipe takes the same options."""

import importlib
from pathlib import Path

import pytest

import recipes

RECIPES = sorted(
    path.stem
    for path in Path(recipes.__file__).parent.glob("*.py")
    if "running.parser(" in path.read_text()
)
OPTIONS = ("--out", "--seed", "--smoke", "--data", "--epochs")
# What a recipe has no use for: digits come with scikit-learn, three recipes train nothing.
WITHOUT = {
    "digits": ("--data",),
    "fidelity": ("--epochs",),
    "npu": ("--epochs",),
    "search": ("--epochs",),
}


def test_the_recipes_are_found() -> None:
    assert {"digits", "fidelity", "mobilenetv2_cifar10"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_options(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"recipes.{recipe}").main(["--help"])
    usage = capsys.readouterr().out
    for option in OPTIONS:
        assert (f"[{option}" in usage) == (option not in WITHOUT.get(recipe, ())), option
