"""Histograms over grids: what is counted, for every grid, and what is refused by name."""

import io
import sys
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import kqat
from kqat.analysis.grid_use import GridCounts, RoundedTensor, counts_of_weight, rounded_tensors
from kqat.graph import trace

matplotlib = pytest.importorskip("matplotlib")
POLICY = {
    "four": "w4a8",
    "three": "ternary",
    "two": "binary",
    "wide": "int16x8",
    "learned": kqat.QuantizeConfig(
        weight_step=kqat.LearnedStep(), activation_range=kqat.LearnedRange()
    ),
    "cut": kqat.QuantizeConfig(activation_range=kqat.Fixed(-0.25, 0.25)),
    "plain": None,
}


@pytest.fixture(scope="module")
def mixed() -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    x = keras.Input((12,), name="x")
    y = x
    for name in ("eight", "four", "three", "two", "wide", "learned", "cut", "plain"):
        y = L.Dense(8, name=name)(y)
    y = L.Reshape((4, 2), name="steps")(y)
    y = L.LSTM(3, name="lstm")(y)
    model = keras.Model(x, L.Dense(2, name="head")(y), name="mixed")
    data = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    with pytest.warns(kqat.CalibrationWarning, match="cut"):
        qat = kqat.quantize_model(model, POLICY, calibration_data=data)
    return qat, data


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


@pytest.mark.slow
def test_every_grid_has_its_row(mixed: tuple[keras.Model, np.ndarray]) -> None:
    figure = kqat.plot_quantization(*mixed[:1], data=mixed[1])
    found = titles(figure)
    for name, bits in (("eight", 8), ("four", 4), ("three", 2), ("two", 1), ("learned", 8)):
        assert any(t.startswith(f"{name}  kernel, int{bits}: ") for t in found), name
    assert any(t.startswith("wide  values, int16: ") for t in found)
    assert any(t.startswith("x  input") for t in found)
    assert sum(t.startswith("lstm/") and "values" not in t for t in found) == 2
    assert not any(t.startswith("plain  kernel") for t in found)
    cut = next(t for t in found if t.startswith("cut  values"))
    assert float(cut.split(": ")[1].split(" %")[0]) > 5
    figure.savefig(io.BytesIO(), format="png", dpi=40)


def test_counts_are_those_of_the_model(mixed: tuple[keras.Model, np.ndarray]) -> None:
    qat, _ = mixed
    for tensor in rounded_tensors(qat, trace(qat)):
        if tensor.wrapper is None:
            continue
        counts = counts_of_weight(tensor)
        size = int(np.prod(getattr(tensor.wrapper.layer, tensor.what).shape))
        assert counts.total == counts.exact.sum() == counts.rounded.sum() == size
        middles = (counts.edges[:-1] + counts.edges[1:]) / 2
        inside = np.abs(middles) <= tensor.spec.qmax + 0.5
        assert counts.rounded[inside].sum() == size
        if tensor.spec.bits == 1:
            assert counts.rounded[np.abs(middles) < 0.5].sum() == 0


@pytest.mark.parametrize(
    "spec",
    [
        kqat.QuantSpec(),
        kqat.QuantSpec(bits=4, symmetric=True, narrow_range=True),
        kqat.QuantSpec(bits=2, symmetric=True, narrow_range=True),
        kqat.QuantSpec(bits=1, symmetric=True),
        kqat.QuantSpec(bits=5),
        kqat.QuantSpec(bits=16, symmetric=True, narrow_range=True),
    ],
    ids=lambda spec: f"{spec.bits} bits",
)
def test_bins_lie_around_the_integers_and_clipping_is_beyond_them(spec: kqat.QuantSpec) -> None:
    counts = GridCounts.of(RoundedTensor("layer", "values", "layer", "values", (), spec))
    ends = np.array([spec.qmin, spec.qmax], np.float64)
    counts.add(ends, ends)
    counts.add(np.array([spec.qmin - 0.49, spec.qmax + 0.49]), ends)
    assert counts.clipped == 0
    counts.add(np.array([spec.qmin - 0.51, spec.qmax + 1e9]), ends)
    assert (counts.clipped, counts.total) == (2, 6)
    # Whole grid inside, with room on either side; what lies far beyond is in the last bin.
    assert counts.edges[0] <= spec.qmin - 1 and counts.edges[-1] >= spec.qmax + 1
    assert counts.exact[-1] == 1
    # One step beyond the end costs what rounding may cost, as a softmax's 1.0 does.
    assert counts.far == 1
    counts.add(np.array([spec.qmax + 1.0, spec.qmin - 1.01]), ends)
    assert (counts.clipped, counts.far, counts.total) == (4, 2, 8)
    if spec.bits <= 8:
        near = np.abs(counts.edges[None] - np.arange(spec.qmin, spec.qmax + 1)[:, None]).min(axis=1)
        assert near.min() > 1e-6  # no integer lies on the edge of two bins


def test_names_choose_layers_and_values(mixed: tuple[keras.Model, np.ndarray]) -> None:
    qat, _ = mixed
    figure = kqat.plot_quantization(qat, "four")
    assert len(titles(figure)) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == [
        "before rounding",
        "after rounding",
    ]
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert "share of weights" in labels
    assert all(t.startswith("lstm") for t in titles(kqat.plot_quantization(qat, ["lstm*"])))
    (axes,) = [a for a in kqat.plot_quantization(qat, "x").axes if a.get_title(loc="left")]
    assert "pass data" in axes.texts[0].get_text()


def test_what_cannot_be_drawn_is_refused_by_name(mixed: tuple[keras.Model, np.ndarray]) -> None:
    qat, _ = mixed
    with pytest.raises(kqat.ModelError, match=r"Received: 'hed'\. Did you mean 'head'\?"):
        kqat.plot_quantization(qat, ["eight", "hed"])
    model = keras.Sequential([keras.Input((3,)), L.Dense(2, name="only")], name="small")
    with pytest.raises(kqat.ModelError, match="'small', which is float"):
        kqat.plot_quantization(model)
    with pytest.warns(kqat.RangeWarning):
        empty = kqat.quantize_model(model)
    with pytest.raises(kqat.CalibrationError, match="the values of 'only', has no range"):
        kqat.plot_quantization(empty, "only")


def test_without_matplotlib_the_error_names_the_extra(
    mixed: tuple[keras.Model, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(kqat.KqatError, match=r"pip install 'kqat\[plots\]'"):
        kqat.plot_quantization(mixed[0])
