"""Does the line keep a fast device busy? A whole node with a stand-in for a GPU, and a network that takes its time.

    python -m bench --only line
    python -m bench.line [--only CASE]... [--seconds N] [ROUNDS]

The second form prints a row of a Markdown table per case, as soon as it is measured. With `--seconds 3` each case has only so
many images as the device computes in 3 s: enough to see that everything works, not to judge it.

What is real: the node with its children, Celery, Redis, HTTP and S3, all on loopback, and their default settings. Each case has
a new node and a new Redis, so nobody knows yet how fast the device is or how large its batches can be. What is not:

- The device (`stand-in-gpu` in bench/stand_in.py) sleeps for a set time per batch, however full the batch is, without holding
  Python's lock. It looks like a GPU with plenty of memory: the line starts with a batch of one and tries larger ones, and
  waits for batches to be full. The device's rate is what it reaches with full batches only.
- The network: bench/servers.py answers each GET and each PUT after a set delay. Some cases have a tail: 1 % of the GETs take
  3 s. The images are JPEGs of 10 kB or of 2 megapixels, distinct ones, and come back as JPEGs.

What is measured:

- rate: images per second from the call of `submit` until the last image is recorded, divided by the device's rate. Filling
  and draining the line count. A job that takes more than twice its time is cancelled; then the rate is that until then.
- fill: how full the batches were in the steady state, which excludes the first seconds, when sizes are learned, and the end.
- busy: the share of the time, from the first batch to the end of the last, in which the device had a batch.
- first, last: seconds from `submit` to the first batch, and from the end of the last batch to the last record. A rate is about
  fill times busy, less what these take.
- waits: seconds that the node says its device waited, by cause, and was busy ("shift over" in its log).
- CPU and memory of the children, two of which share the device: CPU time per image, and their peak RSS above the RSS with which
  they began.
- The most GETs and PUTs in flight at the same time, as seen by the servers, and the core that both servers used.
- cores: the share of all cores that everything here used, and the share in use by anyone. At more than 90 %, they limit the
  rate, so it isn't held against the line. That others have a lower priority (`nice`) helps little: each of the many short
  steps of an image then waits for its core.
- lock (one case, with py-spy): the time per image for which a thread of its child holds Python's lock.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import psutil
from skimage import data

from bench.ending import end_on_sigterm
from bench.figures import Figure, Measured, over_rounds
from bench.line_node import Jobs, Node, Spy
from bench.nodes import cpu_of
from bench.servers import Load, Servers, photos
from bench.stand_in import Batch
from imagemill.producer.embedded_redis import EmbeddedRedis

GOALS = {5: 0.95, 20: 0.95, 100: 0.95, 300: 0.90}
"""The least share of the device's rate, by that rate."""
FILL = 0.95
BATCH = {5: 4, 20: 8, 100: 16, 300: 32}
SECONDS = {5: 60.0, 20: 40.0, 100: 30.0, 300: 25.0}
"""Work of a case, by the device's rate."""
LOCK_MS = 2.0
LIMIT = 0.9
"""Share of all cores above which they are the limit."""
LEARNING_SECONDS, LAST_BATCHES = 5.0, 3
PATIENCE, CUT_PATIENCE = 70.0, 5.0
"""Seconds to wait for the end of a shift, which tells what the device waited for."""


@dataclass(frozen=True)
class Case:
    """`rate` is the device's, in images per second; `get` and `put` are delays in seconds; `tail` of the GETs take 3 s."""

    name: str
    rate: int
    get: float = 0.1
    put: float = 0.05
    tail: float = 0.0
    images: int = 0
    jobs: int = 1
    hosts: int = 1
    size: Literal["10 kB", "2 MP"] = "10 kB"
    lock: bool = False

    @property
    def title(self) -> str:
        """What is special about the case, for the table."""
        parts = [f"{self.rate}/s", self.size, f"GET {1000 * self.get:g} ms", f"PUT {1000 * self.put:g} ms"]
        parts += ["1 % of GETs 3 s"] * (self.tail > 0) + [f"{self.hosts} hosts"] * (self.hosts > 1)
        return ", ".join([*parts, *[f"{self.jobs} jobs"] * (self.jobs > 1), f"{self.images:,} images"])

    def lasting(self, seconds: float | None) -> Case:
        """The case with so many seconds of work, or as many as it should have."""
        if seconds is None and self.images:
            return self
        work = SECONDS[self.rate] if seconds is None else seconds
        return replace(self, images=max(self.jobs, round(work * self.rate)))


CASES = (
    Case("5", 5),
    Case("5-2mp", 5, size="2 MP"),
    Case("20", 20),
    Case("20-slow", 20, get=0.5, put=0.2, tail=0.01),
    Case("20-2mp", 20, size="2 MP"),
    Case("100", 100),
    Case("100-get20", 100, get=0.02),
    Case("100-get500", 100, get=0.5),
    Case("100-tail", 100, tail=0.01),
    Case("100-put200", 100, put=0.2),
    Case("100-jobs", 100, jobs=100, images=5000),
    Case("300-first", 300, images=20_000),
    Case("300-get500", 300, get=0.5),
    Case("300-hosts", 300, get=0.5, hosts=4),
    Case("300-tail", 300, tail=0.01),
    Case("300-put200", 300, put=0.2),
    Case("300-lock", 300, lock=True),
)


@dataclass
class Result:
    """What a case gave. Shares are 0 to 1; `ours` and `all` are shares of all cores, `servers` of one core."""

    case: Case
    rate: float
    fill: float
    busy: float
    first: float
    last: float
    cpu: float
    memory: float
    gets: int
    puts: int
    servers: float
    ours: float
    all: float
    cut: bool
    lock: float | None = None
    waits: dict[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> str:
        """Why the goals don't count, if they don't."""
        if self.ours > LIMIT:
            return "limited by the cores"
        return "other programs kept the cores busy" if self.all > LIMIT else ""

    def measured(self) -> list[Measured]:
        """The figures."""
        remarks = [self.case.title, *[self.limit] * bool(self.limit), *["cancelled at twice its time"] * self.cut]
        row, judged = f"line, {self.case.name}", not self.limit
        rate = f"{row}: rate / the device's ({'; '.join(remarks)})"
        figures = [
            Measured(rate, self.rate, "x", GOALS[self.case.rate] if judged else None, at_most=False),
            Measured(f"{row}: fill of batches", self.fill, "x", FILL if judged else None, at_most=False),
            Measured(f"{row}: device busy", 100 * self.busy, "%"),
            Measured(f"{row}: from submit to the first batch", self.first, "s"),
            Measured(f"{row}: from the last batch to the last record", self.last, "s"),
            Measured(f"{row}: CPU of the children per image", self.cpu, "ms"),
            Measured(f"{row}: memory of the children above the idle ones'", self.memory, "MB"),
            Measured(f"{row}: most GETs in flight", self.gets),
            Measured(f"{row}: most PUTs in flight", self.puts),
            Measured(f"{row}: core of the servers", 100 * self.servers, "%"),
            Measured(f"{row}: all cores, used by this case", 100 * self.ours, "%"),
        ]
        if self.lock is not None:
            figures.append(Measured(f"{row}: Python's lock per image", self.lock, "ms", LOCK_MS if judged else None))
        figures += [
            Measured(f"{row}: seconds of the device, {cause}", seconds, "s") for cause, seconds in sorted(self.waits.items())
        ]
        return figures

    def row(self) -> str:
        """A row of the table that `HEADER` begins."""
        waits = ", ".join(f"{cause} {seconds:.1f}" for cause, seconds in sorted(self.waits.items(), key=lambda one: -one[1]))
        holds = self.limit or ("yes" if self.rate >= GOALS[self.case.rate] else "no")
        cells = [
            *(self.case.name, self.case.title, f"{self.rate:.3f}{' (cut)' if self.cut else ''}", holds),
            *(f"{self.fill:.3f}", f"{self.busy:.3f}", f"{self.first:.1f}, {self.last:.1f}"),
            *(f"{self.cpu:.1f}", f"{self.memory:.0f}", self.gets, self.puts),
            *(f"{100 * self.servers:.0f}", f"{100 * self.ours:.0f}, {100 * self.all:.0f}"),
            *(waits, "" if self.lock is None else f"{self.lock:.2f}"),
        ]
        return f"| {' | '.join(map(str, cells))} |"


COLUMNS = ("case", "", "rate", "holds", "fill", "busy", "first, last: s", "CPU ms", "MB", "GETs", "PUTs", "servers %")
HEADER = f"| {' | '.join((*COLUMNS, 'cores %: ours, all', 'waits: s', 'lock ms'))} |\n|---|---|{'---:|' * 13}"


def run(rounds: int = 1) -> list[Figure]:
    """All cases."""
    results = [[result.measured() for result in measure_all(CASES)] for _ in range(rounds)]
    by_case = zip(*results, strict=True)
    return [figure for case in by_case for figure in over_rounds(_alike(case))]


def _alike(rounds: Sequence[list[Measured]]) -> list[list[Measured]]:
    """The figures that all rounds have; a round names only the waits that it saw, and the first one's remarks are kept."""
    places = [{_stem(one.name): one for one in figures} for figures in rounds]
    return [
        [place[_stem(one.name)] for one in rounds[0] if all(_stem(one.name) in place for place in places)] for place in places
    ]


def _stem(name: str) -> str:
    return name.partition("the device's")[0]


def measure_all(cases: Sequence[Case], seconds: float | None = None) -> Iterator[Result]:
    """The results, one by one."""
    files = {"10 kB": small_photos(), "2 MP": photos(1920, 1080)}
    for case in cases:
        yield measure(case.lasting(seconds), files[case.size])


def small_photos() -> list[bytes]:
    """JPEGs of about 10 kB."""
    files = []
    for source in (data.astronaut(), data.coffee(), data.rocket(), data.chelsea()):
        pixels = cv2.resize(source, (240, 160), interpolation=cv2.INTER_AREA)
        done, file = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
        assert done
        files.append(file.tobytes())
    return files


def measure(case: Case, files: list[bytes]) -> Result:
    """Run a case with a node and a Redis of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = stack.enter_context(Servers(files, put_delay=case.put, hosts=case.hosts))
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        node = Node(folder, redis.url, servers, rate=case.rate, batch=BATCH[case.rate])
        stack.enter_context(node.worker)
        node.worker.wait_ready()
        jobs = stack.enter_context(Jobs(redis.url))
        result = _measured(case, node, servers, jobs)
        if result.cut:
            node.worker.kill()  # it would go on storing
        return result


def _measured(case: Case, node: Node, servers: Servers, jobs: Jobs) -> Result:
    """Submit the jobs of a case, wait for them, and say how it went."""
    lists = [servers.fresh(case.images // case.jobs, delay=case.get, tail=case.tail) for _ in range(case.jobs)]
    idle, machine, began = node.settle(), psutil.cpu_times(), time.monotonic()
    processes = {"servers": servers.pid, "all": os.getpid(), **{f"child {pid}": pid for pid in node.children}}
    before, epoch = {name: cpu_of(pid) for name, pid in processes.items()}, time.time()
    spy = Spy(node.children[0], case.images / case.rate) if case.lock else None
    for urls in lists:
        jobs.submit(urls)
    cut = jobs.await_images(began + 2 * case.images / case.rate + 5)
    used = {name: cpu_of(pid) - before[name] for name, pid in processes.items()}
    spent, everything = time.monotonic() - began, _busy(machine, psutil.cpu_times())
    ends = jobs.recorded()
    batches = [batch for batch in Batch.read(node.folder) if batch.began >= began]
    images = (len(ends) + sum(batch.images for batch in batches)) / 2  # of a job that was cancelled, some are computed only
    cores = spent * (psutil.cpu_count() or 1)
    load: dict[str, Load] = servers.load()
    return Result(
        case=case,
        rate=len(ends) / (ends[-1] - epoch) / case.rate,
        fill=_fill(batches, BATCH[case.rate]),
        first=batches[0].began - began,
        last=ends[-1] - epoch - (batches[-1].ended - began),
        busy=sum(batch.ended - batch.began for batch in batches) / (batches[-1].ended - batches[0].began),
        cpu=1000 * sum(seconds for name, seconds in used.items() if name.startswith("child")) / images,
        memory=(node.peak() - idle) / 1e6,
        gets=load["GET"].most,
        puts=load["PUT"].most,
        servers=used["servers"] / spent,
        ours=used["all"] / cores,
        all=everything,
        cut=cut,
        lock=None if spy is None else spy.lock(batches),
        waits=node.waits(ends[-1], CUT_PATIENCE if cut else PATIENCE),
    )


def _busy(before: Any, after: Any) -> float:
    """The share of all cores in use between two readings of psutil.cpu_times()."""
    spent = {name: getattr(after, name) - getattr(before, name) for name in before._fields}
    total = sum(spent[name] for name in ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"))
    return 1 - (spent["idle"] + spent["iowait"]) / total


def _fill(batches: Sequence[Batch], most: int) -> float:
    """How full batches were in the steady state; of a short run, at least half of it counts."""
    first, last = batches[0].began, batches[-1].ended
    learned = first + min(LEARNING_SECONDS, (last - first) / 4)
    end = len(batches) - min(LAST_BATCHES, len(batches) // 4)
    steady = [batch.images for batch in batches[:end] if batch.began >= learned]
    return sum(steady) / len(steady) / most if steady else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.line", description="Does the line keep a fast device busy?")
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="only this case; repeatable")
    parser.add_argument("--seconds", type=float, help="seconds of work per case")
    parser.add_argument("rounds", type=int, nargs="?", default=1)
    arguments = parser.parse_args()
    end_on_sigterm()
    print(HEADER, flush=True)
    for _ in range(arguments.rounds):
        for result in measure_all([case for case in CASES if case.name in (arguments.only or [case.name])], arguments.seconds):
            print(result.row(), flush=True)


if __name__ == "__main__":
    main()
