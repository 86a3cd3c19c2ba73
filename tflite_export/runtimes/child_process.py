"""Runs Python programs in a child process, which may crash or hang without harm to the caller."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_python(
    arguments: Sequence[str],
    *,
    request: bytes | None = None,
    folder: Path | None = None,
    timeout_seconds: float | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Runs this Python interpreter with `arguments` and captures stdout and stderr.

    The child finds the very packages that this process finds, and none in its directory.

    Args:
        arguments: of the interpreter.
        request: what the child reads on stdin.
        folder: the child's working directory, by default this process's.
        timeout_seconds: how long it may take, by default for ever.

    Raises:
        subprocess.TimeoutExpired: if it takes longer.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments],
        input=request,
        cwd=folder,
        capture_output=True,
        timeout=timeout_seconds,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
    )


def exit_name(code: int) -> str:
    """A return code in words: the signal that ended the child, or its exit code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
