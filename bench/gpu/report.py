"""The results of a run, written after every figure: a run may be cut off at any time.

`results-gpu.json` has everything. A table of it replaces what stands between two marks in RESULTS.md.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from bench.figures import Figure

BEGIN, END = "<!-- python3 -m bench.gpu: begin -->", "<!-- python3 -m bench.gpu: end -->"
State = Literal["running", "done", "skipped", "stopped", "failed"]


@dataclass
class Part:
    """What came of one section. `why` says why it was skipped or stopped; of a failure it is the traceback."""

    name: str
    state: State = "running"
    why: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)


class Report:
    """Keeps what was measured, prints it, and writes it to both files in `folder`. `machine` is what it was measured on."""

    def __init__(self, folder: Path, machine: dict[str, str]) -> None:
        self.machine, self.parts = machine, list[Part]()
        self.json, self.rows = folder / "results-gpu.json", folder / "RESULTS.md"
        self._began = 0.0

    def begin(self, name: str) -> None:
        """From now on, figures are this section's."""
        self._began = time.monotonic()
        self.parts.append(Part(name))
        print(f"--- {name}", flush=True)

    def add(self, figure: Figure) -> None:
        """Keep a figure of the section that runs."""
        self.parts[-1].figures.append(figure)
        goal = {True: ", as it should be", False: ", MISSED", None: ""}[figure["holds"]]
        print(f"    {figure['name']}: {_value(figure)}{goal}", flush=True)
        self.write()

    def end(self, state: State, why: str = "") -> None:
        """The section that runs is over."""
        part = self.parts[-1]
        part.state, part.why, part.seconds = state, why, round(time.monotonic() - self._began, 1)
        if state != "done":
            print(f"    {state}: {why}", flush=True)
        self.write()

    def status(self, *, goals: bool = True) -> int:
        """The exit status: 1 if a section failed or, unless only the program is tested, a goal is missed."""
        missed = any(figure["holds"] is False for part in self.parts for figure in part.figures)
        return int((goals and missed) or any(part.state == "failed" for part in self.parts))

    def write(self) -> None:
        """Write both files, each in one step."""
        whole = {"machine": self.machine, "sections": [asdict(part) for part in self.parts]}
        _replace(self.json, json.dumps(whole, indent=2) + "\n")
        before = self.rows.read_text() if self.rows.is_file() else f"# Benchmark results\n\n{BEGIN}\n{END}\n"
        _replace(self.rows, between_marks(before, table(self.machine, self.parts)))


def between_marks(text: str, block: str) -> str:
    """The text with the block instead of what stood between the marks; appended with marks if there are none."""
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n## On a GPU\n\n{BEGIN}\n{block}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def table(machine: dict[str, str], parts: list[Part]) -> str:
    """The rows for RESULTS.md, and which sections are missing."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    lines += ["| benchmark | value | goal | holds |", "|---|---:|---:|---|"]
    for part in parts:
        for figure in part.figures:
            goal = "" if figure["goal"] is None else f"{figure['goal']:g} {figure['unit']}".strip()
            holds = {True: "yes", False: "no", None: ""}[figure["holds"]]
            lines.append(f"| {part.name}: {figure['name']} | {_value(figure)} | {goal} | {holds} |")
    missing = [part for part in parts if part.state not in ("done", "running")]
    lines += ["", *(f"- {part.name}: {part.state} ({_last_line(part.why)})" for part in missing)]
    return "\n".join(lines).rstrip()


def _value(figure: Figure) -> str:
    return f"{figure['value']:.4g} {figure['unit']}".strip()


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:300]


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)
