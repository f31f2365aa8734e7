"""A job's story, from the JSON lines that nodes log."""

from __future__ import annotations

import gzip
import heapq
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from imagemill.shared.errors import UsageError

WRAPPERS = ("log", "MESSAGE")
"""Where Docker's json-file driver and journald put a line."""
DISORDER = 1000
"""How many lines out of order a file may be."""

Line = dict[str, Any]


@dataclass
class Found:
    """What has been read so far."""

    lines: int = 0
    of_the_job: int = 0
    first: dict[str, str] = field(default_factory=dict)


def expand(places: Sequence[str]) -> list[str]:
    """The files that are meant: those of folders, those that match a pattern, - for stdin. Raises UsageError."""
    files: dict[str, None] = {}
    for place in places:
        path = Path(place)
        if place == "-" or path.is_file():
            found = [place]
        elif path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        else:
            found = sorted(str(file) for file in path.parent.glob(path.name) if file.is_file()) if path.name else []
        if not found:
            raise UsageError(f"no log files at {place}")
        files |= dict.fromkeys(found)
    return list(files)


def read(files: Iterable[str], job: str, found: Found) -> Iterator[Line]:
    """The lines about a job, from all files, by time. Each file should be roughly in order, as logs are."""
    return heapq.merge(*(_ordered(_about(_opened(name), job, found)) for name in files), key=_time)


def _opened(name: str) -> Iterator[str]:
    """The lines of a file, of a gzipped one, or of stdin. Raises UsageError."""
    if name == "-":
        yield from sys.stdin
        return
    try:
        with _open(Path(name)) as file:
            yield from file
    except (OSError, EOFError) as error:
        raise UsageError(f"can't read {name}: {error}") from error


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", errors="replace") if zipped else path.open(errors="replace")


def _about(lines: Iterable[str], job: str, found: Found) -> Iterator[Line]:
    for text in lines:
        line = parse(text)
        if line is not None:
            found.lines += 1
            if line.get("job") == job or job in _listed(line):
                found.of_the_job += 1
                yield line


def _listed(line: Line) -> list[object]:
    jobs = line.get("jobs")
    return jobs if isinstance(jobs, list) else []


def parse(text: str) -> Line | None:
    """A line as logged, without what a log driver has put around it or `docker compose logs` before it."""
    start = text.find("{")
    try:
        line = json.loads(text[start:]) if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    for name in WRAPPERS:
        if isinstance(line.get(name), str):
            return parse(line[name])
    return line if isinstance(line.get("time"), str) and isinstance(line.get("message"), str) else None


def _ordered(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines by time, if none is more than a few lines out of order."""
    waiting: list[tuple[str, int, Line]] = []
    for number, line in enumerate(lines):
        heapq.heappush(waiting, (_time(line), number, line))
        if len(waiting) > DISORDER:
            yield heapq.heappop(waiting)[2]
    while waiting:
        yield heapq.heappop(waiting)[2]


def _time(line: Line) -> str:
    return str(line["time"])
