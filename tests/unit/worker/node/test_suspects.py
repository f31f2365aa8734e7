"""Images whose worker died are run in halves, until the one that kills is found out."""

from __future__ import annotations

import threading

import pytest

from imagemill.shared.ledger.leasing import Request, Share
from tests.unit.worker.line.jobs import waiting
from tests.unit.worker.node.feeding import LANE, Feeding
from tests.workers import wait_until

pytestmark = pytest.mark.integration

OTHERS = "cpu@b/0/1"


def lose(feeding: Feeding, images: int) -> Share:
    """Another child takes this many images, and dies."""
    share = feeding.ledger.take(Request(OTHERS, [LANE], {LANE: images}))
    assert isinstance(share, Share)
    assert len(feeding.ledger.bury(OTHERS)) == 1
    return share


def test_images_whose_worker_died_are_run_in_halves_after_the_others(feeding: Feeding) -> None:
    """A half goes down the line together, with nothing else."""
    job = feeding.submit(8)
    lose(feeding, 4)
    at_work: dict[str, int] = {}
    feeding.operation.at_begin = lambda name: at_work.update({name: feeding.leased()})
    feeding.operation.let(8)
    with feeding.shift():
        feeding.check_done(job, 8)
    suspects = [f"{job}/{index}" for index in range(4)]
    assert [sorted(half) for half in (feeding.operation.begun[-4:-2], feeding.operation.begun[-2:])] == [
        suspects[:2],
        suspects[2:],
    ]
    assert [at_work[name] for name in suspects] == [2] * 4, "nothing else is leased meanwhile"
    assert [result.attempts for result in feeding.results(job)] == [2] * 4 + [1] * 4


def test_no_image_runs_alone_after_one_death(feeding: Feeding) -> None:
    job = feeding.submit(16)
    lose(feeding, 16)
    feeding.operation.let(16)
    with feeding.shift():
        feeding.check_done(job, 16)
    assert feeding.ledger.sizes == [16, 8, 8]


@pytest.mark.parametrize(("attempts", "deaths", "lost"), [(3, 2, True), (3, 1, False), (1, 1, True), (1, 0, False)])
def test_image_is_given_up_only_after_it_has_killed_alone_and_used_up_its_attempts(
    attempts: int, deaths: int, lost: bool, feeding: Feeding
) -> None:
    """`deaths` more processes die while they run it alone. In a batch, a neighbour may have been the culprit."""
    job = feeding.submit(1, attempts=attempts)
    for _ in range(1 + deaths):
        lose(feeding, 1)
    feeding.operation.let(1)
    with feeding.shift():
        wait_until(lambda: feeding.ledger.status(job).over, "the job is over")
    (result,) = feeding.results(job)
    assert result.code == ("worker_lost" if lost else None)
    assert len(feeding.operation.begun) == (not lost)
    assert result.attempts == 1 + deaths + (not lost)
    if lost:
        assert f"died {1 + deaths} times" in (result.message or "")


def test_suspect_that_is_given_back_uses_up_no_attempt(feeding: Feeding) -> None:
    job = feeding.submit(1)
    lose(feeding, 1)
    feeding.feeder.begin()  # nobody runs the device
    wait_until(lambda: waiting(feeding.line) == 1, "it waits for the device")
    assert feeding.feeder.end()
    wait_until(lambda: feeding.leased() == 0, "it is given back")
    feeding.operation.let(1)
    feeding.work()
    assert [result.attempts for result in feeding.results(job)] == [2]


def test_image_that_was_recorded_before_its_worker_died_is_not_done_again(feeding: Feeding) -> None:
    job = feeding.submit(6)
    done = threading.Event()

    def finish() -> None:
        done.set()

    feeding.operation.at_finish = finish
    with feeding.shift():
        feeding.wait_for(begun=1, leased=3)
        feeding.operation.let(1)
        wait_until(lambda: len(feeding.results(job)) == 1, "one is recorded")
        feeding.ledger.bury("cpu@a/0/17")  # by mistake: it is alive, and learns that it has lost its share
        feeding.operation.let(10)
        feeding.check_done(job, 6)
    assert done.is_set()
    assert feeding.operation.begun.count(f"{job}/0") == 1
