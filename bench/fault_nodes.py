"""Nodes that come and go under load, and hosts whose clocks are wrong."""

from __future__ import annotations

import os
import re
import time

from bench.fault_run import FaultRun, Row
from tests.workers import ROOT

SECONDS = 0.2
"""How long the engine takes per image."""
WORKS = {"IMAGEMILL_TEST_SECONDS": str(SECONDS)}
GRACE_SECONDS = 90.0
"""How long docker-compose.yml lets a node take to stop."""
WINDOW = 4.0


def come_and_go(run: FaultRun) -> str:
    """Work waits for nodes: at first there is none, then one, four and two."""
    stay = run.count(20, 8)
    job = run.submit(int(stay * 7 / SECONDS) + 500)  # some are done while nodes start and stop
    time.sleep(stay / 2)
    assert run.client.status(job).done == 0
    nodes = [run.node("node0", **WORKS)]
    run.wait_done(job, 1)
    told = []
    for count in (1, 4, 2):
        while len(nodes) < count:
            nodes.append(run.node(f"node{len(nodes)}", ready=False, **WORKS))
        for node in nodes:
            node.wait_ready()
        while len(nodes) > count:
            node = nodes.pop()
            assert node.stop() == 0, node.tail()
        rate = measured_rate(run, job, stay)
        told.append(f"{count}: {rate:.1f}/s")
        assert 0.75 * count / SECONDS <= rate <= 1.25 * count / SECONDS, f"{count} nodes computed {rate:.1f} images/s"
    run.wait(job, 600)
    return f"{run.check(job)}; nodes and their images per second: 0: 0, {', '.join(told)} (each computes {1 / SECONDS:g}/s)"


def measured_rate(run: FaultRun, job: str, seconds: float) -> float:
    """Images per second in the next `seconds`, after a moment for the change to be noticed."""
    time.sleep(2)
    begun = time.time()
    time.sleep(seconds)
    return sum(begun <= moment < begun + seconds for moment in run.recorded_at(job)) / seconds


def rolling(run: FaultRun) -> str:
    """All nodes are stopped under load, one by one, and each is replaced by a new one."""
    count = 4
    old = [run.node(f"old{number}", ready=False, **WORKS) for number in range(count)]
    for node in old:
        node.wait_ready()
    job = run.submit(int(run.count(120, 60) * count / SECONDS))
    run.wait_done(job, count * 10)
    time.sleep(2 * WINDOW)
    begun, gone = time.time(), []
    for number, node in enumerate(old):
        replacement = run.node(f"new{number}", ready=False, **WORKS)
        start = time.monotonic()
        node.process.terminate()
        assert node.process.wait(GRACE_SECONDS) == 0, node.tail()
        gone.append(time.monotonic() - start)
        replacement.wait_ready()
    ended = time.time()
    assert not run.client.status(job).over, "the job was too small"
    run.wait(job, 600)
    times = run.recorded_at(job)
    normal = rate_between(times, begun - 2 * WINDOW, begun)
    least = min(rate_between(times, moment, moment + WINDOW) for moment in windows(begun, ended))
    counts = run.check(job)
    assert least >= normal / 2, f"{least:.1f} images/s instead of {normal:.1f}"
    slowest, share = max(gone), 100 * least / normal
    return f"{counts}; {count} nodes replaced, each gone after at most {slowest:.1f} s; rate at least {share:.0f} %"


def windows(begun: float, ended: float) -> list[float]:
    """When each stretch of WINDOW seconds begins, one a second."""
    return [begun + second for second in range(max(1, int(ended - begun - WINDOW)))]


def rate_between(times: list[float], begin: float, end: float) -> float:
    """Images per second between two moments."""
    return sum(begin <= moment < end for moment in times) / (end - begin)


def clock(run: FaultRun) -> str:
    """One host's clock is an hour fast, another's an hour slow, and each holds images for longer than a lease."""
    folder = run.folder / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFTED)
    nodes = [
        run.node(
            f"shifted{shift}",
            IMAGEMILL_TEST_SECONDS="5",  # a batch takes 20 s, twice a lease
            IMAGEMILL_TEST_CLOCK=shift,
            PYTHONPATH=f"{folder}{os.pathsep}{ROOT / 'src'}{os.pathsep}{ROOT}",
        )
        for shift in ("3600", "-3600")
    ]
    nodes.append(run.node("right", IMAGEMILL_TEST_SECONDS="5"))
    job = run.submit(run.count(60, 15))
    run.wait(job, 300)
    hours = {re.findall(r"T(\d\d):\S+ INFO .* node ready", node.log.read_text())[0] for node in nodes}
    assert len(hours) == 3, f"the clocks are not shifted: {hours}"
    used = {row.result.node for row in run.client.results(job) if row.result}
    assert len(used) == 3, f"only {used} took part"
    return f"{run.check(job)}; the clocks of 3 nodes an hour fast, right and an hour slow; each image held for up to 2 leases"


SHIFTED = """
import os, time
from time import time as right
time.time = lambda: right() + float(os.environ["IMAGEMILL_TEST_CLOCK"])
"""

ROWS = [
    Row("come-and-go", "all done; the rate follows", come_and_go),
    Row("rolling", "0 lost; rate stays above half; each gone within its limit", rolling),
    Row("clock", "leases hold", clock),
]
