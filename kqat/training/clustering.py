"""`cluster`: weights of a float model moved to a few values for each kernel."""

from typing import Any

import keras
import numpy as np

from kqat.base import ModelError
from kqat.training.kmeans import clustered
from kqat.training.pruning import check_float, float_copy, kernels


def cluster(model: keras.Model, clusters: int = 16, *, only: str = "*") -> keras.Model:
    """A copy of a float model whose kernels have at most `clusters` distinct values each.

    The values are found by k-means, which starts from values spread evenly between the least and
    the greatest weight. Weights that are zero stay zero, as one of the values. Kernels of Dense,
    EinsumDense and (transposed) convolutions take part; depthwise ones and biases stay. Quantize
    the copy with `kqat.quantize_model(…, preserve="clusters")`, which keeps them.

    Args:
        model: a built float model; it is not changed.
        clusters: number of values for each kernel, 2 to 255.
        only: pattern of the names of the layers, as in `fnmatch`.

    Raises:
        ModelError: if the model is a QAT model, there is no such layer, or `clusters` is no such
            number.

    Reference: Han et al. 2016, section 3 (https://arxiv.org/abs/1510.00149).
    """
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 2 <= clusters <= 255:
        raise ModelError(
            f"Expected 2 to 255 clusters: int8 weights have 255 values. Received: {clusters!r}. "
            "Use 16."
        )
    check_float(model, "cluster")
    copy = float_copy(model)
    for layer in kernels(copy, only, "cluster"):
        kernel: Any = layer.kernel
        kernel.assign(clustered(np.asarray(kernel), clusters))
    return copy
