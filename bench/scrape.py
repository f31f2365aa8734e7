"""What a scrape of the exporter costs in a large installation: 64 nodes, 1,000 lanes, 5,000 unfinished jobs of 200 owners.

python -m bench.scrape
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from statistics import median
from typing import Any

import psutil
import redis

from bench.figures import Figure, Measured, over_rounds, print_figures
from bench.hand_out import own_redis
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import PRIORITIES, Node
from tests.services.s3 import free_ports
from tests.workers import ROOT, clean_environment

NODES, LANES, JOBS, OWNERS = 64, 1000, 5000, 200
LANES_OF_A_NODE = 32
SCRAPES = 20
INTERVAL = 15.0
"""Seconds between scrapes in deploy/prometheus."""


def run(rounds: int = 1) -> list[Figure]:
    """All figures."""
    return over_rounds([measure() for _ in range(rounds)])


def measure() -> list[Measured]:
    """Time and CPU of scrapes of `imagemill exporter`, and what they cost Redis."""
    (port,) = free_ports(1)
    with own_redis() as url, redis.Redis.from_url(url) as client:
        plant(url, client)
        command = [sys.executable, "-m", "imagemill.producer.cli", "exporter", "--port", str(port)]
        environment = clean_environment(IMAGEMILL_REDIS_URL=url)
        with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            process.stderr.readline()
            exporter = psutil.Process(process.pid)
            scrape(port)
            before, spent = redis_cpu(client), cpu_of(exporter)
            seconds = [scrape(port) for _ in range(SCRAPES)]
            used, cpu = redis_cpu(client) - before, cpu_of(exporter) - spent
            memory = exporter.memory_info().rss
            process.terminate()
    row = f"scrape with {NODES} nodes, {LANES:,} lanes, {JOBS:,} jobs"
    return [
        Measured(f"{row}: time", 1000 * median(seconds), "ms", 200),
        Measured(f"{row}: core of the exporter, every {INTERVAL:g} s", 100 * cpu / SCRAPES / INTERVAL, "%", 1),
        Measured(f"{row}: time that Redis is busy", 1000 * used / SCRAPES, "ms"),
        Measured(f"{row}: memory of the exporter", memory / 1e6, "MB"),
    ]


def plant(url: str, client: redis.Redis) -> None:
    """Write nodes, rates and jobs as they stand in Redis while work goes on."""
    fleet, ledger = Fleet(url), WorkLedger(url)
    lanes = [f"stylize.engine.model{number}" for number in range(LANES)]
    for number in range(NODES):
        mine = [lanes[(number * LANES_OF_A_NODE + place) % LANES] for place in range(LANES_OF_A_NODE)]
        fields = dict(node=f"gpu{number % 8}@host{number // 8}", host=f"host{number // 8}", pid=1, device=f"gpu{number % 8}")
        fleet.report_node(Node.model_validate({**fields, "lanes": tuple(mine), "children": 1, "ready": True}))
        for lane in mine:
            ledger.report_rate(lane, f"{fields['node']}/0", 10.0)
    now = int(1000 * time.time())
    with client.pipeline(transaction=False) as pipe:
        pipe.sadd("imagemill:lanes", *lanes)
        for number in range(JOBS):
            lane, priority, owner = lanes[number % LANES], PRIORITIES[number % 3], f"owner{number % OWNERS}"
            record = dict(state="running", lane=lane, priority=priority, owner=owner, created=now, size=1000, total=1000)
            counts: dict[str, Any] = dict(done=100, failed=0, next=200, back=0, open=900)
            pipe.hset(f"imagemill:job:j{number}", mapping={**record, **counts})
            pipe.hset(f"imagemill:job:j{number}:shares", "1", "{}")
            pipe.zadd(f"imagemill:waiting:{lane}:{priority}:{owner}", {f"j{number}": number})
            pipe.zadd(f"imagemill:turns:{lane}:{priority}", {owner: number})
            pipe.zadd("imagemill:leased", {f"j{number}:1": now + 20_000})
        pipe.execute()


def scrape(port: int) -> float:
    """The seconds that one scrape takes."""
    start = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert b"imagemill_redis_up 1" in answer.read()
    return time.perf_counter() - start


def cpu_of(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def redis_cpu(client: redis.Redis) -> float:
    used: Any = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


if __name__ == "__main__":
    print_figures(run)
