"""What is not begun is given back in time, so that others can work on it; what is begun is finished."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import DeviceLost
from imagemill.worker.node.appetite import FIRST_IMAGES
from imagemill.worker.node.feeder import Feeder
from tests.conftest import photo
from tests.devices import DEAD
from tests.services.images import ImageServer
from tests.unit.worker.line.jobs import waiting
from tests.unit.worker.node.feeding import LANE, Feeding, Steady
from tests.workers import wait_until

pytestmark = pytest.mark.integration

AT_WORK = FIRST_IMAGES + 1
"""Images of a new feeder with a busy device: one on the device, the others ahead."""


@pytest.mark.parametrize("how", ["cancel", "pause"])
def test_stopped_job_is_given_back_while_the_device_is_busy(how: str, feeding: Feeding) -> None:
    job = feeding.submit(20)
    with feeding.shift():
        feeding.wait_for(begun=1, leased=AT_WORK)
        getattr(feeding.ledger, how)(job)
        wait_until(lambda: feeding.leased() == 1, "all is given back but the image on the device")
        feeding.operation.let(1)
        wait_until(lambda: feeding.leased() == 0, "it is recorded")
    assert len(feeding.operation.begun) == 1
    assert [result.state for result in feeding.results(job)] == ["done"]
    status = feeding.ledger.status(job)
    assert (status.state, status.done) == ("cancelled" if how == "cancel" else "paused", 1)


def test_resumed_job_is_completed_and_no_image_done_twice(feeding: Feeding) -> None:
    job = feeding.submit(12)
    with feeding.shift():
        feeding.wait_for(begun=1, leased=AT_WORK)
        feeding.ledger.pause(job)
        wait_until(lambda: feeding.leased() == 1, "all is given back but the image on the device")
        feeding.ledger.resume(job)
        feeding.operation.let(12)
        feeding.check_done(job, 12)
    assert len(set(feeding.operation.begun)) == len(feeding.operation.begun) == 12


def test_other_jobs_go_on_when_one_is_cancelled(feeding: Feeding) -> None:
    cancelled, other = feeding.submit(20), feeding.submit(5)
    with feeding.shift():
        wait_until(lambda: feeding.operation.begun, "an image is on the device")
        wait_until(lambda: feeding.leased() >= AT_WORK, "images are taken ahead")
        feeding.ledger.cancel(cancelled)
        feeding.operation.let(20)
        feeding.check_done(other, 5)
    assert feeding.ledger.status(cancelled).state == "cancelled"


def test_urgent_images_overtake_those_that_are_fetched(feeding: Feeding) -> None:
    feeding.line.speed = Steady(1.0)  # so three images are taken at a time
    normal = feeding.submit(20)
    with feeding.shift():
        feeding.wait_for(begun=1, leased=3)
        wait_until(lambda: waiting(feeding.line) == 2, "the other two are fetched")
        urgent = feeding.submit(4, priority="high")
        feeding.operation.let(1)
        wait_until(lambda: len(feeding.operation.begun) == 2, "the second one is begun")
        wait_until(lambda: waiting(feeding.line) >= 3, "urgent ones are fetched, beside the third")
        feeding.operation.let(23)
        feeding.check_done(normal, 20)
        feeding.check_done(urgent, 4)
    names = [name.partition("/")[0] for name in feeding.operation.begun]
    assert names[:4] == [normal, normal, urgent, urgent]


def test_images_that_are_not_fetched_yet_yield_to_an_urgent_job(
    redis_server: EmbeddedRedis, raw: Any, images: ImageServer, tmp_path: Path, quick: None
) -> None:
    """One thread fetches, so one image waits behind the stalled download."""
    feeding = Feeding(redis_server.url, raw, images, tmp_path / "out", threads=1)
    normal, images.fallback = feeding.submit(20), images.hang
    with feeding.shift():
        assert images.stalled.wait(60)
        wait_until(lambda: feeding.leased() == FIRST_IMAGES, "images are taken")
        urgent = feeding.submit(1, priority="high")
        wait_until(lambda: feeding.ledger.status(urgent).state == "running", "the urgent job is taken")
        assert feeding.leased() == 2, "in place of the image that waits"
        images.fallback = photo(1)
        images.released.set()
        feeding.operation.let(21)
        feeding.check_done(urgent, 1)
        feeding.check_done(normal, 20)
    feeding.close()


def test_all_is_given_back_when_no_shift_follows(feeding: Feeding) -> None:
    job = feeding.submit(20)
    feeding.feeder.begin()
    wait_until(lambda: waiting(feeding.line) == FIRST_IMAGES, "images wait for the device")
    assert feeding.feeder.end(), "work remains"
    wait_until(lambda: feeding.leased() == 0, "it is given back")
    feeding.operation.let(20)
    with feeding.shift():
        feeding.check_done(job, 20)


def test_next_shift_continues_with_what_is_in_the_line(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagemill.worker.node.feeder.GRACE_SECONDS", 60.0)
    job = feeding.submit(10)
    feeding.operation.let(10)
    while not feeding.ledger.status(job).over:
        feeding.work(seconds=0)
    feeding.check_done(job, 10)
    assert sum(feeding.server.hits.values()) == 10, "nothing was fetched twice"


def test_next_shift_is_called_for_until_it_begins(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child that is called first may be another one, which has nothing to do: the images must not wait for long."""
    monkeypatch.setattr("imagemill.worker.node.feeder.GRACE_SECONDS", 60.0)
    job = feeding.submit(10)
    feeding.feeder.begin()
    wait_until(lambda: waiting(feeding.line) == FIRST_IMAGES, "images wait for the device")
    assert feeding.calls == [], "the shift goes on"
    assert feeding.feeder.end()
    wait_until(lambda: len(feeding.calls) > 2, "a shift is called for, and again")
    assert set(feeding.calls) == {LANE}
    feeding.operation.let(10)
    with feeding.shift():
        feeding.check_done(job, 10)
    calls = len(feeding.calls)
    feeding.work()
    assert len(feeding.calls) == calls, "nothing is left"


def test_stopping_node_finishes_what_is_begun_and_gives_back_the_rest(feeding: Feeding) -> None:
    job = feeding.submit(20)
    with feeding.shift():
        feeding.wait_for(begun=1, leased=AT_WORK)
        feeding.stopping.set()
        wait_until(lambda: feeding.leased() == 1, "the rest is given back")
        feeding.operation.let(1)
    assert feeding.leased() == 0
    assert len(feeding.results(job)) == len(feeding.operation.begun) == 1


def test_closing_gives_back_and_waits_for_results_that_are_being_stored(feeding: Feeding) -> None:
    job, finishing, go_on = feeding.submit(20), threading.Event(), threading.Event()

    def finish() -> None:
        finishing.set()
        assert go_on.wait(60)

    feeding.operation.at_finish = finish
    feeding.operation.let(1)
    feeding.feeder.begin()
    wait_until(lambda: waiting(feeding.line) == FIRST_IMAGES, "images wait for the device")
    feeding.line.device.run(time.monotonic(), feeding.feeder.busy)  # one of them
    assert feeding.feeder.end()
    assert finishing.wait(60)
    closing = threading.Thread(target=feeding.feeder.close)
    closing.start()
    wait_until(lambda: feeding.leased() == 1, "all is given back but the image that is being stored")
    go_on.set()
    closing.join(60)
    assert feeding.leased() == 0
    assert [result.state for result in feeding.results(job)] == ["done"]
    assert feeding.raw.exists(f"imagemill:job:{job}:suspects") == 0


def test_closing_gives_back_what_takes_too_long_to_store(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planned stop makes no image a suspect."""
    monkeypatch.setattr("imagemill.worker.node.feeder.FINISH_SECONDS", 0.2)
    job, go_on = feeding.submit(20), threading.Event()
    feeding.operation.at_finish = lambda: go_on.wait(60)
    feeding.operation.let(1)
    feeding.feeder.begin()
    wait_until(lambda: waiting(feeding.line) == FIRST_IMAGES, "images wait for the device")
    feeding.line.device.run(time.monotonic(), feeding.feeder.busy)
    feeding.feeder.close()
    leased, waiting_again = feeding.leased(), feeding.ledger.status(job).waiting
    go_on.set()
    assert (leased, waiting_again) == (0, 20)
    assert feeding.raw.exists(f"imagemill:job:{job}:suspects") == 0


def test_only_what_was_on_a_lost_device_becomes_suspect_and_at_once(feeding: Feeding) -> None:
    def fail(_: str) -> None:
        raise DEAD["illegal access"]()

    job, feeding.operation.at_begin = feeding.submit(20), fail
    with pytest.raises(DeviceLost):
        feeding.work()
    feeding.feeder.abandon()
    assert feeding.leased() == 0
    assert feeding.results(job) == []
    assert feeding.raw.hget(f"imagemill:job:{job}", "suspects") == "1"
    assert feeding.ledger.status(job).waiting == 20


def test_all_images_are_suspects_when_the_line_is_abandoned_before_any_is_begun(feeding: Feeding) -> None:
    """They would be handed out again and again if none could be at fault."""
    job = feeding.submit(20)
    feeding.feeder.begin()
    wait_until(lambda: waiting(feeding.line) == FIRST_IMAGES, "images wait for the device")
    feeding.feeder.abandon()
    assert feeding.leased() == 0
    assert feeding.raw.hget(f"imagemill:job:{job}", "suspects") == str(FIRST_IMAGES)


def test_line_is_abandoned_without_redis(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_redis.url, decode_responses=True) as raw:
        feeding = Feeding(own_redis.url, raw, images, tmp_path / "out")
        feeding.submit(20)
        feeding.feeder.begin()
        wait_until(lambda: waiting(feeding.line) == FIRST_IMAGES, "images wait for the device")
        own_redis.stop()
        with caplog.at_level(logging.WARNING):
            feeding.feeder.abandon()
        assert "images not given back" in caplog.text
        feeding.ledger.close()


def test_feeder_survives_an_outage_of_redis(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_redis.url, decode_responses=True) as raw:
        feeding = Feeding(own_redis.url, raw, images, tmp_path / "out")
        job = feeding.submit(10)
        with caplog.at_level(logging.WARNING), feeding.shift():
            feeding.wait_for(begun=1, leased=AT_WORK)
            own_redis.stop()
            wait_until(lambda: "Redis does not respond" in caplog.text, "the feeder has noticed")
            own_redis.start()
            feeding.operation.let(10)
            feeding.check_done(job, 10)
        assert len(feeding.operation.begun) == 10
        feeding.close()


def test_feeder_goes_on_after_a_bug(
    feeding: Feeding, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter([True, True])

    def progress(*_: Any) -> None:
        if next(faults, False):
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(feeding, "progress", progress)
    job = feeding.submit(10)
    with feeding.shift():
        wait_until(lambda: caplog.text.count("feeding failed") == 2, "it has happened")
        feeding.operation.let(10)
        feeding.check_done(job, 10)


def test_shift_ends_when_its_feeder_keeps_failing(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leases would be renewed for ever, and nothing would come of its images."""

    def fail(_: Feeder) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Feeder, "_settle_shares", fail)
        with pytest.raises(ZeroDivisionError):
            feeding.work()
    feeding.feeder.abandon()
