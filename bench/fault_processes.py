"""Faults of processes: nodes and their children that are killed, stopped, hang or are replaced."""

from __future__ import annotations

import time

from bench.fault_run import FaultRun, Row

SECONDS = "0.02"
"""How long the engine takes per image."""


def kill_main(run: FaultRun) -> str:
    """The main process of the only node is killed again and again."""
    images, kills = run.count(3000, 300), run.count(40, 4)
    node = run.node("node", concurrency=2, IMAGEMILL_TEST_SECONDS=SECONDS)
    job = run.submit(images)
    for kill in range(kills):
        run.wait_done(job, images * kill // kills)
        time.sleep(run.rng.uniform(0, 0.5))
        node.kill()
        run.restart(node)
    start = time.time()
    left = images - run.client.status(job).done
    run.wait(job, 60 + 2 * left * float(SECONDS))
    return (
        f"{run.check(job, again=None)}; {kills} kills; over {time.time() - start:.0f} s after the last, with {left} images left"
    )


ROWS = [
    Row("kill-main", "0 lost, 0 twice; done within 60 s beyond the remaining work", kill_main),
]
