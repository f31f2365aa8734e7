"""How well a fleet shares its work: real nodes, Redis and Celery, with stand-in devices that sleep.

    python -m bench.fleet [ROW]...

Without rows, all are measured. `ideal` is the time that the devices need if none of them ever waits. Each row starts its own
Redis and nodes; times are by Redis' clock, from the beginning of the submission.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench import hand_out
from bench.figures import Figure, Measured, over_rounds
from bench.stand_in import BATCH
from bench.stand_in_nodes import Cores, StandInNodes
from tests.workers import wait_until

NODES, SPEED = 8, 10.0
"""Nodes, and images per second of each, unless a row says otherwise."""
EQUAL = [SPEED] * NODES
ONE_BATCH = BATCH / SPEED
IMAGES, LONG = 2000, 50_000
UNEQUAL = [2.5, 2.5, 5.0, 5.0, 7.5, 7.5, 10.0, 10.0]
LATE, KILLED = (2, 6), 4
"""Of the unequal nodes, those that join when a tenth is done, and the one that is killed when four tenths are done."""
WEIGHT = 3
FAIR_SECONDS = 60


# --- how long a job takes ---------------------------------------------------------------------------------------------


def measure_equal() -> list[Measured]:
    """Equal nodes, and the first job of its lane, so that no speed is known yet."""
    row = f"{IMAGES:,} images, {NODES} equal nodes"
    with StandInNodes() as fleet:
        fleet.start(EQUAL)
        cores, before = Cores(), fleet.scripts_run()
        job = fleet.submit(IMAGES)
        fleet.await_end(job)
        return [
            Measured(f"{row} / ideal", max(fleet.arrivals(job)) * sum(EQUAL) / IMAGES, "x", 1.05),
            Measured(f"{row}: calls of the ledger's scripts per image", (fleet.scripts_run() - before) / IMAGES),
            cores.measured(row),
        ]


def measure_slow() -> list[Measured]:
    """One node is ten times slower than the others."""
    row, speeds = "one node ten times slower", [*EQUAL[1:], SPEED / 10]
    with StandInNodes() as fleet:
        fleet.start(speeds)
        cores = Cores()
        job = fleet.submit(IMAGES)
        fleet.await_end(job)
        ratio = max(fleet.arrivals(job)) * sum(speeds) / IMAGES
        return [Measured(f"{row} / ideal of all together", ratio, "x", 1.10), cores.measured(row)]


def measure_unequal() -> list[Measured]:
    """Nodes of different speeds, of which two join late and one is killed."""
    row = "speeds 1 to 4, two join late, one is killed"
    with StandInNodes() as fleet:
        present = [speed for number, speed in enumerate(UNEQUAL) if number not in LATE]
        victim = fleet.start(present)[present.index(UNEQUAL[KILLED])]
        cores = Cores()
        job = fleet.submit(IMAGES)
        created = fleet.client.status(job).created
        stays = [Stay(speed) for speed in present]
        fleet.await_done(job, IMAGES // 10)
        for speed in (UNEQUAL[number] for number in LATE):
            fleet.start([speed])
            stays.append(Stay(speed, begin=fleet.now() - created))
        fleet.await_done(job, IMAGES * 4 // 10)
        fleet.kill(victim)
        stays[fleet.nodes.index(victim)].end = fleet.now() - created
        fleet.await_end(job)
        ratio = max(fleet.arrivals(job)) / ideal_seconds(IMAGES, stays)
        return [Measured(f"{row} / ideal", ratio, "x", 1.10), cores.measured(row)]


@dataclass
class Stay:
    """When a node with this speed is there, in seconds since the submission."""

    speed: float
    begin: float = 0.0
    end: float = math.inf


def ideal_seconds(images: int, stays: Sequence[Stay]) -> float:
    """How long it takes if no node ever waits."""
    changes = sorted({moment for stay in stays for moment in (stay.begin, stay.end)})
    left = float(images)
    for start, end in pairwise(changes):
        speed = sum(stay.speed for stay in stays if stay.begin <= start < stay.end)
        if speed * (end - start) >= left:
            return start + left / speed
        left -= speed * (end - start)
    raise AssertionError("no node stays to the end")


def measure_jobs() -> list[Measured]:
    """Many small jobs take as long as one large one."""
    row = "100 jobs of 50 images / one of 5,000"
    with StandInNodes() as fleet:
        fleet.start(EQUAL)
        fleet.await_end(fleet.submit(2 * NODES * BATCH))  # so that both sides know the speeds
        large = fleet.submit(5000)
        fleet.await_end(large)
        cores = Cores()
        small = [fleet.submit(50) for _ in range(100)]
        fleet.await_end(*small)
        begun = fleet.client.status(small[0]).created
        seconds = max(max(fleet.recorded_at(job)) for job in small) - begun
        return [Measured(row, seconds / max(fleet.arrivals(large)), "x", 1.10), cores.measured(row)]


# --- who is next ------------------------------------------------------------------------------------------------------


def measure_spread() -> list[Measured]:
    """A small job uses every node."""
    with StandInNodes() as fleet:
        fleet.start(EQUAL)
        job = fleet.submit(20)
        fleet.await_end(job)
        nodes = {row.result.node for row in fleet.client.results(job) if row.result}
        return [Measured(f"20 images, {NODES} nodes: nodes used", len(nodes), "", NODES, at_most=False)]


def measure_behind() -> list[Measured]:
    """A small job arrives while a large one of the same priority runs."""
    return _behind("20 images behind 50,000, same priority", "normal", first=3.0, last=8.0)


def measure_high() -> list[Measured]:
    """A small job of high priority arrives while a large one runs."""
    return _behind("20 images behind 50,000, high priority", "high", first=1.0, last=4.0)


def _behind(row: str, priority: str, *, first: float, last: float) -> list[Measured]:
    with StandInNodes() as fleet:
        fleet.start(EQUAL)
        large = fleet.submit(LONG)
        fleet.await_done(large, 5 * NODES * BATCH)
        cores = Cores()
        job = fleet.submit(20, priority=priority)
        fleet.await_end(job)
        times = fleet.arrivals(job)
        return [
            Measured(f"{row}: first result", min(times), "s", first + ONE_BATCH),
            Measured(f"{row}: last result", max(times), "s", last),
            cores.measured(row),
        ]


def measure_owners() -> list[Measured]:
    """Two owners, one of whom has three times the weight of the other."""
    row = "two owners, weights 1 and 3"
    with StandInNodes(IMAGEMILL_OWNER_WEIGHTS=json.dumps({"b": WEIGHT})) as fleet:
        jobs = [fleet.submit(LONG, owner=owner) for owner in ("a", "b")]  # before any node can begin with the first
        fleet.start(EQUAL)
        cores = Cores()
        begun = min(min(fleet.recorded_at(job), default=fleet.now()) for job in jobs)
        wait_until(lambda: fleet.now() >= begun + FAIR_SECONDS, "a minute passed", 2 * FAIR_SECONDS)
        light, heavy = (sum(moment <= begun + FAIR_SECONDS for moment in fleet.recorded_at(job)) for job in jobs)
        return [
            Measured(f"{row}: images of b / of a after a minute", heavy / light, "x"),
            Measured(f"{row}: distance from {WEIGHT}", 100 * abs(heavy / light / WEIGHT - 1), "%", 5.0),
            cores.measured(row),
        ]


# --- cancelling -------------------------------------------------------------------------------------------------------


def measure_cancel_running() -> list[Measured]:
    """Cancelling while each node has a batch of 32 seconds on its device."""
    row = "cancel, nodes in batches of 32 s"
    with StandInNodes(IMAGEMILL_WORKER__SHARE_SECONDS="64") as fleet:  # two batches; by default a node takes less than one
        fleet.start([BATCH / 32] * NODES)
        job = fleet.submit(IMAGES)
        wait_until(lambda: fleet.on_devices() == NODES * BATCH, "every device has a full batch", 120)
        start = time.perf_counter()
        fleet.client.cancel(job)
        wait_until(lambda: fleet.leased(job) <= fleet.on_devices(), "the rest was released")
        seconds = time.perf_counter() - start
    return [Measured(f"{row}: until all but what is on a device is released", seconds, "s", 1.0)]


# --- the table --------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[], list[Measured]]] = {
    "equal": measure_equal,
    "slow": measure_slow,
    "unequal": measure_unequal,
    "spread": measure_spread,
    "behind": measure_behind,
    "high": measure_high,
    "owners": measure_owners,
    "jobs": measure_jobs,
    "cancel": hand_out.measure_cancel,
    "cancel-running": measure_cancel_running,
    "submit": hand_out.measure_submit,
    "scheduling": hand_out.measure_scheduling,
    "shares": hand_out.measure_shares,
    "long-job": hand_out.measure_long_job,
}


def run(rounds: int = 1, rows: Sequence[str] = tuple(ROWS)) -> list[Figure]:
    return [result for row in rows for result in over_rounds([ROWS[row]() for _ in range(rounds)])]


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(ROWS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; the rows are {', '.join(ROWS)}")
    for name in sys.argv[1:] or ROWS:
        for result in run(rows=[name]):
            print(json.dumps(result), flush=True)
