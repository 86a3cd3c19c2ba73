"""The networks of the recipes: one function per file, each returning a new float `keras.Model`."""

from recipes.models.conv1d_audio import conv1d_audio
from recipes.models.digits_cnn import digits_cnn
from recipes.models.ds_cnn import ds_cnn
from recipes.models.mobilenet_v2 import mobilenet_v2
from recipes.models.resnet8 import resnet8
from recipes.models.transformers import text_transformer, vit

__all__ = [
    "conv1d_audio",
    "digits_cnn",
    "ds_cnn",
    "mobilenet_v2",
    "resnet8",
    "text_transformer",
    "vit",
]
