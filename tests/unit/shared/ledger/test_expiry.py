"""Jobs expire with all of their keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import MANIFEST
from tests.unit.shared.ledger.jobs import QUEUE, done, end_lease, failed, keys, make_job, reap, take

pytestmark = pytest.mark.integration

DAYS = 7 * 86_400
"""The default expiry in seconds."""


def test_every_key_of_a_job_expires_after_every_step(
    redis_server: EmbeddedRedis, producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    job = make_job(producer, 2, 1, 1, duplicates=(0,))
    for key in ("queue", "manifest_queue"):
        assert raw.hget(f"imagemill:job:{job}", key)
    steps: list[Callable[[], Any]] = [
        lambda: take(worker, job),
        lambda: worker.count_attempt(job, 0),
        lambda: worker.record(job, failed(0)),
        lambda: end_lease(raw, job, 0),
        lambda: reap(worker, raw),
        lambda: worker.complete(take(worker, job)),
        lambda: worker.release(take(worker, job, 1)),
        lambda: producer.cancel(job),
        lambda: worker.complete(take(worker, job, MANIFEST), manifest="s3://results/x/m.jsonl"),
        lambda: producer.retry(job),
        lambda: take(worker, job),
        lambda: worker.record(job, done(0)),
    ]
    seen = set()
    for step in steps:
        step()
        seen.update(keys(raw, job))
        assert {key: raw.ttl(key) for key in keys(raw, job) if not DAYS - 60 < raw.ttl(key) <= DAYS} == {}
    parts = ("chunks", "results", "events", "duplicates", "attempts", "leases", "lost", "finished")
    assert seen == {f"imagemill:job:{job}", *(f"imagemill:job:{job}:{part}" for part in parts)}


def test_expire_days_sets_the_expiry(redis_server: EmbeddedRedis, raw: Any) -> None:
    with closing(SubmitLedger(redis_server.url, expire_days=0.5)) as producer:
        job = make_job(producer, 1)
        assert {raw.ttl(key) // 60 for key in keys(raw, job)} <= {719, 720}
        raw.zincrby("imagemill:jobs", -43_300_000, job)
        assert producer.jobs() == []


def test_expired_job_leaves_nothing_behind(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job, other = make_job(producer, 1, 1), make_job(producer, 1)
    lease = take(worker, job)
    end_lease(raw, job, 0)
    raw.delete(*keys(raw, job))
    assert not worker.record(job, done(0))
    assert (worker.renew(lease), worker.complete(lease), worker.release(lease)) == ("lost", "lost", False)
    assert worker.acquire(job, 1, task="t", token="t/1") == "gone"
    assert reap(worker, raw, patience=0.0) == [(other, 0)]
    assert [status.job for status in worker.jobs()] == [other]
    assert keys(raw, job) == []
    assert raw.zrange("imagemill:leased", 0, -1) == []
    assert raw.zrange(f"imagemill:waiting:{QUEUE}", 0, -1) == [f"{other}:0"]
    assert raw.zrange("imagemill:jobs", 0, -1) == [other]
