"""Faults of processes: nodes and their children that are killed, stopped or hang."""

from __future__ import annotations

import io
import os
import signal
import time

from PIL import Image

from bench.fault_run import QUEUE, FaultRun, Row
from tests.workers import WorkerProcess, wait_until

SECONDS = 0.02
"""How long the engine takes per image."""
WORKS = {"IMAGEMILL_TEST_SECONDS": str(SECONDS)}


def kill_main(run: FaultRun) -> str:
    """The main process of the only node is killed again and again."""
    images, kills = run.count(3000, 120), run.count(40, 3)
    node = run.node("node", concurrency=2, **WORKS)
    job = run.submit(images)
    for kill in range(kills):
        run.wait_done(job, images * kill // kills)
        run.pause(0.5)
        node.kill()
        run.restart(node)
    ended, left = time.time(), images - run.client.status(job).done
    run.wait(job, 60 + left * SECONDS)
    seconds = time.time() - ended
    return f"{run.check(job, again=None)}; {kills} kills; over {seconds:.0f} s after the last, with {left} images left"


def kill_children(run: FaultRun) -> str:
    """A child of the only node is killed every two seconds.

    Now and then an image is in three of them, alone in the last, and is blamed.
    """
    kills = run.count(30, 3)
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
    blamed = run.wait(job, 60 + (left.total - left.done) * SECONDS).failed
    if blamed:
        run.client.retry(job)
        run.wait(job, 60)
    counts = run.check(job, again=None)
    assert node.process.poll() is None, "the node has ended"
    normal = run.back_to_normal(job, begun, ended)
    return f"{counts}, {blamed} of them after a retry; {killed} kills; normal {normal:.1f} s after the last"


def swallow(run: FaultRun) -> str:
    """A node dies with a wake-up in its socket, which nobody else will ever see."""
    other = run.node("other")
    run.wait(run.submit(1), 60)  # so that the producer has its connections
    jobs, seconds, tries, rounds = [], [], 0, run.count(20, 1)
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


# --- images that are bad for processes -----------------------------------------------------------------------------------


def poison(run: FaultRun) -> str:
    """A few images kill the process that computes them."""
    return _bad_images(run, "Deadly", run.count(5, 1))


def hang(run: FaultRun) -> str:
    """An image hangs until the soft time limit."""
    limit = str(run.count(6, 2))
    return _bad_images(run, "Hangs", 1, IMAGEMILL_WORKER__TIME_LIMIT=limit, IMAGEMILL_WORKER__SHIFT_SECONDS="1")


def hang_for_good(run: FaultRun) -> str:
    """An image hangs in native code until the hard time limit, a minute later."""
    return _bad_images(run, "HangsForGood", 1, IMAGEMILL_WORKER__TIME_LIMIT="6", IMAGEMILL_WORKER__SHIFT_SECONDS="1")


def _bad_images(run: FaultRun, fake: str, bad: int, **settings: str) -> str:
    images = run.count(300, 60)
    node = run.node("node", fake=fake, concurrency=2, **WORKS, **settings)
    urls = [run.images.url(f"/{number}.png") for number in range(images - bad)]
    for number in range(bad):
        white = run.images.url(f"/white{number}.png")
        run.images.routes[f"/white{number}.png"] = run.pictures[white] = white_png(40 + number)
        urls.insert(run.rng.randrange(len(urls)), white)
    start = time.time()
    job = run.submit_urls(urls)
    run.wait(job, 500)
    counts = run.check(job, failed=bad, again=None)
    failed = [row for row in run.client.results(job) if row.state == "failed"]
    assert {(row.code, row.attempts) for row in failed} == {("worker_lost", 3)}, failed
    times = [run.begun(row.source) for row in failed]
    assert max(times) <= 3, f"begun {times} times"
    neighbours = run.recorded_at(job)[-bad - 1] - start
    assert node.process.poll() is None, "the node has ended"
    return f"{counts}; bad images begun {max(times)} times; the others done after {neighbours:.0f} s"


def white_png(size: int) -> bytes:
    """A white image, which the fake engines don't like."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), "white").save(file, "PNG")
    return file.getvalue()


ROWS = [
    Row("kill-main", "0 lost, 0 twice; done within 60 s beyond the remaining work", kill_main),
    Row("kill-children", "0 lost, 0 twice; the node goes on; a retry does what was blamed", kill_children),
    Row("swallow", "woken again within 45 s, every time", swallow),
    Row("poison", "neighbours done; 3 attempts at most", poison),
    Row("hang", "neighbours done; 3 attempts at most", hang),
    Row("hang-for-good", "neighbours done; 3 attempts at most", hang_for_good),
]
