"""Pausing, moving and delaying jobs, and their deadlines."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from tests.unit.shared.ledger.jobs import (
    CHILD,
    LANE,
    ask,
    counts,
    done,
    hours,
    indexes,
    make_job,
    nothing_left,
    ring,
    run,
    take,
    work,
)

pytestmark = pytest.mark.integration


# --- pausing -------------------------------------------------------------------------------------


def test_paused_job_waits_until_it_is_resumed(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job, other = make_job(producer, 4), make_job(producer, 1)
    share = take(worker, room=2)
    assert producer.pause(job)
    assert counts(worker, job)[0] == "paused"
    worker.give_back(share, CHILD, kept=[0], returned=[1])
    assert {job for job, _ in run(worker)} == {other}
    assert worker.tend() == ([], {})
    assert producer.pause(job)
    assert producer.resume(job)
    assert counts(worker, job)[0] == "running"
    worker.record(job, done(0))
    worker.give_back(share, CHILD)
    assert run(worker) == [(job, 1), (job, 2), (job, 3)]
    assert not producer.pause(job)
    assert not producer.resume(job)
    assert nothing_left(raw)


def test_paused_job_of_which_all_was_running_finishes(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2)
    share = take(worker)
    assert producer.pause(job)
    work(worker, share)
    assert counts(worker, job)[0] == "finishing"
    run(worker)
    assert counts(worker, job) == ("done", 2, 0)


def test_cancelled_job_cannot_be_paused(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2)
    share = take(worker)
    assert producer.cancel(job)
    assert not producer.pause(job)
    assert not producer.prioritize(job, "high")
    assert counts(worker, job)[0] == "running"
    worker.give_back(share, CHILD, returned=[0, 1])
    assert counts(worker, job)[0] == "cancelled"


# --- priorities ------------------------------------------------------------------------------------


def test_job_moves_to_another_priority(producer: SubmitLedger, worker: WorkLedger) -> None:
    first, second = make_job(producer, 2, owner="ann"), make_job(producer, 2, owner="ann")
    assert producer.prioritize(second, "high")
    assert worker.status(second).priority == "high"
    assert take(worker, room=1).job == second
    assert producer.prioritize(second, "low")
    assert [job for job, _ in run(worker)] == [first, first, second]


def test_job_that_moves_back_is_in_the_order_of_submission(producer: SubmitLedger, worker: WorkLedger) -> None:
    first, second = make_job(producer, 1, owner="ann"), make_job(producer, 1, owner="ann")
    for priority in ("high", "low", "normal"):
        producer.prioritize(first, priority)
    assert [job for job, _ in run(worker)] == [first, second]


def test_low_priority_rises(redis_server: EmbeddedRedis, producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    make_job(producer, 100, owner="ann")
    with closing(SubmitLedger(redis_server.url, rise_hours=2.0)) as patient:
        low = make_job(patient, 1, priority="low")
        moved = make_job(patient, 1)
        assert patient.prioritize(moved, "low")
        later = make_job(patient, 1, priority="low", not_before=hours(5))
    in_hours = {
        job: (raw.zscore("imagemill:alarms", f"rise {job}") / 1000 - raw.time()[0]) / 3600 for job in (low, moved, later)
    }
    assert in_hours == {low: pytest.approx(2, abs=0.1), moved: pytest.approx(2, abs=0.1), later: pytest.approx(7, abs=0.1)}
    assert worker.spec(take(worker, room=5).job).policy.owner == "ann"
    ring(raw, "rise", low)
    assert take(worker, room=5).job == low
    assert worker.status(low).priority == "normal"


def test_job_that_was_moved_up_does_not_rise(producer: SubmitLedger, raw: Any) -> None:
    job = make_job(producer, 1, priority="low")
    producer.prioritize(job, "high")
    assert not raw.exists("imagemill:alarms")


def test_retried_job_rises_too(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1, priority="low")
    run(worker, bad=[0])
    producer.retry(job)
    ring(raw, "rise", job)
    worker.tend()
    assert worker.status(job).priority == "normal"


# --- times -----------------------------------------------------------------------------------------


def test_job_begins_at_its_time(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    begin = hours(3)
    job = make_job(producer, 1, not_before=begin)
    assert ask(worker) == "none"
    assert worker.status(job).not_before == pytest.approx(begin.timestamp(), abs=0.001)
    ring(raw, "begin", job)
    assert worker.tend() == ([], {LANE: 0})
    assert worker.status(job).not_before is None
    assert take(worker).job == job


def test_job_whose_time_has_passed_begins_at_once(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1, not_before=hours(-1))
    assert run(worker) == [(job, 0)]
    assert nothing_left(raw)


def test_paused_job_does_not_begin_at_its_time(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1, not_before=hours(3))
    producer.pause(job)
    ring(raw, "begin", job)
    assert ask(worker) == "none"
    producer.resume(job)
    assert run(worker) == [(job, 0)]


def test_resumed_job_still_waits_for_its_time(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1, not_before=hours(3))
    producer.pause(job)
    producer.resume(job)
    assert ask(worker) == "none"


def test_deadline_lets_running_images_finish_and_fails_the_rest(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    until = hours(1)
    job = make_job(producer, 5, duplicates=[0, 4], until=until)
    assert worker.status(job).until == pytest.approx(until.timestamp(), abs=0.001)
    share = take(worker, room=3)
    ring(raw, "end", job)
    assert worker.renew(CHILD, [LANE], [share]).verdicts == ["stop"]
    assert counts(worker, job) == ("running", 0, 0)
    assert not producer.pause(job)
    worker.record(job, done(0))
    worker.give_back(share, CHILD, returned=[1, 2])
    assert counts(worker, job) == ("done", 2, 5)
    run(worker)
    assert counts(worker, job) == ("done", 2, 5)
    rows = list(worker.rows(job))
    assert [row.state for row in rows] == ["done", *["failed"] * 4, "done", "failed"]
    assert {row.code for row in rows if row.state == "failed"} == {"expired"}
    assert nothing_left(raw)


def test_retry_restores_expired_images(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 4, duplicates=[1, 3], until=hours(1))
    work(worker, take(worker, room=2), bad=[1])
    ring(raw, "end", job)
    run(worker)
    assert counts(worker, job) == ("done", 1, 5)
    assert producer.retry(job) == 3
    assert counts(worker, job) == ("queued", 1, 0)
    assert worker.status(job).until is None
    assert sorted(run(worker)) == [(job, 1), (job, 2), (job, 3)]
    assert counts(worker, job) == ("done", 6, 0)
    assert nothing_left(raw)


def test_job_that_expires_before_anything_was_done_has_failed(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2, duplicates=[0], until=hours(-1))
    assert run(worker) == []
    assert counts(worker, job) == ("failed", 0, 3)
    assert nothing_left(raw)


@pytest.mark.parametrize("held_up", ["paused", "not_before"])
def test_job_that_expires_while_held_up_can_be_retried(
    producer: SubmitLedger, worker: WorkLedger, raw: Any, held_up: str
) -> None:
    job = make_job(producer, 2, until=hours(1), not_before=hours(2) if held_up == "not_before" else None)
    if held_up == "paused":
        producer.pause(job)
    ring(raw, "end", job)
    run(worker)
    assert counts(worker, job) == ("failed", 0, 2)
    assert producer.retry(job) == 2
    assert worker.status(job).not_before is None
    assert run(worker) == [(job, 0), (job, 1)]
    assert nothing_left(raw)


def test_alarms_of_expired_jobs_do_not_stop_others(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    raw.zadd("imagemill:alarms", {f"{what} job-gone": 1 for what in ("begin", "end", "rise")})
    job = make_job(producer, 2, until=hours(1))
    assert indexes(take(worker)) == [0, 1]
    assert raw.zrange("imagemill:alarms", 0, -1) == [f"end {job}"]
