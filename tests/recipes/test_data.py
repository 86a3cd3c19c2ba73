"""The reader of data and pretrained models, on folders made here and on the shared one."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

from recipes import data
from tests.newer_keras import needs_keras

VENDORS = [name for name in data.pretrained_names() if not name.startswith("cifar_resnet_keras")]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shared folder without a file in it."""
    monkeypatch.setenv("KQAT_DATA", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    return tmp_path


def test_root_is_beside_the_repository_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KQAT_DATA", raising=False)
    assert data.root() == Path(__file__).resolve().parents[3] / "shared"
    monkeypatch.setenv("KQAT_DATA", "/elsewhere")
    assert data.root() == Path("/elsewhere")


def test_available_wants_both_folders(empty: Path) -> None:
    assert data.available()
    (empty / "models").rmdir()
    assert not data.available()


@pytest.mark.parametrize(
    "read",
    [
        lambda: data.fsdd("train"),
        data.kws01,
        data.ad01_windows,
        lambda: data.text("sst2"),
        data.sww_calibration,
        lambda: data.pretrained("mlperf_tiny/ic"),
        lambda: data.vendor_tflite("mlperf_tiny/ic"),
        lambda: data.vendor_tflite("tflm/person_detect"),
    ],
)
@pytest.mark.usefixtures("empty")
def test_what_is_missing_says_how_to_get_it(read: Callable[[], object]) -> None:
    with pytest.raises(data.DataNotFoundError, match="KQAT_DATA to name the folder"):
        read()


@pytest.mark.parametrize(
    "read",
    [
        lambda: data.cifar10_jpeg("valid"),  # type: ignore[arg-type]
        lambda: data.mnist("valid"),  # type: ignore[arg-type]
        lambda: data.fsdd("valid"),  # type: ignore[arg-type]
    ],
)
def test_an_unknown_split_is_refused(read: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"'train' or 'test'\. Received: split='valid'"):
        read()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected one of mlperf_tiny/ic, .*name='resnet'"):
        data.pretrained("resnet")
    with pytest.raises(ValueError, match="Expected 'sst2', 'trec' or 'subj'"):
        data.text("imdb")
    with pytest.raises(ValueError, match="Expected a model with a vendor's file"):
        data.vendor_tflite("cifar_resnet_keras/resnet20")
    with pytest.raises(ValueError, match="Expected a model of 8-bit images"):
        data.model_input("mlperf_tiny/ad", np.zeros((1, 640)))


@pytest.mark.usefixtures("empty")
def test_cifar10_and_mnist_come_from_keras_without_the_shared_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    colour = np.full((4002, 32, 32, 3), 255, np.uint8), np.arange(4002, dtype=np.uint8)[:, None]
    grey = np.full((3, 28, 28), 255, np.uint8), np.array([7, 8, 9], np.uint8)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (colour, colour))
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: (grey, grey))
    x, y = data.cifar10_jpeg("test", count=2)
    assert (x.shape, x.dtype, x.max(), y.tolist()) == ((2, 32, 32, 3), np.float32, 255, [0, 1])
    x, y = data.cifar10_lossless()
    assert (x.shape, x.dtype, y.shape, y.dtype) == (
        (4000, 32, 32, 3),
        np.float32,
        (4000,),
        np.int64,
    )
    x, y = data.mnist("train")
    assert (x.shape, x.dtype, x.max(), y.tolist()) == ((3, 28, 28, 1), np.float32, 1, [7, 8, 9])


@pytest.mark.usefixtures("empty")
def test_a_failed_download_says_how_to_get_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        # The class that Keras raises.
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    with pytest.raises(data.DataNotFoundError, match=r"URL fetch failure.*KQAT_DATA.*internet"):
        data.mnist("train")


def test_jpegs_are_cut_and_decoded_in_order(empty: Path) -> None:
    greys = np.array([0, 100, 255], np.uint8)
    files = [_jpeg(grey) for grey in greys]
    np.savez(
        empty / "data" / "cifar10_jpeg.npz",
        jpeg_test=np.frombuffer(b"".join(files), np.uint8),
        len_test=np.array([len(file) for file in files], np.int32),
        y_test=np.array([2, 0, 1], np.uint8),
    )
    x, y = data.cifar10_jpeg("test")
    # An image of one grey has no detail that JPEG could lose.
    assert (x == greys.reshape(3, 1, 1, 1)).all()
    assert x.shape == (3, 32, 32, 3)
    assert y.tolist() == [2, 0, 1]
    x, y = data.cifar10_jpeg("test", count=2)
    assert (len(x), y.tolist()) == (2, [2, 0])


def test_digits_are_split_the_same_way_each_time() -> None:
    (x_train, y_train), (x_test, y_test) = data.digits()
    assert (x_train.shape, x_test.shape) == ((1347, 8, 8, 1), (450, 8, 8, 1))
    assert (x_train.dtype, y_train.dtype) == (np.float32, np.int64)
    assert set(np.unique(x_train)) == {np.float32(level / 16) for level in range(17)}
    assert np.bincount(y_test).tolist() == [45, 46, 44, 46, 45, 46, 45, 45, 43, 45]
    np.random.seed(1)
    assert (data.digits()[1][0] == x_test).all()


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataNotFoundError, match="pip install scikit-learn"):
        data.digits()


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("read", "shape", "low", "high", "classes"),
    [
        (lambda: data.cifar10_jpeg("train", count=50), (50, 32, 32, 3), 0, 255, 10),
        (data.cifar10_lossless, (4000, 32, 32, 3), 0, 255, 10),
        (lambda: data.mnist("test"), (10000, 28, 28, 1), 0, 1, 10),
        (lambda: data.fsdd("test"), (300, 8000), -1, 1, 10),
        (data.kws01, (1000, 49, 10, 1), -124, 26, 12),
        (data.sww_calibration, (45, 30, 1, 40), 0, 1, 3),
    ],
)
def test_shared_data_have_the_documented_form(
    read: Callable[[], data.Samples], shape: tuple[int, ...], low: float, high: float, classes: int
) -> None:
    x, y = read()
    assert (x.shape, x.dtype, y.shape, y.dtype) == (shape, np.float32, shape[:1], np.int64)
    assert low <= x.min() < x.max() <= high
    # A range ten times too wide would be met by data that were scaled twice.
    assert x.max() - x.min() > (high - low) / 2
    assert np.unique(y).tolist() == list(range(classes))


@pytest.mark.usefixtures("shared")
def test_shared_windows_and_sentences_have_the_documented_form() -> None:
    windows = data.ad01_windows()
    assert (windows.shape, windows.dtype) == ((196, 640), np.float32)
    for name, sizes in {
        "sst2": {"train": 6920, "dev": 872, "test": 1821},
        "trec": {"train": 5452, "test": 500},
        "subj": {"all": 10000},
    }.items():
        table = data.text(name)
        assert {split: len(sentences) for split, (sentences, _) in table.items()} == sizes
        assert {split: len(labels) for split, (_, labels) in table.items()} == sizes


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", data.pretrained_names())
def test_pretrained_models_are_made_of_stock_layers(name: str) -> None:
    if name.startswith("cifar_resnet_keras"):
        needs_keras("3.13", "a file with BatchNormalization's renorm")
    model = data.pretrained(name)
    foreign = [x.name for x in model.layers if type(x) is not getattr(keras.layers, _kind(x), None)]
    assert foreign == []
    assert not model.compiled


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", VENDORS)
def test_vendor_files_are_tflite(name: str) -> None:
    # The identifier of the TFLite schema lies behind the flatbuffer's root offset.
    assert data.vendor_tflite(name)[4:8] == b"TFL3"


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    "name", ["mlperf_tiny/ic", "mlperf_tiny/vww", "mltk_tinyml/image_classification"]
)
def test_pixels_fall_on_the_input_grid_of_the_vendors_file(name: str) -> None:
    interpreter = Interpreter(model_content=data.vendor_tflite(name))
    scale, zero_point = interpreter.get_input_details()[0]["quantization"]
    pixels = np.arange(256, dtype=np.float32)
    integers = np.round(data.model_input(name, pixels) / scale) + zero_point
    np.testing.assert_array_equal(integers, pixels - 128)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("mlperf_tiny/ic", 3719),
        ("mltk_tinyml/image_classification", 3439),
        ("cifar_resnet_keras/resnet20", 3992),
        ("cifar_resnet_keras/resnet32", 4000),
    ],
)
def test_pretrained_classifiers_get_the_images_they_were_trained_on(name: str, right: int) -> None:
    x, y = data.cifar10_lossless()
    scores = data.pretrained(name).predict(data.model_input(name, x), batch_size=250, verbose=0)
    # Float sums differ between processors: an image or two may lie on the line between classes.
    assert abs(int((scores.argmax(-1) == y).sum()) - right) <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_pretrained_keyword_spotting_hears_what_its_vendor_does() -> None:
    x, y = data.kws01()
    scores = data.pretrained("mlperf_tiny/kws").predict(x, batch_size=250, verbose=0)
    # 913 of the 1,000, one more or less where float sums differ between processors.
    assert abs(int((scores.argmax(-1) == y).sum()) - 913) <= 1


def _jpeg(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (int(grey),) * 3).save(file, "JPEG", quality=75)
    return file.getvalue()


def _kind(layer: keras.layers.Layer) -> str:
    return type(layer).__name__
