"""`TensorBoardQuantization`: how the grids of a QAT model fare during `fit`, for TensorBoard.

It bears the name of Keras's own callback, `keras.callbacks.TensorBoard`, beside which it is used.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from kqat.analysis.grid_use import SAMPLES, VALUES, RoundedTensor, noting, rounded_tensors
from kqat.base import ModelError
from kqat.graph import Graph, trace
from kqat.grids import LOWEST
from kqat.training import (
    ActivationQuantizer,
    Oscillations,
    QatCallback,
    as_tensors,
    integers_of,
    some_samples,
    trained_model,
)

# Of the moving average of oscillating, and how often a weight does that is counted.
MOMENTUM, OFTEN = 0.01, 0.005
_SUFFIX = "_device"


class TensorBoardQuantization(QatCallback):
    """Writes scalars about the grids of a QAT model into a folder that TensorBoard reads.

    For each value that is rounded: `ranges/<value>/low` and `/high`, and with `data`
    `clipped/<value>`, the share of its values outside the range. For each weight:
    `steps/<layer>/<weight>` (the mean over channels), `clipped/<layer>/<weight>`, and
    `oscillating/<layer>/<weight>`, the share of weights that go to and fro between two integers:
    those of which the moving average of oscillating, as in `kqat.FreezeOscillations`, is above
    0.005. The total over all weights is `oscillating/all`. With `kqat.GapCallback` in the same
    `fit`, before it or behind it, its logs are written as `device/val_accuracy_device` and so on.

    The training step is not traced anew and computes nothing more. What is measured runs beside it,
    in a graph of its own that is traced once, and again where a callback changes the grids.

    Args:
        log_dir: folder for the file of events, as of `keras.callbacks.TensorBoard`.
        update_freq: `"epoch"`: after each epoch, over its number; or an integer: after so many
            steps, over the number of steps.
        data: typical inputs, as for `kqat.calibrate`; at most 128 are run for each record. Without
            them nothing is said about clipped values.
        oscillations: whether weights are followed after each step. It costs one rounding of all
            weights a step, and three times their memory.

    Raises:
        ModelError: if `update_freq` is neither, or the model in `fit` is not a QAT model.
        CalibrationError: if data do not fit the model.

    Reference: Nagel et al. 2022, section 4.1 (https://arxiv.org/abs/2203.11086), for oscillations.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "logs",
        *,
        update_freq: int | str = "epoch",
        data: Any = None,
        oscillations: bool = True,
    ) -> None:
        super().__init__()
        whole = isinstance(update_freq, int) and not isinstance(update_freq, bool)
        if update_freq != "epoch" and not (whole and int(update_freq) > 0):
            raise ModelError(
                "Expected 'epoch' or a number of steps above zero. Received: "
                f"update_freq={update_freq!r}. Use 'epoch' or 100."
            )
        self.log_dir = log_dir
        self.update_freq = update_freq
        self.data = data
        self.oscillations = oscillations
        self._step = 0
        self._of: keras.Model | None = None
        self._key: list[Any] | None = None
        self._inputs: list[Any] | None = None
        self._writer: Any = None
        self._measure: Callable[[], Any] | None = None
        self._follow: Callable[[], None] | None = None
        self._tensors: list[RoundedTensor] = []
        self._followed: list[tuple[RoundedTensor, Oscillations]] = []
        self._unwritten: tuple[int, dict[str, Any]] | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the file and finds what is to be measured."""
        super().on_train_begin(logs)
        import tensorflow as tf

        if self._of is not self.model:
            self._of, self._key = self.model, None
        self._step, self._unwritten = 0, None
        self._prepare()
        self._writer = tf.summary.create_file_writer(str(Path(self.log_dir) / "quantization"))

    def _prepare(self) -> None:
        """Finds what is to be measured; anew where grids changed, as `kqat.FallingBits` has it."""
        key = [
            layer.is_frozen if isinstance(layer, ActivationQuantizer) else dict(layer.weight_specs)
            for layer in self.quantizing_layers()
        ]
        if key == self._key:
            return
        self._key = key
        model = trained_model(self.model)
        graph = trace(model)
        self._tensors = rounded_tensors(model, graph)
        if self.data is not None and self._inputs is None:
            self._inputs = as_tensors(some_samples(self.data, graph, SAMPLES), graph)
        self._measure = _compiled(_Measurement(graph, self._tensors, self._inputs).numbers)
        self._followed = [
            (tensor, Oscillations(integers_of(tensor.wrapper, tensor.what)))
            for tensor in self._tensors
            if self.oscillations and tensor.wrapper is not None and tensor.branch == 0
        ]
        self._follow = _compiled(self._follow_all) if self._followed else None

    def _follow_all(self) -> None:
        for tensor, followed in self._followed:
            assert tensor.wrapper is not None
            followed.update(integers_of(tensor.wrapper, tensor.what), MOMENTUM)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Follows the weights, and writes where it is time."""
        self._step += 1
        if batch == 0:
            self._prepare()
        if self._follow is not None:
            self._follow()
        if self.update_freq != "epoch" and self._step % int(self.update_freq) == 0:
            self._write(self._step, self._scalars())

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what callbacks behind this one added to the last epoch's logs."""
        self._write_device()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes where it is time."""
        if self.update_freq == "epoch":
            self._write(epoch, self._scalars())
        # Callbacks behind this one, as GapCallback may be, add to the same dict.
        step = epoch if self.update_freq == "epoch" else self._step
        self._unwritten = None if logs is None else (step, logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Closes the file."""
        self._write_device()
        if self._writer is not None:
            self._writer.close()

    def _write_device(self) -> None:
        if self._unwritten is None:
            return
        step, logs = self._unwritten
        self._unwritten = None
        found = {f"device/{k}": float(v) for k, v in logs.items() if k.endswith(_SUFFIX)}
        self._write(step, found)

    def _scalars(self) -> dict[str, float]:
        """Every scalar now, by its tag."""
        self._prepare()
        assert self._measure is not None
        numbers = [np.asarray(ops.convert_to_numpy(part)) for part in self._measure()]
        found: dict[str, float] = {}
        values = [t for t in self._tensors if t.quantizer is not None]
        weights = [t for t in self._tensors if t.wrapper is not None]
        for tensor, (low, high, known), share in zip(values, numbers[0], numbers[1], strict=True):
            if known > 0.0:
                name = tensor.title
                found |= {f"ranges/{name}/low": low, f"ranges/{name}/high": high}
                if share >= 0.0:
                    found[f"clipped/{name}"] = share
        for tensor, (step, clipped) in zip(weights, numbers[2], strict=True):
            name = tensor.title
            found |= {f"steps/{name}": step, f"clipped/{name}": clipped}
        often = total = 0
        for tensor, followed in self._followed:
            count = int(np.count_nonzero(np.asarray(followed.frequency) > OFTEN))
            found[f"oscillating/{tensor.title}"] = count / max(followed.size, 1)
            often, total = often + count, total + followed.size
        if total:
            found["oscillating/all"] = often / total
        return {tag: float(number) for tag, number in found.items()}

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        # tf.summary.scalar needs the package tensorboard; a file of events does not.
        import tensorflow as tf

        metadata = tf.compat.v1.SummaryMetadata(
            plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        )
        metadata.data_class = 1  # DATA_CLASS_SCALAR of TensorBoard's summary.proto
        with self._writer.as_default():
            for tag, number in scalars.items():
                tf.summary.write(tag, np.float32(number), step=step, metadata=metadata)
        self._writer.flush()


def _compiled(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function as one graph, where the backend has such; traced at its first call."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, autograph=False)


class _Measurement:
    """Ranges and clipped shares of values, steps and clipped shares of weights, as three tensors.

    Args:
        graph: of the QAT model.
        tensors: what is measured.
        inputs: on which values are counted, one tensor per input, or `None`.
    """

    def __init__(self, graph: Graph, tensors: list[RoundedTensor], inputs: Any) -> None:
        self.graph = graph
        self.values = [t for t in tensors if t.quantizer is not None]
        self.weights = [t for t in tensors if t.wrapper is not None]
        self.inputs = inputs

    def numbers(self) -> tuple[Any, Any, Any]:
        """`(values, 3)` low, high, whether known; `(values,)` clipped, −1 where not measured;
        `(weights, 2)` mean step and clipped.
        """
        ranges = [ops.stack([ops.cast(x, "float32") for x in self._range(t)]) for t in self.values]
        shares = self._shares()
        unknown = ops.convert_to_tensor(-1.0, "float32")
        clipped = [shares.get((id(t.quantizer), t.site), unknown) for t in self.values]
        weights = [self._weight(t) for t in self.weights]
        none = ops.zeros((0, 3)), ops.zeros((0,)), ops.zeros((0, 2))
        found = ranges, clipped, weights
        return tuple(ops.stack(x) if x else n for x, n in zip(found, none, strict=True))

    def _range(self, tensor: RoundedTensor) -> tuple[Any, Any, Any]:
        assert tensor.quantizer is not None
        low, high = tensor.quantizer.bounds()
        return low, high, tensor.quantizer.known()

    def _shares(self) -> dict[tuple[int, int], Any]:
        if self.inputs is None:
            return {}
        outside: dict[tuple[int, int], list[Any]] = {}

        def note(quantizer: ActivationQuantizer, site: int, value: Any) -> None:
            real = ops.cast(quantizer.clamped(value), "float32")
            scale, spec = quantizer.scale(), quantizer.spec
            # As the grid lies, with zero on one of its integers.
            low = -ops.floor(0.5 - quantizer.bounds()[0] / scale) * scale
            high, half = low + float(spec.qmax - spec.qmin) * scale, scale * 0.5
            shown = real != LOWEST if quantizer.hides else ops.ones_like(real, "bool")
            beyond = ops.logical_or(real < low - half, real > high + half)
            beyond = ops.logical_and(beyond, shown)
            pair = [ops.sum(ops.cast(part, "float32")) for part in (beyond, shown)]
            outside.setdefault((id(quantizer), site), []).append(ops.stack(pair))

        self.graph.run(self.inputs, noting(note))
        sums = {key: sum(parts[1:], parts[0]) for key, parts in outside.items()}
        return {key: pair[0] / ops.maximum(pair[1], 1.0) for key, pair in sums.items()}

    def _weight(self, tensor: RoundedTensor) -> Any:
        wrapper, name, spec = tensor.wrapper, tensor.what, tensor.spec
        assert wrapper is not None and name != VALUES
        scale = wrapper.scale(name, tensor.branch)
        position = wrapper.folded(name, tensor.branch) / ops.where(scale > 0.0, scale, 1.0)
        outside = ops.logical_or(position < spec.qmin - 0.5, position > spec.qmax + 0.5)
        return ops.stack([ops.mean(scale), ops.mean(ops.cast(outside, "float32"))])
