"""Kernels that miss by more than their rounding are not the file's fault, up to what is known."""

import dataclasses
import warnings

import keras
import numpy as np
import pytest

import kqat
import tflite_export
from kqat.kernels import resizing

NOISE = np.random.default_rng(0).uniform(size=(16, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def report() -> tflite_export.Report:
    """Eight rows become 56, a seventh of one apart, which has no end in binary digits."""
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Resizing(56, 56)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        qat = kqat.quantize_model(model, calibration_data=NOISE)
    return tflite_export.verify(qat, tflite_export.convert(qat), NOISE)


def test_places_that_are_missed_are_told_and_excused(report: tflite_export.Report) -> None:
    row = report.on("litert_reference").by_operator()["RESIZE_BILINEAR"]
    assert 1 < row.max_steps <= row.allowed_steps
    assert all(part.is_right for part in report.runtimes if part.installed)
    assert f"max {row.max_steps} " in str(report)
    assert f"(its kernel is known for up to {row.allowed_steps})" in " ".join(str(report).split())
    exact = report.on("litert_reference").exact
    assert exact is not None and exact.differing == 0


def test_no_more_is_excused(report: tflite_export.Report) -> None:
    part = report.on("litert_reference")
    worse = [dataclasses.replace(s, max_steps=s.allowed_steps + 1) for s in part.sites]
    assert not dataclasses.replace(part, sites=tuple(worse)).is_right
    # XNNPACK finds places in floats.
    (site,) = (s for s in report.on("litert").sites if s.operator == "RESIZE_BILINEAR")
    assert site.allowed_steps == 1


@pytest.mark.parametrize(("result", "missed"), [(16, 0.0), (48, 15 / 1024), (224, 63 / 1024)])
def test_places_are_missed_by_the_rounding_of_the_scale(result: int, missed: float) -> None:
    found = resizing.misplaced(32, result, corners=False, centers=True, xnnpack=False)
    assert found == pytest.approx(missed)
    assert resizing.misplaced(32, result, corners=False, centers=True, xnnpack=True) < 2**-11


@pytest.mark.parametrize("classes", [8, 100])
def test_a_softmax_of_16_bits_sums_what_it_takes_for_no_less_than_exp_of_minus_ten(
    classes: int,
) -> None:
    """Ten steps were excused, however many classes there are."""
    x = keras.Input((classes,), name="x")
    model = keras.Model(x, keras.layers.Softmax(name="last")(x))
    data = np.random.default_rng(0).normal(size=(32, classes)).astype(np.float32) * 40.0
    qat = kqat.quantize_model(model, "int16x8", calibration_data=data)
    report = tflite_export.verify(qat, tflite_export.convert(qat), data)
    for part in report.runtimes:
        row = part.by_operator()["SOFTMAX"]
        assert part.is_right and part.exact is not None and part.exact.is_exact
        assert 10 < row.max_steps <= row.allowed_steps == 10 + 2 * classes
