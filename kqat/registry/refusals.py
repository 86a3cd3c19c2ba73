"""What has no integer form, and why: every Keras layer and `keras.ops` function without a row.

`tests/coverage/test_walk.py` walks all public names of Keras; one that is in no table fails it.
"""

_HASH = "works on strings or a hash table, which no integer kernel does; run it before the model"
_HISTOGRAM = "counts a histogram, for which TFLite has no kernel; run it before the model"
_OTHER = "holds another framework's program, which the converter cannot read; rebuild it in Keras"
_SPECTRUM = (
    "computes a spectrum over many octaves, where eight bits drown all but the loudest; TFLite's "
    "RFFT2D is float; run it before the model"
)
_ABSTRACT = "is no layer of a finished model"

LAYER_REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("StringLookup", "IntegerLookup", "Hashing", "HashedCrossing", "TextVectorization"), _HASH
    ),
    **dict.fromkeys(
        ("AutoContrast", "Equalization", "ContrastLimitedAdaptiveHistogramEqualization"), _HISTOGRAM
    ),
    **dict.fromkeys(("FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"), _OTHER),
    **dict.fromkeys(("MelSpectrogram", "STFTSpectrogram"), _SPECTRUM),
    **dict.fromkeys(
        ("SimpleRNNCell", "GRUCell", "LSTMCell", "StackedRNNCells"),
        "is one step of a recurrent layer; put it into keras.layers.RNN",
    ),
    **dict.fromkeys(
        ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"),
        "has convolutions for gates, which this release does not take apart; use LSTM behind "
        "TimeDistributed convolutions",
    ),
    **dict.fromkeys(("InputLayer", "InputSpec", "Layer", "Wrapper"), _ABSTRACT),
    "Conv3DTranspose": (
        "has no TFLite kernel for int8 (CONV_3D_TRANSPOSE is float), and no cheap rewrite: each "
        "output frame sums other taps; use UpSampling3D and Conv3D"
    ),
    "Discretization": (
        "turns quantities into indexes by BUCKETIZE, whose kernel is float and missing on TFLite "
        "Micro; run it before the model"
    ),
    "Masking": (
        "makes a mask of quantities, and integer kernels know none; give attention a mask of truth "
        "values, or pad to a fixed length and leave it out"
    ),
    "MaxNumBoundingBoxes": "prepares labels, not inputs; run it before the model",
    "Pipeline": "holds preprocessing of many kinds; put its layers into the model one by one",
    "RandomCrop": "gives another size in training than in inference; run it before the model",
}  # fmt: skip

_CREATES = "takes no tensor of the model: Keras computes it when the model is built"
_PYTHON = "is no computation of a model: it converts, inspects or defines"
_LOOPS = "runs a Python function over and over; write the steps out, or use a recurrent layer"
_LOSS = "is a loss or metric; compute it outside the model"
_NAN = "looks for NaN and infinity, which integers do not have; use the function without it"
_SORTS = "sorts, for which TFLite Micro has no kernel; do it after the model"
_SOLVES = "solves or factors matrices, for which TFLite has no kernel; do it outside the model"
_COMPLEX = "computes with complex numbers, for which TFLite has no integer kernel"
_BITS = "works on the bits of integers, for which TFLite Micro has no kernel"
_BATCH = "mixes the samples of a batch, or moves the batch axis, which ships with a fixed size"
_SCATTERS = "writes to computed places, for which TFLite Micro has no int8 kernel"
_COMPOSE = "has no kernel of its own; compose it of products, sums and slices"
_LAYER = "is a layer's own function; use the layer"
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
            "convert_to_numpy convert_to_tensor custom_gradient dtype is_tensor isreal jvp ndim "
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
            "psnr sparse_categorical_crossentropy"
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
        "argpartition argsort median percentile quantile searchsorted sort top_k unique".split(),
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
        "broadcast_to flipud meshgrid ravel rot90 slice vander vdot vsplit vstack".split(), _BATCH
    ),
    **dict.fromkeys(
        (
            "nonzero scatter scatter_update segment_max segment_min segment_prod segment_sum "
            "slice_update take_along_axis unravel_index"
        ).split(),
        _SCATTERS,
    ),
    **dict.fromkeys(
        (
            "cdist conv_transpose cross cumprod diag diagflat diagonal diff divide_no_nan "
            "extract_sequences fold heaviside hypot isclose isin kron ldexp nextafter outer "
            "ptp rearrange select sparsemax trace trapezoid unfold"
        ).split(),
        _COMPOSE,
    ),
    **dict.fromkeys(
        "batch_normalization layer_normalization rms_normalization separable_conv".split(), _LAYER
    ),
    **dict.fromkeys(
        "bincount corrcoef correlate digitize histogram moments".split(), _STATISTIC
    ),
    **dict.fromkeys(
        "count_nonzero".split(),
        "counts truth values, for which TFLite Micro has no kernel; reduce with max or sum",
    ),
    **dict.fromkeys(
        "empty_like full_like ones_like zeros_like".split(),
        "makes a constant of the batch's size; multiply the tensor by 0 and add a number",
    ),
}  # fmt: skip


def reason(name: str, table: dict[str, str]) -> str:
    """Why the layer class or function `name` has no integer form, to end a message; or nothing."""
    return f" It {table[name]}." if name in table else ""
