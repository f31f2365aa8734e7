"""Figures that the benchmarks report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.ending import end_on_sigterm

Figure = dict[str, Any]
"""`name`, `value`, `unit`, `goal` (or None), `holds` (None without a goal) and `rounds`."""


def figure(
    name: str,
    values: float | Sequence[float],
    unit: str = "",
    goal: float | None = None,
    *,
    at_most: bool = False,
    rounds: int | None = None,
) -> Figure:
    """The median of the rounds' values to four digits. `goal` is its lower limit, or upper limit with `at_most`."""
    measured = values if isinstance(values, Sequence) else [values]
    value = float(f"{median(measured):.4g}")
    holds = None if goal is None else (value <= goal if at_most else value >= goal)
    return {"name": name, "value": value, "unit": unit, "goal": goal, "holds": holds, "rounds": rounds or len(measured)}


@dataclass(frozen=True)
class Measured:
    """What one round gives for one figure. `goal` is an upper limit, or a lower limit without `at_most`."""

    name: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_most: bool = True


def over_rounds(rounds: Sequence[Sequence[Measured]]) -> list[Figure]:
    """The figures of rounds that all measured the same."""
    return [
        figure(first.name, [one.value for one in (first, *others)], first.unit, first.goal, at_most=first.at_most)
        for first, *others in zip(*rounds, strict=True)
    ]


def print_figures(run: Callable[..., list[Figure]]) -> None:
    """Run a benchmark with the number of rounds from the command line, and print a line of JSON per figure."""
    end_on_sigterm()
    for result in run(*(int(argument) for argument in sys.argv[1:2])):
        print(json.dumps(result))
