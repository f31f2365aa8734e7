"""Run the benchmarks and print one table; exit status 1 if a goal is missed.

    python -m bench [--only NAME]... [--rounds N] [--images FOLDER] [--weights FOLDER]

`cutout` and `real` need a folder of photos with reference mattes (`real` also takes photos alone), named as bench/cutout.py
describes, from `--images` or the environment variable IMAGEMILL_BENCH_IMAGES; `real` also needs a model, as bench/real.py
describes, from `--weights` or IMAGEMILL_TEST_WEIGHTS. The figures are also written to bench/results.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.ending import end_on_sigterm
from bench.figures import Figure

BENCHES = (
    "enqueue",
    "codec",
    "stages",
    "coldstart",
    "overhead",
    "batching",
    "memory",
    "feeding",
    "line",
    "inpaint",
    "stylize",
    "quality",
    "cutout",
    "real",
    "fleet",
    "scaling",
)
RESULTS = Path(__file__).parent / "results.json"
VARIABLES = {"images": "IMAGEMILL_BENCH_IMAGES", "weights": "IMAGEMILL_TEST_WEIGHTS"}
OWN = "With your own model and photos, as bench/real.py describes: --only real --weights FOLDER --images FOLDER."
NEEDED = {"cutout": ("images",), "real": ("images", "weights")}
"""The folders that some benchmarks need, by the names of their arguments."""


def measure(bench: str, rounds: int | None, folders: dict[str, Path]) -> list[Figure]:
    """Import and run one benchmark; each needs different libraries."""
    module = importlib.import_module(f"bench.{bench}")
    needed = {name: folders[name] for name in NEEDED.get(bench, ())}
    takes_rounds = rounds is not None and bench != "cutout"
    figures: list[Figure] = module.run(*([rounds] if takes_rounds else []), **needed)
    return figures


def make_table(figures: list[Figure]) -> Table:
    table = Table("benchmark", box=None, header_style="bold", pad_edge=False)
    for heading in ("value", "goal", "holds"):
        table.add_column(heading, justify="right")
    for figure in figures:
        goal = "" if figure["goal"] is None else f"{figure['goal']:g} {figure['unit']}".strip()
        holds = {True: "[green]yes[/]", False: "[bold red]no[/]", None: ""}[figure["holds"]]
        table.add_row(figure["name"], f"{figure['value']:.4g} {figure['unit']}".strip(), goal, holds)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run the benchmarks and print one table.", epilog=OWN)
    parser.add_argument("--only", action="append", choices=BENCHES, help="run only this one; repeatable")
    parser.add_argument("--rounds", type=int, help="number of measurements, of which the median is reported")
    parser.add_argument("--images", type=Path, help=f"photos and reference mattes; default: {VARIABLES['images']}")
    parser.add_argument("--weights", type=Path, help=f"folder of a real model; default: {VARIABLES['weights']}")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    given = {name: getattr(arguments, name) or os.environ.get(variable) for name, variable in VARIABLES.items()}
    folders = {name: Path(folder) for name, folder in given.items() if folder}
    for folder in folders.values():
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    end_on_sigterm()
    console, figures = Console(), []
    for bench in arguments.only or BENCHES:
        missing = [name for name in NEEDED.get(bench, ()) if name not in folders]
        if missing:
            wanted = " and ".join(f"--{name} FOLDER or {VARIABLES[name]}" for name in missing)
            console.print(f"{bench} skipped: set {wanted}.", soft_wrap=True)
            continue
        with console.status(f"measuring {bench} ..."):
            figures += measure(bench, arguments.rounds, folders)
    if figures:
        console.print(make_table(figures))
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if any(figure["holds"] is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
