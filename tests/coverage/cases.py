"""What a case of the contract is: a small model, and the operators of its file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from kqat.graph.keras_internals import open_model

# Inputs of whole numbers count below this.
INDEXES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model.

    Args:
        name: of the case.
        build: makes the float model, with Keras's initial weights.
        ops: operator -> how many of them the file holds.
        floats: how many of them read or write a float; none without a float island.
        policy: as for `kqat.quantize_model`.
        io: keyword arguments of `tflite_export.convert`: a float input stays float.
    """

    name: str
    build: Callable[[], keras.Model]
    ops: Mapping[str, int]
    floats: int = 0
    policy: Any = "int8"
    io: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def model(self) -> keras.Model:
        """The float model; every weight that Keras starts at zero or one has a value."""
        model = self.build()
        rng = np.random.default_rng(1)
        limits = {
            "bias": (-1.0, 1.0), "beta": (-1.0, 1.0), "moving_mean": (-1.0, 1.0),
            "gamma": (-1.5, 1.5), "scale": (0.5, 1.5), "moving_variance": (0.5, 1.5),
            "alpha": (-0.3, 0.3),
        }  # fmt: skip
        for weight in model.weights:
            if weight.name in limits:
                weight.assign(rng.uniform(*limits[weight.name], weight.shape))
        return model


def ends(model: keras.Model) -> tuple[Any, Any]:
    """The model's inputs and outputs in its structures."""
    # A Sequential model, which has one of each, was never called and so has no `input`.
    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    opened = open_model(model)
    return opened.input, opened.output


def inputs_of(model: keras.Model, samples: int, seed: int = 0) -> Any:
    """Random values for the model's inputs, in its input structure."""
    rng = np.random.default_rng(seed)

    def values(tensor: Any) -> np.ndarray:
        size = (samples, *tensor.shape[1:])
        if str(tensor.dtype) == "int32":
            return rng.integers(0, INDEXES, size=size).astype(np.int32)
        return rng.normal(scale=3, size=size).astype(np.float32)

    return keras.tree.map_structure(values, ends(model)[0])


def functional(
    shape: tuple[int, ...], call: Callable[[Any], Any], dtype: str = "float32"
) -> keras.Model:
    """The model of one input `x` that computes `call(x)`."""
    x = keras.Input(shape, dtype=dtype, name="x")
    return keras.Model(x, call(x), name="net")
