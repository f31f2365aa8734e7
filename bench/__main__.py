"""The benchmarks, as one table; exit status 1 where a goal is missed.

    python -m bench [--only NAME]... [--rounds N] [--images FOLDER]

`cutout` needs a folder of photos with reference mattes (bench/cutout.py says how they are named), from `--images` or
the environment variable IMAGEMILL_BENCH_IMAGES. The figures also go to bench/results.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BENCHES = (
    "enqueue",
    "codec",
    "coldstart",
    "overhead",
    "batching",
    "memory",
    "feeding",
    "inpaint",
    "stylize",
    "quality",
    "cutout",
)
RESULTS = Path(__file__).parent / "results.json"
VARIABLE = "IMAGEMILL_BENCH_IMAGES"

Figure = dict[str, Any]
"""`name`, `value`, `goal` (None where there is none), `unit`, `holds` (None without a goal), `rounds`."""


def measure(bench: str, rounds: int | None, images: Path | None) -> list[Figure]:
    """One benchmark's figures. It is imported only now: each needs other libraries."""
    module = importlib.import_module(f"bench.{bench}")
    if bench == "cutout":
        figures: list[Figure] = module.run(images)
    else:
        figures = module.run() if rounds is None else module.run(rounds)
    return figures


def table(figures: list[Figure]) -> Table:
    made = Table("benchmark", box=None, header_style="bold", pad_edge=False)
    for heading in ("value", "goal", "holds"):
        made.add_column(heading, justify="right")
    for one in figures:
        goal = "" if one["goal"] is None else f"{one['goal']:g} {one['unit']}".strip()
        holds = {True: "[green]yes[/]", False: "[bold red]no[/]", None: ""}[one["holds"]]
        made.add_row(one["name"], f"{one['value']:.4g} {one['unit']}".strip(), goal, holds)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="The benchmarks, as one table.")
    parser.add_argument("--only", action="append", choices=BENCHES, help="this one; may be given more than once")
    parser.add_argument("--rounds", type=int, help="how often to measure; the median counts")
    parser.add_argument("--images", type=Path, help=f"photos and reference mattes for cutout; else from {VARIABLE}")
    given = parser.parse_args()
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds must be at least 1")
    images = given.images or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if images is not None and not images.is_dir():
        parser.error(f"{images} is no folder")
    console, figures = Console(), []
    for bench in given.only or BENCHES:
        if bench == "cutout" and images is None:
            console.print(f"cutout was left out: name a folder of photos with --images FOLDER or {VARIABLE}.", soft_wrap=True)
            continue
        with console.status(f"measuring {bench} ..."):
            figures += measure(bench, given.rounds, images)
    if figures:
        console.print(table(figures))
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if any(one["holds"] is False for one in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
