"""Submitting, cancelling and retrying jobs, on a real Redis."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.shared.errors import JobNotFound
from imagemill.shared.ledger.leasing import Lease, WorkLedger
from imagemill.shared.ledger.scripts import pack, unpack
from imagemill.shared.ledger.submitting import SUBMITTING_SECONDS, SubmitLedger
from imagemill.shared.messages import MANIFEST, Chunk, Item
from tests.unit.shared.ledger.jobs import counts, done, failed, item, keys, make_job, reap, spec, take, work

pytestmark = pytest.mark.integration


def test_unsealed_job_is_invisible_and_expires_within_an_hour(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    producer.open_job("job-unsealed", spec())
    producer.add_chunks("job-unsealed", [(0, [item(0)])])
    assert worker.acquire("job-unsealed", 0, task="t", token="t/1") == "gone"
    assert reap(worker, raw, patience=0.0) == []
    assert worker.jobs() == []
    assert producer.cancel("job-unsealed") == "over"
    assert producer.retry("job-unsealed") == []
    assert counts(worker, "job-unsealed") == ("submitting", 0, 0)
    assert all(0 < raw.ttl(key) <= SUBMITTING_SECONDS for key in keys(raw, "job-unsealed"))
    producer.discard("job-unsealed")
    assert raw.keys("*job-unsealed*") == []


def test_seal_fails_when_the_unsealed_job_has_expired(producer: SubmitLedger, raw: Any) -> None:
    producer.open_job("job-slow", spec())
    producer.add_chunks("job-slow", [(0, [item(0), item(1, 0)])])
    raw.delete("imagemill:job:job-slow")  # as after an hour
    with pytest.raises(JobNotFound, match="submit it again"):
        producer.seal("job-slow", chunks=1, total=2, duplicates={0: 1})
    assert all(raw.ttl(key) > 0 for key in keys(raw, "job-slow"))
    producer.discard("job-slow")
    assert raw.keys("*job-slow*") == []


def test_seal_fails_the_second_time(producer: SubmitLedger) -> None:
    job = make_job(producer, 2)
    with pytest.raises(JobNotFound):
        producer.seal(job, chunks=1, total=2, duplicates={})


def test_unpack_restores_packed_items() -> None:
    items = [item(0), Item.model_validate({"index": 1, "source": "s3://b/ü.png", "boxes": "1,2,3,4", "name": "画"}), item(2, 0)]
    assert unpack(pack(items)) == items


def test_cancel_closes_waiting_chunks_and_notifies_workers(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1, 1, 1)
    assert work(worker, job, 0) == "ok"
    lease = take(worker, job, 1)
    assert producer.cancel(job) == "stopping"
    assert worker.acquire(job, 2, task="u", token="u/1") == "gone"
    assert worker.renew(lease) == "cancelled"
    assert producer.cancel(job) == "stopping"  # a second time does no harm
    assert worker.complete(lease) == "finishing"
    assert producer.cancel(job) == "over"
    manifest = take(worker, job, MANIFEST)
    assert worker.renew(manifest) == "ok"  # a cancelled job gets a manifest too
    worker.complete(manifest)
    assert counts(worker, job) == ("cancelled", 1, 0)
    assert producer.cancel(job) == "over"


def test_cancel_stops_at_once_when_no_worker_has_a_chunk(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1, 1)
    worker.release(take(worker, job))
    assert producer.cancel(job) == "stopped"
    assert counts(worker, job)[0] == "finishing"
    assert reap(worker, raw, patience=0.0) == [(job, MANIFEST)]


def test_retry_queues_only_failed_and_unprocessed_images(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2, 2, 2, 1, duplicates=(1,))
    assert producer.retry(job) == []
    work(worker, job, 0, bad={1})
    work(worker, job, 1)
    lease = take(worker, job, 2)
    worker.record(job, done(4))
    assert producer.cancel(job) == "stopping"
    worker.complete(lease)
    worker.complete(take(worker, job, MANIFEST))
    assert counts(worker, job) == ("cancelled", 4, 2)
    assert producer.retry(job) == [Chunk(job=job, number=number, images=1) for number in (0, 2, 3)]
    assert producer.retry(job) == []
    assert counts(worker, job) == ("queued", 4, 0)
    assert worker.status(job).ended is None
    assert [worker.recorded(job, [index]) != set() for index in range(7)] == [True, False, True, True, True, False, False]
    assert worker.acquire(job, 1, task="t", token="t/1") == "gone"
    assert worker.renew(take(worker, job, 0)) == "ok"  # no longer cancelled
    assert sorted(reap(worker, raw, patience=0.0)) == [(job, 2), (job, 3)]
    worker.release(Lease(job, 0, "t/1", 0, []))
    assert [work(worker, job, number) for number in (0, 2, 3)] == ["ok", "ok", "finishing"]
    assert counts(worker, job) == ("done", 8, 0)
    assert producer.retry(job) == []


def test_retry_resets_attempts_and_lost_workers(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1)
    take(worker, job)
    assert take(worker, job, delivery=2).lost == 1
    assert [worker.count_attempt(job, 0) for _ in range(3)] == [1, 2, 3]
    worker.forget_attempt(job, 0)
    assert worker.attempts(job, [0, 1]) == {0: 2, 1: 0}
    worker.count_attempt(job, 0)
    assert worker.attempts(job, [0, 1]) == {0: 3, 1: 0}
    worker.record(job, failed(0))
    worker.complete(Lease(job, 0, "t/2", 1, []))
    worker.complete(take(worker, job, MANIFEST))
    producer.retry(job)
    assert worker.attempts(job, [0]) == {0: 0}
    assert take(worker, job).lost == 0


def test_late_manifest_does_not_end_a_retried_job(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    work(worker, job, 0, bad={0})
    raw.hset(f"imagemill:job:{job}", "state", "finishing")
    manifest = take(worker, job, MANIFEST)
    raw.hset(f"imagemill:job:{job}", "state", "done")
    assert len(producer.retry(job)) == 1
    assert worker.complete(manifest) == "lost"
    assert work(worker, job, 0) == "finishing"
    assert counts(worker, job) == ("done", 1, 0)
