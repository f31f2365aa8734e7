"""A child with a real ledger and fleet, and an engine that fills a pretend GPU."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest

from imagemill.shared.errors import ConfigurationError, DeviceLost, StorageUnavailable
from imagemill.shared.ledger.leasing import ManifestDue
from imagemill.worker.hardware.device import Device
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.node import child as module
from tests.devices import DEAD, FakeGpu
from tests.fakes import Invert
from tests.services.images import answers
from tests.unit.worker.node.site import LANE, Site, paths

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw")]


def test_engine_that_cannot_be_loaded_closes_only_its_lane(site: Site) -> None:
    class Damaged(Invert):
        def load(self, _: Device) -> None:
            raise ConfigurationError("the model can't be read")

    def make(operation: str, _: str) -> Any:
        return site.engine if operation == "stylize" else Damaged()

    child = site.child(make=make, operations=["remove-background", "stylize"])
    assert child.lanes() == [LANE]
    job = site.submit(*paths(2))
    assert site.work(child).endswith(": 2 done")
    assert child.ledger.status(job).state == "done"
    with pytest.raises(ConfigurationError, match="the model can't be read"):
        site.child(make=make, operations=["remove-background"])


def test_garbage_collector_ignores_what_is_loaded_before_the_first_task(site: Site) -> None:
    gc.unfreeze()
    site.child()
    assert gc.get_freeze_count()


def test_shift_returns_what_became_of_the_images_and_ends_the_job(site: Site) -> None:
    site.images.routes["/none.png"] = answers(404)
    jobs = [site.submit(*paths(3), "/none.png"), site.submit(*paths(2))]
    child = site.child()
    first, second = site.work(child).split("; ")
    assert first.endswith(": 3 done, 1 failed (not_found 1)")
    assert second.endswith(": 2 done")
    for job in jobs:
        status = child.ledger.status(job)
        assert status.state == "done"
        assert status.manifest == (site.folder / job / "manifest.jsonl").as_uri()
    assert site.publisher.woken == [], "nothing is left for another shift"
    assert site.work(child) == "0 done", "each shift counts its own"


def test_shift_that_leaves_work_wakes_a_child_of_the_same_node(site: Site) -> None:
    job, child = site.submit(*paths(20)), site.child(shift_seconds=0.001)
    shifts, done = 0, 0
    while not child.ledger.status(job).over:
        done += int(site.work(child).removeprefix(f"{job}: ").split()[0])
        shifts += 1
    assert done == 20
    assert 0 < len(site.publisher.woken) < shifts
    assert set(site.publisher.woken) == {(LANE, child.node)}


def test_shift_ends_well_when_the_next_one_cannot_be_asked_for(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.publisher.down = True
    job, child = site.submit(*paths(20)), site.child(shift_seconds=0.001)
    while not child.ledger.status(job).over:
        site.work(child)
    assert site.publisher.woken
    assert "next shift not requested" in caplog.text


@pytest.mark.parametrize(("owner", "shown"), [("anna", " for anna"), (None, "")])
def test_progress_names_counts_job_and_owner(owner: str | None, shown: str, site: Site) -> None:
    job, child = site.submit("/0.png", owner=owner), site.child()
    context = child.open(job, child._make_feeder().line.budget)
    told: list[tuple[str, dict[str, object]]] = []
    child.tell = lambda text, **figures: told.append((text, figures))
    child.progress((context, 12))
    assert told == [(f"0 done; now 12 of {job}{shown}", {"images_done": 0, "images_failed": 0, "jobs": []})]


def test_process_with_a_lost_device_leaves_its_images_to_others(site: Site) -> None:
    job, child = site.submit(*paths(5)), site.child()
    site.engine.fault = DEAD["illegal access"]()
    with pytest.raises(DeviceLost):
        site.work(child)
    status = child.ledger.status(job)
    assert (status.state, status.done, status.failed) == ("running", 0, 0)
    site.engine.fault = None
    assert site.work(site.child()).endswith(": 5 done"), "there is no lease to wait for"


def test_closed_child_gives_back_what_is_in_its_line(site: Site) -> None:
    job, child = site.submit(*paths(20)), site.child(shift_seconds=0.001)
    while not site.publisher.woken:
        site.work(child)
    child.close()
    other = site.child()
    site.work(other)
    assert other.ledger.status(job).state == "done", "there is no lease to wait for"


def test_process_that_is_told_to_exit_at_once_makes_no_image_a_suspect(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagemill.worker.node.feeder.FINISH_SECONDS", 0.2)
    job, child = site.submit(*paths(5)), site.child()
    site.engine.fault = SystemExit()
    with pytest.raises(SystemExit):
        site.work(child)
    child.close()
    site.engine.fault = None
    other = site.child()
    assert site.work(other).endswith(": 5 done")
    assert [row.attempts for row in other.ledger.rows(job)] == [1] * 5


@pytest.mark.parametrize("bug", [NameError("a bug"), OSError("no such file")], ids=lambda error: type(error).__name__)
def test_job_ends_whatever_goes_wrong_with_its_manifest(
    bug: Exception, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise bug

    monkeypatch.setattr(module, "write_manifest", fail)
    job, child = site.submit("/0.png"), site.child()
    with caplog.at_level(logging.INFO):
        site.work(child)
    status = child.ledger.status(job)
    assert (status.state, status.manifest) == ("done", None)


@pytest.mark.parametrize(("seconds", "state"), [(3000, "finishing"), (4000, "done")])
def test_manifest_is_tried_for_an_hour_while_the_store_is_down(
    seconds: int, state: str, site: Site, monkeypatch: pytest.MonkeyPatch, raw: Any
) -> None:
    def down(*_: Any, **__: Any) -> str:
        raise StorageUnavailable("the store is down")

    write = module.write_manifest
    monkeypatch.setattr(module, "write_manifest", down)
    job, child = site.submit("/0.png"), site.child()
    site.work(child)
    assert child.ledger.status(job).state == "finishing"
    raw.hincrby(f"imagemill:job:{job}", "manifest_since", -1000 * seconds)
    raw.zadd(f"imagemill:manifests:{LANE}", {job: 1})  # its lease has expired
    site.work(child)
    assert child.ledger.status(job).state == state
    monkeypatch.setattr(module, "write_manifest", write)
    raw.zadd(f"imagemill:manifests:{LANE}", {job: 1}, xx=True)
    site.work(child)
    status = child.ledger.status(job)
    assert (status.state, status.manifest is None) == ("done", state == "done")


def test_manifest_whose_lease_is_lost_is_neither_stored_nor_the_end(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    job, child = site.submit("/0.png"), site.child()
    due = ManifestDue(job, 1)
    due.stop.set()
    with caplog.at_level(logging.INFO):
        child.write_manifest(due)
    assert "manifest left to others" in caplog.text
    assert "job over" not in caplog.text
    assert list(site.folder.rglob("*.jsonl")) == []
    assert child.ledger.status(job).state == "queued"


@pytest.mark.parametrize(
    ("room", "share", "flagged"),
    [(1.05, 0.95, 12), (2.5, 0.8, 0)],
    ids=["each image takes more than 90 %", "two images take 80 %"],
)
def test_memory_above_90_percent_is_flagged_and_reported_to_the_fleet(
    room: float, share: float, flagged: int, site: Site
) -> None:
    child = site.child(room)
    site.submit(*paths(12))
    assert site.work(child).endswith(": 12 done")
    assert child.fleet.memory()[child.node] == (pytest.approx(share, abs=0.01), flagged)


def test_memory_report_keeps_the_highest_share_of_all_engines(site: Site) -> None:
    child = site.child(2.5)
    other = child.sizes["inpaint", "lama"] = BatchSizes(FakeGpu(100))
    other.top, other.flagged = 0.97, 5
    site.submit("/0.png")
    site.work(child)
    assert child.fleet.memory()[child.node] == (0.97, 5)
