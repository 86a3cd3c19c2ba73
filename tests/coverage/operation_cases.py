"""Cases for the functions of `keras.ops` that `graph_cases` has not."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tests.coverage.cases import Case
from tests.newer_keras import needs_keras

RNG = np.random.default_rng(0)
IMAGE, ROWS = (8, 8, 4), (4, 8)


def _many(shape: tuple[int, ...], *functions: Callable[[Any], Any]) -> Callable[[], keras.Model]:
    """A model of one output for each function of its one input."""

    def build() -> keras.Model:
        x = keras.Input(shape, name="x")
        return keras.Model(x, [function(x) for function in functions])

    return build


def _constant(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


# Functions of one number, by name; the second number of those that take one.
FUNCTIONS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(
        (
            "absolute arccos arccosh arcsin arcsinh arctan arctanh cbrt ceil celu cos cosh "
            "deg2rad erf erfc erfinv exp2 expm1 fabs floor gelu hard_shrink i0 log log10 log1p "
            "log2 nan_to_num rad2deg reciprocal round rsqrt sign sin sinc sinh soft_shrink "
            "sparse_plus sparse_sigmoid sqrt squareplus tan tanh_shrink trunc"
        ).split(),
        (),
    ),
    **dict.fromkeys("arctan2 floor_divide fmax fmin fmod logaddexp logaddexp2 mod".split(), (2.0,)),
    "threshold": (0.1, 0.2),
    "power": (3.0,),
    "elu": (0.5,),
    "clip": (-1.0, 1.0),
    "minimum": (0.5,),
    "maximum": (0.5,),
}


def _functions(names: list[str]) -> Callable[[], keras.Model]:
    def of(name: str) -> Callable[[Any], Any]:
        return lambda x: getattr(ops, name)(x, *FUNCTIONS[name])

    return _many(ROWS, *(of(name) for name in names))


_NAMES = list(FUNCTIONS)

MOVES = _many(
    ROWS,
    lambda x: ops.flip(x, (1, 2)),
    lambda x: ops.fliplr(x),
    lambda x: ops.roll(x, 2, 1),
    lambda x: ops.tile(x, (1, 2, 3)),
    lambda x: ops.repeat(x, 2, axis=-1),
    lambda x: ops.stack([x, x * 2.0], 1),
    lambda x: ops.split(x, 2, -1)[1] * 2.0,
    lambda x: ops.array_split(x, 3, 1)[0] * 3.0,
    lambda x: ops.hsplit(x, 2)[1] * 4.0,
    lambda x: ops.dsplit(ops.expand_dims(x, 1), [1, 3])[1] * 4.0,
    lambda x: ops.unstack(x, axis=1)[2] * 5.0,
    lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 3]]),
    lambda x: ops.moveaxis(x, 1, 2),
    lambda x: ops.take(x, [[0, 1], [1, 2]], axis=2),
    lambda x: ops.hstack([x, ops.dstack([x, x * 2.0])[:, :, :8]]),
    lambda x: ops.append(x, x * 3.0, axis=1),
    lambda x: ops.copy(ops.stop_gradient(ops.cast(x, "float32"))) * 6.0,
)
# Functions of which an operation is made of several.
MADE_OF_OTHERS = _many(
    IMAGE,
    lambda x: ops.rot90(x * 2.0, axes=(1, 2)),
    lambda x: ops.moments(x, axes=(1, 2))[0] * 2.0,
    lambda x: ops.moments(x, axes=(1, 2))[1] * 2.0,
)
REDUCTIONS = _many(
    ROWS,
    lambda x: ops.sum(x, 1),
    lambda x: ops.var(x, 1),
    lambda x: ops.std(x, -1, keepdims=True),
    lambda x: ops.min(x, (1, 2)),
    lambda x: ops.amin(x * 2.0, 1),
    lambda x: ops.amax(x * 3.0, 2),
    lambda x: ops.logsumexp(x * 0.5, 1),
    lambda x: ops.norm(x * 0.25, axis=-1),
    lambda x: ops.average(x * 4.0, axis=-1),
    lambda x: ops.cumsum(x, 1),
)
NETWORKS = _many(
    IMAGE,
    lambda x: ops.conv(x, _constant(3, 3, 4, 2)),
    lambda x: ops.depthwise_conv(x, _constant(3, 3, 4, 1)),
    lambda x: ops.image.gaussian_blur(x, (3, 5), (1.0, 2.0)),
    lambda x: ops.image.sobel_edges(x),
    lambda x: ops.adaptive_average_pool(x, (2, 2)),
    lambda x: ops.adaptive_max_pool(x, (4, 4)),
    lambda x: ops.depth_to_space(x, 2),
    lambda x: ops.space_to_depth(x, 2),
    lambda x: ops.normalize(x, axis=-1),
    lambda x: ops.glu(x),
    lambda x: ops.softmax(x * 2.0, axis=1),
)


IMAGES = _many(
    IMAGE,
    lambda x: (
        needs_keras("3.12", "extract_patches with strides") or ops.image.extract_patches(x, 3, 2)
    ),
    lambda x: ops.image.crop_images(x, 1, 1, 1, 1),
    lambda x: ops.image.pad_images(x, 1, 1, 1, 1),
    lambda x: ops.take_along_axis(x, np.int32([[[[3, 0]]]]), axis=3),
    lambda x: ops.convert_to_tensor(x) * 7.0,
    lambda x: x * ops.full_like(x, 3.0) + ops.ones_like(x) + ops.zeros_like(x),
)


def _products() -> keras.Model:
    x, y = keras.Input((3, 4), name="x"), keras.Input((4, 5), name="y")
    heads = ops.reshape(x, (-1, 3, 2, 2))
    return keras.Model(
        [x, y],
        [
            ops.matmul(x, y),
            x @ _constant(4, 5),
            ops.matmul(_constant(5, 3), x),
            ops.einsum("bij,bjk->bki", x, y),
            ops.tensordot(x, _constant(4, 2), axes=1),
            ops.dot(x, _constant(4, 3)),
            ops.inner(x, _constant(2, 4)),
            ops.dot_product_attention(heads, heads * 0.5, heads * 2.0),
            ops.divide(x, x * x + 1.0),
            x * _constant(3, 4),
            ops.tril(x * 2.0) + ops.triu(x),
        ],
    )


def _case(name: str, build: Callable[[], keras.Model], **counts: int) -> Case:
    return Case(name=name, build=build, ops=counts)


CASES: tuple[Case, ...] = (
    _case("functions_of_numbers_1", _functions(_NAMES[:20]), ADD=1, CAST=1, GATHER=20),
    _case("functions_of_numbers_2", _functions(_NAMES[20:40]), ADD=1, CAST=1, GATHER=20),
    _case("functions_of_numbers_3", _functions(_NAMES[40:]), ADD=1, CAST=1, GATHER=16, QUANTIZE=2),
    _case(
        "moves_2",
        MOVES,
        CONCATENATION=4,
        GATHER=7,
        MUL=8,
        PAD=1,
        RESHAPE=4,
        STRIDED_SLICE=6,
        TRANSPOSE=1,
    ),
    _case(
        "made_of_others",
        MADE_OF_OTHERS,
        GATHER=1,
        MEAN=2,
        MUL=3,
        RESHAPE=1,
        SQUARED_DIFFERENCE=1,
        TRANSPOSE=1,
    ),
    _case(
        "reductions",
        REDUCTIONS,
        ADD=5,
        CAST=4,
        FULLY_CONNECTED=4,
        GATHER=4,
        MEAN=5,
        MUL=6,
        REDUCE_MAX=2,
        REDUCE_MIN=2,
        RESHAPE=2,
        SQUARED_DIFFERENCE=2,
        SUB=1,
        TRANSPOSE=2,
    ),
    _case("prod", _many(ROWS, lambda x: ops.prod(x * 0.3, 1)), MUL=1, REDUCE_PROD=1),
    _case(
        "networks",
        NETWORKS,
        AVERAGE_POOL_2D=1,
        CONV_2D=1,
        DEPTHWISE_CONV_2D=3,
        DEPTH_TO_SPACE=1,
        L2_NORMALIZATION=1,
        LOGISTIC=1,
        MAX_POOL_2D=1,
        MIRROR_PAD=1,
        MUL=2,
        RESHAPE=1,
        SOFTMAX=1,
        SPACE_TO_DEPTH=1,
        STRIDED_SLICE=2,
        TRANSPOSE=2,
    ),
    _case("images", IMAGES, ADD=1, CONCATENATION=1, GATHER=1, MUL=2, PAD=1, STRIDED_SLICE=10),
    _case(
        "products",
        _products,
        ADD=2,
        BATCH_MATMUL=3,
        CAST=1,
        FULLY_CONNECTED=5,
        GATHER=1,
        MUL=9,
        RESHAPE=1,
        SOFTMAX=1,
        TRANSPOSE=7,
    ),
)
