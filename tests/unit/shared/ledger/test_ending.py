"""Manifests, cancelled jobs and retries."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import ManifestDue, WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from tests.unit.shared.ledger.jobs import (
    CHILD,
    LANE,
    OTHER,
    OTHER_LANE,
    ask,
    counts,
    die,
    done,
    failed,
    indexes,
    make_job,
    nothing_left,
    run,
    take,
    work,
    write_manifest,
)
from tests.workers import wait_until

pytestmark = pytest.mark.integration


# --- manifests -------------------------------------------------------------------------------------


def test_manifest_comes_before_images_and_goes_to_one_child(producer: SubmitLedger, worker: WorkLedger) -> None:
    job, other = make_job(producer, 1), make_job(producer, 1, priority="high")
    producer.pause(other)
    work(worker, take(worker))
    producer.resume(other)
    assert ask(worker, lanes=[OTHER_LANE]) == "none"
    due = ask(worker)
    assert due == ManifestDue(job, 1)
    assert take(worker, OTHER).job == other
    assert worker.renew(CHILD, [LANE], [due]).verdicts == ["ok"]
    assert worker.end_job(job, "s3://results/x/m.jsonl")
    assert worker.renew(CHILD, [LANE], [due]).verdicts == ["lost"]
    assert not worker.end_job(job, "s3://results/x/n.jsonl")
    assert worker.status(job).manifest == "s3://results/x/m.jsonl"


def test_manifest_of_a_silent_child_is_due_again(
    redis_server: EmbeddedRedis, producer: SubmitLedger, worker: WorkLedger
) -> None:
    job = make_job(producer, 1)
    work(worker, take(worker))
    with closing(WorkLedger(redis_server.url, lease_seconds=0.05)) as brief:
        first = ask(brief)
    assert first == ManifestDue(job, 1)
    wait_until(lambda: ask(worker, OTHER) == ManifestDue(job, 2), "the lease has expired", 20)
    leases = [first, ManifestDue(job, 2)]
    assert worker.renew(CHILD, [LANE], leases).verdicts == ["lost", "ok"]


def test_manifest_that_is_due_again_says_for_how_long_it_was_tried(
    producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    job = make_job(producer, 1)
    work(worker, take(worker), bad={0})
    first = ask(worker)
    assert isinstance(first, ManifestDue)
    assert first.seconds == 0
    raw.hincrby(f"imagemill:job:{job}", "manifest_since", -5_000_000)
    raw.zadd(f"imagemill:manifests:{LANE}", {job: 1})
    again = ask(worker)
    assert isinstance(again, ManifestDue)
    assert again.seconds >= 5000
    assert worker.end_job(job, None, again.run)
    assert producer.retry(job) == 1
    work(worker, take(worker))
    retried = ask(worker)
    assert isinstance(retried, ManifestDue)
    assert retried.seconds == 0
    assert worker.renew(CHILD, [LANE], [first, again, retried]).verdicts == ["lost", "lost", "ok"]


def test_job_can_end_without_a_manifest(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    work(worker, take(worker))
    assert isinstance(ask(worker), ManifestDue)
    assert worker.end_job(job, None)
    assert (counts(worker, job), worker.status(job).manifest) == (("done", 1, 0), None)
    assert nothing_left(raw)


def test_manifests_of_deleted_jobs_do_not_stop_others(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    raw.zadd(f"imagemill:manifests:{LANE}", {f"job-gone-{number}": number for number in range(3)})
    job = make_job(producer, 1)
    run(worker)
    assert worker.status(job).over
    assert nothing_left(raw)


# --- cancelled jobs ----------------------------------------------------------------------------------


def test_cancelled_job_is_over_at_once_if_nothing_runs(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    fresh, begun = make_job(producer, 2), make_job(producer, 3)
    producer.pause(fresh)
    share = take(worker, room=2)
    worker.record(begun, done(0))
    worker.give_back(share, CHILD, returned=[1])
    for job, counted in ((fresh, 0), (begun, 1)):
        assert producer.cancel(job)
        assert counts(worker, job) == ("cancelled", counted, 0)
        assert worker.status(job).over
        assert not producer.cancel(job)
    assert run(worker) == []
    assert [row.state for row in worker.rows(begun)] == ["done", "cancelled", "cancelled"]
    assert worker.status(begun).manifest
    assert counts(worker, begun)[0] == "cancelled"
    assert nothing_left(raw)


def test_cancelled_job_is_over_when_its_last_share_ends(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 6)
    shares = [take(worker, room=2), take(worker, room=2)]
    assert producer.cancel(job)
    assert not producer.cancel(job)
    assert worker.renew(CHILD, [LANE], shares).verdicts == ["stop", "stop"]
    assert worker.record(job, done(0))  # it was being computed
    worker.give_back(shares[0], CHILD, returned=[1])
    assert counts(worker, job) == ("running", 1, 0)
    assert die(worker, raw, shares[1]) == 1
    assert counts(worker, job) == ("cancelled", 1, 0)
    write_manifest(worker, job)
    assert nothing_left(raw)


def test_job_that_is_over_cannot_be_cancelled(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1)
    work(worker, take(worker))
    assert not producer.cancel(job)
    write_manifest(worker, job)
    assert not producer.cancel(job)
    assert counts(worker, job) == ("done", 1, 0)


# --- retries -----------------------------------------------------------------------------------------


def test_retry_redoes_only_failed_and_unprocessed_images(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 100, duplicates=[1, 1])
    assert producer.retry(job) == 0
    work(worker, take(worker, room=40), bad=[1, 39])
    share = take(worker, room=2)
    worker.record(job, done(40))
    producer.cancel(job)
    worker.give_back(share, CHILD, returned=[41])
    assert counts(worker, job) == ("cancelled", 39, 4)
    write_manifest(worker, job)
    assert producer.retry(job) == 61
    assert producer.retry(job) == 0
    status = worker.status(job)
    assert (counts(worker, job), status.ended, status.manifest) == (("queued", 39, 0), None, None)
    assert sorted(run(worker)) == [(job, index) for index in (1, 39, *range(41, 100))]
    assert counts(worker, job) == ("done", 102, 0)
    assert producer.retry(job) == 0
    assert nothing_left(raw)


def test_retried_job_goes_to_the_end_of_the_line(producer: SubmitLedger, worker: WorkLedger) -> None:
    first = make_job(producer, 1, owner="ann")
    run(worker, bad=[0])
    second = make_job(producer, 1, owner="ann")
    producer.retry(first)
    assert run(worker) == [(second, 0), (first, 0)]


def test_retry_restarts_the_count_of_attempts(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    die(worker, raw, take(worker))
    die(worker, raw, take(worker))
    share = take(worker)
    assert share.deaths == 2
    work(worker, share, bad=[0])
    run(worker)
    assert producer.retry(job) == 1
    assert take(worker).deaths == 0


def test_retry_while_the_manifest_is_due_or_being_written(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2)
    assert producer.cancel(job)
    due = ask(worker)
    assert isinstance(due, ManifestDue)
    assert producer.retry(job) == 2
    assert worker.renew(CHILD, [LANE], [due]).verdicts == ["lost"]
    assert not worker.end_job(job, "s3://results/x/old.jsonl")
    assert counts(worker, job)[0] == "queued"
    assert producer.cancel(job)
    assert producer.retry(job) == 2
    assert run(worker) == [(job, 0), (job, 1)]
    assert worker.status(job).manifest == "s3://results/x/manifest.jsonl"
    assert nothing_left(raw)


def test_two_retries_at_once_redo_each_image_once(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 2)
    run(worker, bad=[0, 1])
    assert producer.retry(job) == 2
    share = take(worker)
    worker.record(job, failed(0))
    producer._script("retry", job, 0)  # the other one had read the results before the first
    assert counts(worker, job) == ("running", 0, 1)
    worker.record(job, failed(1))
    worker.give_back(share, CHILD)
    assert run(worker) == []
    assert counts(worker, job) == ("failed", 0, 2)


def test_share_that_was_not_given_back_before_a_retry_is_lost(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2, owner="ann")
    share = take(worker)
    for index in (0, 1):
        worker.record(job, failed(index))
    write_manifest(worker, job)
    assert producer.retry(job) == 2
    assert worker.renew(CHILD, [LANE], [share]).verdicts == ["lost"]
    assert len(worker.bury(CHILD)) == 0
    assert indexes(take(worker, OTHER)) == [0, 1]
    assert ask(worker, OTHER) == "none"
    assert raw.hgetall("imagemill:running") == {"ann": "2"}


def test_image_that_a_worker_thought_dead_has_recorded_is_retried_once(
    producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    job = make_job(producer, 2)
    die(worker, raw, take(worker))
    for index in (0, 1):
        worker.record(job, failed(index))
    write_manifest(worker, job)
    assert raw.hget(f"imagemill:job:{job}", "suspects") == "0"
    assert producer.retry(job) == 2
    share = take(worker)
    assert indexes(share) == [0, 1]
    assert ask(worker, OTHER) == "none"
    work(worker, share)
    run(worker)
    assert nothing_left(raw)


def test_manifest_of_the_run_before_a_retry_does_not_end_the_job(producer: SubmitLedger, worker: WorkLedger) -> None:
    job = make_job(producer, 1)
    work(worker, take(worker), bad=[0])
    old = ask(worker)
    assert isinstance(old, ManifestDue)
    assert worker.end_job(job, None, old.run)
    assert producer.retry(job) == 1
    work(worker, take(worker))
    new = ask(worker)
    assert isinstance(new, ManifestDue)
    assert not worker.end_job(job, "s3://results/x/old.jsonl", old.run)
    assert worker.end_job(job, "s3://results/x/new.jsonl", new.run)
    assert worker.status(job).manifest == "s3://results/x/new.jsonl"
