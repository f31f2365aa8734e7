"""Redis goes away for longer than a lease: work waits, and nobody is taken for dead."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import redis

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.faults.jobs import check_complete, submit, wait_for_gate
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

LONGER_THAN_A_LEASE = 4.0


def test_work_in_progress_survives_an_outage_of_redis(
    environment: dict[str, str],
    client: Client,
    images: ImageServer,
    tmp_path: Path,
    gate: Path,
    own_redis: EmbeddedRedis,
) -> None:
    """The parent looks for dead workers before its child has renewed its leases, which have all expired."""
    with WorkerProcess(environment, tmp_path, fake="Gated") as node, redis.Redis.from_url(own_redis.url) as raw:
        node.wait_ready()
        job = submit(client, images, tmp_path, 12)
        wait_for_gate(gate, 3)
        wait_until(lambda: client.status(job).done >= 2, "two images recorded")
        (child,) = node.children()
        own_redis.stop()
        time.sleep(LONGER_THAN_A_LEASE)  # nothing happens that could be awaited
        os.kill(child, signal.SIGSTOP)
        own_redis.start()
        before = raw.get("imagemill:tended")
        wait_until(lambda: raw.get("imagemill:tended") != before, "the node has looked for dead workers")
        os.kill(child, signal.SIGCONT)
        (gate / "open").touch()
        check_complete(client, job, 12, tmp_path)
        assert len(list(gate.glob("at-*"))) == 12, "no image was computed twice"
    assert [row.attempts for row in client.results(job)] == [1] * 12
