"""tfmot `QuantizeConfig`s as users write them; skips the tests where tfmot is not installed."""

import sys
import warnings
from typing import Any

import pytest

with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
    # tfmot imports distutils, and leaves TF_USE_LEGACY_KERAS to every process started from here.
    warnings.simplefilter("ignore")
    patch.setenv("TF_USE_LEGACY_KERAS", "1")
    tfmot = pytest.importorskip("tensorflow_model_optimization")
    tf_keras = pytest.importorskip("tf_keras")

quantizers = tfmot.quantization.keras.quantizers
# Not among the public names; tfmot's own schemes use it.
NO_QUANTIZER = sys.modules[quantizers.LastValueQuantizer.__module__].NoQuantizer()

WEIGHTS = {"num_bits": 8, "per_axis": False, "symmetric": True, "narrow_range": True}
OUTPUT = {"num_bits": 8, "per_axis": False, "symmetric": False, "narrow_range": False}


def weight(**changes: Any) -> Any:
    """The quantizer that tfmot gives kernels."""
    return quantizers.LastValueQuantizer(**{**WEIGHTS, **changes})


def average(**changes: Any) -> Any:
    """The quantizer that tfmot gives activations."""
    return quantizers.MovingAverageQuantizer(**{**OUTPUT, **changes})


def fixed(low: float, high: float, **changes: Any) -> Any:
    """A range that the user knows."""
    options = {"num_bits": 8, "narrow_range": False, **changes}
    return quantizers.FixedQuantizer(init_min=low, init_max=high, **options)


class DefaultDenseQuantizeConfig(tfmot.quantization.keras.QuantizeConfig):
    """The example of tfmot's comprehensive guide; its 8-bit kernel has one scale."""

    kernel_bits = 8

    def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
        return [(layer.kernel, weight(num_bits=self.kernel_bits, narrow_range=False))]

    def get_activations_and_quantizers(self, layer: Any) -> list[Any]:
        return [(layer.activation, average())]

    def set_quantize_weights(self, layer: Any, quantize_weights: list[Any]) -> None:
        layer.kernel = quantize_weights[0]

    def set_quantize_activations(self, layer: Any, quantize_activations: list[Any]) -> None:
        layer.activation = quantize_activations[0]

    def get_output_quantizers(self, layer: Any) -> list[Any]:
        return []

    def get_config(self) -> dict[str, Any]:
        return {}


class ModifiedDenseQuantizeConfig(DefaultDenseQuantizeConfig):
    """The guide's second one: 4 bits instead of 8 for the kernel."""

    kernel_bits = 4


class Config(DefaultDenseQuantizeConfig):
    """Answers with what it was made of; weights and activations by attribute of the layer."""

    def __init__(
        self,
        weights: dict[str, Any] | None = None,
        activations: dict[str, Any] | None = None,
        output: tuple[Any, ...] = (),
    ):
        self.weights, self.activations, self.output = weights or {}, activations or {}, output

    def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
        return [(getattr(layer, name), quantizer) for name, quantizer in self.weights.items()]

    def get_activations_and_quantizers(self, layer: Any) -> list[Any]:
        return [(getattr(layer, name), quantizer) for name, quantizer in self.activations.items()]

    def get_output_quantizers(self, layer: Any) -> list[Any]:
        return list(self.output)


class AnyKernel(Config):
    """For every layer of a model: its kernel, if it has one, and its output."""

    def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
        return [(layer.kernel, weight(per_axis=True))] if hasattr(layer, "kernel") else []


class OwnArithmetic(quantizers.LastValueQuantizer):
    """A user's quantizer that rounds in its own way."""

    def __call__(self, inputs: Any, training: Any, weights: Any, **kwargs: Any) -> Any:
        return inputs
