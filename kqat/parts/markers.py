"""Layers that compute nothing: they tell the exporter which value is which."""

import math
from typing import Any

import keras
import numpy as np

from kqat.base import TextEnum
from kqat.grids import QuantSpec, Site, arithmetic


class MarkerKind(TextEnum):
    """What a marker says of the value that it stands on.

    SITE: the value of `sites[index]`. TABLE: the elementwise function `tables[index]` is to be
    applied here. LSTM: what stands between the site before and here is the operator of
    `lstms[index]`. FENCE: integers and floats meet here.
    """

    FENCE = "fence"
    TABLE = "table"
    SITE = "site"
    LSTM = "lstm"


@keras.saving.register_keras_serializable("kqat")
class Marker(keras.Operation):
    """Tells the exporter what a value is, by way of a fake-quant op.

    It is no layer: it has nothing that Keras keeps of a layer, and half of the calls of a frozen
    model are markers.

    The converter keeps fake-quant ops as QUANTIZE/DEQUANTIZE pairs. The pair's scale encodes
    `index`, not the site's real scale, so no rounding inside the converter can alter what was
    trained, and any bit width travels the same way. The pair's zero point encodes `kind`.

    Args:
        kind: what the marker says.
        index: of the site, table or LSTM in the frozen model; 0 for a fence.
    """

    STEP = 2.0**-10
    # Zero points on the converter's uint8 grid.
    KINDS = {  # noqa: RUF012 - a constant of the class
        MarkerKind.FENCE: 0,
        MarkerKind.TABLE: 64,
        MarkerKind.SITE: 128,
        MarkerKind.LSTM: 192,
    }

    def __init__(self, kind: MarkerKind | str, index: int, name: str | None = None):
        super().__init__(name=name)
        self.kind, self.index = MarkerKind(kind), index

    def call(self, x: Any) -> Any:
        """`x` through a fake-quant op whose scale and zero point encode index and kind."""
        step, zero = (self.index + 1) * self.STEP, self.KINDS[self.kind]
        low, high = -zero * step, (255 - zero) * step
        return arithmetic.fake_quantize(x, low, high, QuantSpec())

    def compute_output_spec(self, x: Any) -> Any:
        """The input's shape and dtype."""
        return keras.KerasTensor(x.shape, x.dtype)

    @classmethod
    def read(cls, scale: float, zero_point: int) -> tuple[str, int]:
        """The kind and index that the parameters of a QUANTIZE op to uint8 encode."""
        kinds = {zero: kind for kind, zero in cls.KINDS.items()}
        return kinds[zero_point], round(scale / cls.STEP) - 1

    def get_config(self) -> dict[str, Any]:
        """Name, `kind` and `index`."""
        return {"name": self.name, "kind": self.kind.value, "index": self.index}


@keras.saving.register_keras_serializable("kqat")
class PrecisionBoundary(keras.layers.Layer):
    """Marks where integers become floats or floats integers; computes nothing."""

    def call(self, x: Any) -> Any:
        """`x`, unchanged."""
        return x

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape


@keras.saving.register_keras_serializable("kqat")
class StopGradient(keras.layers.Identity):
    """`keras.ops.stop_gradient`: what stands before it is not trained by what stands behind it."""

    def call(self, x: Any) -> Any:
        """`x`, without a gradient."""
        return keras.ops.stop_gradient(x)


@keras.saving.register_keras_serializable("kqat")
class Requantize(keras.layers.Layer):
    """Marks where integers of `source_bits` become integers of `bits`; computes nothing.

    The quantizer behind it rounds to the new grid; in the file it is a QUANTIZE.
    """

    def __init__(self, source_bits: int, bits: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.source_bits, self.bits = source_bits, bits

    @property
    def kernel_bits(self) -> int:
        """The width that its kernel must know: the wider one."""
        return max(self.source_bits, self.bits)

    def call(self, x: Any) -> Any:
        """`x`, unchanged."""
        return x

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The config of every layer, with `source_bits` and `bits`."""
        return {**super().get_config(), "source_bits": self.source_bits, "bits": self.bits}


class Tabulated(keras.layers.Layer):
    """An elementwise layer that an integer model can look up instead of computing.

    Whether it does is the exporter's decision, for which `index` names it.

    Args:
        layer: what computes the function.
        index: which of the frozen model's tables this is.
        bits: width of the integers that it reads and writes.
    """

    def __init__(self, layer: keras.layers.Layer, index: int, bits: int = 8, **kwargs: Any):
        super().__init__(dtype="float32", **kwargs)
        self.layer, self.index, self.bits = layer, index, bits
        self.sample_shape: tuple[int, ...] = (1,)

    def build(self, input_shape: Any) -> None:
        """Builds the layer inside."""
        self.sample_shape = tuple(input_shape[1:])
        if not self.layer.built:
            self.layer.build(input_shape)

    def call(self, x: Any) -> Any:
        """The layer's output; any shape."""
        return self.layer(x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def lookup(self, source: Site, result: Site) -> np.ndarray:
        """The table: the integer of `result` for each integer of `source`, the lowest first.

        Shape (256,) or (65536,), int8 or int16: every input that the bits can hold.
        """
        return result.integers(self.values(source)).astype(f"int{result.bits}")

    def values(self, source: Site) -> np.ndarray:
        """The function's value for each integer of `source`; shape (256,) or (65536,), float32."""
        half = 2 ** (source.bits - 1)
        real = source.reals(np.arange(-half, half))
        # In samples of the shape that the layer reads: its function may ask for sizes and axes.
        samples = -(-len(real) // math.prod(self.sample_shape))
        shaped = np.resize(real, (samples, *self.sample_shape))
        return np.ravel(self.layer(keras.ops.convert_to_tensor(shaped)))[: len(real)]


def is_marker(layer: Any, kind: MarkerKind | str) -> bool:
    """Whether `layer` is a marker of this kind."""
    return isinstance(layer, Marker) and layer.kind == kind
