"""What the command keeps from the terminal, and what reaches it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Use kqat.quantize_model first.", "Use `kqat quantize` first."),
        ("Leave it float with policy={'a/b*': None}.", "Leave it float with --layer a/b*=float."),
        (
            "Give kqat.quantize_model or kqat.plan the sizes, such as input_shapes=(64, 64, 1).",
            "Give `kqat plan` the sizes, such as --input-shape 64,64,1.",
        ),
        ("such as input_shapes=(64,).", "such as --input-shape 64."),
        ("with float_weights='float16'. target=None", "with --float-weights float16. no --target"),
        ("Leave weights out, give calibration_data.", "Leave --weights out, give --data."),
        ("Received: calibration='mse'", "Received: --calibration mse"),
        ("inference_input_type is 'int4'", "--input-type is 'int4'"),
        ("tflite_export.to_c(blob) of kqat.diagnose", "`kqat to-c` of `kqat diagnose`"),
        (
            "the argument weights= of tflite_export.convert decides",
            "the option --weights of `kqat convert` decides",
        ),
        ("kqat.adapt(model, calibration_data=…) makes", "`kqat adapt --data …` makes"),
        ("unless kqat.calibrate(qat, data) helps", "unless `kqat calibrate` helps"),
        (
            "Give classes and functions of its own as custom_objects, or load it",
            "Give the Python file that defines its own classes and functions as --code FILE, or "
            "load it",
        ),
        ("describe it with kqat.register_layer.", "describe it with kqat.register_layer."),
    ],
)
def test_messages_speak_the_words_of_the_shell(said: str, shown: str) -> None:
    assert terminal.in_shell_words(said) == shown


def test_long_lines_are_broken_and_tables_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    table, long = "a" + " " * 60 + "b", "- " + "word " * 30
    terminal.show_text(f"{table}\n{long}")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == table and len(rest) == 2
    assert max(map(len, rest)) <= 80 and rest[1].startswith("  word")


def test_progress_is_silent_where_there_is_no_terminal(capsys: object) -> None:
    with terminal.progress():
        assert list(tracked(range(3), "counting")) == [0, 1, 2]
    with terminal.doing("waiting"):
        pass
    captured = capsys.readouterr()  # type: ignore[attr-defined]
    assert (captured.out, captured.err) == ("", "")
