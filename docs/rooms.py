"""Writes the listing of both packages into ARCHITECTURE.md: one line per module.

    python -m docs.rooms [--check]

The line is the first sentence of a module's docstring, so the page follows the code. Below
the listing stands how many imports join two sub-packages, and how many of them run upwards.
"""

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
PACKAGES = ("kqat", "tflite_export")
BEGIN, END = "<!-- rooms: python -m docs.rooms -->", "<!-- end of rooms -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page, or with --check says whether it is up to date; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    check = parser.parse_args(argv).check
    old = PAGE.read_text()
    new = with_listing(old)
    if check:
        print("ARCHITECTURE.md is up to date" if old == new else "outdated: python -m docs.rooms")
        return int(old != new)
    PAGE.write_text(new)
    print(f"wrote {PAGE.name}: {len(list(modules()))} modules")
    return 0


def with_listing(page: str) -> str:
    """`page` with the listing of today between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{listing()}{END}{rest.split(END)[1]}"


def listing() -> str:
    """A heading and a table for each sub-package, lowest first, and the count of imports."""
    order = {package: subpackages(package) for package in PACKAGES}
    parts = []
    for package in PACKAGES:
        parts.append(f"### `{package}/`\n")
        for folder in (*order[package], ""):
            rows = [path for path in modules() if is_in(path, package, folder)]
            if folder:
                parts.append(f"**`{folder}/`** {first_sentence(ROOT / package / folder)}\n")
            else:
                parts.append("**above them**\n")
            parts.append("| module | what it holds |\n|---|---|")
            parts += [
                f"| `{name(path, package, folder)}` | {first_sentence(path)} |" for path in rows
            ]
            parts.append("")
    for package in PACKAGES:
        joined = arrows(package)
        places = [*order[package]]
        upwards = [pair for pair in joined if places.index(pair[0]) < places.index(pair[1])]
        parts.append(
            f"`{package}`: imports join {len(joined)} pairs of sub-packages, {len(upwards)} of "
            "them upwards."
        )
    return "\n".join(parts) + "\n"


def modules() -> Iterator[Path]:
    """Every module of both packages that is no face."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                yield path


def is_in(path: Path, package: str, folder: str) -> bool:
    """Whether a module belongs to a sub-package, or for `""` stands above all of them."""
    parts = path.relative_to(ROOT / package).parts if path.is_relative_to(ROOT / package) else ()
    return len(parts) == 1 if not folder and parts else bool(folder) and parts[:1] == (folder,)


def name(path: Path, package: str, folder: str) -> str:
    """The module's name below its sub-package: `ranges/fixed`."""
    return path.relative_to(ROOT / package / folder).with_suffix("").as_posix()


def first_sentence(path: Path) -> str:
    """The first sentence of a module's or folder's docstring, on one line."""
    file = path / "__init__.py" if path.is_dir() else path
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    end = text.find(". ")
    return (text if end < 0 else text[: end + 1]).replace("|", "\\|")


def subpackages(package: str) -> tuple[str, ...]:
    """The sub-packages of a package, lowest first: each after those that it imports."""
    joined = arrows(package)
    imports = {folder: {b for a, b in joined if a == folder} for folder in folders(package)}
    order: list[str] = []
    while len(order) < len(imports):
        ready = [f for f in imports if f not in order and imports[f] <= set(order)]
        if not ready:
            raise ValueError(f"sub-packages of {package} import in a circle: {imports}")
        order += ready[:1]
    return tuple(order)


def folders(package: str) -> tuple[str, ...]:
    """The names of the sub-packages of a package."""
    return tuple(sorted(path.parent.name for path in (ROOT / package).glob("*/__init__.py")))


def arrows(package: str) -> set[tuple[str, str]]:
    """Pairs of sub-packages of which the first imports the second."""
    found, names = set(), folders(package)
    for folder in names:
        for path in (ROOT / package / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module is not None:
                    for alias in node.names:
                        parts = f"{node.module}.{alias.name}".split(".")
                        if parts[0] == package and parts[1] in names:
                            found.add((folder, parts[1]))
    return {(a, b) for a, b in found if a != b}


if __name__ == "__main__":
    raise SystemExit(main())
