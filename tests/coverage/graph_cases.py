"""Cases for graphs: how layers, models, inputs and outputs hang together."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers as L

from tests.coverage.cases import Case, functional

IMAGE = (8, 8, 3)


def _graph(name: str, build: Callable[[], keras.Model], **ops: int) -> Case:
    return Case(name=name, build=build, ops=ops)


def _image(name: str, call: Callable[[Any], Any], **ops: int) -> Case:
    return _graph(name, lambda: functional(IMAGE, call), **ops)


def _island(
    name: str, policy: dict[str, None], floats: int, io: dict[str, str], **ops: int
) -> Case:
    """Stem, middle and head, where the policy leaves one of them float."""
    return Case(name=name, build=_three_parts, ops=ops, floats=floats, policy=policy, io=io)


def _three_parts() -> keras.Model:
    def call(x: Any) -> Any:
        x = L.Conv2D(4, 3, activation="relu", name="stem")(x)
        x = L.Conv2D(4, 3, activation="relu", name="middle")(x)
        return L.Dense(5, name="head")(L.GlobalAveragePooling2D()(x))

    return functional(IMAGE, call)


def _conv_bn(x: Any, filters: int = 3, name: str | None = None) -> Any:
    x = L.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
    return L.BatchNormalization()(x)


def _sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(IMAGE, name="image"),
            L.Conv2D(4, 3),
            L.BatchNormalization(),
            L.ReLU(),
            L.MaxPooling2D(),
            L.Dropout(0.2),
            L.Flatten(),
            L.Dense(5, activation="softmax"),
        ]
    )


def _encoder(name: str) -> keras.Model:
    return keras.Sequential(
        [keras.Input(IMAGE), L.Conv2D(4, 3, activation="relu"), L.GlobalAveragePooling2D()],
        name=name,
    )


def _nested() -> keras.Model:
    inner = functional(IMAGE, lambda x: L.ReLU()(_conv_bn(x)))
    inner.name = "inner"
    outer = keras.Sequential([keras.Input(IMAGE), inner, L.MaxPooling2D()], name="outer")
    return functional(IMAGE, lambda x: L.Dense(5)(L.Flatten()(outer(x))))


def _shared_layer(x: Any) -> Any:
    conv = L.Conv2D(3, 3, padding="same")
    first = conv(x)
    return L.Add()([first, conv(L.ReLU()(first))])


def _siamese() -> keras.Model:
    encoder = _encoder("encoder")
    left, right = keras.Input(IMAGE, name="right"), keras.Input(IMAGE, name="left")
    difference = L.Subtract()([encoder(left), encoder(right)])
    return keras.Model([left, right], L.Dense(1, "sigmoid")(difference))


def _dicts() -> keras.Model:
    inputs = {"zoom": keras.Input(IMAGE, name="zoom"), "age": keras.Input((4,), name="age")}
    image = L.GlobalAveragePooling2D()(L.Conv2D(4, 3, activation="relu")(inputs["zoom"]))
    both = L.Concatenate()([image, L.Dense(4, "relu")(inputs["age"])])
    outputs = {
        "where": L.Dense(2, name="where")(both),
        "class": L.Dense(3, "softmax", name="class")(both),
    }
    return keras.Model(inputs, outputs)


def _lists() -> keras.Model:
    b, a = keras.Input(IMAGE, name="b"), keras.Input(IMAGE, name="a")
    total = L.Add()([L.Conv2D(3, 1)(b), a])
    return keras.Model([b, a], [L.Conv2D(2, 1, name="z")(total), L.Conv2D(2, 3, name="y")(total)])


def _transfer() -> keras.Model:
    base = functional(IMAGE, lambda x: L.ReLU(6.0)(_conv_bn(L.ReLU(6.0)(_conv_bn(x, 4)), 4)))
    base.name = "base"
    base.trainable = False

    def call(x: Any) -> Any:
        x = L.GlobalAveragePooling2D()(base(x, training=False))
        return L.Dense(5, "softmax")(L.Dropout(0.2)(x))

    return functional(IMAGE, call)


def _squeeze_excite(x: Any) -> Any:
    x = L.ReLU()(_conv_bn(x, 4))
    gate = L.GlobalAveragePooling2D(keepdims=True)(x)
    gate = L.Dense(4, "sigmoid")(L.Dense(2, "relu")(gate))
    return L.Multiply()([x, gate])


def _output_twice() -> keras.Model:
    x = keras.Input((8,), name="x")
    y = L.Dense(4, "relu", name="y")(x)
    return keras.Model(x, [y, L.Dense(2, name="z")(y), y])


def _input_is_output() -> keras.Model:
    x = keras.Input((8,), name="x")
    return keras.Model(x, [L.Dense(4, name="y")(x), L.Identity(name="same")(x)])


def _branches(x: Any) -> Any:
    return L.Concatenate()(
        [L.Conv2D(2, 1, activation="relu")(x), L.MaxPooling2D(3, 1, "same")(x), _conv_bn(x, 2)]
    )


def _fixed_and_own(x: Any) -> Any:
    return L.Concatenate()([L.Activation("sigmoid")(x), L.Conv2D(3, 1)(x)])


def _two_fixed(x: Any) -> Any:
    gate = L.Activation("sigmoid")
    return L.Concatenate()([gate(x), L.Activation("sigmoid")(L.Conv2D(3, 1)(x))])


def _residual(x: Any) -> Any:
    x = L.ReLU()(_conv_bn(x, 4))
    for _ in range(2):
        y = _conv_bn(L.ReLU()(_conv_bn(x, 4)), 4)
        x = L.ReLU()(L.Add()([x, y]))
    return x


def _scale_chain(x: Any) -> Any:
    """Values on one scale: pad, pool, Flatten and Reshape (which cancel out), concatenate."""
    x = L.Conv2D(4, 1)(x)
    pooled = L.MaxPooling2D(2)(L.ZeroPadding2D(1)(x))
    cut = L.Reshape((5, 5, 4))(L.Flatten()(pooled))
    both = L.Concatenate()([pooled, L.Conv2D(4, 1)(cut)])
    return L.Add()([both, L.Conv2D(8, 1)(cut)])


def _functions() -> keras.Model:
    """Every elementwise function of `keras.ops` that the table of operations has."""
    names = (
        "relu", "relu6", "sigmoid", "tanh", "hard_silu", "hard_sigmoid", "hard_tanh",
        "log_sigmoid", "selu", "softplus", "softsign", "exp", "softmax", "log_softmax",
        "leaky_relu", "negative", "square",
    )  # fmt: skip
    x = keras.Input((8,), name="x")
    outputs = [getattr(keras.ops, name)(x) for name in names]
    # On another value: the converter computes one sigmoid where it finds two of a value.
    return keras.Model(x, [*outputs, keras.ops.silu(outputs[-1])])


def _arithmetic() -> keras.Model:
    """Operators on tensors, on a tensor and a constant, and the functions of two."""
    x, y = keras.Input((8,), name="x"), keras.Input((8,), name="y")
    ops = keras.ops
    a, b = L.Dense(8)(x), L.Dense(8)(y)
    tensors = [x + y, x - y, x * y, ops.maximum(a, b), ops.minimum(a, b)]
    constants = [x + 1.0, 2.0 - x, x * 0.5, x / 4.0, ops.divide(y, 3.0), ops.clip(y, 0, 6)]
    return keras.Model([x, y], tensors + constants)


def _moves() -> keras.Model:
    """`keras.ops` functions that move, pick and reduce values."""
    x = keras.Input((4, 6, 3), name="x")
    ops = keras.ops
    rows = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, 6, 12))
    columns = ops.swapaxes(rows, 1, 2)
    one = ops.squeeze(ops.expand_dims(columns[:, 2:8], -1), -1)
    image = ops.image.resize(x, (8, 12), interpolation="nearest")
    pooled = ops.concatenate(
        [ops.max_pool(image, 2, 2, "same"), ops.average_pool(image, 2, 2, "same")], axis=-1
    )
    return keras.Model(x, [ops.mean(rows, axis=1), ops.max(rows, axis=1), one, pooled])


_FUNCTION_OPS = {
    "ADD": 1, "CAST": 1, "GATHER": 6, "HARD_SWISH": 1, "LOGISTIC": 2, "LOG_SOFTMAX": 1, "MUL": 3,
    "PRELU": 1, "QUANTIZE": 1, "RELU": 2, "SOFTMAX": 1, "TANH": 1,
}  # fmt: skip
_ARITHMETIC_OPS = {
    "ADD": 2, "FULLY_CONNECTED": 2, "MAXIMUM": 1, "MINIMUM": 1, "MUL": 4, "RELU": 1, "SUB": 2,
}  # fmt: skip
_MOVE_OPS = {
    "AVERAGE_POOL_2D": 1, "CONCATENATION": 1, "MAX_POOL_2D": 1, "MEAN": 1, "REDUCE_MAX": 1,
    "RESHAPE": 1, "RESIZE_NEAREST_NEIGHBOR": 1, "STRIDED_SLICE": 1, "TRANSPOSE": 2,
}  # fmt: skip

CASES = (
    _graph("sequential", _sequential, CONV_2D=1, MAX_POOL_2D=1, FULLY_CONNECTED=1, SOFTMAX=1),
    _graph("nested", _nested, CONV_2D=1, MAX_POOL_2D=1, FULLY_CONNECTED=1),
    _image("shared_layer", _shared_layer, CONV_2D=2, RELU=1, ADD=1),
    _graph("siamese", _siamese, CONV_2D=2, MEAN=2, SUB=1, FULLY_CONNECTED=1, LOGISTIC=1),
    _graph("dicts", _dicts, CONV_2D=1, MEAN=1, FULLY_CONNECTED=3, CONCATENATION=1, SOFTMAX=1),
    _graph("lists", _lists, CONV_2D=3, ADD=1),
    _graph("transfer", _transfer, CONV_2D=2, MEAN=1, FULLY_CONNECTED=1, SOFTMAX=1),
    _image(
        "squeeze_excite",
        _squeeze_excite,
        CONV_2D=1,
        MEAN=1,
        FULLY_CONNECTED=2,
        LOGISTIC=1,
        MUL=1,
    ),
    _graph("output_twice", _output_twice, FULLY_CONNECTED=2),
    _graph("input_is_output", _input_is_output, FULLY_CONNECTED=1),
    _image("branches", _branches, CONV_2D=2, MAX_POOL_2D=1, CONCATENATION=1),
    _image("fixed_and_own", _fixed_and_own, LOGISTIC=1, CONV_2D=1, CONCATENATION=1, QUANTIZE=1),
    _image("two_fixed", _two_fixed, LOGISTIC=2, CONV_2D=1, CONCATENATION=1),
    _image("residual", _residual, CONV_2D=5, ADD=2),
    _image(
        "scale_chain",
        _scale_chain,
        CONV_2D=3,
        PAD=1,
        MAX_POOL_2D=1,
        CONCATENATION=1,
        ADD=1,
    ),
    Case(name="functions", build=_functions, ops=_FUNCTION_OPS),
    Case(name="arithmetic", build=_arithmetic, ops=_ARITHMETIC_OPS),
    Case(name="moves", build=_moves, ops=_MOVE_OPS),
    _island(
        "float_stem",
        {"stem": None},
        2,
        {"inference_input_type": "float32"},
        CONV_2D=2,
        QUANTIZE=1,
        MEAN=1,
        FULLY_CONNECTED=1,
    ),
    _island(
        "float_middle",
        {"middle": None},
        3,
        {},
        CONV_2D=2,
        DEQUANTIZE=1,
        QUANTIZE=1,
        MEAN=1,
        FULLY_CONNECTED=1,
    ),
    _island(
        "float_head",
        {"head": None},
        2,
        {"inference_output_type": "float32"},
        CONV_2D=2,
        MEAN=1,
        DEQUANTIZE=1,
        FULLY_CONNECTED=1,
    ),
)
