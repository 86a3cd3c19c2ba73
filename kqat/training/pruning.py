"""`prune` and `Pruning`: weights set to zero by magnitude, at once or on a schedule."""

import fnmatch
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers

from kqat.base import ModelError, TextEnum
from kqat.graph import check_as_many, copied, duplicate, trace
from kqat.grids import nearest_name
from kqat.training.build import all_layers, is_quantized

# The layers whose `kernel` is pruned or clustered. Depthwise ones have few weights, all of which
# count.
_KERNELS = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose)


class Pattern(TextEnum):
    """Which weights are zero together."""

    SINGLE = "single"
    CHANNEL = "channel"
    TWO_OF_FOUR = "2:4"


def prune(
    model: keras.Model, sparsity: float = 0.5, *, pattern: str = "single", only: str = "*"
) -> keras.Model:
    """A copy of a float model of whose weights the smallest are zero.

    Kernels of Dense, EinsumDense and (transposed) convolutions are pruned, each for itself;
    depthwise ones and biases stay. Train the copy on with `kqat.Pruning`, or quantize it with
    `kqat.quantize_model(…, preserve="sparsity")`, which keep the zeros.

    Args:
        model: a built float model; it is not changed.
        sparsity: share of the weights that become zero, in (0, 1).
        pattern: `"single"`: each weight by its magnitude; `"channel"`: whole output channels, by
            their Euclidean norm; `"2:4"`: two of every four neighbouring input channels, for
            `sparsity=0.5`.
        only: pattern of the names of the layers to prune, as in `fnmatch`.

    Raises:
        ModelError: if the model is a QAT model, there is no such layer, the pattern does not fit
            its kernel, or an option makes no sense.

    Reference: Zhu and Gupta 2017, section 3 (https://arxiv.org/abs/1710.01878); for 2:4, Mishra et
    al. 2021, section 3 (https://arxiv.org/abs/2104.08378).
    """
    kind = checked_pattern(sparsity, pattern)
    check_float(model, "prune")
    copy = float_copy(model)
    for layer in kernels(copy, only, "prune"):
        kernel: Any = layer.kernel
        value = np.asarray(kernel)
        kernel.assign(np.where(mask(layer, value, sparsity, kind), value, 0.0))
    return copy


class Pruning(keras.callbacks.Callback):
    """Sets more and more weights to zero while a float model trains, and keeps them there.

    After `t` batches the share of zeros is

        sparsity + (start - sparsity) * (1 - (t - begin) / (end - begin))**power

    between `begin` and `end`. Every `every` batches the smallest weights are chosen anew, so a
    weight can come back until `end`; after each batch the chosen ones are set to zero.

    Args:
        sparsity: the share in the end, in (0, 1).
        end: the batch at which it is reached; a third of the training is usual.
        begin: the first batch at which weights are pruned.
        start: the share at `begin`.
        every: batches between two choices.
        power: 3 in the paper.
        pattern, only: as of `kqat.prune`; `"2:4"` prunes at `begin` all that it prunes.

    Raises:
        ModelError: if an option makes no sense; when training begins, as `kqat.prune`.

    Reference: Zhu and Gupta 2017, section 3, equation 1 (https://arxiv.org/abs/1710.01878).
    """

    def __init__(
        self,
        sparsity: float,
        end: int,
        *,
        begin: int = 0,
        start: float = 0.0,
        every: int = 100,
        power: float = 3.0,
        pattern: str = "single",
        only: str = "*",
    ):
        super().__init__()
        self.pattern = checked_pattern(sparsity, pattern)
        if not 0 <= begin < end or every < 1 or not 0.0 <= start <= sparsity or not power > 0:
            raise ModelError(
                f"Expected 0 <= begin < end, every >= 1, 0 <= start <= sparsity, power > 0. "
                f"Received: begin={begin}, end={end}, every={every}, start={start}, "
                f"sparsity={sparsity}, power={power}."
            )
        self.sparsity, self.start, self.power = sparsity, start, power
        self.begin, self.end, self.every, self.only = begin, end, every, only
        self.batch = 0
        self._masks: dict[int, np.ndarray] = {}

    def share(self, batch: int) -> float:
        """The share of zeros that the schedule asks for after `batch` batches."""
        if self.pattern is Pattern.TWO_OF_FOUR:
            return self.sparsity
        done = min(max((batch - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.sparsity + (self.start - self.sparsity) * (1.0 - done) ** self.power

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks the model."""
        check_float(self.model, "prune")
        for layer in kernels(self.model, self.only, "prune"):
            mask(layer, np.asarray(layer.kernel), self.sparsity, self.pattern)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Chooses anew where it is time, and sets the chosen weights to zero."""
        self.batch += 1
        since = self.batch - self.begin
        if since < 0:
            return
        choose = self.batch == self.end or (self.batch < self.end and since % self.every == 0)
        for layer in kernels(self.model, self.only, "prune"):
            kernel: Any = layer.kernel
            if choose or id(layer) not in self._masks:
                share = self.share(self.batch)
                self._masks[id(layer)] = mask(layer, np.asarray(kernel), share, self.pattern)
            kernel.assign(np.asarray(kernel) * self._masks[id(layer)])

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Sets them to zero again: an optimizer with `use_ema` has just averaged all weights."""
        for layer in kernels(self.model, self.only, "prune"):
            kernel: Any = layer.kernel
            if id(layer) in self._masks:
                kernel.assign(np.asarray(kernel) * self._masks[id(layer)])


def checked_pattern(sparsity: float, pattern: str) -> Pattern:
    """The pattern of that name.

    Raises:
        ModelError: if there is none, or the sparsity does not go with it.
    """
    if pattern not in tuple(Pattern):
        raise ModelError(
            f"Expected pattern to be one of {[str(p) for p in Pattern]}. Received: {pattern!r}."
        )
    if isinstance(sparsity, bool) or not 0.0 < sparsity < 1.0:
        raise ModelError(f"Expected a sparsity in (0, 1). Received: {sparsity!r}. Use 0.5.")
    if pattern == Pattern.TWO_OF_FOUR and sparsity != 0.5:
        raise ModelError(
            f"Expected sparsity=0.5 for the pattern '2:4'. Received: {sparsity!r}. Use 0.5, or "
            "pattern='single'."
        )
    return Pattern(pattern)


def float_copy(model: keras.Model) -> keras.Model:
    """A copy of a float model with weights of its own.

    Layers that Keras cannot make anew from their configs are copied by what the model computes; a
    subclassed model then is a functional one.

    Raises:
        ModelError: if layers share weights that their copies would not.
        UnsupportedLayerError: if a layer cannot be copied.
    """
    try:
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        return copy
    except Exception:  # Whatever a user's own class raises that is made anew from its config.
        graph = trace(model)
    copy = copied(graph, model.name, lambda node: duplicate(node.layer, node.name))
    check_as_many(model, copy, "kqat.Pruning prunes a model while it trains, without a copy.")
    return copy


def check_float(model: Any, what: str) -> None:
    """Raises ModelError for a QAT model, or what is no model."""
    if not isinstance(model, keras.Model) or is_quantized(model):
        raise ModelError(
            f"Expected a float model to {what}. Received: {getattr(model, 'name', model)!r}. "
            "Start from the float model, and quantize it with "
            "kqat.quantize_model(…, preserve=…)."
        )


def kernels(model: keras.Model, only: str, what: str) -> list[Any]:
    """The layers whose kernel can be pruned or clustered and whose name matches.

    Raises:
        ModelError: if there is none.
    """
    found = list(_kernels(model, only))
    if not found:
        known = [layer.name for layer in _kernels(model, "*")]
        raise ModelError(
            f"Expected Dense or convolutional layers to {what} whose name matches {only!r}. "
            f"Received: '{model.name}', which has {', '.join(known) or 'none at all'}."
            + nearest_name(only, known)
        )
    return found


def _kernels(model: keras.Model, only: str) -> Iterator[Any]:
    met = set()
    for layer in all_layers(model):
        kind = type(layer) in _KERNELS and id(layer) not in met
        if kind and fnmatch.fnmatchcase(layer.name, only):
            met.add(id(layer))
            yield layer


def mask(layer: Any, kernel: np.ndarray, sparsity: float, pattern: Pattern) -> np.ndarray:
    """Which weights stay: booleans of the kernel's shape.

    Raises:
        ModelError: if the kernel has no such pattern.
    """
    if pattern is Pattern.TWO_OF_FOUR:
        return _two_of_four(layer, kernel)
    size = np.abs(kernel)
    if pattern is Pattern.CHANNEL:
        axis = -2 if isinstance(layer, _TRANSPOSED) else -1
        moved = np.moveaxis(kernel, axis, -1)
        size = np.sqrt(np.square(moved, dtype=np.float64).reshape(-1, moved.shape[-1]).sum(axis=0))
        kept = _largest(size, sparsity)
        shape = [1] * kernel.ndim
        shape[axis] = -1
        return np.broadcast_to(kept.reshape(shape), kernel.shape)
    return _largest(size, sparsity)


def _largest(size: np.ndarray, sparsity: float) -> np.ndarray:
    """All but the given share of the smallest; of equal ones the first go first."""
    order = np.argsort(size.reshape(-1), kind="stable")
    kept = np.ones(size.size, bool)
    kept[order[: round(sparsity * size.size)]] = False
    return kept.reshape(size.shape)


def _two_of_four(layer: Any, kernel: np.ndarray) -> np.ndarray:
    axis = 0 if isinstance(layer, layers.Dense) else -2
    if isinstance(layer, (layers.EinsumDense, *_TRANSPOSED)) or kernel.shape[axis] % 4:
        raise ModelError(
            f"Expected a Dense or Conv layer whose input channels come in fours for the pattern "
            f"'2:4'. Received: '{layer.name}' of type {type(layer).__name__} with a kernel of "
            f"shape {kernel.shape}. Leave it out by `only`, or use pattern='single'."
        )
    moved = np.moveaxis(np.abs(kernel), axis, -1)
    fours = moved.reshape(*moved.shape[:-1], -1, 4)
    rank = np.argsort(np.argsort(-fours, axis=-1, kind="stable"), axis=-1)
    return np.moveaxis((rank < 2).reshape(moved.shape), -1, axis)
