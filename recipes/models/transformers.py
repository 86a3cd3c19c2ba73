"""Two small transformers, whose blocks normalize first.

Vaswani et al. 2017, section 3 (https://arxiv.org/abs/1706.03762); Dosovitskiy et al. 2021, section
3.1 (https://arxiv.org/abs/2010.11929), with the mean of all tokens in place of a class token.
"""

from typing import Any

import keras
from keras import layers, ops

WIDTH = 48
HEADS = 3
BLOCKS = 2
DROPOUT = 0.1


@keras.saving.register_keras_serializable("kqat_recipes")
class PositionEmbedding(layers.Layer):
    """Adds a learned vector for each position; input and output (batch, steps, width)."""

    def build(self, input_shape: Any) -> None:
        """Creates the table of vectors."""
        _, steps, width = input_shape
        self.table = layers.Embedding(steps, width, name="table")
        self.table.build((steps,))

    def call(self, x: Any) -> Any:
        """`x` with the vectors added."""
        return x + self.table(ops.arange(x.shape[1]))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape


def vit(
    input_shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10, patch: int = 7
) -> keras.Model:
    """A vision transformer over square patches; images in, class probabilities out."""
    inputs = keras.Input(input_shape, name="image")
    x = layers.Conv2D(WIDTH, patch, strides=patch, name="patches")(inputs)
    x = layers.Reshape((-1, WIDTH), name="tokens")(x)
    return _classifier(inputs, x, classes, "vit")


def text_transformer(steps: int, vocabulary: int, classes: int) -> keras.Model:
    """A transformer over token numbers (batch, steps), int32; class probabilities out."""
    inputs = keras.Input((steps,), dtype="int32", name="tokens")
    x = layers.Embedding(vocabulary, WIDTH, name="words")(inputs)
    return _classifier(inputs, x, classes, "text_transformer")


def _classifier(inputs: Any, x: Any, classes: int, name: str) -> keras.Model:
    x = layers.Dropout(DROPOUT)(PositionEmbedding(name="positions")(x))
    for index in range(1, BLOCKS + 1):
        x = _block(x, f"block{index}")
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    outputs = layers.Dense(classes, activation="softmax", name="class")(x)
    return keras.Model(inputs, outputs, name=name)


def _block(x: Any, name: str) -> Any:
    y = layers.LayerNormalization(name=f"{name}_norm1")(x)
    y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, dropout=DROPOUT, name=f"{name}_attention")(
        y, y
    )
    x = layers.Add(name=f"{name}_sum1")([x, y])
    y = layers.LayerNormalization(name=f"{name}_norm2")(x)
    y = layers.Dense(2 * WIDTH, activation="gelu", name=f"{name}_wide")(y)
    y = layers.Dropout(DROPOUT)(layers.Dense(WIDTH, name=f"{name}_narrow")(y))
    return layers.Add(name=f"{name}_sum2")([x, y])
