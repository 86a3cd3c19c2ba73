"""The transformer with planted outliers computes what it did, and methods are compared on both."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from recipes import outliers, running
from recipes.models import text_transformer, transformers


def test_planted_channels_are_larger_and_change_nothing() -> None:
    keras.utils.set_random_seed(0)
    model = text_transformer(8, 50, 3)
    twin = outliers.planted(model)
    x = np.random.default_rng(0).integers(0, 50, (16, 8), dtype=np.int32)
    # Measured: 137 dB, the rounding of floats; below 80 something else is computed.
    assert running.sqnr_db(running.keras_outputs(model, x), running.keras_outputs(twin, x)) > 80
    inside = [
        np.asarray(keras.Model(m.input, m.get_layer("block2_norm1").output)(x))
        for m in (model, twin)
    ]
    ratio = np.abs(inside[1]).max(axis=(0, 1)) / np.abs(inside[0]).max(axis=(0, 1))
    np.testing.assert_allclose(ratio[list(outliers.CHANNELS)], outliers.FACTOR, rtol=1e-3)
    np.testing.assert_allclose(np.delete(ratio, outliers.CHANNELS), 1.0, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.long
def test_both_networks_have_a_row_for_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "BLOCKS", 1)  # Every method searches each block.
    results = outliers.main(["--smoke", "--out", str(tmp_path), "--policies", "w4a8"])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for table in outliers.tables(results):
        assert [row[0] for row in table.rows] == list(outliers.METHODS)
