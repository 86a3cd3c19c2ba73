"""Children of `tflite_export.runtimes` that are forked from one process, which has the runtimes.

    with forked_children():
        ...  # verify, run, compare_runtimes, again and again

A child of its own keeps a runtime's crash from its caller. But each imports Python's packages and
the runtime anew, a fifth of a second, where most small files run within a hundredth. Inside the
context a child is a fork of one process that has imported them, and has run nothing: it computes,
crashes, hangs and speaks as one that was started anew.
"""

import contextlib
import importlib
import importlib.util
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from unittest import mock


@contextlib.contextmanager
def forked_children() -> Iterator[None]:
    """Inside, what LiteRT and TFLite Micro run in a child runs in a fork."""
    # Here, as the process below, which is this file too, needs neither.
    from tflite_export.runtimes import execution

    paths = os.pathsep.join(path for path in sys.path if path)
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
    )
    assert server.stdin is not None and server.stdout is not None
    asked, answers = server.stdin, server.stdout

    def run_forked(
        arguments: Sequence[str],
        *,
        request: bytes | None = None,
        folder: Path | None = None,
        timeout_seconds: float | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """As `run_python`."""
        assert folder is None
        pickle.dump((list(arguments), request or b"", timeout_seconds), asked)
        asked.flush()
        code, out, err = pickle.load(answers)
        if code is None:
            raise subprocess.TimeoutExpired(list(arguments), timeout_seconds or 0.0, out, err)
        return subprocess.CompletedProcess(list(arguments), code, out, err)

    try:
        with mock.patch.object(execution, "run_python", run_forked):
            yield
    finally:
        asked.close()
        server.wait()
        answers.close()


def main() -> None:
    """Answers each request on stdin with the exit code of a fork, its stdout and its stderr."""
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What prints prints elsewhere.
    importlib.import_module("ai_edge_litert.interpreter")
    if importlib.util.find_spec("tflite_micro") is not None:
        importlib.import_module("tflite_micro.python.tflite_micro.runtime")
    programs: dict[str, ModuleType] = {}
    with contextlib.suppress(EOFError):
        while True:
            arguments, request, seconds = pickle.load(asked)
            program = programs.setdefault(arguments[0], _loaded(arguments[0]))
            pickle.dump(_forked(program, arguments, request, seconds), answers)
            answers.flush()


def _loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("child_program", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _forked(
    program: ModuleType, arguments: list[str], request: bytes, seconds: float | None
) -> tuple[int | None, bytes, bytes]:
    """The exit code of `program.main()` in a fork, or `None` if it took longer; what it wrote."""
    # Files, which unlike pipes are never full.
    with contextlib.ExitStack() as stack:
        files: list[Any] = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(request)
        files[0].seek(0)
        child = os.fork()
        if child == 0:
            _become(program, arguments, files)
        ended = _ends_within(child, seconds)
        if not ended:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = (_whole(file) for file in files[1:])
        return (code if ended else None), out, err


def _become(program: ModuleType, arguments: list[str], files: Sequence[BinaryIO]) -> None:
    """Runs the program as a process of its own would, and does not return."""
    code = 1
    try:
        for descriptor, file in enumerate(files):
            os.dup2(file.fileno(), descriptor)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.argv = arguments
        program.main()
        code = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        # Neither this file's cleaning up nor that of the process that was forked.
        os._exit(code)


def _ends_within(child: int, seconds: float | None) -> bool:
    descriptor = os.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _whole(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


if __name__ == "__main__":
    main()
