"""Faults, counted: real processes, Redis and S3 server; after each fault nothing may be lost, doubled or left over.

    python -m bench.faults [--seed N] [--small] [ROW]...

Without rows, all are run; they take minutes each, and with --small less, to try them out. The seed is printed, and replays a
run as far as the machine allows. What is checked after each fault is in fault_checks.py.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench import fault_nodes, fault_processes, fault_redis, fault_soak, fault_transfer
from bench.ending import end_on_sigterm
from bench.fault_run import FaultRun, Row

ROWS: list[Row] = [*fault_processes.ROWS, *fault_redis.ROWS, *fault_nodes.ROWS, *fault_transfer.ROWS, *fault_soak.ROWS]


@dataclass(frozen=True)
class Told:
    """What a row told, and whether all held that must."""

    row: Row
    what: str
    held: bool
    seconds: float


def run_row(row: Row, seed: int, *, small: bool) -> Told:
    """Run one row with everything of its own."""
    start, run = time.monotonic(), FaultRun(seed, small=small, s3=row.s3)
    try:
        with run:
            what, held = row.run(run), True
    except Exception as error:  # noqa: BLE001  # the table tells
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        what, held = f"{error} (logs: {run.folder})", False
    return Told(row, what, held, time.monotonic() - start)


def make_table(told: list[Told]) -> Table:
    table = Table("fault", "must hold", "what happened", box=None, header_style="bold", pad_edge=False)
    table.add_column("s", justify="right")
    table.add_column("held?")
    for one in told:
        held = "[green]yes[/]" if one.held else "[bold red]no[/]"
        table.add_row(one.row.name, one.row.must_hold, one.what, f"{one.seconds:.0f}", held)
    return table


def main() -> int:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description="Cause faults, and count what they cost.")
    parser.add_argument("rows", metavar="ROW", nargs="*", choices=[[], *names], help=f"one of {', '.join(names)}")
    parser.add_argument("--seed", type=int, help="replays a run; printed by each")
    parser.add_argument("--small", action="store_true", help="smaller counts, to try a row out")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    end_on_sigterm()
    console, told = Console(), []
    console.print(f"seed {seed}")
    for row in ROWS:
        if row.name in (arguments.rows or names):
            with console.status(f"{row.name} ..."):
                told.append(run_row(row, seed, small=arguments.small))
            console.print(f"{row.name}: {'held' if told[-1].held else 'did NOT hold'}: {told[-1].what}", soft_wrap=True)
    console.print(make_table(told))
    return 0 if all(one.held for one in told) else 1


if __name__ == "__main__":
    sys.exit(main())
