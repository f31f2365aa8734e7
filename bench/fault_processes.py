"""Faults of processes: nodes and their children that are killed or stopped."""

from __future__ import annotations

import os
import signal
import time

from bench.fault_run import QUEUE, FaultRun, Row
from tests.workers import WorkerProcess, wait_until

SECONDS = 0.02
"""How long the engine takes per image."""
WORKS = {"IMAGEMILL_TEST_SECONDS": str(SECONDS)}


def kill_main(run: FaultRun) -> str:
    """The main process of the only node is killed again and again."""
    images, kills = run.count(3000, 300), run.count(40, 4)
    node = run.node("node", concurrency=2, **WORKS)
    job = run.submit(images)
    for kill in range(kills):
        run.wait_done(job, images * kill // kills)
        time.sleep(run.rng.uniform(0, 0.5))
        node.kill()
        run.restart(node)
    ended, left = time.time(), images - run.client.status(job).done
    run.wait(job, 60 + left * SECONDS)
    seconds = time.time() - ended
    return f"{run.check(job, again=None)}; {kills} kills; over {seconds:.0f} s after the last, with {left} images left"


def kill_children(run: FaultRun) -> str:
    """A child of the only node is killed every two seconds."""
    kills = run.count(30, 5)
    node = run.node("node", concurrency=2, **WORKS)
    job = run.submit(run.count(3000, 300))
    run.wait_done(job, 20)
    begun, killed = time.time(), 0
    for _ in range(kills):
        children = node.children()
        if children:
            os.kill(run.rng.choice(children), signal.SIGKILL)
            killed += 1
        time.sleep(2)
    ended, left = time.time(), run.client.status(job)
    run.wait(job, 60 + (left.total - left.done) * SECONDS)
    counts = run.check(job, again=None)
    assert node.process.poll() is None, "the node has ended"
    return f"{counts}; {killed} kills; normal {run.back_to_normal(job, begun, ended):.1f} s after the last"


def swallow(run: FaultRun) -> str:
    """A node dies with a wake-up in its socket, which nobody else will ever see."""
    other = run.node("other")
    run.wait(run.submit(1), 60)  # so that the producer has its connections
    jobs, seconds, tries, rounds = [], [], 0, run.count(20, 3)
    for number in range(rounds):
        victim = run.node(f"victim{number}")
        pause(run, other)
        job = ""
        while not job:
            tries += 1
            job = swallowed(run, victim)
        run.destroy(victim)
        assert (run.raw.llen(QUEUE), run.raw.hlen("unacked")) == (0, 0), "the message is still there"
        os.kill(other.process.pid, signal.SIGCONT)
        start = time.monotonic()
        run.wait(job, 45)
        seconds.append(time.monotonic() - start)
        jobs.append(job)
    counts = run.check(*jobs)
    told = f"{rounds} of {rounds} wake-ups lost for certain (no queue had them) in {tries} tries"
    return f"{counts}; {told}; work done after {min(seconds):.1f} to {max(seconds):.1f} s"


def pause(run: FaultRun, node: WorkerProcess) -> None:
    """Stop a node, and wait until it no longer waits for a message."""
    others = len(blocked(run))
    os.kill(node.process.pid, signal.SIGSTOP)
    wait_until(lambda: len(blocked(run)) < max(2, others), f"{node.name} does not wait", 20)


def swallowed(run: FaultRun, victim: WorkerProcess) -> str:
    """Stop the victim while it waits for a message, and submit a job: its id, or '' if the message did not go to the victim.

    Redis answers a waiting client at once, so the message leaves the queue though the victim never reads it.
    """
    wait_until(lambda: blocked(run) == [0], f"only {victim.name} waits, and has just begun", 20)
    os.kill(victim.process.pid, signal.SIGSTOP)
    job = run.submit(1)
    if run.raw.llen(QUEUE) == 0 and run.raw.hlen("unacked") == 0 and not run.client.status(job).running:
        return job
    os.kill(victim.process.pid, signal.SIGCONT)  # its wait had ended already
    run.wait(job, 60)
    return ""


def blocked(run: FaultRun) -> list[int]:
    """For how many seconds each node has been waiting for a message."""
    return [int(client["idle"]) for client in run.raw.client_list() if client["cmd"] == "brpop" and "b" in client["flags"]]


ROWS = [
    Row("kill-main", "0 lost, 0 twice; done within 60 s beyond the remaining work", kill_main),
    Row("kill-children", "0 lost, 0 twice; the node goes on", kill_children),
    Row("swallow", "woken again within 45 s, every time", swallow),
]
