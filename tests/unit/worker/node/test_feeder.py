"""The feeder takes images ahead of the device: enough, but no more than a few seconds of work."""

from __future__ import annotations

import pytest

from imagemill.shared.errors import StorageUnavailable
from imagemill.shared.ledger.leasing import ManifestDue
from imagemill.worker.line import front
from imagemill.worker.node.appetite import FIRST_IMAGES
from tests.conftest import photo
from tests.services.images import Handler, reply
from tests.unit.worker.line.jobs import waiting
from tests.unit.worker.node.feeding import LANE, Feeding, Steady
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def test_job_is_done_its_manifest_written_and_the_shift_ends(feeding: Feeding) -> None:
    job = feeding.submit(20)
    feeding.operation.let(20)
    with feeding.shift():
        feeding.check_done(job, 20)
    assert feeding.manifests == [ManifestDue(job, 1)]
    assert feeding.ledger.status(job).manifest == f"file:///{job}/manifest.jsonl"
    assert str(feeding.records.tally) == "20 done"
    assert feeding.leased() == 0


def test_shift_without_work_ends_at_once(feeding: Feeding) -> None:
    assert feeding.work() is False
    assert feeding.work() is False


def test_few_images_are_taken_first_and_more_once_the_speed_is_known(feeding: Feeding) -> None:
    job = feeding.submit(200)
    with feeding.shift():
        feeding.wait_for(begun=1, leased=FIRST_IMAGES + 1)
        feeding.wait_for_renewals(3)
        assert feeding.leased() == FIRST_IMAGES + 1, "one on the device, and as many ahead"
        assert feeding.ledger.sizes[0] == FIRST_IMAGES
        feeding.operation.let(200)
        feeding.check_done(job, 200)
    assert max(feeding.ledger.sizes) > 4 * FIRST_IMAGES


def test_no_more_than_a_few_seconds_of_work_are_taken_ahead(feeding: Feeding) -> None:
    feeding.line.speed = Steady(4.0)
    job = feeding.submit(100)
    with feeding.shift():
        feeding.wait_for(begun=1, leased=12)  # three seconds of work
        feeding.wait_for_renewals(3)
        assert feeding.leased() == 12
        feeding.operation.let(6)
        wait_until(lambda: len(feeding.ledger.sizes) == 2, "the next share is taken once half of that is done")
        feeding.wait_for_renewals(3)
        assert feeding.in_line() <= 13
        feeding.operation.let(94)
        feeding.check_done(job, 100)


def test_rate_is_reported_to_the_ledger(feeding: Feeding) -> None:
    feeding.line.speed = Steady(4.0)
    feeding.submit(2)
    with feeding.shift():
        wait_until(lambda: feeding.raw.hgetall(f"imagemill:rates:{LANE}") == {"cpu@a/0": "4"}, "the rate is reported")
        feeding.operation.let(2)


def test_next_job_is_fetched_while_the_last_images_of_this_one_are_computed(feeding: Feeding) -> None:
    """The device never runs dry between jobs."""
    jobs = [feeding.submit(3, owner="anna") for _ in range(3)]
    with feeding.shift():
        for image in range(9):
            wait_until(lambda image=image: len(feeding.operation.begun) == image + 1, "the next image is on the device")  # type: ignore[misc]
            if image < 8:
                wait_until(lambda: waiting(feeding.line) >= 1, "another one is ready")
            feeding.operation.let(1)
        for job in jobs:
            feeding.check_done(job, 3)


def test_writer_of_a_manifest_is_stopped_when_another_child_has_its_lease(feeding: Feeding) -> None:
    stopped = []

    def lose(due: ManifestDue) -> None:
        feeding.raw.hincrby(f"imagemill:job:{due.job}", "manifest_leases", 1)
        stopped.append(due.stop.wait(30))
        raise StorageUnavailable("stopped")

    feeding.before_manifest = lose
    feeding.submit(1)
    feeding.operation.let(1)
    with feeding.shift():
        wait_until(lambda: stopped, "the writer returned")
    assert stopped == [True]


def test_images_of_a_slow_host_are_overtaken(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads."""
    monkeypatch.setattr(front, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(front, "GLANCE", 0.02)
    stalls = feeding.server.hang

    def send(handler: Handler) -> None:
        if handler.headers["Host"].startswith("localhost"):
            stalls(handler)
        else:
            reply(handler, 200, photo(1))

    feeding.server.fallback = send
    job = feeding.submit(80, hosts=("localhost", "127.0.0.1"))
    feeding.operation.let(80)
    with feeding.shift():
        wait_until(lambda: len(feeding.results(job)) == 40, "all images of the other host are done")
        assert all(result.index % 2 for result in feeding.results(job))
        feeding.server.fallback = photo(1)
        feeding.server.released.set()  # the stalled downloads fail, and are tried again
        feeding.check_done(job, 80)


def test_manifest_that_could_not_be_written_is_handed_out_again(feeding: Feeding) -> None:
    def fail_once(due: ManifestDue) -> None:
        if due.number == 1:
            raise StorageUnavailable("try later")

    feeding.before_manifest = fail_once
    job = feeding.submit(1)
    feeding.operation.let(1)
    with feeding.shift():
        wait_until(lambda: feeding.manifests, "it was tried")
    assert feeding.ledger.status(job).state == "finishing"
    feeding.raw.zadd(f"imagemill:manifests:{LANE}", {job: 1})  # its lease has expired
    feeding.work()
    assert feeding.manifests == [ManifestDue(job, 1), ManifestDue(job, 2)]
    assert feeding.ledger.status(job).state == "done"


def test_lease_is_renewed_while_an_image_is_on_the_device(feeding: Feeding) -> None:
    job = feeding.submit(1)
    with feeding.shift():
        feeding.wait_for(begun=1, leased=1)
        (member,) = feeding.raw.zrange("imagemill:leased", 0, -1)
        feeding.raw.zadd("imagemill:leased", {member: 1})  # about to expire
        wait_until(lambda: feeding.raw.zscore("imagemill:leased", member) != 1, "the lease is renewed")
        feeding.operation.let(1)
        feeding.check_done(job, 1)
