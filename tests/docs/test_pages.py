"""The code of every page runs and prints what the page says; every link leads somewhere."""

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kqat
import tflite_export
from docs import pages
from kqat import algorithms
from tests import traced_once

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs"
# Pages that take more than a few seconds: they train, try methods, or search.
SLOW = {
    "custom-training", "debug-a-gap", "from-tfmot", "microcontroller", "mixed-precision", "pruning",
    "quick-start", "recurrent", "transfer-learning", "transformers",
}  # fmt: skip
TEXTS = [*sorted(FOLDER.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
        for page in pages.pages()
    ],
)
def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(traced_once.OWNER, "compile", traced_once.compile)
    ran = pages.run(page)
    assert any(block.kind == "python" for block, _ in ran)
    for block, printed in ran:
        if block.kind == "text" and printed != "left out":
            missing = pages.words(block.code) - pages.words(printed)
            assert not missing, f"{page.name}:{block.line} shows {missing}, the code prints not"
            assert printed.strip(), f"{page.name}:{block.line}: nothing is printed"
        if block.kind == "cpp" and shutil.which("g++"):
            assert_compiles(block.code, tmp_path)


def assert_compiles(code: str, folder: Path) -> None:
    """Compiles C++ against the generated headers and stand-ins for those of TFLite Micro."""
    from tests.tflite_export.firmware import test_c_source as firmware

    source = folder / "page.cc"
    source.write_text(code)
    includes = ["-I", str(firmware.stubs(folder / "stubs")), "-I", str(folder / "firmware")]
    command = ["g++", *firmware.FLAGS, "-fsyntax-only", *includes, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*pages.pages(), ROOT / "README.md"], ids=lambda page: page.stem)
def test_code_needs_no_scrolling(page: Path) -> None:
    # So many columns stand beside the table of contents, and in half a screen of a laptop.
    text = page.read_text()
    wide = [
        f"{page.name}:{block.line + place}: {line}"
        for block in pages.blocks(text)
        if text[: block.start].splitlines()[-1].startswith("```")  # it is shown
        for place, line in enumerate(block.code.splitlines())
        if len(line) > 80
    ]
    assert not wide, wide


def test_blocks_are_found_in_their_order() -> None:
    text = (
        "<!-- setup\na = 1\n-->\n```python\nb = a\n```\n"
        "```text\nx\n```\n<!-- needs os -->\n```sh\nkqat\n```\n"
    )
    found = [(block.kind, block.code, block.line, block.needs) for block in pages.blocks(text)]
    assert found == [
        ("python", "a = 1\n", 2, ""),
        ("python", "b = a\n", 5, ""),
        ("text", "x\n", 8, ""),
        ("sh", "kqat\n", 12, "os"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("pip install '.[nothing]'", "extra that does not exist: nothing"),
        ("python -m recipes.nothing", "module that does not exist"),
        ("rm -rf out", "neither run nor checked"),
        ("kqat plan no_such.keras", "ended with 2"),
    ],
)
def test_a_line_of_a_shell_that_cannot_run_is_told(
    line: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n{line}\n```\n")
    with pytest.raises(RuntimeError, match=problem):
        pages.run(page)


def test_output_is_written_below_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('one ')\n```\n\n```text\nold\nlines\n```\nend\n")
    assert pages.with_output(page) == "```python\nprint('one ')\n```\n\n```text\none\n```\nend\n"


def test_every_public_name_has_an_entry() -> None:
    text = "".join(path.read_text() for path in (FOLDER / "api").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    names = {f"kqat.{name}" for name in kqat.__all__}
    names |= {f"kqat.algorithms.{name}" for name in algorithms.__all__}
    names |= {f"tflite_export.{name}" for name in tflite_export.__all__}
    # Tables and modules, which the text names.
    names -= {"kqat.TARGETS", "kqat.algorithms", "tflite_export.TARGETS", "tflite_export.RUNTIMES"}
    assert names - entries == set()
    assert {e for e in entries if e not in names} == set()


def test_no_power_is_taken_for_bold_text() -> None:
    # In Markdown, 2**-15 to 2**-9 without backticks shows -15 to 2 in bold.
    code = re.compile(r"`[^`]*`|\n\n {4}.*(\n {4}.*)*")
    found = [
        f"{face.__name__}.{name}: {line.strip()}"
        for face in (kqat, tflite_export, algorithms)
        for name in face.__all__
        for line in code.sub("", inspect.getdoc(getattr(face, name)) or "").splitlines()
        if re.search(r"\w\*\*", line)
    ]
    assert not found


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    for path in FOLDER.rglob("*.md"):
        assert f": {path.relative_to(FOLDER)}\n" in f"{config}\n", path.name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(#[^)\s]+)?\)", text):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", t).strip().lower().replace(" ", "-") for t in titles}
            assert anchor[1:] in slugs, f"{target}{anchor}"


def test_named_recipes_and_benchmarks_exist() -> None:
    for path in TEXTS:
        for module in re.findall(
            r"python -m ((?:recipes|benchmarks|docs)[\w.]*)", path.read_text()
        ):
            file = ROOT / f"{module.replace('.', '/')}.py"
            assert file.exists(), f"{path.name}: {module}"
