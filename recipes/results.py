"""Writes RESULTS.md from the JSON results of recipes that are kept in recipes/results.

    python -m recipes.results                               # write it again
    python -m recipes.results --add out/digits/results.json # keep these results, then write it
    python -m recipes.results --stamp                       # ask git which commit had which first

No number in RESULTS.md is typed by hand: each table is printed by its recipe.
"""

import argparse
import importlib
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kqat.base import write_file
from recipes.running import Table

FOLDER = Path(__file__).with_name("results")
PAGE = Path(__file__).with_name("RESULTS.md")
# The lab comes first; the others follow in the order of their names.
FIRST = "mobilenetv2"
SEEDED = re.compile(r"_seed\d+$")
HEAD = """\
# Results

Written by `python -m recipes.results` from the JSON in `recipes/results`, which the recipes wrote:
each command prints the tables below it. What a column means is said where it first stands.

Each section ends with the day and the commit that it was measured on. Older runs noted no commit,
the oldest no day: there stands the first commit that holds the numbers. Those without a day were
measured before calibration corrected the means that rounding moves. Today's calibrated files (PTQ)
are nearer to the float model, and differ by some bytes: compare the six pretrained models below,
which were measured after it.
"""
# What a result says of its run, beside what was measured: changed where an option got another name.
ABOUT = frozenset({"command", "options", "kqat", "date", "commit", "first_commit"})


def main(argv: Sequence[str] | None = None) -> None:
    """Keeps the given results and writes RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", nargs="+", type=Path, default=[], help="results.json to keep")
    parser.add_argument("--stamp", action="store_true", help="note the first commits of results")
    options = parser.parse_args(argv)
    for path in options.add:
        keep(path)
    if options.stamp:
        for path in sorted(FOLDER.glob("*.json")):
            stamp(path)
    write_file(PAGE, page().encode())
    print(f"Written to {PAGE}")


def keep(path: Path) -> None:
    """Copies a results.json to recipes/results.

    Raises:
        SystemExit: if the results are from a run with --smoke, on made-up data.
    """
    results = json.loads(path.read_text())
    options = results["options"]
    if options["smoke"]:
        raise SystemExit(f"Expected results of real data. Received: {path}, of a run with --smoke.")
    name = results["recipe"]
    if "network" in options:
        name += f"_{options['network']}"
    if options["seed"]:
        name += f"_seed{options['seed']}"
    FOLDER.mkdir(exist_ok=True)
    write_file(FOLDER / f"{name}.json", json.dumps(results, indent=1).encode())


def stamp(path: Path) -> None:
    """Notes in kept results without a commit which is the first that has their numbers, and its
    day.

    The page is made of the results alone, so that it can be made without the history too.
    """
    results = json.loads(path.read_text())
    if results.get("commit"):
        return
    wanted, first = _numbers(results), None
    log = _git("log", "--follow", "--format=%h %as", "--name-only", "--", str(path))
    lines = [line for line in log.splitlines() if line]
    # Two lines for each commit: its hash and day, and the name that the file had then.
    for head, name in zip(lines[::2], lines[1::2], strict=True):
        commit, day = head.split()
        if _numbers(json.loads(_git("show", f"{commit}:{name}"))) != wanted:
            break
        first = {"commit": commit, "date": day}
    if first is not None:
        write_file(path, json.dumps({**results, "first_commit": first}, indent=1).encode())


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in ABOUT}


def _git(*words: str) -> str:
    command = ["git", "-C", str(FOLDER), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def page() -> str:
    """The text of RESULTS.md, from all kept results."""
    paths = sorted(FOLDER.glob("*.json"), key=lambda path: (not path.stem.startswith(FIRST), path))
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        runs.setdefault(SEEDED.sub("", path.stem), []).append(json.loads(path.read_text()))
    explained: set[str] = set()
    return "\n".join([HEAD, *(_section(same, explained) for same in runs.values())])


def _section(runs: list[dict[str, Any]], explained: set[str]) -> str:
    """The section of one recipe, with the legends that are not yet in `explained`.

    Of several runs, which differ in their seeds, the first is shown whole.
    """
    results, *others = runs
    recipe = importlib.import_module(results["command"].split()[2])
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    tables: list[Table] = recipe.tables(results)
    if others:
        tables += recipe.tables_over_seeds(runs)
    legends = [x for x in dict.fromkeys(t.legend for t in tables) if x and x not in explained]
    explained.update(legends)
    return "\n".join(
        [
            f"## {(recipe.__doc__ or '').splitlines()[0]}\n",
            *(f"    {run['command']}" for run in runs),
            "",
            *map(_markdown, tables),
            *(f"```\n{legend}\n```\n" for legend in legends),
            f"kqat {results['kqat']}, {packages}, Python {machine['python']}; "
            f"{machine['cores']} cores, {machine['processor']}.\n",
            *(_measured(run, several=bool(others)) for run in runs),
        ]
    )


def _measured(run: dict[str, Any], *, several: bool) -> str:
    """When a run was measured, and on which commit; as far as it or the history tells."""
    seed = f", seed {run['options']['seed']}" if several else ""
    date, commit, first = (run.get(name) for name in ("date", "commit", "first_commit"))
    when = f"on {date}" if date else f"by {first['date']}" if first else "on a day not noted"
    if commit:
        where = f", on commit {commit.removesuffix('+')}"
        where += " with uncommitted changes" if commit.endswith("+") else ""
    else:
        where = f", before commit {first['commit']}" if first else ""
    return f"Measured {when}{where}{seed}.\n"


def _markdown(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [" | ".join(("", *cells, "")).strip() for cells in (table.header, rule, *table.rows)]
    return f"{table.title}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
