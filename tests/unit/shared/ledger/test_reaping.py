"""The reaper: chunks that Celery or a worker lost are published again, others are not."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import MANIFEST, Chunk
from tests.unit.shared.ledger.jobs import QUEUE, age, make_job, reap, take, work

pytestmark = pytest.mark.integration


def test_chunks_missing_from_an_empty_queue_are_republished(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1, 1, 1)
    take(worker, job, 1)
    assert reap(worker, raw) == []  # its patience is not over
    age(raw, job, 60)
    assert reap(worker, raw) == [(job, 0), (job, 2)]
    assert reap(worker, raw) == []


def test_chunks_behind_others_in_their_queue_are_not_republished(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    early, later = make_job(producer, 1, 1, 1), make_job(producer, 1, 1)
    age(raw, early, 120)
    age(raw, later, 60)
    raw.lpush(QUEUE, "a message")
    take(worker, early, 0)
    assert reap(worker, raw) == []
    take(worker, early, 1)
    take(worker, later, 0)  # queues are first in, first out, so chunks published long before this one are lost
    assert reap(worker, raw) == [(early, 2)]


@pytest.mark.parametrize("priority", ["normal", "high"])
def test_ended_job_does_not_make_older_waiting_chunks_look_lost(
    producer: SubmitLedger, worker: WorkLedger, raw: Any, priority: Any
) -> None:
    queue = QUEUE if priority == "normal" else f"{QUEUE}.high"
    waiting = make_job(producer, 1, 1, 1, priority=priority)
    age(raw, waiting, 120, queue)
    raw.lpush(queue, "a message")
    quick = make_job(producer, 1, priority=priority)
    age(raw, quick, 120, queue)
    assert work(worker, quick, 0) == "finishing"
    assert reap(worker, raw) == []


def test_manifest_is_looked_for_in_its_own_queue(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    assert producer.cancel(job) == "stopped"
    age(raw, job, 60, f"{QUEUE}.high")
    raw.lpush(f"{QUEUE}.high", "a message")
    assert reap(worker, raw) == []
    raw.delete(f"{QUEUE}.high")
    raw.lpush(QUEUE, "a message")
    assert reap(worker, raw) == [(job, MANIFEST)]


def test_only_one_node_is_the_reaper(redis_server: EmbeddedRedis, producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    make_job(producer, 1)
    other = WorkLedger(redis_server.url)
    assert len(worker.reap("cpu@a", patience=0.0)) == 1
    assert other.reap("cpu@b", patience=0.0) == []
    assert 0 < raw.pttl("imagemill:reaper") <= 5000
    raw.delete("imagemill:reaper")
    assert len(other.reap("cpu@b", patience=0.0)) == 1
    other.close()


def test_republished_chunks_carry_their_image_counts(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 3, duplicates=(0, 1))
    assert [chunk.images for chunk in worker.reap("cpu@a", patience=0.0)] == [3, 0]
    assert worker.chunk(job, MANIFEST) == Chunk(job=job, number=MANIFEST, images=0)
