"""Redis goes away for longer than a lease: work waits, and nobody is taken for dead."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.faults.jobs import check_complete, submit, wait_for_gate
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

LONGER_THAN_A_LEASE = 6.0


def test_images_computed_during_an_outage_of_redis_are_recorded_after_it(
    environment: dict[str, str],
    client: Client,
    images: ImageServer,
    tmp_path: Path,
    gate: Path,
    own_redis: EmbeddedRedis,
) -> None:
    with WorkerProcess(environment, tmp_path, fake="Gated") as node:
        node.wait_ready()
        job = submit(client, images, tmp_path, 12)
        wait_for_gate(gate, 3)
        wait_until(lambda: client.status(job).done >= 2, "two images recorded")
        own_redis.stop()
        (gate / "open").touch()
        time.sleep(LONGER_THAN_A_LEASE)  # nothing happens that could be awaited
        begun = len(list(gate.glob("at-*")))
        own_redis.start()
        check_complete(client, job, 12, tmp_path)
        assert len(list(gate.glob("at-*"))) == 12, "no image was computed twice"
    assert begun > 2
    assert [row.attempts for row in client.results(job)] == [1] * 12
