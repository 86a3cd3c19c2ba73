"""A 1-D convolutional network for raw samples of a sensor, here one second of speech.

A long first kernel takes the place of a spectrogram, as in Dai et al. 2016, "Very Deep
Convolutional Neural Networks for Raw Waveforms", section 2 (https://arxiv.org/abs/1610.00087).
"""

import keras
from keras import layers

FIRST_KERNEL = 80
FIRST_STRIDE = 8
CHANNELS = (24, 48, 64, 96)
BN_MOMENTUM = 0.9


def conv1d_audio(input_shape: tuple[int, int] = (8000, 1), classes: int = 10) -> keras.Model:
    """Four convolutions over time, each quartering the rate, and an average over what is left.

    Samples in [-1, 1) go in, of shape (samples, 1), and class probabilities come out.
    """
    inputs = keras.Input(input_shape, name="samples")
    x = _block(inputs, CHANNELS[0], FIRST_KERNEL, FIRST_STRIDE)
    for filters in CHANNELS[1:]:
        x = _block(layers.MaxPooling1D(4)(x), filters, 3, 1)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dropout(0.3)(x)
    outputs = layers.Dense(classes, activation="softmax")(x)
    return keras.Model(inputs, outputs, name="conv1d_audio")


def _block(x: keras.KerasTensor, filters: int, kernel: int, strides: int) -> keras.KerasTensor:
    x = layers.Conv1D(filters, kernel, strides=strides, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization(momentum=BN_MOMENTUM)(x))
