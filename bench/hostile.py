"""What files cost that are made to cost much: CPU time of reading one, and memory while four are read at a time.

    python -m bench.hostile [FOLDER]

Reads the files of a folder, or samples of our own (hostile_samples.py). A process like a worker's child reads each file
alone and then four times at once, and this one watches it and its helpers. The promise: at most five times the CPU time of an
ordinary PNG of the same width and height, plus one second; and 1.2 GB.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import numpy as np
from PIL import Image

from bench.figures import Figure, figure
from bench.hostile_samples import SAMPLES
from imagemill.shared.errors import ImageError
from imagemill.worker.imaging import codec

MAX_PIXELS = 64_000_000
AT_A_TIME = 4
TIMES, SECONDS = 5.0, 1.0
MOST_MB = 1200.0
PNG_SIZE = (2000, 1500)
_PAGE, _TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What a file took, as a part of what it may; `outcome` is ok or an error code."""

    name: str
    outcome: str
    seconds: float
    pixels: int
    megabytes: float
    with_helpers: float


def run(folder: Path | None = None) -> list[Figure]:
    with tempfile.TemporaryDirectory() as own:
        if folder is None:
            folder = Path(own)
            for name, make in SAMPLES.items():
                (folder / name).write_bytes(make())
        costs = measure(sorted(path for path in folder.iterdir() if path.is_file()))
    png = _png_seconds()
    worst = max(costs, key=lambda cost: _share(cost, png))
    largest = max(costs, key=lambda cost: cost.megabytes)
    for cost in sorted(costs, key=lambda cost: -_share(cost, png)):
        size = f"{cost.megabytes:5.0f} MB, {cost.with_helpers:5.0f} MB with helpers"
        print(f"{_share(cost, png):5.2f}  {cost.seconds:6.2f} s  {size}  {cost.outcome:16} {cost.name}", file=sys.stderr)
    return [
        figure(f"reading a file: CPU, part of the promised limit ({worst.name})", _share(worst, png), "", 1.0, at_most=True),
        figure(f"four files at a time: growth of the child ({largest.name})", largest.megabytes, "MB", MOST_MB, at_most=True),
        figure("four files at a time: growth of the child and its helpers", max(cost.with_helpers for cost in costs), "MB"),
        figure("files refused as too costly", sum(cost.outcome == "too_costly" for cost in costs)),
        figure("children killed", sum(cost.outcome == "killed" for cost in costs), "", 0, at_most=True),
    ]


def _share(cost: Cost, png: float) -> float:
    return cost.seconds / (TIMES * png * cost.pixels + SECONDS)


def _png_seconds() -> float:
    """CPU seconds per pixel of an ordinary PNG."""
    y, x = np.mgrid[: PNG_SIZE[1], : PNG_SIZE[0]]
    noise = np.random.default_rng(1).normal(0, 6, (*y.shape, 3))
    smooth = np.stack([np.sin(x / 40 + y / 90), np.cos(x / 70), np.sin(y / 30)], axis=-1)
    pixels = np.clip(128 + 80 * smooth + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = file.getvalue()
    header, times = codec.probe(data, max_pixels=MAX_PIXELS), []
    for _ in range(3):
        start = time.process_time()
        codec.decode(data, header)
        times.append(time.process_time() - start)
    return sorted(times)[1] / (PNG_SIZE[0] * PNG_SIZE[1])


def measure(paths: list[Path]) -> list[Cost]:
    """Let a child read each file, and another one if it dies."""
    costs, child = [], _Child()
    for path in paths:
        cost = child.read(path)
        costs.append(cost)
        if cost.outcome == "killed":
            child.close()
            child = _Child()
    child.close()
    return costs


class _Child:
    """A process that reads files, watched."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.hostile", "--child"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._before, self._before_all = self._memory()
        self._most = self._most_all = 0.0

    def read(self, path: Path) -> Cost:
        """Have it read a file, alone and then together with three copies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._most = self._most_all = 0.0
        over = Event()
        watcher = Thread(target=self._watch, args=(over,))
        watcher.start()
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        over.set()
        watcher.join()
        found = json.loads(line) if line else {"outcome": "killed", "seconds": 0.0, "pixels": 0}
        return Cost(path.name, **found, megabytes=self._most - self._before, with_helpers=self._most_all - self._before_all)

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _watch(self, over: Event) -> None:
        while not over.wait(0.005):
            own, everything = self._memory()
            self._most, self._most_all = max(self._most, own), max(self._most_all, everything)

    def _memory(self) -> tuple[float, float]:
        """Resident MB of the child; and with what its helpers don't share."""
        own = _resident(self._process.pid)[0]
        return own / 1e6, (own + sum(_resident(pid)[1] for pid in _children(self._process.pid))) / 1e6


def _resident(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and those that are its own."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0, 0
    return resident * _PAGE, (resident - shared) * _PAGE


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _cpu() -> float:
    """CPU seconds of this process and its helpers, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for pid in _children(os.getpid()):
        total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / _TICK
    return total


def _read(data: bytes) -> tuple[str, int]:
    """Read a file: the outcome, and the pixels that it claims to have."""
    pixels = 0
    try:
        header = codec.probe(data, max_pixels=MAX_PIXELS)
        pixels = header.size[0] * header.size[1]
        codec.decode(data, header)
    except ImageError as error:
        return error.code, pixels
    return "ok", pixels


def _serve() -> None:
    """The child: read files whose paths come in."""
    warm = SAMPLES["plain.gif"]()
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        list(threads.map(_read, [warm] * AT_A_TIME))
        print("ready", flush=True)
        for line in sys.stdin:
            data = Path(line.rstrip("\n")).read_bytes()
            list(threads.map(_read, [warm] * AT_A_TIME))  # helpers that take the place of others are not this file's cost
            before = _cpu()
            outcome, pixels = _read(data)
            seconds = _cpu() - before
            list(threads.map(_read, [data] * AT_A_TIME))
            print(json.dumps({"outcome": outcome, "seconds": seconds, "pixels": pixels}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        _serve()
    else:
        for measured in run(Path(sys.argv[1]) if sys.argv[1:] else None):
            print(json.dumps(measured))
