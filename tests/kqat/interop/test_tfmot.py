"""tfmot `QuantizeConfig`s of many kinds, read for Keras 3 layers, planned, trained and shipped."""

import dataclasses
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
import tflite_export
from kqat import numerics
from kqat.calibration import calibrate
from kqat.errors import PolicyError, UnsupportedLayerError
from kqat.interop.tfmot import INPUT_CONFIG, translate, translate_policy
from kqat.tracing import trace
from kqat.wrapping import wrap
from tflite_export import flatbuffer

with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
    # tfmot imports distutils, and sets TF_USE_LEGACY_KERAS for every process started from here.
    warnings.simplefilter("ignore")
    patch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    tfmot = pytest.importorskip("tensorflow_model_optimization")

quantizers = tfmot.quantization.keras.quantizers
Schema = Callable[..., Any]

WEIGHTS = {"num_bits": 8, "per_axis": False, "symmetric": True, "narrow_range": True}
OUTPUT = {"num_bits": 8, "per_axis": False, "symmetric": False, "narrow_range": False}


def weight(**changes: Any) -> Any:
    """The quantizer that tfmot gives kernels."""
    return quantizers.LastValueQuantizer(**{**WEIGHTS, **changes})


def average(**changes: Any) -> Any:
    """The quantizer that tfmot gives activations."""
    return quantizers.MovingAverageQuantizer(**{**OUTPUT, **changes})


def fixed(low: float, high: float, **changes: Any) -> Any:
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


NOTHING = Config()
SPEC8 = kqat.QuantSpec(bits=8, symmetric=True, narrow_range=True)
CHANNELS = dataclasses.replace(SPEC8, axis="channel")
AVERAGE = kqat.MovingAverage(0.999)


def built(layer: keras.layers.Layer) -> keras.layers.Layer:
    """`layer` in a model of 8 x 8 x 3 inputs."""
    layer(keras.Input((8, 8, 3)))
    return layer


def ours(weights: Any, method: Any = AVERAGE, **activation: Any) -> kqat.QuantizeConfig:
    return kqat.QuantizeConfig(
        weights=weights, activation=kqat.QuantSpec(**activation), activation_range=method
    )


@pytest.mark.parametrize(
    ("layer", "config", "expected"),
    [
        (
            layers.Dense(2),
            DefaultDenseQuantizeConfig(),
            ours({"kernel": kqat.QuantSpec(bits=8, symmetric=True)}),
        ),
        (
            layers.Dense(2, activation="relu"),
            ModifiedDenseQuantizeConfig(),
            ours({"kernel": kqat.QuantSpec(bits=4, symmetric=True)}),
        ),
        (
            layers.Conv2D(2, 3),
            Config({"kernel": weight(per_axis=True)}, output=(average(),)),
            ours({"kernel": CHANNELS}),
        ),
        (
            layers.Dense(2),
            Config({"kernel": weight()}, {"activation": average()}, (average(),)),
            ours({"kernel": SPEC8}),
        ),
        (
            layers.Dense(2),
            Config({"kernel": weight()}, output=(quantizers.AllValuesQuantizer(**OUTPUT),)),
            ours({"kernel": SPEC8}, kqat.MinMax()),
        ),
        (
            layers.Dense(2),
            Config({"kernel": weight()}, output=(quantizers.LastValueQuantizer(**OUTPUT),)),
            ours({"kernel": SPEC8}, kqat.LastValue()),
        ),
        (
            layers.Dense(2, activation="relu"),
            Config({"kernel": weight()}, output=(fixed(-1, 4),)),
            ours({"kernel": SPEC8}, kqat.Fixed(-1.0, 4.0)),
        ),
        (layers.Add(), Config(output=(average(),)), ours(None)),
        (layers.PReLU(), Config({"alpha": weight()}, output=(average(),)), ours({"alpha": SPEC8})),
        (
            layers.SeparableConv2D(2, 3),
            Config(
                {"depthwise_kernel": weight(), "pointwise_kernel": weight()}, output=(average(),)
            ),
            ours(SPEC8),
        ),
        # A kernel with one scale for input and output, or with a scale of its own, needs none.
        (layers.MaxPooling2D(), NOTHING, kqat.QuantizeConfig()),
        (layers.Softmax(), NOTHING, kqat.QuantizeConfig()),
        # What is quantized nowhere is float.
        (layers.Dense(2), NOTHING, None),
        (layers.ReLU(), NOTHING, None),
        (layers.Lambda(lambda x: x), NOTHING, None),
    ],
)
def test_translation(layer: Any, config: Any, expected: kqat.QuantizeConfig | None) -> None:
    layer = layer if isinstance(layer, layers.Add) else built(layer)
    assert translate(config, layer) == expected


@pytest.mark.parametrize(
    ("layer", "config", "problem"),
    [
        (
            layers.DepthwiseConv2D(3, name="dw"),
            Config({"depthwise_kernel": weight()}),
            "Config.get_weights_and_quantizers .*'dw' of type DepthwiseConv2D has in Keras 3: "
            "kernel, bias, activation. .*no attribute 'depthwise_kernel'. Name that in the class",
        ),
        (
            layers.Flatten(name="flat"),
            DefaultDenseQuantizeConfig(),
            "'flat' of type Flatten has in Keras 3: neither weights nor an activation. Received: "
            ".*'kernel'.* policy={keras.layers.Dense: config}",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight(symmetric=False)}),
            "symmetric quantizer for weight 'kernel' of layer 'd' of type Dense: integer kernels "
            r"take no weight zero point. Received: LastValueQuantizer\(symmetric=False\)",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": average(symmetric=True)}),
            "LastValueQuantizer for weight 'kernel' of layer 'd'.* Received: MovingAverage",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight(num_bits=16)}, output=(average(),)),
            "at most 8 bits for weight 'kernel' of layer 'd'.* Received: num_bits=16",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight(num_bits=1)}, output=(average(),)),
            "2 to 16 bits. Received: bits=1. .* Asked by Config for layer 'd'",
        ),
        (
            layers.PReLU(name="p"),
            Config({"alpha": weight(per_axis=True)}, output=(average(),)),
            "one scale for weight 'alpha' of layer 'p'.* Use per_axis=False",
        ),
        (
            layers.SeparableConv2D(2, 3, name="s"),
            Config({"depthwise_kernel": weight()}, output=(average(),)),
            "same quantizer for each of .*depthwise_kernel', 'pointwise_kernel'.* of layer 's'",
        ),
        (
            layers.SeparableConv2D(2, 3, name="s"),
            Config(
                {"depthwise_kernel": weight(), "pointwise_kernel": weight(num_bits=4)},
                output=(average(),),
            ),
            "same quantizer for each of .*depthwise_kernel', 'pointwise_kernel'.* of layer 's'",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}),
            "quantizer for the output of layer 'd'.* Received: none from .* give None as the",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, {"activation": average()}, (fixed(-1, 1),)),
            r"one quantizer for the output of layer 'd'.*MovingAverage\(.* and Fixed\(",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, output=(average(), average())),
            "one quantizer from get_output_quantizers for layer 'd'.* Received: 2",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, {"use_bias": average()}),
            "return layer.activation of layer 'd'.* Received: True",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, output=(average(per_axis=True),)),
            r"one scale for the output of layer 'd'.* Received: MovingAverageQuantizer\(per_axis",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, output=(average(num_bits=4),)),
            "256 integers of 8 bits for the output of layer 'd'.* Received: .*num_bits=4",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, output=(average(narrow_range=True),)),
            "256 integers of 8 bits for the output of layer 'd'.*narrow_range=True",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, output=(fixed(1, 2),)),
            r"low <= 0 <= high.* Received: \[1.0, 2.0\]. Asked by Config for layer 'd'",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": OwnArithmetic(**WEIGHTS)}),
            "tfmot's MovingAverageQuantizer, .* for weight 'kernel' of layer 'd'.*OwnArithmetic",
        ),
        (
            layers.Dense(2, activation="elu", name="d"),
            Config({"kernel": weight()}, output=(fixed(-1, 6),)),
            "observed range for the output of layer 'd'.* as its activation elu comes after",
        ),
        (
            layers.Softmax(name="s"),
            Config(output=(fixed(0, 1),)),
            r"range \(0.0, 0.99609375\) with zero point -128 for the output of layer 's'",
        ),
        (
            layers.Softmax(name="s"),
            Config(output=(average(symmetric=True),)),
            r"with zero point -128 for the output of layer 's'.* Received: symmetric Moving",
        ),
    ],
)
def test_what_cannot_carry_over(layer: Any, config: Any, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem):
        translate(config, built(layer))
