"""Every recipe takes the same options."""

import importlib
from pathlib import Path

import pytest

import recipes

SHARED = ("--out", "--seed", "--smoke")
# Recipe -> what it has no use for: digits come with scikit-learn, and fidelity trains nothing.
WITHOUT = {
    "digits": ("--data",),
    "fidelity": ("--epochs",),
    "kws_fsdd": (),
    "mlperf_tiny_ic": (),
    "mobilenetv2_cifar10": (),
}


def test_every_recipe_is_looked_at() -> None:
    folder = Path(recipes.__file__).parent
    found = {p.stem for p in folder.glob("*.py") if "running.parser(" in p.read_text()}
    assert found == set(WITHOUT)


@pytest.mark.parametrize("recipe", WITHOUT)
def test_options(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"recipes.{recipe}").main(["--help"])
    usage = capsys.readouterr().out
    for option in (*SHARED, "--data", "--epochs"):
        assert (f"[{option}" in usage) == (option not in WITHOUT[recipe]), option
