"""What a feeder does while a store does not respond, and when a model can't be opened."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.shared.errors import ConfigurationError, ModelUnavailable
from imagemill.worker.line.outages import MANY
from tests.unit.worker.node.feeding import LANE, Feeding, Steady
from tests.workers import wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def feeding(feeding: Feeding) -> Feeding:
    feeding.line.speed = Steady(4.0)  # 12 images ahead
    feeding.operation.let(10_000)
    return feeding


def waiting(feeding: Feeding) -> int:
    return sum(image.waits for held in list(feeding.feeder._held) for image in held.images)


def test_job_whose_store_is_down_waits_and_says_why(feeding: Feeding) -> None:
    job = feeding.submit(60)
    feeding.down.add(job)
    with feeding.shift():
        wait_until(lambda: waiting(feeding) >= MANY, "many results wait")
        begun = len(feeding.operation.begun)
        feeding.wait_for_renewals(3)
        assert len(feeding.operation.begun) <= begun + 12, "no more is taken"
        status = feeding.ledger.status(job)
        assert (status.done, status.failed) == (0, 0)
        assert status.why is not None
        assert "no connection" in status.why
        feeding.down.clear()
        feeding.check_done(job, 60)
    assert len(feeding.operation.begun) == 60, "nothing is computed twice"


def test_job_with_another_store_goes_on(feeding: Feeding) -> None:
    job = feeding.submit(60, folder="down")
    feeding.down.add(job)
    with feeding.shift():
        wait_until(lambda: waiting(feeding) >= MANY, "many results wait")
        feeding.check_done(other := feeding.submit(40, folder="up"), 40)
        feeding.down.clear()
        feeding.check_done(job, 60)
    assert len(feeding.operation.begun) == 100
    assert feeding.ledger.status(other).why is None


def test_other_jobs_with_a_store_that_is_down_wait_too(feeding: Feeding) -> None:
    jobs = [feeding.submit(60) for _ in range(3)]
    feeding.down.update(jobs)
    with feeding.shift():
        wait_until(lambda: waiting(feeding) >= MANY, "many results wait")
        feeding.wait_for_renewals(3)
        assert len(feeding.operation.begun) <= 60
        feeding.down.clear()
        for job in jobs:
            feeding.check_done(job, 60)
    assert len(feeding.operation.begun) == 180


def test_cancelled_job_does_not_wait_for_its_store(feeding: Feeding) -> None:
    job = feeding.submit(60)
    feeding.down.add(job)
    with feeding.shift():
        wait_until(lambda: waiting(feeding) >= MANY, "many results wait")
        assert feeding.ledger.cancel(job)
        wait_until(lambda: feeding.ledger.status(job).over, "it is over")
    assert feeding.ledger.status(job).state == "cancelled"


U2NET = "remove-background.rembg.u2net"


@pytest.fixture
def damaged(feeding: Feeding, monkeypatch: pytest.MonkeyPatch, where: str) -> list[ModelUnavailable]:
    """What the engine raises each time it is to use u2net: the faults in this list, then nothing any more."""
    step, faults = getattr(feeding.operation, where), list[ModelUnavailable]()

    def opened(*inputs: Any) -> Any:
        options = inputs[0][0].options if where == "run" else inputs[1].options
        if options.engine == "rembg" and faults:
            raise faults.pop(0)
        return step(*inputs)

    monkeypatch.setattr(feeding.operation, where, opened)
    feeding.offered = [U2NET, LANE]
    return faults


@pytest.mark.parametrize("where", ["run", "prepare"])
def test_lane_whose_model_cannot_be_used_goes_out_of_service(feeding: Feeding, damaged: list[ModelUnavailable]) -> None:
    """Its images wait for another node, also the one that found out, and none uses up an attempt. Other lanes go on."""
    damaged += [ModelUnavailable("the model can't be read")] * 100
    job, other = feeding.submit(40, model="u2net"), feeding.submit(20)
    with feeding.shift():
        feeding.check_done(other, 20)
    assert feeding.offered == [LANE]
    status = feeding.ledger.status(job)
    assert (status.done, status.failed, status.running, status.waiting) == (0, 0, 0, 40)
    assert len(damaged) > 80, "it is tried once, or with images that were on their way, and not with all 40"
    feeding.offered, damaged[:] = [U2NET], []
    with feeding.shift():
        feeding.check_done(job, 40)
    assert {row.attempts for row in feeding.ledger.rows(job)} == {1}


@pytest.mark.parametrize("where", ["run", "prepare"])
def test_model_replaced_in_the_meantime_is_used_at_once(feeding: Feeding, damaged: list[ModelUnavailable]) -> None:
    feeding.repaired = True
    damaged += [ModelUnavailable("the model can't be read")]
    job = feeding.submit(10, model="u2net")
    with feeding.shift():
        feeding.check_done(job, 10)
    assert feeding.offered == [U2NET, LANE]


def test_job_that_this_child_cannot_work_on_does_not_delay_a_stop(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ConfigurationError("no S3 keys")

    monkeypatch.setattr(feeding, "open", refuse)
    job = feeding.submit(4)
    with feeding.shift():
        wait_until(lambda: feeding.feeder._unable, "the job is given back")
        feeding.stopping.set()
    status = feeding.ledger.status(job)
    assert (status.waiting, status.running, status.failed) == (4, 0, 0)
