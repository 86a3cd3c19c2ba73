"""Reads all data and pretrained models for recipes, benchmarks and tests.

All of it except scikit-learn's digits is in one folder that holds `data/` and `models/`. The
variable `KQAT_DATA` names this folder; the default is `shared/` beside the repository. Without the
folder, CIFAR-10 and MNIST come from `keras.datasets`, and everything else raises
`DataNotFoundError`.

Inputs are float32 in the range that each function states. Labels are int64 of shape (n,).
"""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

import keras
import numpy as np
from PIL import Image

import kqat

Split = Literal["train", "test"]
Samples = tuple[np.ndarray, np.ndarray]

# The input quantization of the vendor's int8 file, which made these features.
KWS_SCALE = np.float32(0.5847029089927673)
KWS_ZERO_POINT = np.float32(83)

_TEXT_SPLITS = {"sst2": ("train", "dev", "test"), "trec": ("train", "test")}


class DataNotFoundError(FileNotFoundError):
    """Data or a model is not on this machine; the message says how to get it."""


class Pixels(NamedTuple):
    """How a model takes 8-bit pixels: (pixels - mean) / std, one value or one per channel."""

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]


class _Pretrained(NamedTuple):
    """Files of one model below `models/`; `pixels` is None if the input is not an 8-bit image."""

    weights: str
    tflite: str | None
    pixels: Pixels | None = None


# For models with a vendor's int8 file, mean and std come from the scale and zero point of its
# input. The README of the cifar_resnet_keras models gives ImageNet's statistics, here times 255.
_RAW = Pixels(0.0, 1.0)
_UNIT = Pixels(0.0, 255.0)
_SIGNED = Pixels(128.0, 128.0)
_IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

_PRETRAINED = {
    "mlperf_tiny/ic": _Pretrained("ic/pretrainedResnet.h5", "ic/pretrainedResnet_quant", _RAW),
    "mlperf_tiny/vww": _Pretrained("vww/vww_96.h5", "vww/vww_96_int8", _UNIT),
    "mlperf_tiny/ad": _Pretrained("ad/ad01.h5", "ad/ad01_int8"),
    "mlperf_tiny/sww": _Pretrained("sww/str_ww_ref_model.h5", "sww/str_ww_ref_model"),
    "mlperf_tiny/kws": _Pretrained("kws/kws_ref_model", "kws/kws_ref_model"),
    "mltk_tinyml/image_classification": _Pretrained(
        "image_classification.h5", "image_classification", _SIGNED
    ),
    "mltk_tinyml/visual_wake_words": _Pretrained("visual_wake_words.h5", "visual_wake_words", _RAW),
    "mltk_tinyml/keyword_spotting": _Pretrained("keyword_spotting.h5", "keyword_spotting"),
    "mltk_tinyml/anomaly_detection": _Pretrained("anomaly_detection.h5", "anomaly_detection"),
    "mltk_siliconlabs/keyword_spotting_on_off": _Pretrained(
        "keyword_spotting_on_off.h5", "keyword_spotting_on_off"
    ),
    "mltk_siliconlabs/rock_paper_scissors": _Pretrained(
        "rock_paper_scissors.h5", "rock_paper_scissors"
    ),
    "cifar_resnet_keras/resnet20": _Pretrained("resnet20_cifar10.keras", None, _IMAGENET),
    "cifar_resnet_keras/resnet32": _Pretrained("resnet32_cifar10.keras", None, _IMAGENET),
}


def root() -> Path:
    """The folder that holds `data/` and `models/`, whether it exists or not."""
    named = os.environ.get("KQAT_DATA")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared"


def available() -> bool:
    """Whether the shared data and models are on this machine."""
    return (root() / "data").is_dir() and (root() / "models").is_dir()


def digits() -> tuple[Samples, Samples]:
    """scikit-learn's handwritten digits: always the same 1,347 train and 450 test images.

    Images are (n, 8, 8, 1) in [0, 1] with 17 grey levels. They are part of the package.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataNotFoundError(
            "Expected scikit-learn, whose package holds the digits. Received: it is not installed. "
            "Use `pip install scikit-learn`."
        ) from error
    source = load_digits()
    x = (source.images / 16).astype(np.float32)[..., np.newaxis]
    y = source.target.astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.25, stratify=y, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def cifar10_jpeg(split: Split, *, count: int | None = None) -> Samples:
    """CIFAR-10 through JPEG at quality 75: 50,000 "train" or 10,000 "test" images.

    Images are (n, 32, 32, 3) in 0..255; with `count`, the first ones only. JPEG costs accuracy, so
    compare only runs on this very set. Without the shared data these are the lossless images of
    `keras.datasets`.
    """
    _check_split(split)
    if not _path("data/cifar10_jpeg.npz").exists():
        x, y = _from_keras("cifar10", split)
        return x[:count], y[:count]
    jpegs, lengths, y = _arrays(
        "data/cifar10_jpeg.npz", f"jpeg_{split}", f"len_{split}", f"y_{split}"
    )
    lengths = lengths[:count]
    images = [
        np.asarray(Image.open(io.BytesIO(jpegs[end - length : end].tobytes())))
        for end, length in zip(np.cumsum(lengths), lengths, strict=True)
    ]
    return np.stack(images).astype(np.float32), y[:count].astype(np.int64)


def cifar10_lossless() -> Samples:
    """4,000 lossless images of CIFAR-10's training set, (4000, 32, 32, 3) in 0..255.

    Use them only to compare a pretrained model with its integer form, because its training may
    have seen them. Without the shared data these are the first 4,000 training images of
    `keras.datasets`.
    """
    name = "data/cifar10_lossless_4000train.npz"
    if not _path(name).exists():
        x, y = _from_keras("cifar10", "train")
        return x[:4000], y[:4000]
    x, y = _arrays(name, "x", "y")
    return x.astype(np.float32), y.astype(np.int64)


def mnist(split: Split) -> Samples:
    """MNIST: 60,000 "train" or 10,000 "test" images, (n, 28, 28, 1) in [0, 1]."""
    _check_split(split)
    if not _path("data/mnist.npz").exists():
        x, y = _from_keras("mnist", split)
    else:
        x, y = _arrays("data/mnist.npz", f"x_{split}", f"y_{split}")
    return (x / np.float32(255)).astype(np.float32)[..., np.newaxis], y.astype(np.int64)


def fsdd(split: Split) -> Samples:
    """Free Spoken Digit: 2,700 "train" or 300 "test" clips of one second, 10 classes.

    Samples are (n, 8000) at 8 kHz in [-1, 1).
    """
    _check_split(split)
    x, y, is_test = _arrays("data/fsdd.npz", "x", "y", "is_test")
    chosen = is_test if split == "test" else ~is_test
    return x[chosen].astype(np.float32) / np.float32(2**15), y[chosen].astype(np.int64)


def kws01() -> Samples:
    """MLPerf Tiny's 1,000 keyword test inputs: MFCC features (1000, 49, 10, 1) and 12 classes.

    Features lie on the int8 grid of the vendor's file, about -123 to 26.
    """
    x, y = _arrays("data/mlperf_kws01_mfcc.npz", "x", "y")
    return (x.astype(np.float32) - KWS_ZERO_POINT) * KWS_SCALE, y.astype(np.int64)


def ad01_windows() -> np.ndarray:
    """The windows of one normal ToyCar clip, (196, 640): five log-mel frames each, in decibels."""
    (windows,) = _arrays("data/ad01_one_normal_clip.npz", "windows")
    return windows


def text(name: str) -> dict[str, tuple[list[str], np.ndarray]]:
    """Sentences and labels of "sst2", "trec" or "subj", by split; "subj" has only "all"."""
    if name not in ("sst2", "trec", "subj"):
        raise ValueError(f"Expected 'sst2', 'trec' or 'subj'. Received: name={name!r}.")
    with gzip.open(_existing("data/text_cls.json.gz"), "rt", encoding="utf-8") as file:
        table = json.load(file)
    if name == "subj":
        return {"all": (table["subj_text"], np.asarray(table["subj_y"], np.int64))}
    return {
        split: (table[f"{name}_text_{split}"], np.asarray(table[f"{name}_y_{split}"], np.int64))
        for split in _TEXT_SPLITS[name]
    }


def sww_calibration() -> Samples:
    """The streaming wake word's calibration spectrograms, (45, 30, 1, 40) in [0, 1]; 3 classes."""
    x, y = _arrays("models/mlperf_tiny/sww/calibration_samples.npz", "specs", "labels")
    return x.astype(np.float32), y.astype(np.int64)


def pretrained_names() -> tuple[str, ...]:
    """The names that `pretrained` takes, as "collection/model"."""
    return tuple(_PRETRAINED)


def pretrained(name: str) -> keras.Model:
    """A pretrained model, uncompiled and made of stock Keras layers only.

    Raises:
        ValueError: if there is no such model.
        DataNotFoundError: if its file is not on this machine.
    """
    path = _existing(_below_models(name, _row(name).weights))
    return kqat.load_model(path)


def model_input(name: str, pixels: np.ndarray) -> np.ndarray:
    """Images in 0..255, of any batch and size, scaled for the pretrained model `name`."""
    scaling = _row(name).pixels
    if scaling is None:
        raise ValueError(f"Expected a model of 8-bit images. Received: name={name!r}.")
    mean, std = (np.asarray(value, np.float32) for value in scaling)
    return (np.asarray(pixels, np.float32) - mean) / std


def vendor_tflite(name: str) -> bytes:
    """The vendor's own integer `.tflite` of a pretrained model.

    Also any other file below `models/`, by its path without the suffix: "tflm/person_detect".
    """
    row = _PRETRAINED.get(name)
    if row is None:
        return _existing(f"models/{name}.tflite").read_bytes()
    if row.tflite is None:
        raise ValueError(f"Expected a model with a vendor's file. Received: name={name!r}.")
    return _existing(_below_models(name, f"{row.tflite}.tflite")).read_bytes()


def _row(name: str) -> _Pretrained:
    if name not in _PRETRAINED:
        raise ValueError(f"Expected one of {', '.join(_PRETRAINED)}. Received: name={name!r}.")
    return _PRETRAINED[name]


def _below_models(name: str, file: str) -> str:
    return f"models/{name.split('/')[0]}/{file}"


def _path(relative: str) -> Path:
    return root() / relative


def _existing(relative: str) -> Path:
    path = _path(relative)
    if not path.exists():
        raise DataNotFoundError(
            f"Expected {path}. Received: no such file. Use KQAT_DATA to name the folder that "
            "holds data/ and models/."
        )
    return path


def _arrays(relative: str, *keys: str) -> tuple[np.ndarray, ...]:
    with np.load(_existing(relative)) as file:
        return tuple(file[key] for key in keys)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"Expected 'train' or 'test'. Received: split={split!r}.")


def _from_keras(name: Literal["cifar10", "mnist"], split: Split) -> Samples:
    source = keras.datasets.cifar10 if name == "cifar10" else keras.datasets.mnist
    try:
        train, test = source.load_data()
    except Exception as error:  # Keras raises no narrower class when a download fails.
        raise DataNotFoundError(
            f"Expected {name} in {root()} or from keras.datasets. Received: {error}. Use KQAT_DATA "
            "to name the folder that holds data/ and models/, or connect to the internet."
        ) from error
    x, y = train if split == "train" else test
    return x.astype(np.float32), y.reshape(-1).astype(np.int64)
