"""Faults of Redis and of the network to it. No process dies but Redis, so nothing may be computed twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from bench.fault_run import FaultRun, Row
from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.services.proxy import Proxy
from tests.workers import wait_until

SECONDS = 0.05
"""How long the engine takes per image."""
WORKS = {"IMAGEMILL_TEST_SECONDS": str(SECONDS)}
MUST = "0 lost, 0 twice, nothing recomputed that was stored; consuming resumes"


def kill(run: FaultRun) -> str:
    """Redis is killed and started again with its append-only file."""
    kills = run.count(20, 2)

    def disturb() -> None:
        for _ in range(kills):
            run.pause(4)
            run.redis.kill()
            run.pause(3)
            run.redis.start()

    return f"{disturbed(run, 60 * kills, disturb)}; {kills} kills"


def freeze(run: FaultRun) -> str:
    """Redis does not respond for longer than a lease."""
    seconds = run.count(30, 4)

    def disturb() -> None:
        pid = run.raw.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    return f"{disturbed(run, 600, disturb)}; frozen {seconds} s"


def reset(run: FaultRun) -> str:
    """All connections to Redis are closed."""
    times, closed = run.count(10, 2), 0

    def disturb() -> None:
        nonlocal closed
        for _ in range(times):
            for kind in ("normal", "pubsub"):
                closed += run.raw.client_kill_filter(_type=kind, skipme=True)
            run.pause(4)

    return f"{disturbed(run, 600, disturb)}; {closed} connections reset in {times} rounds"


def cut_off(run: FaultRun) -> str:
    """The network to Redis swallows everything, and after that refuses connections, each for several leases."""
    seconds = run.count(60, 4)
    with Proxy(run.redis.port) as proxy:

        def disturb() -> None:
            for mode in ("stall", "refuse"):
                proxy.set(mode)
                time.sleep(seconds)
                proxy.set("pass")
                time.sleep(2)

        told = disturbed(run, 1200, disturb, proxy.url("redis", "/0"))
    return f"{told}; {seconds} s of silence, then {seconds} s of refused connections"


def cut_one(run: FaultRun) -> str:
    """One of two nodes is cut off for several leases: the other takes over its work, and it returns with results of its own."""
    seconds = run.count(60, 20)
    with Proxy(run.redis.port) as proxy:
        near = run.node("near", **WORKS)
        far = run.node("far", IMAGEMILL_REDIS_URL=proxy.url("redis", "/0"), **WORKS)
        job = run.submit(10 * seconds)
        run.wait_done(job, 40)
        begun = time.monotonic()
        proxy.set("stall")
        run.wait(job, 5 * seconds)
        took = time.monotonic() - begun
        time.sleep(max(0.0, seconds - took))
        proxy.set("pass")
        near.stop()  # so that the next job is for the other
        second, begun = run.submit(20), time.monotonic()
        run.wait(second, 120)
        back = time.monotonic() - begun
        counts = run.check(job, second, again=None)
        assert far.process.poll() is None, "the node has ended"
        return f"{counts}; the other node was done {took:.0f} s after the cut; the first is back after {back:.1f} s"


def failover(run: FaultRun) -> str:
    """Redis is lost, and its replica, which had every write, takes over."""
    return _failover(run, 0)


def failover_behind(run: FaultRun) -> str:
    """Redis is lost, and its replica, which had not got the last writes, takes over."""
    return _failover(run, 2)


def _failover(run: FaultRun, behind: float) -> str:
    """The replica lacks the last `behind` seconds. What Redis forgot may be computed again."""
    with (
        Proxy(run.redis.port) as to_redis,
        Proxy(run.redis.port) as to_primary,
        EmbeddedRedis(run.folder / "replica") as replica,
    ):
        run.use(to_redis.port)
        lost = 0

        def disturb() -> None:
            nonlocal lost
            with run.client_of(replica.port) as its:
                its.replicaof("127.0.0.1", to_primary.port)
                wait_until(lambda: its.info("replication")["master_link_status"] == "up", "the replica follows", 30)
                wait_until(lambda: caught_up(run.raw, its), "the replica has every write", 30)
                if behind:
                    to_primary.set("stall")
                    time.sleep(behind)
                before = done(run.raw)
                run.redis.kill()
                to_primary.set("refuse")
                its.replicaof("NO", "ONE")
                lost = before - done(its)
                to_redis.target = replica.port
                to_redis.reset()

        # With the results, Redis has forgotten who had which images: some are at two nodes until these learn that.
        again = None if behind else 0
        told = disturbed(run, 600, disturb, to_redis.url("redis", "/0"), again=again, late=behind > 0)
        return f"{told}; the replica lacked {lost} results"


def caught_up(primary: object, replica: object) -> bool:
    """Whether a replica has applied everything that its primary had."""
    return bool(offset(replica, "slave_repl_offset") >= offset(primary, "master_repl_offset"))


def offset(client: object, name: str) -> int:
    """A position in the stream of writes."""
    return int(client.info("replication")[name])  # type: ignore[attr-defined]


def done(client: object) -> int:
    """How many results Redis has."""
    return sum(client.hlen(name) for name in client.scan_iter("imagemill:job:*:results"))  # type: ignore[attr-defined]


def disturbed(
    run: FaultRun, seconds: float, disturb: Callable[[], None], url: str = "", again: int | None = 0, late: bool = False
) -> str:
    """A job is disturbed, and a second one goes undisturbed through the same nodes. Returns the counts."""
    more = {"IMAGEMILL_REDIS_URL": url} if url else {}
    nodes = run.start("first", "second", **WORKS, **more)
    job = run.submit(run.count(3000, 200))
    run.wait_done(job, 20)
    begun = time.time()
    disturb()
    ended = time.time()
    run.wait(job, run.count(int(seconds), 60))
    normal = run.back_to_normal(job, begun, ended)
    second = run.submit(40)
    run.wait(second, 60)
    counts = run.check(job, second, again=again, late=late)
    assert all(node.process.poll() is None for node in nodes), "a node has ended"
    attempts = {row.attempts for row in run.client.results(job)}
    return f"{counts}, attempts {sorted(attempts)}; normal {normal:.1f} s after the fault"


ROWS = [
    Row("redis-kill", MUST, kill),
    Row("redis-freeze", MUST, freeze),
    Row("redis-reset", MUST, reset),
    Row("redis-cut-off", MUST, cut_off),
    Row("redis-cut-one", "0 lost, 0 twice; the others take over its work, and it comes back", cut_one),
    Row("redis-failover", MUST, failover),
    Row("redis-failover-behind", "0 lost, 0 twice; what the replica lacked is computed again", failover_behind),
]
