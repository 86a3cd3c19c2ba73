"""Writes files whole or not at all: a failure leaves the old file as it was."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to `path`. On any failure the old file, if there was one, stays as it was.

    Args:
        path: the file; its folder must exist.
        data: the whole content.

    Raises:
        OSError: if the folder is missing, the disk is full or the file may not be written.
    """
    write_files({Path(path): data})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Writes files that belong together; replaces none before all new ones are on the disk.

    Where a name is a link, the file that it leads to is replaced, and the link stays. What is no
    file but a device or a pipe, as /dev/null, is written to: it is not replaced by a file.

    Args:
        files: path -> whole content; the folders must exist.

    Raises:
        OSError: as `write_file`.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            path = name.resolve()
            if path.exists() and not (path.is_file() or path.is_dir()):
                path.write_bytes(data)
            else:
                temporaries[path] = _written_beside(path, data)
        for path, temporary in temporaries.items():
            temporary.replace(path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def save_model(model: Any, path: Path) -> None:
    """Saves a Keras model to `path`, which ends in `.keras`; on failure the old file stays.

    Raises:
        OSError: as `write_file`.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.stem}.new.keras")
    try:
        model.save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _written_beside(path: Path, data: bytes) -> Path:
    """Writes `data` to a temporary file in the folder of `path`, with a new file's permissions."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; this one gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
