"""`reestimate_batchnorm`: the statistics of BatchNormalization from data, with rounded weights."""

import dataclasses
from typing import Any

import keras

from kqat.base import ModelError
from kqat.graph import Node, trace
from kqat.training import calibration
from kqat.training.build import check_quantized, trained_model
from kqat.training.callbacks import QatCallback
from kqat.training.controls import Controls
from kqat.training.weight_wrapper import QuantizeWrapper


def reestimate_batchnorm(qat: keras.Model, data: Any) -> None:
    """Replaces the moving statistics of all BatchNormalization layers by means over `data`.

    In training, weights that oscillate between two integers spoil the moving averages, and those
    lag behind. Here weights stay, weights and activations are rounded, nothing is dropped, no range
    moves, and every batch has the same weight: means and variances are the averages of those of the
    batches.

    Args:
        qat: a QAT model; its statistics change, nothing else.
        data: as for `kqat.calibrate`; some hundred training samples, of all kinds in each batch.

    Raises:
        ModelError: if `qat` is no QAT model, or has no BatchNormalization.
        CalibrationError: if data are empty, misshapen or not finite.

    Reference: Nagel et al. 2022, section 2.3.1, on statistics that oscillations spoil
    (https://arxiv.org/abs/2203.11086).
    """
    graph = trace(qat)
    check_quantized(qat)
    layers = {id(node.layer): node.layer for node in graph.nodes}.values()
    wrappers = [la for la in layers if isinstance(la, QuantizeWrapper) and la.takes_statistics]
    alone = [la for la in layers if isinstance(la, keras.layers.BatchNormalization)]
    norms = [norm for wrapper in wrappers for norm in _norms(wrapper)] + alone
    if not norms:
        raise ModelError(
            f"Expected a BatchNormalization layer in '{qat.name}'. Received: none, so that there "
            "are no statistics to estimate."
        )
    counts = {id(norm): _Count(norm) for norm in norms}
    settings = [(w, w.freeze_statistics, w.between, w.controls) for w in wrappers]
    trainable = [(norm, norm.trainable) for norm in norms]

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.layer
        if isinstance(layer, QuantizeWrapper) and layer.takes_statistics:
            branch = kwargs.get("branch", 0)
            counts[id(_norms(layer)[branch])].next()
            return layer(*args, **{**kwargs, "training": True})
        if id(layer) in counts:
            counts[id(layer)].next()
            return layer(*args, **{**kwargs, "training": True})
        return layer(*args, **kwargs)

    try:
        for wrapper in wrappers:
            # What stands between the two changes nothing in inference; in training it drops values.
            wrapper.freeze_statistics, wrapper.between = False, []
            # Those of the last fit may have frozen the statistics, or shake the weights.
            wrapper.controls = Controls(still=True)
        for norm in norms:
            norm.trainable = True
        calibration.run_batches(graph, calibration.batches(data, graph), call)
    finally:
        for norm, kept in trainable:
            norm.trainable = kept
        for wrapper, frozen, between, controls in settings:
            wrapper.freeze_statistics, wrapper.between = frozen, between
            wrapper.controls = controls
        for count in counts.values():
            count.norm.momentum = count.momentum


def _norms(wrapper: QuantizeWrapper) -> list[Any]:
    return wrapper.normalizations or [wrapper.layer]


@dataclasses.dataclass
class _Count:
    """The batches that a layer has seen, which give the next one its weight in a plain mean."""

    norm: Any
    batches: int = 0

    def __post_init__(self) -> None:
        self.momentum = self.norm.momentum

    def next(self) -> None:
        self.norm.momentum = self.batches / (self.batches + 1.0)
        self.batches += 1


class ReestimateBatchNorm(QatCallback):
    """`reestimate_batchnorm` at the end of `fit`.

    Args:
        data: as for `reestimate_batchnorm`; it has to serve more than once, where `fit` does.
    """

    def __init__(self, data: Any):
        super().__init__()
        self.data = data

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Estimates."""
        reestimate_batchnorm(trained_model(self.model), self.data)
