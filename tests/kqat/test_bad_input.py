"""Bad input, one table per kind: a clear error that names the culprit, or a handled result."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers

import kqat
from kqat import QuantizeConfig, QuantSpec
from kqat.base.errors import (
    CalibrationError,
    ModelError,
    PolicyError,
    SpecError,
    UnsupportedLayerError,
)

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 4)).astype(np.float32)


@keras.saving.register_keras_serializable("tests")
class Odd(keras.layers.Layer):
    """A layer that no table knows, nor can anybody look inside."""

    def call(self, x: Any) -> Any:
        return x * tf.math.cumulative_logsumexp(x)


def summed(x: Any) -> Any:
    return tf.math.cumulative_logsumexp(x, axis=1)


def doubled(x: Any) -> Any:
    return 2.0 * x


def model_of(
    build: Callable[[Any], Any], shape: tuple[Any, ...] = (6, 6, 3), **options: Any
) -> Any:
    x = keras.Input(shape, name="image", **options)
    return keras.Model(x, build(x), name="model")


def conv(name: str = "conv", filters: int = 4, **options: Any) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", name=name, **options)


def one_input() -> keras.Model:
    return model_of(lambda x: layers.Dense(2, name="dense")(x), (4,))


def two_inputs() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    return keras.Model([a, b], layers.Add(name="sum")([a, b]), name="model")


# What is no model


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="sub")
        self.dense = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.dense(x)


class Branching(Subclassed):
    def call(self, x: Any) -> Any:
        if keras.ops.max(x) > 0:
            x = -x
        return self.dense(x)


def called_subclassed() -> keras.Model:
    model = Branching()
    model(ROWS)
    return model


def legacy() -> Any:
    return tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))])


@functools.cache
def quantized() -> keras.Model:
    return kqat.quantize_model(one_input(), calibration_data=ROWS)


NO_MODEL: dict[str, tuple[Callable[[], Any], str]] = {
    "array": (lambda: ROWS, r"keras.Model \(Keras 3\). Received: numpy.ndarray"),
    "function": (lambda: doubled, r"keras.Model \(Keras 3\). Received: builtins.function"),
    "None": (lambda: None, "Received: builtins.NoneType"),
    "layer": (lambda: layers.Dense(2), r"Received: .*\.Dense\."),
    "Keras 2": (legacy, r"Keras 2 \(tf_keras\) model: kqat.load_model"),
    "unbuilt": (
        lambda: keras.Sequential([layers.Dense(2)], name="bare"),
        r"built model. Received: 'bare'.*Begin it with keras.Input",
    ),
    "unbuilt subclassed": (Subclassed, "Expected a built model. Received: 'sub'"),
    "subclassed": (
        called_subclassed,
        r"'sub' of type Branching.*branches on a value: line \d+, `if keras.ops.max\(x\) > 0:`",
    ),
    "quantized": (
        quantized,
        r"Received: 'model', which is quantized already. Train it on with fit",
    ),
    "around a quantized one": (
        lambda: keras.Sequential([keras.Input((4,)), quantized()], name="outer"),
        "Received: 'outer', which is quantized already",
    ),
    "sparse input": (
        lambda: model_of(layers.Dense(2), (8,), sparse=True),
        r"dense inputs in model 'model'.*'image', which is sparse.*tf.sparse.to_dense",
    ),
    "ragged input": (
        lambda: model_of(layers.Dense(2), (8,), ragged=True),
        r"dense inputs in model 'model'.*'image', which is ragged.*x.to_tensor",
    ),
    "integer input": (
        lambda: model_of(lambda x: layers.Rescaling(2.0)(x), (8,), dtype="int16"),
        r"int32 inputs that hold indexes.*input 'image' of dtype int16. Declare indexes ",
    ),
    "nothing inside": (
        lambda: model_of(layers.Dropout(0.5)),
        "Expected a layer to quantize. Received: 'model'",
    ),
}


@pytest.mark.parametrize(("make", "message"), NO_MODEL.values(), ids=NO_MODEL)
def test_what_is_no_model_is_refused(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(ModelError, match=message):
        kqat.quantize_model(model, calibration_data=ROWS)
    if message.startswith("Expected a layer to quantize"):
        assert kqat.plan(model).groups == ()  # A plan may be looked at.
    else:
        with pytest.raises(ModelError, match=message):
            kqat.plan(model)


def test_what_starts_from_a_float_model_refuses_a_quantized_one() -> None:
    """`diagnose` found 120 dB of a model against itself; `search` named a rounding of kqat."""
    qat = quantized()
    for call in (
        lambda: kqat.search(qat, ROWS, budget=0.9),
        lambda: kqat.sensitivity(qat, ROWS),
        lambda: kqat.diagnose(qat, qat, ROWS),
    ):
        with pytest.raises(ModelError, match=r"a float model. Received: 'model', which is quantiz"):
            call()
    for nothing in (lambda: kqat.search("model", ROWS, budget=0.9), lambda: kqat.load_model(3)):
        with pytest.raises(ModelError, match=r"Received: (builtins.str|int)\."):
            nothing()
    with pytest.raises(kqat.PolicyError, match=r"a budget above 0. Received: '1k'"):
        kqat.search(one_input(), ROWS, budget="1k")


def test_a_policy_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(
        ModelError,
        match=r"layer to quantize. Received: 'model', which computes nothing, or whose layers the",
    ):
        kqat.quantize_model(one_input(), None, calibration_data=ROWS)


@pytest.mark.parametrize("variable", ["kernel", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights_are_refused_by_name(variable: str, value: float) -> None:
    model = one_input()
    weight = getattr(model.get_layer("dense"), variable)
    weight.assign(np.full(weight.shape, value))
    with pytest.raises(ModelError, match=f"NaN or infinity in 'dense/{variable}' of 'model'"):
        kqat.quantize_model(model, calibration_data=ROWS)


# What has no integer form

UNSUPPORTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unknown layer": (
        Odd(name="odd"),
        r"Or leave layer 'odd' of type Odd float with policy=\{'odd': None\}.*register_layer",
    ),
    "operation": (
        lambda x: keras.ops.median(x, axis=-1),
        r"operation 'median' of type Median. Leave it float with policy=\{'median': None\}.*"
        r"It sorts.*keras.ops.sort, argsort or top_k",
    ),
    "stock layer": (
        lambda x: layers.Discretization([0.5])(x),
        "layer 'discretization' of type Discretization.*It turns quantities into indexes",
    ),
    "Normalization axes": (
        layers.Normalization(axis=(1, 3), mean=0.0, variance=1.0, name="norm"),
        r"layer 'norm' of type Normalization.*axis=\(1, 3\) is not one axis behind the batch",
    ),
    "interpolation": (
        layers.UpSampling2D(2, interpolation="bicubic", name="up"),
        "layer 'up' of type UpSampling2D.*interpolation='bicubic'.*'nearest' or 'bilinear'",
    ),
    "Resizing options": (
        layers.Resizing(4, 4, crop_to_aspect_ratio=True, name="resize"),
        "layer 'resize' of type Resizing.*only plain resizing",
    ),
    "own activation": (
        conv(activation=summed),
        r"layer 'conv' of type Activation, which is neither.*policy=\{'conv': None\}",
    ),
    "own function as a layer": (
        layers.Activation(summed, name="act"),
        r"layer 'act' of type Activation.*line \d+ of test_bad_input.py, `return tf.math.cum",
    ),
}


@pytest.mark.parametrize(("build", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_has_no_integer_form_is_refused_by_name(
    build: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        kqat.plan(model_of(build))


def test_the_way_out_names_the_users_layer_not_a_part() -> None:
    """`conv` is split into itself and `conv_odd`, of which no policy could speak."""
    model = model_of(conv(activation=Odd(name="odd")))
    with pytest.raises(UnsupportedLayerError, match=r"'conv' of type Odd.*\{'conv': None\}"):
        kqat.plan(model)
    assert kqat.plan(model, {"conv": None}).float_layers() == ("conv",)


class Forgetful(Odd):
    def __init__(self, factor: float, **options: Any) -> None:
        super().__init__(**options)
        self.factor = factor

    def get_config(self) -> dict[str, Any]:
        return super().get_config()


def test_a_float_layer_that_cannot_be_made_anew_is_refused_by_name() -> None:
    model = model_of(lambda x: conv()(Forgetful(2.0, name="odd")(x)))
    with pytest.raises(ModelError, match="'odd' of type Forgetful, which cannot"):
        kqat.plan(model, {"odd": None})


# Grids that cannot be

GRIDS: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "1 bit": (SpecError, lambda: QuantSpec(bits=1), "2 to 16 bits. Received: bits=1"),
    "17 bits": (SpecError, lambda: QuantSpec(bits=17), "2 to 16 bits. Received: bits=17"),
    "wide weights": (
        PolicyError,
        lambda: QuantizeConfig(weights=QuantSpec(bits=16, symmetric=True)),
        r"at most 8 bits for weights\['\*'\].*bits=16",
    ),
    "asymmetric weights": (
        PolicyError,
        lambda: QuantizeConfig(weights={"kernel": QuantSpec()}),
        r"symmetric grid for weights\['kernel'\].*Use symmetric=True",
    ),
    "narrow activations": (
        PolicyError,
        lambda: QuantizeConfig(activation=QuantSpec(bits=4)),
        "activation grid of 8 bits.*bits=4",
    ),
    "wide activations": (
        PolicyError,
        lambda: QuantizeConfig(activation=QuantSpec(bits=16)),
        "symmetric activation grid of 16 bits.*bits=16",
    ),
}


@pytest.mark.parametrize(("error", "make", "message"), GRIDS.values(), ids=GRIDS)
def test_grids_that_no_kernel_has_are_refused(
    error: type[Exception], make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


# Calibration data


def with_value(value: float) -> np.ndarray:
    data = ROWS.copy()
    data[35, 1] = value
    return data


def dataset(elements: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(elements).batch(8)


NOTHING = r"at least one sample of calibration data for the inputs \['image'\]. Received: none"
SHAPE = r"shape \('samples', 4\) for input 'image'. Received: "
NOT_FINITE = r"finite calibration data for input 'image'. Received: NaN or infinity in 1 of"

DATA: dict[str, tuple[Any, str]] = {
    "no rows": (ROWS[:0], NOTHING),
    "empty dataset": (dataset(ROWS[:0]), NOTHING),
    "empty generator": (iter([]), NOTHING),
    "empty batches": (iter([ROWS[:0]]), NOTHING),
    "another width": (ROWS[:, :3], SHAPE + r"\(40, 3\)"),
    "one sample": (ROWS[0], SHAPE + r"\(4,\)"),
    "a number": (np.float32(1.0), SHAPE + r"\(\)"),
    "unbatched dataset": (tf.data.Dataset.from_tensor_slices(ROWS), SHAPE + r"\(4,\)"),
    "inputs and targets": ((ROWS, ROWS[:, 0]), SHAPE + r"\(40,\)"),
    "rows in a list": ([*ROWS[:3]], r"list of 1 arrays.*\['image'\]. Received: 3"),
    "empty list": ([], r"list of 1 arrays, one per input \['image'\]. Received: 0"),
    "empty dict": ({}, r"data for the inputs \['image'\]. Received: \[\]"),
    "another name": ({"picture": ROWS}, r"inputs \['image'\]. Received: \['picture'\]"),
    "empty tuple as batch": (iter([()]), r"list of 1 arrays.*\['image'\]. Received: 0"),
    "ragged": ([[[1.0, 2.0], [3.0]]], "array for input 'image'. Received: rows of different"),
    "text": (np.array([["a"] * 4]), "real numbers for input 'image'. Received: dtype <U1"),
    "objects": (ROWS.astype(object), "real numbers for input 'image'. Received: dtype object"),
    "complex": (ROWS * 1j, "real numbers for input 'image'. Received: dtype complex64"),
    "NaN": (with_value(np.nan), NOT_FINITE),
    "infinity": (with_value(-np.inf), NOT_FINITE),
    "beyond float32": (ROWS.astype(np.float64) * 1e300, "NaN or infinity in 128 of 128 values"),
    "NaN in a dict": ({"image": with_value(np.nan)}, NOT_FINITE),
    "NaN in a dataset": (dataset(with_value(np.nan)), NOT_FINITE),
    "NaN in a labelled dataset": (dataset((with_value(np.nan), ROWS)), NOT_FINITE),
    "NaN in a generator": (iter([ROWS, with_value(np.nan)]), NOT_FINITE),
    "a number of batches": (3, r"iterable of batches.*inputs \['image'\]. Received: int"),
    "a file name": ("data.npy", r"batches of arrays for the inputs \['image'\].*type str"),
    "None as batch": (iter([None]), r"inputs \['image'\]. Received: NoneType"),
}

TWO_DATA: dict[str, tuple[Any, str]] = {
    "one array": (ROWS, r"list or dict of arrays for the inputs \['a', 'b'\]. Received: one"),
    "three arrays": ([ROWS] * 3, r"list of 2 arrays, one per input \['a', 'b'\]. Received: 3"),
    "one key": ({"a": ROWS}, r"for the inputs \['a', 'b'\]. Received: \['a'\]"),
    "sizes": ([ROWS, ROWS[:5]], r"many samples for every input of \['a', 'b'\].*\[40, 5\]"),
    "sizes in a batch": (iter([{"a": ROWS, "b": ROWS[:5]}]), r"every input.*\[40, 5\] samples"),
    "shape of the second": ([ROWS, ROWS[:, :1]], r"'samples', 4\) for input 'b'.*\(40, 1\)"),
    "NaN in the second": ([ROWS, with_value(np.nan)], "finite calibration data for input 'b'"),
    "pairs that look labelled": (dataset((ROWS, ROWS)), r"tuple is taken as \(inputs, targets\)"),
}


@pytest.mark.parametrize(("data", "message"), DATA.values(), ids=DATA)
def test_bad_calibration_data_are_refused_by_input(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        kqat.quantize_model(one_input(), calibration_data=data)


@pytest.mark.parametrize(("data", "message"), TWO_DATA.values(), ids=TWO_DATA)
def test_bad_calibration_data_for_two_inputs_are_refused(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        kqat.quantize_model(two_inputs(), calibration_data=data)


def test_a_float_model_is_not_calibrated() -> None:
    with pytest.raises(ModelError, match=r"QAT model to calibrate. Received: 'model'"):
        kqat.training.calibration.calibrate(one_input(), ROWS)


def test_a_model_of_open_sizes_wants_sizes_or_data_that_have_them() -> None:
    model = model_of(conv(), (None, None, 3))
    with pytest.raises(ModelError, match=r"input 'image' of shape \(None, None, None, 3\)"):
        kqat.plan(model)
    with pytest.raises(CalibrationError, match=r"'samples', None, None, 3.*'samples', 4"):
        kqat.quantize_model(model, calibration_data=ROWS)


@pytest.mark.parametrize("floatx", ["float64", "float16"])
def test_another_floatx_is_refused_and_the_way_out_works(floatx: str) -> None:
    keras.config.set_floatx(floatx)
    model = one_input()
    with pytest.raises(ModelError, match=rf"to be 'float32'.*Received: '{floatx}'"):
        kqat.plan(model)
    keras.config.set_floatx("float32")
    assert kqat.plan(model).layers


def test_weights_that_keras_quantized_are_refused_by_name() -> None:
    model = one_input()
    model.get_layer("dense").quantize("int8")
    with pytest.raises(UnsupportedLayerError, match=r"'dense'.*quantize\('int8'\)"):
        kqat.plan(model)


def test_adapters_are_refused_and_the_way_out_works(tmp_path: Any) -> None:
    adapted = one_input()
    dense = adapted.get_layer("dense")
    dense.enable_lora(2)
    for variable in dense.trainable_variables:
        variable.assign(RNG.normal(size=variable.shape))
    with pytest.raises(UnsupportedLayerError, match=r"'dense'.*LoRA.*save_weights"):
        kqat.plan(adapted)
    adapted.save_weights(tmp_path / "merged.weights.h5")
    plain = one_input()
    plain.load_weights(tmp_path / "merged.weights.h5")
    np.testing.assert_allclose(plain(ROWS), adapted(ROWS), rtol=1e-4, atol=1e-5)
    assert kqat.plan(plain).layers


def test_adapters_inside_a_layer_are_refused_by_name() -> None:
    x = keras.Input((4, 6))
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    model = keras.Model(x, attention(x, x))
    attention.query_dense.enable_lora(2)
    with pytest.raises(UnsupportedLayerError, match=r"'query' inside 'attention'.*LoRA"):
        kqat.plan(model)


def test_float64_is_taken_as_float32() -> None:
    x = keras.Input((4,), dtype="float64")
    hidden = layers.Dense(8, dtype="float64", activation="relu")(x)
    model = keras.Model(x, layers.Dense(3, dtype="float64")(hidden))
    rows = ROWS.astype(np.float64)
    qat = kqat.quantize_model(model, calibration_data=rows)
    expected = np.asarray(model(rows))
    assert np.max(np.abs(np.asarray(qat(rows)) - expected)) < 0.05 * np.max(np.abs(expected))


@pytest.mark.parametrize("wrap", [layers.Lambda, lambda call, **kwargs: Calls(call, **kwargs)])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: keras.ops.cond(keras.ops.sum(x) > 0, lambda: x, lambda: -x),
        lambda x: keras.ops.cond(keras.ops.sum(x) > 0, lambda: 2.0 * x, lambda: -x),
        lambda x: keras.ops.switch(
            keras.ops.cast(keras.ops.max(x) > 0, "int32"), [lambda a: a, lambda a: -a], x
        ),
    ],
)
def test_a_branch_on_a_value_is_refused(call: Any, wrap: Any) -> None:
    """One of them came out as its first branch alone."""
    model = model_of(lambda x: wrap(call, name="branch")(layers.Dense(4)(x)), (4,))
    with pytest.raises((UnsupportedLayerError, ModelError), match="branch"):
        kqat.plan(model)


class Calls(keras.layers.Layer):
    """A layer of the user's that calls a function."""

    def __init__(self, function: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)
