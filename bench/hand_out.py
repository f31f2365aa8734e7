"""The rows of bench/fleet.py that need no nodes: what submitting costs, and what the ledger costs.

A simulated node only calls the ledger: it takes shares, records results, and gives shares back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

import psutil
import redis

from bench import enqueue
from bench.enqueue import make_urls
from bench.figures import Measured
from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import ManifestDue, Request, Share, WorkLedger
from imagemill.shared.messages import ItemResult, Job, Node, Output
from imagemill.shared.settings import load_settings
from tests.workers import ROOT, clean_environment

SPEC = Job(operation="stylize", output=Output(url="s3://results/sketches"))
LANE = SPEC.lane
CHILDREN, SPEED = 8, 10
"""Children of the simulated fleet, and the images per second of each."""
SHARE = 15
"""Images that a child takes at a time: it has up to 3 s of work at hand, and asks for more at half of that."""
SCHEDULED = 24_000
"""Images of the job whose scheduling is measured."""
PROCESSES, THREADS, SHARES_EACH = 4, 16, 100
"""The 64 simulated nodes, and the shares that each takes."""
LONG, SHORT, LONE = 1_000_000, 100_000, 16_000
"""Images of the long job, images after which memory is read first, and images at either end that one child takes alone."""


@contextmanager
def own_redis() -> Iterator[str]:
    """The URL of a Redis of its own."""
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedRedis(Path(folder, "redis"))
        try:
            yield server.start()
        finally:
            server.kill()  # nothing of it is needed any more


def submit_list(url: str, images: int) -> str:
    """Submit a job of so many images, and return its id."""
    with Client(load_settings(redis_url=url)) as client:
        rows = (SourceRow("list", {"source": source}) for source in make_urls(images))
        return client.submit(rows, SPEC).job


# --- rows -------------------------------------------------------------------------------------------------------------


def measure_submit() -> list[Measured]:
    """What it costs to submit 50,000 images; the goals are what the ledger before this one took."""
    with own_redis() as url, redis.Redis.from_url(url) as client, tempfile.TemporaryDirectory() as folder:
        urls = enqueue.write_list(Path(folder, "urls.txt"))
        used = enqueue.submit_in_new_process(url, urls, client)
    return [
        Measured("submit 50,000: CPU of the whole process", used["cpu"], "s", 0.72),
        Measured("submit 50,000: Redis memory per image", used["bytes"] / enqueue.IMAGES, "bytes", 102),
    ]


def measure_cancel() -> list[Measured]:
    """Cancelling a job that no node has seen."""
    with own_redis() as url, Client(load_settings(redis_url=url)) as client:
        job = submit_list(url, 2000)
        start = time.perf_counter()
        client.cancel(job)
        assert client.wait(job, 60).over
        return [Measured("cancel with no node: until the job is over", time.perf_counter() - start, "s", 1)]


def measure_scheduling() -> list[Measured]:
    """What scheduling and, apart from it, recording take per image, with 8 children that each do 10 images per second."""
    with own_redis() as url, redis.Redis.from_url(url) as client:
        job, ledger = submit_list(url, SCHEDULED), WorkLedger(url)
        report_nodes(url, CHILDREN)
        before = Spent.so_far(client)
        _schedule(ledger)
        between = Spent.so_far(client)
        for index in range(SCHEDULED):
            ledger.record(job, result_of(index))
        after = Spent.so_far(client)
    scheduling, recording = between.less(before), after.less(between)
    return [
        Measured("scheduling an image: CPU of child and Redis", 1000 * scheduling.cpu / SCHEDULED, "ms", 0.1),
        Measured("scheduling an image: commands sent to Redis", scheduling.sent / SCHEDULED, "", 3),
        Measured("scheduling an image: commands in Redis, those of scripts included", scheduling.run / SCHEDULED),
        Measured("recording an image: CPU of child and Redis", 1000 * recording.cpu / SCHEDULED, "ms"),
        Measured("recording an image: commands sent to Redis", recording.sent / SCHEDULED),
        Measured("recording an image: commands in Redis, those of scripts included", recording.run / SCHEDULED),
    ]


def measure_shares() -> list[Measured]:
    """Shares that one Redis hands to 64 nodes, while each ends its share at once and asks for the next."""
    nodes = PROCESSES * THREADS
    images = 2 * nodes * SHARES_EACH * SHARE  # shares get smaller in the second half of a job
    with own_redis() as url, redis.Redis.from_url(url) as client:
        submit_list(url, images)
        report_nodes(url, nodes)
        with ProcessPoolExecutor(PROCESSES) as pool:
            list(pool.map(_warm_up, [url] * PROCESSES))
            before, start = _redis_cpu(client), time.perf_counter()
            list(pool.map(_take_in_threads, [url] * PROCESSES, range(PROCESSES)))
            seconds, cpu = time.perf_counter() - start, _redis_cpu(client) - before
    shares = nodes * SHARES_EACH
    return [
        Measured("64 simulated nodes: shares handed out", shares / seconds, "1/s"),
        Measured("64 simulated nodes: CPU of Redis per share, taken and ended", 1000 * cpu / shares, "ms"),
        Measured("64 simulated nodes: core that Redis used", 100 * cpu / seconds, "%"),
    ]


def measure_long_job() -> list[Measured]:
    """A job of 1,000,000 images, from its list to its end."""
    with own_redis() as url:
        command = [sys.executable, "-m", "bench.hand_out", url]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=clean_environment(), cwd=ROOT).stdout
        memory = json.loads(output)
        job, ledger = memory["job"], WorkLedger(url)
        first = _work_off(url, "first", LONE)
        each = (LONG - 2 * LONE) // PROCESSES
        with ProcessPoolExecutor(PROCESSES) as pool:
            list(pool.map(_work_off, [url] * PROCESSES, map(str, range(PROCESSES)), [each] * PROCESSES))
        last = _work_off(url, "last", LONE)
        ended = ledger.take(ask("last", 1)) == ManifestDue(job, 1) and ledger.end_job(job, None)
        done = ended and ledger.status(job).done == LONG
    return [
        Measured("1,000,000 images: memory of submit / after 100,000", memory["last"] / memory["first"], "x", 1.2),
        Measured("1,000,000 images: memory of submit", memory["last"] / 1e6, "MB"),
        Measured("1,000,000 images: time of a take at the end / at the start", median(last) / median(first), "x", 1.2),
        Measured("1,000,000 images: time of a take at the start", 1000 * median(first), "ms"),
        Measured("1,000,000 images: the job ends (1: yes)", float(done), "", 1, at_most=False),
    ]


# --- simulated nodes --------------------------------------------------------------------------------------------------


def ask(child: str, room: int, rate: float = SPEED) -> Request:
    return Request(child, [LANE], {LANE: room}, {LANE: rate})


def result_of(index: int) -> ItemResult:
    """A result as a node records it."""
    output = f"s3://results/sketches/260730-1f0c9a3e/{index:06d}-photo.jpg"
    seconds = {"fetch": 0.104, "decode": 0.021, "run": 0.1, "store": 0.052}
    return ItemResult(index=index, state="done", output=output, batch=8, seconds=seconds, node="node@host")


def report_nodes(url: str, nodes: int) -> None:
    """Let the ledger believe in nodes with one child each, so that it hands out shares as it does in a fleet."""
    fleet, ledger = Fleet(url), WorkLedger(url)
    for number in range(nodes):
        fields = dict(node=f"n{number}", host="host", pid=1, device="cpu", lanes=(LANE,), children=1, ready=True)
        fleet.report_node(Node.model_validate(fields))
        ledger.report_rate(LANE, f"n{number}/0", SPEED)
    ledger.tend()


def _schedule(ledger: WorkLedger) -> None:
    """Hand out all images, in steps of half a second: children renew every second, and every 1.5 s they take the next share."""
    shares: dict[str, deque[Share]] = {f"n{number}/0": deque() for number in range(CHILDREN)}
    for step in count():
        for child, mine in shares.items():
            if step % 2 == 0 and mine:
                ledger.renew(child, [LANE], list(mine))
            if step % 3 == 0:
                if mine and step > 3:
                    ledger.give_back(mine.popleft(), child)
                share = ledger.take(ask(child, SHARE))
                if isinstance(share, Share):
                    mine.append(share)
        if step % 2 == 0:
            ledger.tend()
        if not any(shares.values()):
            return


def _warm_up(url: str) -> None:
    """Start the pool's processes, and load the scripts."""
    WorkLedger(url).tend()


def _take_in_threads(url: str, process: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_take_shares, [url] * THREADS, [f"n{process * THREADS + thread}/0" for thread in range(THREADS)]))


def _take_shares(url: str, child: str) -> None:
    ledger = WorkLedger(url)
    for _ in range(SHARES_EACH):
        share = ledger.take(ask(child, SHARE))
        assert isinstance(share, Share), share
        ledger.give_back(share, child)
    ledger.close()


def _work_off(url: str, child: str, images: int) -> list[float]:
    """Take and record so many images; returns the seconds of each take of 32 images."""
    ledger, seconds = WorkLedger(url), []
    while images:
        start = time.perf_counter()
        share = ledger.take(ask(child, min(32, images)))
        spent = time.perf_counter() - start
        assert isinstance(share, Share), share
        if len(share.indexes) == 32:
            seconds.append(spent)
        for index in share.indexes:
            ledger.record(share.job, result_of(index))
        ledger.give_back(share, child)
        images -= len(share.indexes)
    ledger.close()
    return seconds


# --- costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """CPU seconds of this process and Redis, commands sent to Redis, and commands run in Redis, scripts' included."""

    cpu: float
    sent: int
    run: int

    @classmethod
    def so_far(cls, client: redis.Redis) -> Spent:
        stats = client.info("commandstats")
        # The ledger's client sends nothing but scripts here; Redis counts the commands of scripts as well.
        scripts = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "script|load"))
        run = sum(command["calls"] for command in stats.values())
        return cls(time.process_time() + _redis_cpu(client), scripts, run)

    def less(self, before: Spent) -> Spent:
        return Spent(self.cpu - before.cpu, self.sent - before.sent, self.run - before.run)


def _redis_cpu(client: redis.Redis) -> float:
    used = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def _submit_long_job(url: str) -> None:
    """Submit the long job; print its id, and this process's memory after 100,000 images and after the last."""
    process, memory = psutil.Process(), {}

    def rows() -> Iterator[SourceRow]:
        for number, source in enumerate(make_urls(LONG)):
            if number == SHORT:
                memory["first"] = process.memory_info().rss
            yield SourceRow("list", {"source": source})
        memory["last"] = process.memory_info().rss  # afterwards, what was kept for the check of the list is freed

    with Client(load_settings(redis_url=url)) as client:
        job = client.submit(rows(), SPEC).job
    print(json.dumps({"job": job, **memory}))


if __name__ == "__main__":
    _submit_long_job(sys.argv[1])
