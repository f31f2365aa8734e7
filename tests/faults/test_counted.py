"""Faults as `python -m bench.faults` causes them, each in seconds: nothing is lost, doubled, left over or damaged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import fault_processes, fault_redis
from bench.fault_run import FaultRun, Row
from tests.services.redis import require_redis

pytestmark = pytest.mark.integration

ROWS = {row.name: row for row in (*fault_processes.ROWS, *fault_redis.ROWS)}
QUICK = (
    *("kill-main", "swallow", "hang"),
    *("redis-kill", "redis-freeze", "redis-reset", "redis-cut-off", "redis-failover-behind"),
)


@pytest.fixture
def run() -> Iterator[FaultRun]:
    require_redis()
    with FaultRun(small=True) as run:
        yield run


@pytest.mark.parametrize("row", [ROWS[name] for name in QUICK], ids=QUICK)
def test_must_hold(row: Row, run: FaultRun) -> None:
    row.run(run)


def test_nodes_are_replaced_one_by_one_under_load(run: FaultRun) -> None:
    old0, old1, *_ = run.start("old0", "old1", "new0", "new1", IMAGEMILL_TEST_SECONDS="0.1")
    job = run.submit(400)
    for node in (old0, old1):
        run.wait_done(job, 20)
        assert node.stop() == 0, node.tail()
        assert not run.client.status(job).over, "the job was too small"
    run.wait(job, 60)
    run.check(job)
