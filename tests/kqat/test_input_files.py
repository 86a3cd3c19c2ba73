"""What the command reads: each kind of file is told by its content, and errors say what to do."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kqat.base.errors import CalibrationError
from kqat.input_files import for_inputs, kind_of, read_data

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def _npy(array: Any, **options: Any) -> bytes:
    with io.BytesIO() as file:
        np.save(file, array, **options)
        return file.getvalue()


def _zip(*names: str) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                # Of a fixed date: every worker is to collect the same tests.
                archive.writestr(zipfile.ZipInfo(name), "")
        return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (b"1.0,2.0\n", "text", r"np.loadtxt\('x.csv', delimiter=','\)"),
        (b"", "an empty file", "Write it again"),
        (b"\x1c\0\0\0TFL3", "a TFLite file", "look at the order"),
        (_zip("config.json", "model.weights.h5"), "a Keras model", "look at the order"),
        (_zip("readme.txt"), "an archive without a model or arrays", "np.save"),
        (_zip("a.npy")[:-10], "a damaged archive", "Write it again"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "look at the order"),
        (b"\x89PNG\r\n", "a picture", "np.save"),
        (b"\0\1\2\3", "no file of a kind", "np.save"),
    ],
)
def test_what_is_no_data_is_named(tmp_path: Path, content: bytes, kind: str, remedy: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    assert kind in kind_of(path)
    with pytest.raises(CalibrationError, match=f"as a .npy or .npz file.*{kind}.*{remedy}"):
        read_data(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (_npy(X)[:-8], "which is damaged.*Write it again"),
        (_npy(np.array([{}], object), allow_pickle=True), "an array of Python objects"),
        (_npy(np.array(["a"])), "of dtype <U1, which is no number"),
    ],
)
def test_arrays_of_other_things_are_named(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=match):
        read_data(path)


def test_arrays_go_to_the_inputs_of_their_names(tmp_path: Path) -> None:
    path, one, two = tmp_path / "x.npz", {"image": (3, 4)}, {"image": (3, 4), "words": (5,)}
    words = np.zeros((2, 5))

    def read(shapes: dict[str, Any], *arrays: Any, **named: Any) -> Any:
        np.savez(path, *arrays, **named)
        return for_inputs(read_data(path), path, shapes)

    np.testing.assert_array_equal(read(one, X), X)
    np.testing.assert_array_equal(read(one, photo=X), X)
    assert read(one, image=X).keys() == {"image"}
    assert read(two, words=words, image=X)["words"].shape == (2, 5)
    assert [a.shape for a in read(two, X, words).values()] == [(2, 3, 4), (2, 5)]
    with pytest.raises(CalibrationError, match=r"'y' of shape \(2,\).*image=d\['x'\]"):
        read(one, x=X, y=np.zeros(2))
    with pytest.raises(CalibrationError, match=r"image=d\['photo'\], words=d\['words'\]"):
        read(two, words=words, photo=X, y=np.zeros(2))
    with pytest.raises(CalibrationError, match=r"image=d\['image'\], words=d\[…\]"):
        read(two, image=X)
