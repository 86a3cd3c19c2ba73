"""Writes RESULTS.md from the JSON results of recipes that are kept in recipes/results.

    python -m recipes.results                               # write it again
    python -m recipes.results --add out/digits/results.json # keep these results, then write it

No number in RESULTS.md is typed by hand: each table is printed by its recipe.
"""

import argparse
import importlib
import json
import re
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

Sections without a date were measured in November 2026, before calibration corrected the means that
rounding moves. Today's calibrated files (PTQ) are nearer to the float model, and differ by some
bytes: compare the six pretrained models below, which were measured after it.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Keeps the given results and writes RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", nargs="+", type=Path, default=[], help="results.json to keep")
    for path in parser.parse_args(argv).add:
        keep(path)
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
            *(_measured(run, several=bool(others)) for run in runs if "date" in run),
        ]
    )


def _measured(run: dict[str, Any], *, several: bool) -> str:
    seed = f", seed {run['options']['seed']}" if several else ""
    return f"Measured on {run['date']}{seed}.\n"


def _markdown(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [" | ".join(("", *cells, "")).strip() for cells in (table.header, rule, *table.rows)]
    return f"{table.title}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
