"""What the command keeps from the terminal, and what reaches it."""

import os
import subprocess
import sys
from pathlib import Path

from kqat import terminal
from kqat.base import tracked

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from kqat import terminal
with terminal.quiet_libraries():
    os.write(2, b"noise of a library\\n")
    terminal.tell("a message")
    os.system("echo noise of a child >&2")
os.write(2, b"after\\n")
"""


def test_libraries_are_quiet_and_messages_are_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        check=True,
    )
    assert done.stderr == "a message\nafter\n"


def test_progress_is_silent_where_there_is_no_terminal(capsys: object) -> None:
    with terminal.progress():
        assert list(tracked(range(3), "counting")) == [0, 1, 2]
    captured = capsys.readouterr()  # type: ignore[attr-defined]
    assert (captured.out, captured.err) == ("", "")
