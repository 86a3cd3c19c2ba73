"""**Table**: why each Keras layer or `keras.ops` function without a row has no integer form.

`tests/coverage/test_walk.py` visits all public names of Keras and fails if one is in no table.
"""

_HASH = "works on strings or a hash table, which no integer kernel does; run it before the model"
_HISTOGRAM = "counts a histogram, for which TFLite has no kernel; run it before the model"
_OTHER = "holds another framework's program, which the converter cannot read; rebuild it in Keras"
_SPECTRUM = (
    "computes a spectrum, whose small values are lost on an 8-bit grid, and TFLite's RFFT2D is "
    "float; run it before the model"
)
_ABSTRACT = "is a base class or describes an input, and computes nothing"

LAYER_REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("StringLookup", "IntegerLookup", "Hashing", "HashedCrossing", "TextVectorization"), _HASH
    ),
    **dict.fromkeys(
        ("AutoContrast", "Equalization", "ContrastLimitedAdaptiveHistogramEqualization"), _HISTOGRAM
    ),
    **dict.fromkeys(("FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"), _OTHER),
    **dict.fromkeys(("MelSpectrogram", "STFTSpectrogram"), _SPECTRUM),
    **dict.fromkeys(("InputLayer", "InputSpec", "Layer", "Wrapper"), _ABSTRACT),
    "Conv3DTranspose": (
        "has no int8 kernel in TFLite (CONV_3D_TRANSPOSE is float), and no cheap rewrite: each "
        "output frame sums different taps; use UpSampling3D and Conv3D"
    ),
    "Discretization": (
        "turns quantities into indexes by BUCKETIZE, whose kernel is float and missing on TFLite "
        "Micro; run it before the model"
    ),
    "MaxNumBoundingBoxes": "prepares labels, not inputs; run it before the model",
    "Pipeline": "holds preprocessing of many kinds; put its layers into the model one by one",
}  # fmt: skip

_CREATES = "takes no tensor of the model: Keras computes it when the model is built"
_PYTHON = "computes nothing in a model: it converts, inspects or defines"
_LOOPS = "runs a Python function in a loop; unroll the loop, or use a recurrent layer"
_LOSS = "is a loss or metric; compute it outside the model"
_NAN = "treats NaN or infinity, which integers do not have; use the function without it"
_SORTS = (
    "sorts, and ships by no rewrite; take what is wanted of keras.ops.sort, argsort or top_k, or "
    "run it after the model"
)
_SOLVES = "solves or factors matrices, for which TFLite has no kernel; do it outside the model"
_COMPLEX = "computes with complex numbers, for which TFLite has no integer kernel"
_BITS = "works on the bits of integers, for which TFLite Micro has no kernel"
_BATCH = "mixes the samples of a batch, or moves the batch axis, which must stay first"
_SCATTERS = "writes to computed positions, for which TFLite Micro has no int8 kernel"
_COMPOSE = "has no integer kernel; write it with products, sums and slices"
_LAYER = "is the function of a layer; use the layer"
_STATISTIC = "is a statistic of data, not of one sample; compute it outside the model"

OPERATION_REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "arange array bartlett blackman empty eye full geomspace hamming hanning identity "
            "kaiser linspace logspace ones tri zeros"
        ).split(),
        _CREATES,
    ),
    **dict.fromkeys(
        (
            "convert_to_numpy custom_gradient dtype is_tensor isreal jvp ndim "
            "saturate_cast shape size view"
        ).split(),
        _PYTHON,
    ),
    **dict.fromkeys(
        (
            "associative_scan cond fori_loop map scan switch vectorize vectorized_map while_loop"
        ).split(),
        _LOOPS,
    ),
    **dict.fromkeys(
        (
            "allclose binary_crossentropy categorical_crossentropy ctc_decode ctc_loss in_top_k "
            "psnr sparse_categorical_crossentropy ssim"
        ).split(),
        _LOSS,
    ),
    **dict.fromkeys(
        (
            "isfinite isinf isnan isneginf isposinf nanargmax nanargmin nancumprod nancumsum "
            "nanmax nanmean nanmedian nanmin nanpercentile nanprod nanquantile nanstd nansum nanvar"
        ).split(),
        _NAN,
    ),
    **dict.fromkeys(
        "argpartition median percentile quantile searchsorted unique".split(),
        _SORTS,
    ),
    **dict.fromkeys(
        (
            "cholesky cholesky_inverse det eig eigh inv logdet lstsq lu_factor matrix_rank pinv qr "
            "slogdet solve solve_triangular svd"
        ).split(),
        _SOLVES,
    ),
    **dict.fromkeys(
        (
            "angle conj conjugate fft ifft2 imag irfft istft polar real rfft stft "
            "view_as_complex view_as_real"
        ).split(),
        _COMPLEX,
    ),
    **dict.fromkeys(
        (
            "bitwise_and bitwise_invert bitwise_left_shift bitwise_not bitwise_or "
            "bitwise_right_shift bitwise_xor gcd lcm left_shift logical_xor right_shift signbit"
        ).split(),
        _BITS,
    ),
    **dict.fromkeys(
        "flipud meshgrid ravel slice vander vdot vsplit vstack".split(), _BATCH
    ),
    **dict.fromkeys(
        (
            "nonzero scatter scatter_update segment_max segment_min segment_prod segment_sum "
            "slice_update unravel_index"
        ).split(),
        _SCATTERS,
    ),
    **dict.fromkeys(
        (
            "cdist cross cumprod diag diagflat diagonal diff "
            "extract_sequences fold heaviside hypot isclose isin kron ldexp nextafter outer "
            "ptp rearrange select trace trapezoid unfold"
        ).split(),
        _COMPOSE,
    ),
    **dict.fromkeys(
        "batch_normalization layer_normalization rms_normalization separable_conv".split(), _LAYER
    ),
    **dict.fromkeys(
        "bincount corrcoef correlate digitize histogram".split(), _STATISTIC
    ),
    "sparsemax": (
        "makes numbers whose sum is not one up to Keras 3.15 "
        "(https://github.com/keras-team/keras/issues/23425); write it with top_k and cumsum: "
        "relu(x - max((cumsum(top_k(x, n)[0], -1) - 1) / [1, 2, ..., n], -1, keepdims=True))"
    ),
    **dict.fromkeys(
        "hsv_to_rgb rgb_to_hsv".split(),
        "turns colours by divisions and a hue that jumps from 1 to 0, where one step of an 8-bit "
        "grid is another colour; convert the image before the model, or train on RGB, from which "
        "a 1 x 1 convolution learns what it needs",
    ),
    **dict.fromkeys(
        (
            "affine_transform elastic_transform map_coordinates perspective_transform "
            "scale_and_translate"
        ).split(),
        "picks pixels at computed places, for which TFLite has no integer kernel; do it before the "
        "model, or use resize",
    ),
    **dict.fromkeys(
        "empty_like".split(),
        "makes numbers that nobody knows; use zeros_like",
    ),
}  # fmt: skip


def reason(name: str, table: dict[str, str]) -> str:
    """A sentence why the layer class or function `name` has no integer form; "" if unknown."""
    return f" It {table[name]}." if name in table else ""
