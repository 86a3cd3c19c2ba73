"""Files that are whole or not there: full disks, missing folders, what was there before."""

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kqat.base.atomic_files import save_model, write_file

OLD, NEW = b"old and whole", b"new" * 1000


def test_a_file_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_old_file_is_replaced_and_a_string_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    write_file(str(tmp_path / "file"), b"")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    """A link became a file of its own, and a device, as /dev/null, a file in its place."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(OLD)
    (tmp_path / "link").symlink_to("real/file")
    write_file(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_bytes() == NEW
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", NEW)
    assert os.read(reader, len(NEW)) == NEW and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_is_as_readable_as_any_other(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_file(tmp_path / "ours", NEW)
        (tmp_path / "other").write_bytes(NEW)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    ours, other = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "other"))
    assert ours == other


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("old", [OLD, None], ids=["a file before", "none before"])
@pytest.mark.parametrize(
    ("failure", "error"), [(full, OSError), (interrupted, KeyboardInterrupt)], ids=["full", "^C"]
)
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: bytes | None,
    failure: object,
    error: type[BaseException],
    step: str,
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(step, failure)
    with pytest.raises(error, match="No space left" if failure is full else None):
        write_file(path, NEW)
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if old is not None else [])
    assert old is None or path.read_bytes() == old


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skips where this user may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full_leaves_what_was_there(small_disk: Path) -> None:
    write_file(small_disk / "file", OLD)
    with pytest.raises(OSError, match="No space left on device"):
        write_file(small_disk / "file", bytes(1 << 20))
    assert (small_disk / "file").read_bytes() == OLD
    assert [p.name for p in small_disk.iterdir()] == ["file"]
    write_file(small_disk / "file", NEW)  # What was written in vain takes no room.
    assert (small_disk / "file").read_bytes() == NEW


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        write_file(tmp_path / "missing" / "file", NEW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_file(tmp_path / "folder", NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


class Model:
    """Saves half of itself, then what `failure` does."""

    def __init__(self, failure: Callable[[], None]) -> None:
        self.failure = failure

    def save(self, path: Path) -> None:
        assert path.suffix == ".keras"  # Keras saves by the name's ending.
        path.write_bytes(NEW[:5])
        self.failure()
        path.write_bytes(NEW)


@pytest.mark.parametrize("old", [OLD, None], ids=["a file before", "none before"])
@pytest.mark.parametrize("failure", [full, interrupted], ids=["full", "^C"])
def test_a_model_that_is_saved_by_half_leaves_what_was_there(
    tmp_path: Path, old: bytes | None, failure: Callable[[], None]
) -> None:
    path = tmp_path / "model.keras"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_model(Model(failure), path)
    assert [p.name for p in tmp_path.iterdir()] == (["model.keras"] if old is not None else [])
    assert old is None or path.read_bytes() == old


def test_a_saved_model_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(OLD)
    save_model(Model(lambda: None), path)
    assert path.read_bytes() == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]
