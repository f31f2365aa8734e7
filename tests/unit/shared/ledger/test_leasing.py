"""Leases and results: one worker per chunk, one result per image."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import MANIFEST
from tests.unit.shared.ledger.jobs import counts, done, end_lease, failed, make_job, reap, take, work
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def test_chunk_belongs_to_one_worker_until_it_is_done(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2, 1)
    assert counts(worker, job)[0] == "queued"
    lease = take(worker, job)
    assert ([item.index for item in lease.items], lease.lost) == ([0, 1], 0)
    assert counts(worker, job)[0] == "running"
    assert worker.acquire(job, 0, task="u", token="u/1") == "held"
    assert worker.renew(lease) == "ok"
    assert worker.complete(lease) == "ok"
    assert worker.acquire(job, 0, task="u", token="u/1") == "gone"
    assert (worker.renew(lease), worker.complete(lease), worker.release(lease)) == ("lost", "lost", False)


def test_redelivered_task_takes_over_and_counts_as_lost(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1)
    first = take(worker, job, task="abc")
    assert worker.acquire(job, 0, task="ab", token="ab/1") == "held"  # another task, whose ID is a prefix
    second = take(worker, job, task="abc", delivery=2)
    assert second.lost == 1
    assert (worker.renew(first), worker.complete(first), worker.release(first)) == ("lost", "lost", False)
    assert take(worker, job, task="abc", delivery=3).lost == 2


def test_chunk_of_expired_lease_is_republished_once(
    redis_server: EmbeddedRedis, producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    job = make_job(producer, 1, 1)
    brief = WorkLedger(redis_server.url, lease_seconds=0.05)
    silent, kept = take(brief, job, 0), take(worker, job, 1)
    republished: list[tuple[str, int]] = []
    wait_until(lambda: republished.extend(reap(worker, raw)) or republished, "the lease has expired", 20)
    assert republished == [(job, 0)]
    assert reap(worker, raw) == []
    assert (worker.renew(silent), worker.renew(kept)) == ("lost", "ok")
    assert take(worker, job, 0, task="u").lost == 1
    brief.close()


def test_another_worker_takes_chunk_of_expired_lease_without_reaper(
    producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    job = make_job(producer, 1)
    late = take(worker, job)
    end_lease(raw, job, 0)
    assert take(worker, job, task="u").lost == 1
    assert worker.complete(late) == "lost"
    assert reap(worker, raw) == []


def test_released_chunk_waits_again_and_does_not_count_as_lost(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2)
    lease = take(worker, job)
    worker.record(job, done(0))
    assert worker.release(lease)
    assert not worker.release(lease)
    assert reap(worker, raw, patience=0.0) == [(job, 0)]
    again = take(worker, job, task="u")
    assert again.lost == 0
    assert worker.recorded(job, [item.index for item in again.items]) == {0}


def test_acquire_returns_gone_when_the_job_has_no_such_chunk(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1, 1)
    for number in (2, 99, MANIFEST):
        assert worker.acquire(job, number, task="t", token="t/1") == "gone"


def test_result_is_recorded_once_by_concurrent_threads(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2, duplicates=(0, 0))
    take(worker, job)
    start, answers = threading.Barrier(8), []

    def record(thread: int) -> None:
        start.wait()
        answers.extend([worker.record(job, done(0) if (thread + n) % 2 else failed(0)) for n in range(5)])

    threads = [threading.Thread(target=record, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 39 + [True]
    status = worker.status(job)
    assert sorted((status.done, status.failed)) == [0, 3]
    assert len(worker.follow(job)[1]) == 1
    assert worker.recorded(job, [0, 1, 7]) == {0}


def test_job_is_done_when_its_manifest_is_complete(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2, 1, duplicates=(2,))
    assert work(worker, job, 0, bad={1}) == "ok"
    assert counts(worker, job) == ("running", 1, 1)
    assert work(worker, job, 1) == "ok"
    lease = take(worker, job, 2)
    assert worker.complete(lease) == "finishing"
    status = worker.status(job)
    assert (status.state, status.over, status.manifest, status.ended) == ("finishing", False, None, None)
    manifest = take(worker, job, MANIFEST)
    assert worker.acquire(job, MANIFEST, task="u", token="u/1") == "held"
    assert worker.complete(manifest, manifest="s3://results/x/m.jsonl") == "ok"
    status = worker.status(job)
    assert (status.state, status.total, status.done, status.failed, status.duplicates) == ("done", 4, 3, 1, 1)
    assert status.manifest == "s3://results/x/m.jsonl"
    assert status.ended is not None
    assert status.seconds == pytest.approx(status.ended - status.created, abs=0.001)
    assert worker.acquire(job, MANIFEST, task="u", token="u/1") == "gone"


def test_worker_that_lost_the_manifest_cannot_set_its_url(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1)
    assert worker.complete(take(worker, job)) == "finishing"
    late = take(worker, job, MANIFEST)
    take(worker, job, MANIFEST, delivery=2)
    assert worker.complete(late, manifest="s3://results/x/m.jsonl") == "lost"
    status = worker.status(job)
    assert (status.state, status.manifest) == ("finishing", None)
