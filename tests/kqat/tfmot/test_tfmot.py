"""One tfmot `QuantizeConfig` and one Keras 3 layer: what carries over, and what is refused."""

import dataclasses
import importlib
import sys
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kqat
from kqat.base.errors import PolicyError
from kqat.tfmot.translation import translate
from tests.kqat.tfmot.configs import (
    NO_QUANTIZER,
    OUTPUT,
    WEIGHTS,
    Config,
    DefaultDenseQuantizeConfig,
    ModifiedDenseQuantizeConfig,
    OwnArithmetic,
    average,
    fixed,
    quantizers,
    tf_keras,
    tfmot,
    weight,
)

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


def tfmot_default(kind: str, *args: Any) -> Any:
    """What tfmot itself gives a Keras 2 layer."""
    registry = tfmot.quantization.keras.default_8bit.Default8BitQuantizeRegistry()
    return registry.get_quantize_config(getattr(tf_keras.layers, kind)(*args))


def preserving(folder: str, name: str, *args: Any) -> Any:
    """What tfmot gives a Dense whose zeros or clusters it keeps."""
    tfmot_keras = "tensorflow_model_optimization.python.core.quantization.keras"
    module = importlib.import_module(
        f"{tfmot_keras}.collab_opts.{folder}.{folder}_quantize_registry"
    )
    layer = tf_keras.layers.Dense(2)
    layer.build((None, 3))
    return getattr(module, name)(*args).get_quantize_config(layer)


class Answers:
    """Returns what it is given for weights and output."""

    def __init__(self, weights: Any, output: Any):
        self.weights, self.output = weights, output

    def get_weights_and_quantizers(self, layer: Any) -> Any:
        return self.weights

    def get_activations_and_quantizers(self, layer: Any) -> Any:
        return []

    def get_output_quantizers(self, layer: Any) -> Any:
        return self.output


def test_gates_of_a_recurrent_layer_are_its_cells() -> None:
    registry = sys.modules[type(tfmot_default("Dense", 2)).__module__]
    attributes = [["kernel", "recurrent_kernel"]], [["activation", "recurrent_activation"]]
    config: Any = registry.Default8BitQuantizeConfigRNN(*attributes, False)
    layer = layers.LSTM(2)
    layer(keras.Input((4, 3)))
    assert translate(config, layer) == ours(SPEC8)


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
            layers.Dense(2),
            Config({"kernel": weight()}, output=(average(symmetric=True),)),
            ours({"kernel": SPEC8}, symmetric=True),
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
        (
            layers.Conv2D(2, 3, activation="relu"),
            tfmot_default("Conv2D", 2, 3),
            ours({"kernel": CHANNELS}),
        ),
        (
            layers.Conv2DTranspose(2, 3),
            tfmot_default("Conv2DTranspose", 2, 3),
            ours({"kernel": SPEC8}),
        ),
        (layers.Add(), tfmot_default("Add"), ours(None)),
        # tfmot's own classes know layers as Keras 2 has them.
        (
            layers.DepthwiseConv2D(3),
            tfmot_default("DepthwiseConv2D", 3),
            ours({"kernel": CHANNELS}),
        ),
        (layers.Activation("relu"), tfmot_default("Activation", "relu"), ours(None)),
        (layers.Activation("silu"), tfmot_default("Activation", "swish"), ours(None)),
        (layers.Softmax(), Answers(None, None), kqat.QuantizeConfig()),
        (
            layers.Dense(2),
            Config({"kernel": weight()}, output=(average(num_bits=16, symmetric=True),)),
            ours({"kernel": SPEC8}, bits=16, symmetric=True),
        ),
        (
            layers.Dense(2),
            Config({"kernel": weight()}, {"activation": NO_QUANTIZER}, (average(),)),
            ours({"kernel": SPEC8}),
        ),
        (layers.Dense(2), Config({"kernel": NO_QUANTIZER}, output=(NO_QUANTIZER,)), None),
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
            Config({"pointwise_kernel": weight()}),
            "Config.get_weights_and_quantizers .*'dw' of type DepthwiseConv2D has in Keras 3: "
            "kernel, bias, activation. .*no attribute 'pointwise_kernel'. Use these names in",
        ),
        (
            layers.Activation("elu", name="a"),
            tfmot_default("Activation", "elu"),
            "get_output_quantizers .*'a' of type Activation.* ValueError: Activation .*elu",
        ),
        (
            layers.Dense(2, name="d"),
            preserving("prune_preserve", "Default8bitPrunePreserveQuantizeRegistry"),
            "for weight 'kernel' of layer 'd'.*PrunePreserve.*keeps the zeros or clusters",
        ),
        (
            layers.Dense(2, name="d"),
            preserving("cluster_preserve", "Default8bitClusterPreserveQuantizeRegistry", False),
            "for weight 'kernel' of layer 'd'.*ClusterPreserve.*keeps the zeros or clusters",
        ),
        (
            layers.Dense(2, name="d"),
            Config({"kernel": weight()}, output=(average(num_bits=16),)),
            "symmetric quantizer of 16 bits for the output of layer 'd'",
        ),
        (
            layers.Dense(2, name="d"),
            Answers([layers.Dense(2)], []),
            "Answers.get_weights_and_quantizers to return a list of pairs for layer 'd'",
        ),
        (
            layers.Dense(2, name="d"),
            Answers([np.ones((2, 3))], []),
            r"Received: \[ndarray of shape \(2, 3\)\]\. Return a list",
        ),
        (
            layers.Dense(2, name="d"),
            Answers,
            r"an object with tfmot's methods for layer 'd'.* the class Answers\..*: Answers\(\)",
        ),
        (
            layers.Dense(2, name="d"),
            Answers([], 3),
            "Answers.get_output_quantizers to return a list of quantizers for layer 'd'.* 3",
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
            "grid of one bit: .* Asked by Config for layer 'd'",
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
            "observed range for the output of layer 'd'.* its activation elu comes after",
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
