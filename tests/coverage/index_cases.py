"""Cases for values that are no quantities: tokens, indexes, truth values."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers as L
from keras import ops

from tests.coverage.cases import INDEXES, Case, functional

TOKENS = (6,)


def _tokens(name: str, call: Callable[[Any], Any], **counts: int) -> Case:
    return Case(name=name, build=lambda: functional(TOKENS, call, "int32"), ops=counts)


def _values(name: str, shape: tuple[int, ...], call: Callable[[Any], Any], **counts: int) -> Case:
    return Case(name=name, build=lambda: functional(shape, call), ops=counts)


def _positions(x: Any) -> Any:
    table = np.random.default_rng(0).normal(size=(1, *TOKENS, 4)).astype(np.float32)
    return L.Dense(3)(L.Embedding(INDEXES, 4)(x) + table)


def _chosen(x: Any) -> list[Any]:
    a, b = L.Dense(5)(x), L.Dense(5)(x)
    both = ops.logical_and(ops.less(a, 1.0), ops.logical_not(ops.greater_equal(b, a)))
    return [ops.where(a > 0.5, a, b), ops.where(both, b, a)]


def _largest(x: Any) -> list[Any]:
    """Rows of the best scores, as a detector picks them; and what else sorts."""
    scores = L.Flatten()(L.Dense(1)(x))
    values, places = ops.top_k(scores, 2)
    rows = ops.take_along_axis(L.Dense(6)(x), ops.expand_dims(places, -1), axis=1)
    return [values, places, rows, ops.sort(scores), ops.argsort(scores)]


def _compared(x: Any) -> list[Any]:
    a, b = L.Dense(5)(x), L.Dense(5)(x)
    tests = [ops.less_equal(a, b), ops.logical_or(a > b, b > 1.0), ops.not_equal(a, b)]
    return [a, b, *tests]


def _shifted(x: Any) -> list[Any]:
    moved = ops.reshape((x + 1) * 2 - 1, (-1, 2, 3))
    rows = L.Embedding(2 * INDEXES + 2, 4)(moved)
    equal = ops.where(ops.expand_dims(ops.equal(x, 3), -1), rows_of(x), rows_of(x))
    return [rows, equal]


def rows_of(x: Any) -> Any:
    """An Embedding of its own."""
    return L.Embedding(INDEXES, 3)(x)


def _codes(x: Any) -> list[Any]:
    return [
        L.Dense(4)(L.Flatten()(ops.one_hot(x, INDEXES + 2))),
        L.CategoryEncoding(INDEXES, output_mode="count")(x),
        ops.multi_hot(x, INDEXES + 1),
        ops.take(np.random.default_rng(0).normal(size=(INDEXES, 3)), x, axis=0),
    ]


def _shown(x: Any) -> Any:
    shown = ops.expand_dims(ops.cast(ops.not_equal(x, 0), "float32"), -1)
    return L.GlobalMaxPooling1D()(rows_of(x) * shown)


def _truths(x: Any) -> Any:
    y = L.Dense(5)(x)
    some = ops.cast(ops.any(y > 0.5, axis=-1, keepdims=True), "float32")
    return y * some + ops.cast(ops.all(y > 0.0, axis=-1, keepdims=True), "float32")


def _counted(x: Any) -> list[Any]:
    places = ops.cumsum(ops.cast(ops.not_equal(x, 0), "int32"), axis=1)
    length = ops.expand_dims(ops.count_nonzero(x, axis=1), 1)
    mean = ops.divide_no_nan(ops.sum(rows_of(x), axis=1), length)
    return [mean, rows_of(ops.clip(places, 1, INDEXES) - 1)]


def _divided(x: Any) -> list[Any]:
    places = L.ZeroPadding1D(1)(L.Reshape((6, 1))(ops.pad(x // 3, ((0, 0), (2, 0)))[:, 2:]))
    return [rows_of(ops.pad(-x % 4, ((0, 0), (1, 1)), constant_values=2)), rows_of(places)]


def _read_both_ways(x: Any) -> Any:
    table = L.ReversibleEmbedding(INDEXES, 4)
    return table(L.Dense(4)(table(x)), reverse=True)


CASES: tuple[Case, ...] = (
    _tokens(
        "embedding",
        lambda x: L.Dense(4)(L.Flatten()(L.Embedding(INDEXES, 4)(x))),
        FULLY_CONNECTED=1,
        GATHER=1,
    ),
    _tokens(
        "embedding_pooled",
        lambda x: L.GlobalMaxPooling1D()(L.Embedding(INDEXES, 4)(x)),
        GATHER=1,
        REDUCE_MAX=1,
    ),
    Case(
        name="embedding_4_bits",
        build=lambda: functional(TOKENS, lambda x: L.Embedding(INDEXES, 4)(x), "int32"),
        ops={"GATHER": 1},
        policy="w4a8",
    ),
    _tokens("reversible_embedding", lambda x: L.ReversibleEmbedding(INDEXES, 4)(x), GATHER=1),
    _tokens("table_read_both_ways", _read_both_ways, FULLY_CONNECTED=2, GATHER=1),
    _tokens(
        "positions",
        _positions,
        ADD=1,
        FULLY_CONNECTED=1,
        GATHER=1,
    ),
    _tokens("codes", _codes, FULLY_CONNECTED=1, GATHER=4, MEAN=1, MUL=1, REDUCE_MAX=1),
    _tokens(
        "shifted_tokens", _shifted, ADD=1, EQUAL=1, GATHER=3, MUL=1, RESHAPE=2, SELECT_V2=1, SUB=1
    ),
    _tokens("truth", _shown, CAST=1, GATHER=2, MUL=1, NOT_EQUAL=1, REDUCE_MAX=1),
    _tokens(
        "counts",
        _counted,
        ADD=7,
        CAST=2,
        CONCATENATION=3,
        GATHER=4,
        MAXIMUM=1,
        MEAN=1,
        MINIMUM=1,
        MUL=5,
        NOT_EQUAL=1,
        RESHAPE=1,
        STRIDED_SLICE=11,
        SUB=1,
    ),
    _values(
        "truths",
        (6,),
        _truths,
        ADD=1,
        CAST=4,
        FULLY_CONNECTED=1,
        GATHER=4,
        GREATER=4,
        MUL=1,
        REDUCE_MAX=1,
        REDUCE_MIN=1,
        RESHAPE=4,
    ),
    _tokens(
        "divided",
        _divided,
        ADD=1,
        CAST=2,
        DIV=2,
        GATHER=2,
        LESS=2,
        MUL=3,
        PAD=2,
        PADV2=1,
        RESHAPE=1,
        STRIDED_SLICE=1,
        SUB=4,
    ),
    _values(
        "argmax",
        (4, 6),
        lambda x: (lambda y: [y, ops.argmax(y, axis=-1)])(L.Dense(5)(x)),
        ARG_MAX=1,
        FULLY_CONNECTED=1,
    ),
    _values(
        "argmin",
        (4, 6),
        lambda x: (lambda y: [y, ops.argmin(y, axis=1, keepdims=True)])(x * 2.0),
        ARG_MIN=1,
        MUL=1,
        RESHAPE=1,
    ),
    _values(
        "largest",
        (4, 6),
        _largest,
        BATCH_MATMUL=1,
        FULLY_CONNECTED=2,
        GATHER=4,
        RESHAPE=1,
        SUB=1,
        TOPK_V2=3,
    ),
    _values(
        "where", (6,), _chosen, FULLY_CONNECTED=2, GREATER=1, LESS=2, LOGICAL_AND=1, SELECT_V2=2
    ),
    _values(
        "comparisons",
        (6,),
        _compared,
        CAST=2,
        FULLY_CONNECTED=2,
        GREATER=2,
        LESS_EQUAL=1,
        LOGICAL_OR=1,
        MUL=2,
        NOT_EQUAL=1,
        SUB=1,
    ),
)
