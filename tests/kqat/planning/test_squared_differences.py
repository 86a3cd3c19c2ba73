"""The square of a difference is one operator, whose difference is never rounded."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import kqat
import tflite_export
from kqat.base.errors import ExportError
from kqat.parts import SquaredDifference
from kqat.registry import rule_for
from kqat.registry.rule import resolution_of_square
from tests.tflite_export.small_models import operators
from tflite_export import flatbuffer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6, 4)).astype(np.float32)
SQUARE = "SQUARED_DIFFERENCE"


def model_of(call: Callable[[Any], Any]) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input(X.shape[1:], name="x")
    return keras.Model(x, call(x))


def halves(x: Any) -> tuple[Any, Any]:
    return L.Dense(4, name="a")(x), L.Dense(4, name="b")(x)


def minus(x: Any, name: str | None = None) -> Any:
    return L.Subtract(name=name)(halves(x))


def read_twice(x: Any) -> Any:
    difference = minus(x)
    return ops.square(difference) + difference


def an_output(x: Any) -> Any:
    difference = minus(x)
    return [difference, ops.square(difference)]


def five_axes(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The square of a difference from `call` of a value of as many, with the batch."""

    def squared(x: Any) -> Any:
        y = ops.reshape(x, (-1, 2, 3, 2, 2))
        return ops.square(y - call(y))

    return squared


class Centers(L.Layer):
    """Squared differences from trained points, as of radial basis functions and of codebooks."""

    def __init__(self, call: Callable[[Any, Any], Any], regularizer: Any = None) -> None:
        super().__init__()
        self.difference, self.regularizer = call, regularizer

    def build(self, shape: Any) -> None:
        """Makes five of them."""
        self.points = self.add_weight(
            shape=(5, shape[-1]), initializer="random_normal", regularizer=self.regularizer
        )

    def call(self, x: Any) -> Any:
        """The largest of each, (batch, steps, 5)."""
        return ops.max(ops.square(self.difference(x[:, :, None], self.points)), axis=-1)


class Energy(L.Layer):
    """A cell that squares how far its input is from its state."""

    state_size = 4

    def call(self, x: Any, states: list[Any]) -> Any:
        """The squared distance, and the next state."""
        return ops.square(x - states[0]), [ops.tanh(x)]


@pytest.mark.parametrize(
    ("call", "policy", "squares", "others"),
    [
        (lambda x: ops.square(minus(x)), "int8", 1, 0),
        (lambda x: minus(x) ** 2, "w4a8", 1, 0),
        (lambda x: (lambda d: d * d)(minus(x)), "int8", 1, 0),
        (lambda x: ops.square(x - L.GlobalAveragePooling1D(keepdims=True)(x)), "int8", 1, 0),
        (lambda x: ops.var(x, axis=1), "int8", 1, 0),
        (lambda x: ops.std(x, axis=-1), "int8", 1, 0),
        (lambda x: ops.moments(x, axes=[1])[1], "int8", 1, 0),
        (lambda x: (x - 0.5) ** 2, "int8", 1, 0),
        (lambda x: (x - X[0]) ** 2, "int8", 1, 0),
        (lambda x: (x - X[0, 0]) ** 2, "int8", 1, 0),
        (Centers(lambda x, c: x - c), "int8", 1, 0),
        (Centers(lambda x, c: c - x), "w4a8", 1, 1),  # The input's negative is a product, or SUB.
        # A penalty of the user's may weigh the negative otherwise.
        (Centers(lambda x, c: x + c, "l2"), "int8", 0, 0),
        # A constant that a bias takes in costs nothing.
        (lambda x: (L.Dense(4)(x) - 0.5) ** 2, "int8", 0, 0),
        (lambda x: L.RNN(Energy())(x), "int8", 1, 1),  # Zeros to begin with are a SUB.
        # The kernel broadcasts over four axes; the converter makes no SQUARED_DIFFERENCE of more.
        (five_axes(lambda y: ops.flip(y, 1)), "int8", 1, 0),
        (five_axes(lambda y: X[0].reshape(1, 2, 3, 2, 2)), "int8", 1, 0),
        (five_axes(lambda y: ops.mean(y, axis=3, keepdims=True)), "int8", 0, 1),
        # What a penalty is of is a value of its own.
        (lambda x: L.Rescaling(1.0, 2.0, activity_regularizer="l2")(x) ** 2, "int8", 0, 1),
        (lambda x: L.Subtract(activity_regularizer="l2")(halves(x)) ** 2, "int8", 0, 1),
        # What else reads a difference reads it rounded. TFLite Micro alone has a kernel of 16 bits.
        (read_twice, "int8", 0, 1),
        (an_output, "int8", 0, 1),
        (lambda x: ops.square(minus(x)), "int16x8", 0, 1),
        (lambda x: ops.square(minus(x, "wide")), {"wide": "int16x8", "*": "int8"}, 0, 1),
    ],
)
def test_differences_that_only_a_square_reads(
    call: Callable[[Any], Any], policy: Any, squares: int, others: int
) -> None:
    found = [op for layer in kqat.plan(model_of(call), policy).layers for op in layer.ops]
    assert [found.count(op) for op in (SQUARE, "SUB")] == [squares, others]


def test_every_runtime_computes_what_was_trained() -> None:
    """Also where the values hardly differ: no kernel computes at a scale too small."""

    def call(x: Any) -> Any:
        a, b = halves(x)
        near = L.Rescaling(1.0 + 1e-5, name="near")(a)
        return [
            ops.sum(ops.square(a - b), axis=-1),
            ops.square(a - L.GlobalMaxPooling1D(keepdims=True)(b)),
            ops.square(near - a),
            ops.square(x - X[0]),
            ops.square(x - X[0, 0] + 0.5),
            Centers(lambda x, c: x - c)(x),
        ]

    model = model_of(call)
    with pytest.warns(kqat.CalibrationWarning):  # of the last one, whose sums are of a step
        qat = kqat.quantize_model(model, calibration_data=X)
    assert [tuple(w.shape) for w in qat.trainable_weights].count((5, 4)) == 1  # the centers
    blob = tflite_export.convert(qat)
    assert operators(flatbuffer.read(blob)).count(SQUARE) == 6
    report = tflite_export.verify(qat, blob, X, samples=8)
    for part in report.runtimes:
        assert part.is_right and part.problem is None and part.unmatched == (), part
        assert part.exact is not None and part.exact.is_exact, part
        assert part.by_operator()[SQUARE].max_steps <= 1
    for want, got in zip(*([*m(X)[:2], *m(X)[3:]] for m in (model, qat)), strict=True):
        wanted = np.asarray(want, np.float64)
        noise = np.mean((wanted - np.asarray(got, np.float64)) ** 2)
        # Outputs that round to their grids leave 40.6 to 45.3 dB; operands that do take 3 to 8.
        assert 10 * np.log10(np.mean(wanted**2) / noise) > 36.0


@pytest.mark.parametrize(
    ("call", "bits", "width"),
    [
        (lambda x: minus(x, "last"), 8, 1e-6),
        (lambda x: minus(x, "last") ** 2, 8, 1e-6),
        (lambda x: L.Add(name="last")(halves(x)), 8, 1e-2),
        (lambda x: L.Add(name="last")([x, x]), 16, 1e-4),
    ],
)
def test_a_given_range_that_no_kernel_computes(
    call: Callable[[Any], Any], bits: int, width: float
) -> None:
    """LiteRT computes other values, without a word, or ends the process."""
    model = model_of(call)
    grid = kqat.QuantSpec(bits=bits, symmetric=bits == 16)
    tiny = kqat.QuantizeConfig(activation=grid, activation_range=kqat.Fixed(-width, width))
    end, rest = model.layers[-1].name, {8: "int8", 16: "int16x8"}[bits]
    qat = kqat.quantize_model(model, {"last": tiny, end: tiny, "*": rest}, calibration_data=X)
    with pytest.raises(ExportError, match=f"scale above .* for '{end}'.*wider range"):
        tflite_export.convert(qat)


def test_a_given_range_that_no_kernel_squares_into() -> None:
    """The difference and its square are one operator where the policy gives both one config."""
    model = model_of(lambda x: minus(x, "difference") ** 2)
    tiny = kqat.QuantizeConfig(activation_range=kqat.Fixed(-1e-9, 1e-9))
    policy = {"difference": tiny, "power*": tiny, "*": "int8"}
    qat = kqat.quantize_model(model, policy, calibration_data=X)
    with pytest.raises(ExportError, match=r"for 'power', the least that SQUARED_DIFFERENCE can"):
        tflite_export.convert(qat)


def test_the_least_scale_is_one_that_the_kernel_multiplies_by() -> None:
    """`4 * scale**2 / (2**14 * result's scale)` is less than one, for every scale of the input."""
    share, power = resolution_of_square(SquaredDifference(), 1, 1)
    assert power == 2 and 4.0 / (2**14 * share) < 1.0
    row = rule_for(SquaredDifference())
    assert row.resolution is resolution_of_square
