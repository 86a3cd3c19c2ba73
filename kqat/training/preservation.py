"""What a QAT model keeps of its float weights while it trains: zeros, or few distinct values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import layers, ops

from kqat.base import PolicyError, TextEnum
from kqat.grids import QuantSpec
from kqat.training.kmeans import clustered

# A kernel with more distinct values than a grid of eight bits has integers was not clustered.
MOST_CLUSTERS = 255
# A kernel with fewer zeros than this share was not pruned.
LEAST_SPARSITY = 0.1


class Preserve(TextEnum):
    """What is kept."""

    SPARSITY = "sparsity"
    CLUSTERS = "clusters"


@dataclasses.dataclass(frozen=True)
class Preserved:
    """What is kept of one weight: whether its zeros, and how many distinct values (0 for any)."""

    sparsity: bool = False
    clusters: int = 0


def preserved_kinds(preserve: Any) -> tuple[Preserve, ...]:
    """The kinds that `preserve` names: one, or a sequence of them; none for `None`.

    Raises:
        PolicyError: if it names something else.
    """
    asked = () if preserve is None else (preserve,) if isinstance(preserve, str) else preserve
    if not isinstance(asked, Sequence) or any(one not in tuple(Preserve) for one in asked):
        raise PolicyError(
            f"Expected preserve to be 'sparsity', 'clusters' or both. Received: {preserve!r}."
        )
    return tuple(dict.fromkeys(Preserve(one) for one in asked))


def preserved_in(
    layer: Any, specs: Mapping[str, QuantSpec], kinds: Sequence[Preserve], folds: int
) -> dict[str, Preserved]:
    """What is kept of each weight of a float layer.

    Args:
        layer: the layer.
        specs: name of a weight -> its grid.
        kinds: what to keep.
        folds: how many BatchNormalizations fold into the layer.

    Raises:
        PolicyError: if a grid cannot hold what is kept.
    """
    found = {}
    for name, spec in specs.items():
        weight = np.asarray(getattr(layer, name))
        zeros = Preserve.SPARSITY in kinds and np.mean(weight == 0.0) >= LEAST_SPARSITY
        count = np.unique(weight).size if Preserve.CLUSTERS in kinds else 0
        # So many values are none that were meant.
        count = count if count <= min(MOST_CLUSTERS, weight.size // 2) else 0
        if zeros:
            check_holds_zero(layer.name, name, spec)
        if count:
            check_holds_clusters(layer.name, name, spec, count)
            check_folds(layer.name, name, spec, folds)
        if zeros or count:
            found[name] = Preserved(bool(zeros), count)
    return found


def check_folds(layer: str, name: str, spec: QuantSpec, folds: int) -> None:
    """Raises PolicyError where folding would give a value another integer in each channel."""
    if folds > 1 or (folds and spec.axis is None):
        found = f"{folds} BatchNormalizations" if folds > 1 else "one scale per tensor"
        raise PolicyError(
            f"Expected one BatchNormalization behind '{layer}', and a scale per channel, for "
            f"preserve='clusters': it folds into '{name}'. Received: {found}. Use axis='channel', "
            "or call the layer once."
        )


def turned_over(
    layer: Any, norm: Any, preserved: Mapping[str, Preserved]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The weights of a layer and its BatchNormalization with no gamma below zero.

    Folding turns the integers of such a channel over, so a kernel of k values would have up to 2k
    in the file. Here the channel is turned over before, and the kernel clustered anew. The function
    stays the same but for that.
    """
    weights, numbers = layer.get_weights(), norm.get_weights()
    kept = preserved.get("kernel", Preserved())
    gamma = np.asarray(norm.gamma) if norm.scale else np.ones(1, np.float32)
    if not kept.clusters or not (gamma < 0.0).any():
        return weights, numbers
    sign = np.where(gamma < 0.0, np.float32(-1.0), np.float32(1.0))
    kernel = weights[0]
    # A depthwise kernel ends in (channels, multiplier), a transposed one in (outputs, inputs).
    axes = [a for a in (-1, -2) if kernel.shape[a] == gamma.size]
    depthwise = isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D)
    transposed = isinstance(layer, layers.Conv1DTranspose | layers.Conv2DTranspose)
    if depthwise:
        turned = kernel * sign.reshape(kernel.shape[-2:])
    else:
        axis = -2 if transposed else axes[0]
        shape = [1] * kernel.ndim
        shape[axis] = -1
        turned = kernel * sign.reshape(shape)
    weights[0] = clustered(turned, kept.clusters)
    if layer.use_bias:
        weights[1] = weights[1] * sign
    places = {id(v): i for i, v in enumerate(norm.weights)}
    for variable in (norm.gamma, norm.moving_mean):
        numbers[places[id(variable)]] = np.asarray(variable) * sign
    return weights, numbers


def check_holds_zero(layer: str, name: str, spec: QuantSpec) -> None:
    """Raises PolicyError where a grid has no zero."""
    if spec.bits == 1:
        raise PolicyError(
            f"Expected a grid with a zero for preserve='sparsity'. Received: the grid of −1 and 1 "
            f"for '{name}' of '{layer}'. Give it 'ternary', or leave preserve out."
        )


def check_holds_clusters(layer: str, name: str, spec: QuantSpec, clusters: int) -> None:
    """Raises PolicyError where a grid has fewer integers than a weight has values."""
    held = 2 if spec.bits == 1 else 2 * spec.qmax + 1
    if clusters > held:
        needed = next(bits for bits in range(2, 9) if 2**bits - 1 >= clusters)
        raise PolicyError(
            f"Expected a grid of at least {clusters} integers for preserve='clusters': '{name}' of "
            f"'{layer}' has so many values. Received: {spec.bits} bits, which hold {held}. Use "
            f"kqat.cluster(model, {held}), or {needed} bits."
        )


def cluster_means(value: Any, assignment: Any, clusters: int) -> Any:
    """`value` with each number replaced by the mean of its cluster.

    All numbers of a cluster get the mean of their gradients, so they move together.

    Args:
        value: float32 of any shape.
        assignment: int32 of that shape, the cluster of each number.
        clusters: how many there are.
    """
    index = ops.reshape(assignment, (-1,))
    flat = ops.reshape(value, (-1,))
    sums = ops.segment_sum(flat, index, num_segments=clusters)
    counts = ops.segment_sum(ops.ones_like(flat), index, num_segments=clusters)
    means = sums / ops.maximum(counts, 1.0)
    return ops.reshape(ops.take(means, index), value.shape)
