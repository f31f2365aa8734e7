"""Images whose worker died are run again after all others, in halves, until the one that kills is found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger
from tests.unit.shared.ledger.jobs import (
    CHILD,
    OTHER,
    ask,
    counts,
    die,
    done,
    fall_silent,
    indexes,
    make_job,
    nothing_left,
    run,
    take,
    work,
)

pytestmark = pytest.mark.integration


def groups(worker: WorkLedger) -> list[tuple[list[int], int]]:
    """The images and deaths of the next shares."""
    found: list[tuple[list[int], int]] = []
    while (share := ask(worker)) != "none":
        found.append((indexes(share), share.deaths))
    return found


def test_suspects_come_after_all_other_images_in_halves(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 6)
    share = take(worker, room=4)
    worker.record(job, done(1))
    assert die(worker, raw, share) == 1
    assert not worker.give_back(share, CHILD, returned=[0, 2, 3])
    assert indexes(take(worker)) == [4, 5]
    assert groups(worker) == [([0, 2], 1), ([3], 1)]


@pytest.mark.parametrize(
    ("attempts", "deaths"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7], [0]]),
        (2, [[0, 1, 2, 3, 4, 5, 6, 7], [0]]),
        (3, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [0]]),
        (4, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [0, 1], [0]]),
        (6, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [0, 1], [0], [0], [0]]),
    ],
)
def test_image_that_kills_has_its_last_attempt_alone(
    attempts: int, deaths: list[list[int]], producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    """The first death says nothing of one image. All others are done."""
    job = make_job(producer, 8, attempts=attempts)
    killed = []
    while (share := take(worker)).deaths < len(deaths):
        if 0 in indexes(share):
            killed.append(indexes(share))
            worker.bury(CHILD)
        else:
            work(worker, share)
    assert killed == deaths
    assert indexes(share) == [0]
    assert counts(worker, job) == ("running", 7, 0)


def test_halves_run_on_different_children_at_the_same_time(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    make_job(producer, 8)
    die(worker, raw, take(worker))
    assert [indexes(take(worker, child)) for child in (CHILD, OTHER)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_what_is_given_back_of_a_group_is_next_and_no_more_suspect_than_before(
    producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    job = make_job(producer, 8)
    die(worker, raw, take(worker))
    share = take(worker)
    assert worker.give_back(share, CHILD, kept=[1], returned=[0, 2, 3])
    assert worker.give_back(share, CHILD, kept=[1], returned=[0, 2, 3]), "the answer was lost"
    assert worker.status(job).waiting == 7
    assert len(worker.bury(CHILD)) == 1
    assert groups(worker) == [([0, 2, 3], 1), ([4, 5, 6, 7], 1), ([1], 2)]


def test_deaths_are_counted_unless_the_image_is_given_back(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    die(worker, raw, take(worker))
    assert take(worker).deaths == 1
    assert len(worker.bury(CHILD)) == 1
    share = take(worker)
    assert share.deaths == 2
    assert worker.give_back(share, CHILD, returned=[0])
    share = take(worker)
    assert share.deaths == 2
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
    assert take(worker, OTHER).deaths == 1


def test_suspect_recorded_in_the_meantime_is_skipped(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 3)
    die(worker, raw, take(worker))
    worker.record(job, done(0))  # its worker was only slow
    assert worker.status(job).waiting == 2
    share = take(worker)
    assert indexes(share) == [1]
    worker.record(job, done(2))
    assert ask(worker) == "none"
    work(worker, share)
    run(worker)
    assert counts(worker, job) == ("done", 3, 0)
    assert nothing_left(raw)


def test_gaps_and_duplicates_are_not_suspects_for_children(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    make_job(producer, 8, gaps=range(1, 7), duplicates=[0] * 8)
    next_job = make_job(producer, 1, priority="low")
    die(worker, raw, take(worker))
    assert indexes(take(worker)) == [0, 7]
    assert take(worker).job == next_job


def test_job_whose_last_images_are_suspects_can_be_cancelled(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 2)
    die(worker, raw, take(worker))
    assert producer.cancel(job)
    assert counts(worker, job)[0] == "cancelled"
    assert producer.retry(job) == 2
    assert groups(worker) == [([0], 1), ([1], 1)]


def test_suspects_of_a_paused_job_wait(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    job = make_job(producer, 1)
    share = take(worker)
    producer.pause(job)
    die(worker, raw, share)
    assert ask(worker) == "none"
    producer.resume(job)
    assert take(worker).deaths == 1


def test_child_that_will_not_drain_gets_other_work(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    """Such as one whose results wait for a store that is down."""
    make_job(producer, 2)
    die(worker, raw, take(worker))
    other = make_job(producer, 4, priority="low")
    assert take(worker, empty=False, drains=False).job == other


@pytest.mark.parametrize(
    ("pid", "age", "weight"),
    [(17, 0, 1), (17, 60, 0.5), (18, 0, 0.5)],
    ids=["lives", "is silent", "was replaced"],
)
def test_death_with_the_node_counts_half(
    pid: int, age: int, weight: float, producer: SubmitLedger, worker: WorkLedger, raw: Any
) -> None:
    make_job(producer, 1)
    seen = raw.time()[0] - age
    raw.hset("imagemill:nodes", "cpu@a", json.dumps({"node": "cpu@a", "pid": pid, "seen": seen}))
    share = take(worker, "cpu@a/0/17.21")
    assert fall_silent(worker, raw, share) == 1
    assert take(worker).deaths == weight


def test_image_that_takes_nodes_down_is_given_up_after_six(producer: SubmitLedger, worker: WorkLedger, raw: Any) -> None:
    make_job(producer, 1)
    deaths = []
    while (share := take(worker)).deaths < 3:
        deaths.append(share.deaths)
        assert fall_silent(worker, raw, share) == 1
    assert deaths == [0, 0.5, 1, 1.5, 2, 2.5]
