"""What readers see of a job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import JobNotFound
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from tests.unit.shared.ledger.jobs import LANE, done, failed, make_job, take, work, write_manifest

pytestmark = pytest.mark.integration


def test_status_names_owner_lane_and_priority(producer: SubmitLedger, worker: WorkLedger) -> None:
    job, nobodys = make_job(producer, 1, owner="ann@example.com", priority="high"), make_job(producer, 1)
    status = worker.status(job)
    assert (status.owner, status.priority, status.lane) == ("ann@example.com", "high", LANE)
    assert worker.status(nobodys).owner is None
    assert [status.job for status in worker.jobs()] == [nobodys, job]
    assert [status.job for status in worker.jobs(1)] == [nobodys]


def test_rows_have_results_and_duplicates_share_them(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 3, duplicates=[0, 1, 2])
    share = take(worker, room=2)
    worker.record(job, done(0))
    worker.record(job, failed(1))
    assert [row.state for row in worker.rows(job)] == ["done", "failed", "pending"] * 2
    producer.cancel(job)
    work(worker, share)
    writing = list(worker.rows(job))  # the rows of the manifest
    write_manifest(worker, job)
    assert list(worker.rows(job)) == writing
    assert [row.state for row in writing] == ["done", "failed", "cancelled"] * 2
    assert [row.duplicate_of for row in writing] == [None] * 3 + [0, 1, 2]
    assert writing[3].output == writing[0].output == "s3://results/x/0.png"
    assert writing[4].code == "not_found"


def test_rows_skip_gaps(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 100, gaps=range(1, 98))
    assert [row.index for row in worker.rows(job)] == [0, 98, 99]


def test_follow_returns_results_in_order_of_recording(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 3)
    place, results = worker.follow(job, wait=0.01)
    assert (place, results) == ("0", [])
    recorder = threading.Timer(0.05, lambda: [worker.record(job, result) for result in (done(2), failed(0))])
    recorder.start()
    found: list[int] = []
    while len(found) < 2:
        place, results = worker.follow(job, since=place, wait=60.0)
        found += [result.index for result in results]
    assert found == [2, 0]
    recorder.join()
    assert worker.follow(job, since=place, wait=0.01) == (place, [])


def test_long_wait_for_results_does_not_time_out(redis_server: EmbeddedRedis, raw: Any) -> None:
    with closing(SubmitLedger(redis_server.url)) as producer:
        producer._redis.connection_pool.connection_kwargs["socket_timeout"] = 0.4
        job = make_job(producer, 1)
        assert producer.follow(job, wait=60.0) == ("0", [])


def test_unknown_job_is_named_in_the_error(producer: SubmitLedger, worker: WorkLedger) -> None:
    calls: list[Callable[[str], Any]] = [
        worker.status,
        worker.spec,
        producer.cancel,
        producer.pause,
        producer.resume,
        lambda job: producer.prioritize(job, "high"),
        producer.retry,
        lambda job: list(worker.rows(job)),
    ]
    for call in calls:
        with pytest.raises(JobNotFound, match="260730-00000000"):
            call("260730-00000000")
    assert not worker.end_job("260730-00000000", None)
    assert worker.follow("260730-00000000", wait=0.01) == ("0", [])
