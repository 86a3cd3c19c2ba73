"""Comparisons of integers: thresholds, factors, and files that compare as training does."""

from collections import Counter
from fractions import Fraction
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import kqat
import tflite_export
from kqat.grids import Site
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer
from tflite_export.integer_pass.comparisons import factors, thresholds
from tflite_export.runtimes.execution import RUNTIMES, run, supports

COMPARISONS = ("EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL")
RNG = np.random.default_rng(0)


def grid(scale: float, zero_point: int, bits: int = 8) -> Site:
    return Site("x", np.float32(scale), zero_point, bits, (4,))


def integers(site: Site) -> np.ndarray:
    return np.arange(-(2 ** (site.bits - 1)), 2 ** (site.bits - 1))


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize(
    "site", [grid(3.921, -128), grid(0.1, 5), grid(2e-5, 0), grid(1 / 3, 127), grid(0.02, 0, 16)]
)
def test_an_integer_stands_for_a_number(name: str, site: Site) -> None:
    """Against floats: numbers on points of the grid, beside and between them, and outside."""
    every, compare = integers(site), getattr(np, name.lower())
    some = np.unique(
        [*every[:3], *every[-3:], *RNG.choice(every, 20 if site.bits == 8 else 2), site.zero_point]
    )
    on = site.reals(some)
    numbers = [on, np.nextafter(on, np.float32(np.inf)), np.nextafter(on, np.float32(-np.inf))]
    numbers += [site.reals(some + 0.5), site.reals(some + 0.3), np.float32([-1e9, 1e9, 0.0, -0.0])]
    given = np.concatenate(numbers).reshape(1, -1)
    found = thresholds(name, site, given)
    assert found.dtype == np.int32 and found.shape == given.shape
    expected = compare.outer(site.reals(every), given)
    np.testing.assert_array_equal(compare.outer(every, found), expected)


@pytest.mark.parametrize("ratio", [1.0, 1 / 3, 0.5, 0.999, 0.7312345, 1e-3, 1e-9, 255 / 256])
@pytest.mark.parametrize("bits", [8, 16])
def test_integers_of_two_grids_compare_as_their_values(ratio: float, bits: int) -> None:
    zeros = (-128, 17) if bits == 8 else (0, 0)
    for scales in ((0.75, 0.75 * ratio), (0.75 * ratio, 0.75)):
        a, b = (grid(scale, zero, bits) for scale, zero in zip(scales, zeros, strict=True))
        every = integers(a) if bits == 8 else np.unique([*RNG.choice(integers(a), 400), -32768, 0])
        p, q = factors(a, b)
        left, right = p * (every - a.zero_point), q * (every - b.zero_point)
        offset = q * b.zero_point - p * a.zero_point
        for sides in (left, right, p * every, q * every, q * every - offset):
            assert np.abs(sides).max() < 2**31
        exact = [[Fraction(float(s.scale)) * int(v - s.zero_point) for v in every] for s in (a, b)]
        sides = np.array([[float(v) for v in side] for side in exact])
        found, expected = (
            np.sign(np.subtract.outer(left, right)),
            np.sign(np.subtract.outer(*sides)),
        )
        # A float32 holds a third to 3e-8: its multiples are equal to it in a file.
        apart = np.abs(np.subtract.outer(*sides)) > 1e-7 * np.abs(sides).max()
        equal = np.subtract.outer(*sides) == 0
        np.testing.assert_array_equal(found[apart | equal], expected[apart | equal])
    assert factors(grid(0.5, 3), grid(0.25, 3)) == (2, 1)
    assert factors(grid(0.1, 0), grid(0.3, 0)) == (1, 3)


# The inputs, with the least and the greatest of their values.
ENDS = {
    "pixels": (0, 1000),
    "others": (0, 700),
    "usual": (-3, 3),
    "more": (-2, 0.9),
    "fine": (-4e-3, 4e-3),
}


def compared(x: dict[str, Any]) -> dict[str, Any]:
    return {
        "a number beyond int8 kernels": x["pixels"] > 50,
        "at the left": ops.less_equal(500.0, x["pixels"]),
        "an array": x["pixels"] < np.float32([100.0, 50.0, 900.0, 2000.0]),
        "the least": ops.equal(x["pixels"], 0.0),
        "two": x["pixels"] >= x["others"],
        "two of unlike size": x["pixels"] < x["usual"],
        "smaller than the kernel's step": ops.not_equal(x["fine"], 0.0),
        "a small number": x["fine"] < 5e-4,
        "as it is": x["usual"] <= 0.5,
        "moved halfway": x["usual"] > np.float32([0.1234, 0.5, 1.5, -1.7]),
        "two of like size": x["usual"] > x["more"],
        "the same once more": x["usual"] <= x["more"],
        "between two points of the grid": ops.equal(x["usual"], 0.7),
        "beyond all": ops.equal(x["more"], 1e9),
        "between two points of it each": ops.not_equal(np.float32([-1.1, 0, 0.7, 0.9]), x["more"]),
        "two of one grid": x["usual"][:, :32] > x["usual"][:, 32:],
    }


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        ("int8", {"CAST": 5, "MUL": 6, "SUB": 3}),
        pytest.param("int16x8", {"CAST": 9, "MUL": 6, "SUB": 0}, marks=pytest.mark.slow),
    ],
)
def test_files_compare_as_training_does(policy: str, steps: dict[str, int]) -> None:
    x = {name: keras.Input((64, 4), name=name) for name in ENDS}
    outputs = compared(x)
    model = keras.Model([*x.values()], [*outputs.values()], name="compared")
    data = [RNG.uniform(*ends, (32, 64, 4)).astype(np.float32) for ends in ENDS.values()]
    for array, ends in zip(data, ENDS.values(), strict=True):
        array[0, 0, :2] = ends
    qat = kqat.quantize_model(model, policy, calibration_data=data)
    frozen = kqat.freeze(qat)
    blob = tflite_export.convert(frozen)
    counts = Counter(operators(flatbuffer.read(blob)))
    assert {name: counts[name] for name in steps} == steps, counts
    # Slices; and what rounds constants as the numbers are that they stand beside.
    assert counts.total() == sum(steps.values()) + len(outputs) + 2 + 2 * 5, counts
    if policy != "int8":  # Of which tests/coverage has cases.
        report = tflite_export.verify(frozen, blob, data, samples=4)
        assert all(part.exact and part.exact.is_exact for part in report.runtimes), report
    # Every integer of each grid, or as many, in an order of its own.
    sites = {site.name: site for site in frozen.sites}
    given = [RNG.permutation(integers(sites[name]))[:256].reshape(1, 64, 4) for name in ENDS]
    reals = [sites[name].reals(v) for name, v in zip(ENDS, given, strict=True)]
    expected = [np.asarray(value) for value in qat(reals)]
    equal = expected[[*outputs].index("between two points of the grid")]
    assert equal.any() or policy != "int8"  # All of 256 integers are there.
    given = [array.astype(policy.removesuffix("x8")) for array in given]
    for runtime in filter(supports, RUNTIMES):
        found = run(blob, given, runtime=runtime).outputs
        for name, one, other in zip(outputs, found, expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{runtime}: {name}")


def test_the_plan_tells_what_a_comparison_may_become(monkeypatch: pytest.MonkeyPatch) -> None:
    x = keras.Input((4,), name="x")
    model = keras.Model(x, ops.where(ops.greater(x, 50.0), x, x * 0.5), name="chosen")
    (layer,) = (layer for layer in kqat.plan(model).layers if "GREATER" in layer.ops)
    assert layer.ops == ("GREATER", "CAST", "MUL", "SUB")
    (misfit,) = (m for m in kqat.plan(model, target="ethos_u55").misfits if m.layer == layer.name)
    assert misfit.operators == ("CAST", "GREATER") and not misfit.blocking
    monkeypatch.setitem(kqat.devices.kernels.KERNELS, "CAST", frozenset())
    (misfit,) = kqat.plan(model, target="tflite_micro").misfits
    assert misfit.operators == ("CAST",) and misfit.blocking
