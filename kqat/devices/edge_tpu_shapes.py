"""**Table**: the shapes and versions for which the Edge TPU leaves an operator to the CPU.

Quotations are from Coral's "TensorFlow models on the Edge TPU", sections Model requirements and
Supported operations, column Known limitations (https://coral.ai/docs/edgetpu/models-intro/). Coral
does not list the operator versions that the compiler knows; these come from users' reports.
"""

# "If a tensor has more than 3 dimensions, then only the 3 innermost dimensions may have a size
# greater than 1."
AXES = 3
# Softmax: "Supports only 1-D input tensor with a max of 16,000 elements."
SOFTMAX_ELEMENTS = 16_000
# Mean: "If a z-reduction, the z-dimension must be multiple of 4."
MEAN_CHANNELS = 4

# Operator -> the highest version that Coral's compiler takes. For a higher one it stops, or leaves
# the operator to the CPU ("Operation version not supported"). From the issues of
# github.com/google-coral/edgetpu: 631 and 845 of compiler 16.0; 396 and 420 of 15.0, of resizing
# with half_pixel_centers, as Keras does; 71 of libedgetpu.
VERSIONS = {
    "CONV_2D": 5,
    "TRANSPOSE_CONV": 3,
    "RESIZE_BILINEAR": 2,
    "RESIZE_NEAREST_NEIGHBOR": 2,
    "EXP": 1,
}


def too_many_axes(shape: tuple[int, ...]) -> str | None:
    """Why a tensor of `shape`, with or without a batch of one, does not map; or `None`."""
    if any(size != 1 for size in shape[:-AXES]):
        return f"has shape {shape}; only the three innermost axes may be larger than 1"
    return None


def shape_limit(op: str, source: tuple[int, ...], result: tuple[int, ...]) -> str | None:
    """Why an operator with these input and output shapes does not map, or `None`.

    Either both shapes have the batch of one, or neither has it.
    """
    if not source or not result:
        return None
    if op == "SOFTMAX" and (any(n != 1 for n in source[:-1]) or source[-1] > SOFTMAX_ELEMENTS):
        return f"reads {source}; SOFTMAX takes one axis of at most {SOFTMAX_ELEMENTS:,} values"
    # FullyConnected: "Output tensor is one-dimensional."
    if op == "FULLY_CONNECTED" and any(n != 1 for n in result[:-1]):
        return f"makes {result}; FULLY_CONNECTED makes one axis only"
    if op == "MEAN" and _reduces_last(source, result) and source[-1] % MEAN_CHANNELS:
        return (
            f"averages {source[-1]} channels; MEAN over channels takes a multiple of "
            f"{MEAN_CHANNELS} of them"
        )
    return None


def version_limit(op: str, version: int) -> str | None:
    """Why an operator of `version` does not map, or `None`."""
    if version > VERSIONS.get(op, version):
        return f"has version {version}; the compiler knows {op} up to version {VERSIONS[op]}"
    return None


def _reduces_last(source: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether a MEAN surely reduces the last axis: its output has the shape of the others."""
    kept = [n for n in result if n != 1]
    first, last = ([n for n in part if n != 1] for part in (source[:-1], source[-1:]))
    return bool(last) and kept == first and source[-1] not in kept
