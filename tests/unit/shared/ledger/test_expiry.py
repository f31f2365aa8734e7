"""Jobs are kept until they end, and then expire with all of their keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from tests.unit.shared.ledger.jobs import CHILD, ask, counts, die, done, failed, hours, keys, make_job, nothing_left, run, take

pytestmark = pytest.mark.integration

DAYS = 7 * 86_400
"""The default expiry in seconds."""


def test_no_key_of_a_job_expires_before_it_ends_and_then_all_do(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 4, duplicates=[0], until=hours(1))
    first, second = take(worker, room=2), take(worker, room=1)
    running: list[Callable[[], Any]] = [
        lambda: worker.record(job, failed(0)),
        lambda: die(worker, raw, first),
        lambda: worker.give_back(second, CHILD, returned=[2]),
        lambda: take(worker, room=4),
        lambda: take(worker),
        lambda: worker.bury(CHILD),
        lambda: producer.pause(job),
    ]
    seen = set()
    for step in running:
        step()
        seen.update(keys(raw, job))
        assert {key: raw.ttl(key) for key in keys(raw, job) if raw.ttl(key) != -1} == {}
    ended: list[Callable[[], Any]] = [
        lambda: producer.cancel(job),
        lambda: ask(worker),
        lambda: worker.end_job(job, "s3://results/x/m.jsonl"),
        lambda: worker.record(job, done(1)),
        lambda: worker.give_back(first, CHILD, returned=[1]),
        lambda: producer._script("retry", job, 0),  # and then the producer dies
        lambda: worker.tend(),
    ]
    for step in ended:
        step()
        seen.update(keys(raw, job))
        assert {key: raw.ttl(key) for key in keys(raw, job) if not DAYS - 60 < raw.ttl(key) <= DAYS} == {}
    parts = ("packs", "results", "events", "duplicates", "shares", "back", "suspects")
    assert seen == {f"imagemill:job:{job}", *(f"imagemill:job:{job}:{part}" for part in parts)}
    assert producer.retry(job) == 4
    assert {key for key in keys(raw, job) if raw.ttl(key) != -1} == set()


def test_share_that_outlives_its_job_leaves_no_key_behind(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2, duplicates=[0, 1])
    shares = [take(worker, room=1), take(worker)]
    for index in (0, 1):
        worker.record(job, done(index))
    run(worker)
    assert worker.give_back(shares[0], CHILD, returned=[0])
    assert die(worker, raw, shares[1]) == 1
    assert {key for key in keys(raw, job) if not DAYS - 60 < raw.ttl(key) <= DAYS} == set()
    assert nothing_left(raw)


def test_expire_days_sets_the_expiry(redis_server: EmbeddedRedis, worker: WorkLedger, raw: Any) -> None:
    with closing(SubmitLedger(redis_server.url, expire_days=0.5)) as producer:
        job = make_job(producer, 1)
        run(worker)
        assert {raw.ttl(key) // 60 for key in keys(raw, job)} <= {719, 720}


def test_expired_job_leaves_nothing_behind(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job, other = make_job(producer, 2), make_job(producer, 1)
    run(worker)
    raw.delete(*keys(raw, job))
    assert not worker.record(job, done(0))
    assert not worker.end_job(job, "s3://results/x/m.jsonl")
    worker.tend()
    assert raw.zrange("imagemill:jobs", 0, -1) == [other]
    assert [status.job for status in worker.jobs()] == [other]
    assert keys(raw, job) == []
    assert counts(worker, other)[0] == "done"
