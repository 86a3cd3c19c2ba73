"""What the command reads: what kind a file is, and data in .npy and .npz for named inputs."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kqat.base import CalibrationError

if TYPE_CHECKING:
    import numpy as np

# The kinds that the command takes, in words.
TFLITE, KERAS, HDF5 = "a TFLite file", "a Keras model", "an HDF5 file"
ARRAY, ARRAYS = "a NumPy array", "an archive of NumPy arrays"
_WANTED = "Expected data as a .npy or .npz file."
_FIRST_BYTES = {
    b"\x93NUMPY": ARRAY,
    b"\x89HDF": HDF5,
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"RIFF": "a sound or a picture",
    b"\x80": "a pickle",
}


def kind_of(path: Path) -> str:
    """What a file is by its content, in words; its name is not asked."""
    if path.is_dir():
        return "a folder"
    with path.open("rb") as file:
        begin = file.read(512)
    if not begin:
        return "an empty file"
    if begin[4:8] == b"TFL3":
        return TFLITE
    if begin.startswith(b"PK"):
        return _kind_of_archive(path)
    for first, kind in _FIRST_BYTES.items():
        if begin.startswith(first):
            return kind
    text = all(byte in b"\t\n\r" or 32 <= byte != 127 for byte in begin)
    return "text" if text else "no file of a kind that kqat reads"


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "a damaged archive"
    if "config.json" in names:
        return KERAS
    arrays = names and all(name.endswith(".npy") for name in names)
    return ARRAYS if arrays else "an archive without a model or arrays"


def check_kind(path: Path) -> None:
    """Checks by its first bytes that a file holds arrays.

    Raises:
        CalibrationError: if it is of another kind; says of which and what to do.
    """
    kind = kind_of(path)
    if kind not in (ARRAY, ARRAYS):
        damaged = kind in ("a damaged archive", "an empty file")
        remedy = "Write it again." if damaged else _how_to_convert(path, kind)
        raise CalibrationError(f"{_WANTED} Received: '{path}', {kind}. {remedy}")


def read_data(path: Path) -> Any:
    """The array of a .npy file, or the arrays of a .npz file by their names.

    Raises:
        CalibrationError: if the file holds no arrays of numbers; says what it is and what to do.
    """
    import numpy as np

    check_kind(path)
    wanted = _WANTED
    try:
        loaded = np.load(path, allow_pickle=False)
        found = loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if "pickle" in str(error):
            raise CalibrationError(
                f"{wanted} Received: '{path}', an array of Python objects. Make it an array of "
                "numbers of one shape: np.save(path, np.stack(samples).astype('float32'))."
            ) from error
        raise CalibrationError(
            f"{wanted} Received: '{path}', which is damaged: {error}. Write it again."
        ) from error
    for name, array in found.items() if isinstance(found, dict) else [("", found)]:
        if array.dtype.kind not in "biuf":
            where = f"'{name}' in '{path}'" if name else f"'{path}'"
            raise CalibrationError(
                f"{wanted} Received: {where}, of dtype {array.dtype}, which is no number."
            )
    return found


def _how_to_convert(path: Path, kind: str) -> str:
    if kind == "text":
        comma = ", delimiter=','" if path.suffix.lower() == ".csv" else ""
        return (
            "Convert it in Python: "
            f"np.save('{path.stem}.npy', np.loadtxt('{path.name}'{comma}).reshape(-1, *shape)), "
            "where shape is that of one input."
        )
    if kind in (TFLITE, KERAS, HDF5):
        return "It stands where data are expected: look at the order of the names."
    return "Save the inputs, preprocessed as in training, with np.save('x.npy', inputs)."


def for_inputs(
    data: Any, path: Path, shapes: Mapping[str, Sequence[int | None]]
) -> "np.ndarray | dict[str, np.ndarray]":
    """What `read_data` read, by the names of a model's inputs; a single array stays one.

    An archive has the inputs' names, or one array for a model of one input, or arrays without names
    (`arr_0`, `arr_1`, as `np.savez(path, a, b)` writes them) in the order of the inputs.

    Args:
        data: from `read_data`.
        path: for messages.
        shapes: input -> shape without the batch, in the model's order.

    Raises:
        CalibrationError: if the arrays are for other inputs.
    """
    if not isinstance(data, dict) or not shapes or data.keys() == shapes.keys():
        return data
    if len(data) == len(shapes) == 1:
        return next(iter(data.values()))
    if list(data) == [f"arr_{index}" for index in range(len(shapes))]:
        return dict(zip(shapes, data.values(), strict=True))
    found = ", ".join(f"'{name}' of shape {array.shape}" for name, array in data.items())
    pairs = ", ".join(f"{name}=d[{_key_for(name, s, data)}]" for name, s in shapes.items())
    raise CalibrationError(
        f"Expected one array for each of the inputs {list(shapes)}. Received: '{path}' with "
        f"{found}. Write these inputs alone, in Python: d = np.load('{path.name}'); "
        f"np.savez('inputs.npz', {pairs})."
    )


def _key_for(name: str, shape: Sequence[int | None], data: Mapping[str, Any]) -> str:
    """The key of the array that is meant for an input, by name and then by shape; `…` if none."""
    if name in data:
        return repr(name)
    fitting = [key for key, array in data.items() if _fits(array.shape[1:], shape)]
    return repr(fitting[0]) if fitting else "…"


def _fits(found: Sequence[int], declared: Sequence[int | None]) -> bool:
    return len(found) == len(declared) and all(
        known in (None, size) for size, known in zip(found, declared, strict=True)
    )
