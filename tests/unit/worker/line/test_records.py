"""One record per image, whatever happens to Redis, and a tally of those that were first."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import NotFound
from imagemill.shared.messages import ItemResult
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line import recorder as module
from imagemill.worker.line.image import Failed, ImageInFlight, NotBegun, Outcome, Stored
from imagemill.worker.line.records import Records, Tally
from imagemill.worker.operations.base import Inputs
from imagemill.worker.transfer.network import Network
from tests.fakes import AnyWork, Invert
from tests.ledgers import Ledger
from tests.services.images import ImageServer
from tests.unit.worker.line.jobs import SIZE, Gate, LineJob, drain
from tests.workers import wait_until

STORED = Stored("computed", "file:///results/1.png", 100, (96, 72))


def tally(*codes: str | None) -> Tally:
    made = Tally()
    for index, code in enumerate(codes):
        made.count(ItemResult(index=index, state="failed" if code else "done", code=code), "spring", reused=False)
    return made


def test_tally_is_one_short_line() -> None:
    assert str(tally()) == "0 done"
    assert str(tally(None, None)) == "2 done"
    assert str(tally(*[None] * 160, "timeout", "not_found", "not_found")) == "160 done, 3 failed (not_found 2, timeout 1)"


def test_tally_names_the_jobs_with_most_failures_first() -> None:
    made = tally(None, "timeout")
    for number in range(6):
        made.count(ItemResult(index=0, state="done"), f"job-{number}", reused=False)
    text = "spring: 1 done, 1 failed (timeout 1); job-0: 1 done; job-1: 1 done; job-2: 1 done; job-3: 1 done"
    assert made.by_job() == f"{text}; and 2 more jobs; in all 7 done, 1 failed"
    assert made.ranked() == ["spring", *(f"job-{number}" for number in range(6))]


def test_tally_names_the_commonest_codes_only() -> None:
    codes = [f"code_{number}" for number in range(7)]
    assert str(tally(*codes, "code_6")).endswith("8 failed (code_6 2, code_0 1, code_1 1, code_2 1, code_3 1, others 2)")


@given(st.lists(st.none() | st.sampled_from(["timeout", "not_found", "bad_mask"]), max_size=30))
def test_tally_counts_every_image_once(codes: list[str | None]) -> None:
    made = tally(*codes)
    assert made.done + made.failed == len(codes)
    assert made.failed == sum(map(bool, codes))
    assert {code: made.codes[code] for code in made.codes} == {code: codes.count(code) for code in set(codes) - {None}}


def test_record_waits_for_redis_and_is_written_once(
    own_redis: EmbeddedRedis,
    images: ImageServer,
    tmp_path: Path,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.1)
    ledger = Ledger(own_redis.url)
    job = LineJob(ledger, images, tmp_path / "out", network)
    items, operation = job.photos(3), Gate()

    def postponed() -> int:
        return sum(record.message == "records postponed" for record in caplog.records)

    with caplog.at_level(logging.WARNING), job.running(operation, items) as line:
        assert operation.inside.wait(60)
        own_redis.stop()
        operation.open.set()
        wait_until(lambda: postponed() >= 4, "recording was tried")
        own_redis.start()
    assert job.codes() == ["done"] * 3
    assert sorted(job.entries()) == [0, 1, 2]
    assert str(line.records.tally) == "3 done"
    job.close()
    ledger.close()


@pytest.mark.parametrize("how", ["cancel", "pause"])
def test_nothing_more_is_begun_once_a_record_says_that_the_job_is_stopped(how: str, job: LineJob) -> None:
    items, operation = job.photos(12), Gate()
    with job.running(operation, items, threads=2, look_ahead=2 * SIZE):
        assert operation.inside.wait(60)
        assert not job.stop.is_set()
        getattr(job.ledger, how)(job.name)
        operation.open.set()
    assert job.stop.is_set()
    assert operation.begun < 12
    # Nothing of this job is leased, so it is over as soon as it is cancelled.
    assert job.codes().count("done") == (operation.begun if how == "pause" else 0)


@pytest.mark.parametrize("over", [True, False])
def test_image_of_a_job_that_is_over_is_not_counted(over: bool, job: LineJob) -> None:
    items = job.photos(2)
    line, images = job.begin(Invert(), items)
    if over:
        job.ledger.cancel(job.name)
    drain(line, images)
    assert str(line.records.tally) == ("0 done" if over else "2 done")


def test_bug_in_a_record_ends_the_run(job: LineJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bool:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(job.ledger, "record_all", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        job.run(Invert(), job.photos(3))


class Recording(NamedTuple):
    """Images of a job whose results are at hand, and those that have left the line."""

    records: Records
    images: list[ImageInFlight]
    left: list[ImageInFlight]

    def record(self, *outcomes: Outcome) -> None:
        """Record the outcome of each image; by default all are stored."""
        for image, outcome in zip(self.images, outcomes or [STORED] * len(self.images), strict=True):
            self.records.record(image, outcome, self.left.append)

    def wait(self) -> None:
        wait_until(lambda: len(self.left) == len(self.images), "all have left")
        assert {image.item.index for image in self.left} == {image.item.index for image in self.images}


def recording(job: LineJob, count: int) -> Recording:
    line, images = job.begin(Invert(), job.photos(count), enter=False)
    return Recording(line.records, images, [])


def calls(raw: Any) -> int:
    return int(raw.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


def test_records_that_gather_are_written_in_one_call(job: LineJob, raw: Any) -> None:
    made = recording(job, 40)
    before = calls(raw)
    raw.client_pause(60_000, all=False)  # writes wait, while we still ask
    made.record()
    raw.client_unpause()
    made.wait()
    assert calls(raw) - before <= 2
    assert all(image.recorded for image in made.images)
    assert sorted(job.entries()) == list(range(40))
    assert str(made.records.tally) == "40 done"


def test_bad_result_does_not_fail_its_neighbours(job: LineJob) -> None:
    made = recording(job, 3)
    made.record(STORED, replace(STORED, notes=("caf\udce9",)), Failed(NotFound("no such image")))
    made.wait()
    assert job.codes() == ["done", "internal_error", "not_found"]
    assert [image.code for image in made.images] == [None, "internal_error", "not_found"]


def test_records_of_an_outage_are_written_once(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    job = LineJob(Ledger(own_redis.url), images, tmp_path, network)
    made = recording(job, 5)
    own_redis.stop()
    made.record()
    wait_until(lambda: "records postponed" in caplog.messages, "recording was tried")
    assert not made.left
    assert not made.records.close(0)
    own_redis.start()
    made.wait()
    assert sorted(job.entries()) == list(range(5))
    assert str(made.records.tally) == "5 done"
    job.ledger.close()


def test_only_the_first_record_of_an_image_counts(job: LineJob) -> None:
    first, second = recording(job, 2), recording(job, 2)
    first.record()
    first.wait()
    second.record(*[Failed(NotFound("no such image"))] * 2)
    second.wait()
    assert (str(first.records.tally), str(second.records.tally)) == ("2 done", "0 done")
    assert all(image.recorded and image.code is None for image in second.images)
    assert job.codes() == ["done"] * 2


def test_waiting_records_are_written_before_the_end(job: LineJob) -> None:
    made = recording(job, 5)
    made.record()
    assert made.records.close(60)
    assert len(made.left) == 5
    assert job.codes() == ["done"] * 5


def test_image_that_was_not_begun_leaves_at_once_without_a_record(job: LineJob) -> None:
    made = recording(job, 1)
    made.record(NotBegun())
    assert made.left == made.images
    assert not made.images[0].recorded
    assert job.codes() == ["pending"]


def test_bug_while_an_image_leaves_reaches_the_line(job: LineJob) -> None:
    made, errors = recording(job, 2), []

    def fail(image: ImageInFlight) -> None:
        made.left.append(image)
        raise ZeroDivisionError

    made.records.on_error = errors.append
    for image in made.images:
        made.records.record(image, STORED, fail)
    made.wait()
    assert made.records.close(60)
    assert [type(error) for error in errors] == [ZeroDivisionError] * 2
    assert job.codes() == ["done"] * 2


class Garbled(Invert):
    """Remarks on its second image in what is no valid text."""

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> AnyWork:
        work = super().prepare(picture, inputs)
        work.notes += ["caf\udce9"] * (inputs.item.index == 1)
        return work


def test_result_that_cannot_be_written_is_recorded_as_a_failure(job: LineJob) -> None:
    with job.running(Garbled(), job.photos(3)):
        pass
    assert job.codes() == ["done", "internal_error", "done"]
