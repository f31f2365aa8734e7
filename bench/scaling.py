"""How far one Redis goes: simulated nodes, and what real ones send.

    python -m bench.scaling

A simulated node calls the ledger as a child and its parent do, at a steady 10 images per second: it takes shares, renews them,
records results, and reports itself. It sends no Celery messages; `measure_traffic` counts those of real nodes. docs/scaling.md
rests on these figures.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from statistics import median, quantiles
from typing import Any

import redis

from bench.figures import Figure, Measured, over_rounds, print_figures
from bench.hand_out import LANE, SPEED, ask, own_redis, report_nodes, result_of, submit_list
from bench.stand_in_nodes import StandInNodes
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import Share, WorkLedger
from imagemill.shared.messages import Node

NODES = (1, 4, 16, 64)
SECONDS = 15
STEP = 0.5
PROCESSES = 4
SHARE = 15
AT_HAND = 20
"""A node asks for more when it has fewer images than this: 2 s of work."""
REAL_NODES, REAL_SPEED, REAL_IMAGES, IDLE_SECONDS = 4, 20.0, 1600, 20


def run(rounds: int = 1) -> list[Figure]:
    """All figures."""
    return over_rounds([[*chain.from_iterable(map(measure_nodes, NODES)), *measure_traffic()] for _ in range(rounds)])


# --- simulated nodes --------------------------------------------------------------------------------------------------


def measure_nodes(nodes: int) -> list[Measured]:
    """What Redis does while so many nodes work at a steady pace, and how long a call takes them."""
    row = f"{nodes} simulated nodes"
    with own_redis() as url, redis.Redis.from_url(url) as client, ProcessPoolExecutor(PROCESSES) as pool:
        submit_list(url, 2 * nodes * SPEED * (SECONDS + 5))  # shares get smaller in the second half of a job
        report_nodes(url, nodes)
        groups = [range(first, nodes, PROCESSES) for first in range(min(PROCESSES, nodes))]
        before = Traffic.so_far(client)
        worked = list(chain.from_iterable(pool.map(_work_in_threads, [url] * len(groups), groups)))
        used = Traffic.so_far(client).less(before)
    images = sum(images for images, _ in worked)
    calls = sorted(chain.from_iterable(calls for _, calls in worked))
    return [
        Measured(f"{row}: images/s, of {nodes * SPEED}", images / used.seconds, "1/s"),
        Measured(f"{row}: core that Redis used", 100 * used.cpu / used.seconds, "%"),
        Measured(f"{row}: CPU of Redis per image", 1000 * used.cpu / images, "ms"),
        Measured(f"{row}: bytes to and from Redis per image", used.bytes / images, "bytes"),
        Measured(f"{row}: time of a call, median", 1000 * median(calls), "ms"),
        Measured(f"{row}: time of a call, 99 of 100", 1000 * quantiles(calls, n=100)[98], "ms"),
    ]


def _work_in_threads(url: str, numbers: range) -> list[tuple[int, list[float]]]:
    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(lambda number: SimulatedNode(url, number).work(), numbers))


class SimulatedNode:
    """One node with one child."""

    def __init__(self, url: str, number: int) -> None:
        self.name, self.child = f"n{number}", f"n{number}/0"
        self.ledger, self.fleet = WorkLedger(url), Fleet(url)
        fields = dict(node=self.name, host="host", pid=1, device="cpu", lanes=(LANE,), children=1, ready=True)
        self.report = Node.model_validate(fields)
        self.shares: deque[Share] = deque()
        self.ahead: deque[tuple[Share, int]] = deque()
        self.calls: list[float] = []

    def work(self) -> tuple[int, list[float]]:
        """The number of images recorded, and the seconds that each call of the ledger took."""
        done, pause = 0, threading.Event()  # never set
        start = time.perf_counter()
        for step in range(int(SECONDS / STEP)):
            pause.wait(max(0.0, start + step * STEP - time.perf_counter()))
            if step % 2 == 0:
                self._housekeeping(step)
            if len(self.ahead) < AT_HAND:
                self._take()
            for _ in range(min(len(self.ahead), int(SPEED * STEP))):
                self._record()
                done += 1
        self.ledger.close()
        self.fleet.close()
        return done, self.calls

    def _housekeeping(self, step: int) -> None:
        """What a node does every second, and every five seconds."""
        if self.shares:
            self._timed(self.ledger.renew, self.child, [LANE], list(self.shares))
        if self.ledger.lead(self.name, 0.9):
            self.ledger.tend()
        if step % 10 == 0:
            self.fleet.report_node(self.report)
            self.ledger.set_weights({})

    def _take(self) -> None:
        share = self._timed(self.ledger.take, ask(self.child, SHARE))
        if isinstance(share, Share):
            self.shares.append(share)
            self.ahead.extend((share, item.index) for item in share.items)

    def _record(self) -> None:
        share, index = self.ahead.popleft()
        self._timed(self.ledger.record, share.job, result_of(index))
        if not any(other is share for other, _ in self.ahead):
            self.shares.remove(share)
            self._timed(self.ledger.give_back, share, self.child)

    def _timed(self, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        answer = call(*arguments)
        self.calls.append(time.perf_counter() - start)
        return answer


# --- real nodes -------------------------------------------------------------------------------------------------------


def measure_traffic() -> list[Measured]:
    """What real nodes exchange with Redis for each image, Celery's own traffic included, and what they do without work."""
    with StandInNodes() as fleet:
        fleet.start([REAL_SPEED] * REAL_NODES)
        before = Traffic.so_far(fleet.redis)
        job = fleet.submit(REAL_IMAGES)
        fleet.await_end(job)
        busy = Traffic.so_far(fleet.redis).less(before)
        before = Traffic.so_far(fleet.redis)
        time.sleep(IDLE_SECONDS)
        idle = Traffic.so_far(fleet.redis).less(before)
    node_seconds = idle.seconds * REAL_NODES
    busy = busy.less(idle.times(busy.seconds / idle.seconds))
    return [
        Measured("real nodes: requests per image", busy.sent / REAL_IMAGES),
        Measured("real nodes: bytes to and from Redis per image", busy.bytes / REAL_IMAGES, "bytes"),
        Measured("real nodes: CPU of Redis per image", 1000 * busy.cpu / REAL_IMAGES, "ms"),
        Measured("an idle node: requests", idle.sent / node_seconds, "1/s"),
        Measured("an idle node: bytes to and from Redis", idle.bytes / node_seconds, "bytes/s"),
        Measured("an idle node: CPU of Redis", 1000 * idle.cpu / node_seconds, "ms/s"),
    ]


@dataclass(frozen=True)
class Traffic:
    """What a Redis has done: CPU seconds, requests from clients (a pipeline is one), and bytes in both directions."""

    seconds: float
    cpu: float
    sent: float
    bytes: float

    @classmethod
    def so_far(cls, client: Any) -> Traffic:
        info = client.info("all")
        cpu, net = info["used_cpu_user"] + info["used_cpu_sys"], info["total_net_input_bytes"] + info["total_net_output_bytes"]
        return cls(time.perf_counter(), cpu, info["total_reads_processed"], net)

    def less(self, before: Traffic) -> Traffic:
        return Traffic(*(after - earlier for after, earlier in zip(vars(self).values(), vars(before).values(), strict=True)))

    def times(self, factor: float) -> Traffic:
        return Traffic(*(factor * value for value in vars(self).values()))


if __name__ == "__main__":
    print_figures(run)
