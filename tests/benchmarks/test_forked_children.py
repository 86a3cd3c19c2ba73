"""A fork answers as a process that was started anew."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.forked_children import forked_children
from tflite_export.runtimes import execution

PROGRAM = """
import os, sys, time

def main():
    sys.excepthook = lambda kind, error, trace: print(error, file=sys.stderr)
    what = sys.argv[1]
    os.write(1, sys.stdin.buffer.read()[::-1])
    print("words of", what, file=sys.stderr)
    if what == "raises":
        raise ValueError("a kernel is missing")
    if what == "crashes":
        os.abort()
    if what == "hangs":
        time.sleep(60)

if __name__ == "__main__":
    main()
"""


def test_a_fork_answers_as_a_child(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    request = bytes(range(256)) * 1000

    def answers() -> list[tuple[int, bytes, bytes]]:
        kinds = ("ends", "raises", "crashes", "ends")
        found = [execution.run_python([str(path), kind], request=request) for kind in kinds]
        return [(child.returncode, child.stdout, child.stderr) for child in found]

    with forked_children():
        forked = answers()
        with pytest.raises(subprocess.TimeoutExpired):
            execution.run_python([str(path), "hangs"], timeout_seconds=0.1)
        # It is at hand for the next one.
        assert execution.run_python([str(path), "ends"]).stderr == b"words of ends\n"
    assert [code for code, _, _ in forked] == [0, 1, -6, 0]
    assert forked == answers()
