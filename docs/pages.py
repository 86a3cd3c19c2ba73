"""Runs the code of the documentation's pages, and writes what it prints below it.

    python -m docs.pages [--write] docs/guide/quick-start.md …

The blocks of a page run in their order, in one namespace and one folder:

  * ```` ```python ```` is executed, and so is the text of a comment that begins `<!-- setup`, which
    readers do not see. `<!-- needs NAME -->` before a block leaves it out where that package is not
    installed.
  * ```` ```sh ````: lines that begin with `kqat` run in this process; of other lines it is checked
    that their modules and extras exist.
  * ```` ```text ```` holds what the block before it prints.

Numbers differ from machine to machine, so what is compared are the words.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
from click.testing import CliRunner

FOLDER = Path(__file__).parent
_BLOCK = re.compile(
    r"<!-- setup\n(?P<hidden>.*?)-->"
    r"|(?:<!-- needs (?P<needs>\w+) -->\n)?^```(?P<kind>\w+)[^\n]*\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a page.

    Attributes:
        kind: `"python"`, `"sh"`, `"text"` or another language, which is not run.
        code: what is in it.
        line: number of its first line in the page.
        needs: a package without which it does not run, or "".
        start, end: where its code is in the page's text.
    """

    kind: str
    code: str
    line: int
    needs: str
    start: int
    end: int


def pages() -> list[Path]:
    """The pages with code: the guides and the home page."""
    return [FOLDER / "index.md", *sorted((FOLDER / "guide").glob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in their order."""
    for match in _BLOCK.finditer(text):
        group = "hidden" if match["hidden"] is not None else "code"
        yield Block(
            kind=match["kind"] or "python",
            code=match[group],
            line=text.count("\n", 0, match.start(group)) + 1,
            needs=match["needs"] or "",
            start=match.start(group),
            end=match.end(group),
        )


def run(page: Path) -> list[tuple[Block, str]]:
    """Runs a page in the current folder; returns its blocks, each with what it printed.

    A block of text is paired with what the block before it printed; a block that was left out
    with its own text.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    keras.utils.set_random_seed(0)
    ran: list[tuple[Block, str]] = []
    for block in blocks(page.read_text()):
        printed = ""
        if block.needs and importlib.util.find_spec(block.needs) is None:
            printed = "left out"
        elif block.kind == "python":
            code = "\n" * (block.line - 1) + block.code
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, page.name, "exec"), namespace)
            printed = out.getvalue()
        elif block.kind == "sh":
            printed = "".join(_line(line) for line in _lines(block.code))
        elif block.kind == "text":
            printed = ran[-1][1]
        ran.append((block, printed))
    return ran


def words(text: str) -> set[str]:
    """The words of three letters or more in what a program printed."""
    return set(re.findall(r"[A-Za-z_]{3,}", text))


def _lines(code: str) -> list[str]:
    return [line for line in code.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]


def _line(line: str) -> str:
    """Runs one line of a shell, or checks that it can."""
    parts = shlex.split(line, comments=True)
    if parts[0] == "kqat":
        from kqat.cli import main as command

        done = CliRunner().invoke(command, parts[1:])
        if done.exit_code:
            raise RuntimeError(f"{line!r} ended with {done.exit_code}: {done.output}")
        return done.output
    if parts[:2] == ["python", "-m"]:
        if importlib.util.find_spec(parts[2]) is None:
            raise RuntimeError(f"{line!r} names a module that does not exist")
    elif parts[:2] == ["pip", "install"]:
        setup = (FOLDER.parent / "setup.py").read_text()
        for extra in re.findall(r"\[(.*?)\]", line):
            for name in extra.split(","):
                if f'"{name}"' not in setup:
                    raise RuntimeError(f"{line!r} names an extra that does not exist: {name}")
    elif parts[0] not in ("make", "git", "cd"):
        raise RuntimeError(f"{line!r} is neither run nor checked")
    return ""


def with_output(page: Path) -> str:
    """The page's text with each block of text as the code before it prints it now."""
    text = page.read_text()
    for block, printed in reversed(run(page)):
        if block.kind == "text" and printed != "left out":
            lines = [f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines()]
            text = text[: block.start] + "".join(lines) + text[block.end :]
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Runs pages, and with --write puts into them what they print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write what the code prints")
    parser.add_argument("pages", nargs="*", type=Path, default=pages())
    options = parser.parse_args(argv)
    for page in options.pages:
        path = page.resolve()
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                text = with_output(path)
            finally:
                os.chdir(here)
        if options.write:
            path.write_text(text)
        print(f"ran {path.relative_to(FOLDER)}")


if __name__ == "__main__":
    main()
