"""Images whose worker died are tried again, one at a time and alone."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from tests.unit.shared.ledger.jobs import CHILD, OTHER, ask, counts, die, done, indexes, make_job, nothing_left, run, take, work

pytestmark = pytest.mark.integration


def test_suspects_come_after_all_other_images_and_alone(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 6)
    share = take(worker, room=4)
    worker.record(job, done(1))
    assert die(worker, raw, share) == 1
    assert not worker.give_back(share, CHILD, returned=[0, 2, 3])
    assert indexes(take(worker)) == [4, 5]
    suspects = [take(worker) for _ in range(3)]
    assert [(indexes(share), share.tried) for share in suspects] == [([0], 0), ([2], 0), ([3], 0)]
    assert ask(worker) == "none"


def test_tries_are_counted_unless_the_image_is_given_back(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    die(worker, raw, take(worker))
    assert take(worker).tried == 0
    assert worker.bury(CHILD) == 1
    share = take(worker)
    assert share.tried == 1
    assert worker.give_back(share, CHILD, returned=[0])
    share = take(worker)
    assert share.tried == 1
    work(worker, share, bad=[0])
    run(worker)
    assert counts(worker, job) == ("failed", 0, 1)
    assert nothing_left(raw)


def test_one_child_at_a_time_is_asked_to_drain(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job, other = make_job(producer, 2), make_job(producer, 4, priority="low")
    die(worker, raw, take(worker))
    assert ask(worker, empty=False) == "drain"
    assert take(worker, OTHER, room=1, empty=False).job == other
    assert ask(worker, empty=False) == "drain"
    assert take(worker).job == job
    assert ask(worker, OTHER, empty=False) == "drain"


def test_child_that_never_drains_is_replaced(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    die(worker, raw, take(worker))
    assert ask(worker, empty=False) == "drain"
    assert 0 < raw.pttl(f"imagemill:draining:{job}") <= 10_000
    assert take(worker, OTHER).tried == 0


def test_suspect_recorded_meanwhile_is_skipped(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 3)
    die(worker, raw, take(worker))
    worker.record(job, done(0))  # its worker was only slow
    share = take(worker)
    assert indexes(share) == [1]
    worker.record(job, done(2))
    assert ask(worker) == "none"
    work(worker, share)
    run(worker)
    assert counts(worker, job) == ("done", 3, 0)
    assert nothing_left(raw)


def test_gaps_and_duplicates_are_no_suspects_to_children(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    make_job(producer, 8, gaps=range(1, 7), duplicates=[0] * 8)
    next_job = make_job(producer, 1, priority="low")
    die(worker, raw, take(worker))
    assert [indexes(take(worker)) for _ in range(2)] == [[0], [7]]
    assert take(worker).job == next_job


def test_job_whose_last_images_are_suspects_can_be_cancelled(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2)
    die(worker, raw, take(worker))
    assert producer.cancel(job)
    assert counts(worker, job)[0] == "cancelled"
    assert producer.retry(job) == 2
    assert [share.tried for share in (take(worker), take(worker))] == [0, 0]
    assert ask(worker) == "none"


def test_suspects_of_a_paused_job_wait(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    share = take(worker)
    producer.pause(job)
    die(worker, raw, share)
    assert ask(worker) == "none"
    producer.resume(job)
    assert take(worker).tried == 0
