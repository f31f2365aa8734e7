"""What a child makes of models that come while it runs, and of those that don't work."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from imagemill.shared.errors import (
    ConfigurationError,
    ImageError,
    MissingExtra,
    ModelUnavailable,
    OperationFailed,
    UnsafeContent,
)
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import Item, Job
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.errors import DeviceUnusable
from imagemill.worker.node.child import Child
from imagemill.worker.operations.base import Sample
from tests.conftest import photo
from tests.fakes import Invert
from tests.unit.worker.node.site import LANE, Site, paths

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw")]

U2NET, SILUETA = (f"remove-background.rembg.{model}" for model in ("u2net", "silueta"))
BOTH = {"operations": ["remove-background", "stylize"], "engines": ["opencv", "rembg"]}


class CutOut(Invert):
    """Stands in for rembg. `faults` holds what happens on each use of a model until it is repaired."""

    spec = replace(Invert.spec, name="remove-background", engine="rembg")

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}
        self.spoilt: dict[str, ImageError] = {}
        """What the images of a model come to."""
        self.runs: list[str] = []

    def load(self, device: Device) -> None:
        if "engine" in self.faults:
            raise self.faults["engine"]

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.runs.append(samples[0].options.model)
        if samples[0].options.model in self.spoilt:
            return [self.spoilt[samples[0].options.model]] * len(samples)
        if samples[0].options.model in self.faults:
            raise self.faults[samples[0].options.model]
        return super().run(samples)


@pytest.fixture
def rembg(site: Site) -> CutOut:
    (site.weights / "rembg").mkdir(parents=True)
    return CutOut()


def put(site: Site, *models: str) -> None:
    for model in models:
        (site.weights / "rembg" / f"{model}.onnx").touch()


def child_of(site: Site, rembg: CutOut, **worker: Any) -> Child:
    """A child with rembg, and with another engine for whatever else it does."""
    return site.child(make=lambda _, engine: rembg if engine == "rembg" else site.engine, **{**BOTH, **worker})


def submit(site: Site, model: str, images: int = 2) -> str:
    job = f"child-{uuid.uuid4().hex[:12]}"
    site.images.routes |= {path: photo(number) for number, path in enumerate(paths(images))}
    work = {"operation": "remove-background", "options": {"engine": "rembg", "model": model}}
    producer = SubmitLedger(site.url)
    producer.open_job(job, Job.model_validate({**work, "output": {"url": site.folder.as_uri()}}))
    producer.add_packs(job, [(0, [Item(index=n, source=site.images.url(path)) for n, path in enumerate(paths(images))])])
    producer.seal(job, size=images, total=images, duplicates={})
    producer.close()
    return job


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ModelUnavailable("the model u2net can't be opened"), "the model u2net can't be opened"),
        (OperationFailed("expected 3 channels"), "expected 3 channels: check the model with `imagemill models verify`"),
        (KeyError("output"), "KeyError: 'output': check the model with `imagemill models verify`"),
        (MemoryError("malloc"), "MemoryError: malloc: check the model with `imagemill models verify`"),
    ],
    ids=["can't be opened", "doesn't fit", "bug", "memory"],
)
def test_model_that_does_not_work_at_the_start_closes_its_lane_only(
    fault: Exception, reason: str, site: Site, rembg: CutOut, caplog: pytest.LogCaptureFixture
) -> None:
    put(site, "u2net", "silueta")
    rembg.faults["u2net"] = fault
    child = child_of(site, rembg)
    assert site.lanes.closed()[U2NET].reason == reason
    assert (site.lanes.closed()[U2NET].again is not None) is isinstance(fault, MemoryError)
    assert SILUETA in child.lanes()
    assert rembg.runs == ["u2net", "silueta"], "the next one is tried"
    (line,) = (record for record in caplog.records if record.message == "lane out of service")
    assert (line.levelname, vars(line)["lane"], vars(line)["reason"]) == ("ERROR", U2NET, reason)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OperationFailed("its output is not finite"),
            "its output is not finite: check the model with `imagemill models verify`",
        ),
        (UnsafeContent("the safety checker rejected the result"), None),
    ],
)
def test_model_whose_results_are_no_images_closes_its_lane(
    error: ImageError, reason: str | None, site: Site, rembg: CutOut
) -> None:
    """But what the safety checker thinks of a test image is not the model's fault."""
    put(site, "u2net")
    rembg.spoilt["u2net"] = error
    child_of(site, rembg)
    assert [fault.reason for fault in site.lanes.closed().values()] == ([reason] if reason else [])


def test_node_stays_when_all_of_its_models_are_damaged(site: Site, rembg: CutOut) -> None:
    put(site, "u2net", "silueta")
    rembg.faults |= dict.fromkeys(("u2net", "silueta"), ModelUnavailable("damaged"))
    child = child_of(site, rembg, engines=["rembg"], operations=["remove-background"])
    assert child.lanes() == []
    assert sorted(site.lanes.closed()) == [SILUETA, U2NET]
    rembg.faults.clear()
    site.lanes.offer(SILUETA)
    job = submit(site, "silueta")
    assert site.work(child) == f"{job}: 2 done"


@pytest.mark.parametrize("where", ["engine", "u2net"])
def test_node_exits_when_no_engine_can_use_the_device(where: str, site: Site, rembg: CutOut) -> None:
    put(site, "u2net", "silueta")
    rembg.faults[where] = DeviceUnusable("install the driver")
    with pytest.raises(ConfigurationError, match="install the driver"):
        child_of(site, rembg, engines=["rembg"], operations=["remove-background"])
    child = child_of(site, rembg)
    assert LANE in child.lanes(), "another engine goes on"
    assert sorted(site.lanes.closed()) == [SILUETA, U2NET]


def test_engine_is_loaded_when_its_first_model_comes(site: Site, rembg: CutOut) -> None:
    child = child_of(site, rembg)
    assert rembg.runs == []
    put(site, "u2net")
    job = submit(site, "u2net")
    assert site.work(child) == "0 done"
    site.lanes.offer(U2NET)  # the parent has seen it
    assert site.work(child) == f"{job}: 2 done"
    assert U2NET in child.lanes()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (MissingExtra("rembg is not installed"), "rembg is not installed"),
        (AttributeError("no session"), "its engine can't be loaded: AttributeError: no session"),
    ],
)
def test_engine_that_can_not_be_loaded_later_closes_its_lanes(fault: Exception, reason: str, site: Site, rembg: CutOut) -> None:
    child = child_of(site, rembg)
    rembg.faults["engine"] = fault
    site.lanes.offer(U2NET), site.lanes.offer(SILUETA)
    job = site.submit(*paths(2))
    assert site.work(child) == f"{job}: 2 done", "other lanes go on"
    assert {fault.reason for fault in site.lanes.closed().values()} == {reason}


def test_model_that_opens_and_never_works_closes_its_lane_and_fails_no_image(site: Site, rembg: CutOut) -> None:
    """Such as one that was replaced by a model for other inputs."""
    put(site, "u2net", "silueta")
    child = child_of(site, rembg)
    rembg.faults["silueta"] = OperationFailed("expected 3 channels")
    job, other = submit(site, "silueta"), submit(site, "u2net")
    assert site.work(child) == f"{other}: 2 done"
    status = child.ledger.status(job)
    assert (status.done, status.failed, status.waiting) == (0, 0, 2)
    assert sorted(site.lanes.closed()) == [SILUETA]
    rembg.faults.clear()
    site.lanes.offer(SILUETA)
    assert site.work(child) == f"{job}: 2 done"


def test_fingerprint_is_unknown_on_a_node_that_can_not_have_made_the_results(site: Site, rembg: CutOut) -> None:
    """Such as that of a manifest which a node writes that has only a damaged copy of the job's LoRA."""
    child = child_of(site, rembg)
    child.operations["stylize", "diffusion"] = rembg
    options = {"engine": "diffusion", "loras": "red", "control": "none"}
    spec = Job.model_validate({"operation": "stylize", "options": options, "output": {"url": site.folder.as_uri()}})
    assert child._fingerprint(spec) is None
    site.parts.offer("red")
    assert child._fingerprint(spec) == rembg.fingerprint(spec.options)
    error = ModelUnavailable.of_part("red", "it is cut off")
    child.report_fault(spec.lane, error, time.monotonic())
    assert child._fingerprint(spec) is None


def test_images_that_fail_on_a_model_that_works_fail(site: Site, rembg: CutOut, monkeypatch: pytest.MonkeyPatch) -> None:
    put(site, "u2net")
    child = child_of(site, rembg)
    run = rembg.run

    def only_small(samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        if samples[0].data.shape[0] > 64:
            raise OperationFailed("this image can't be done")
        return run(samples)

    monkeypatch.setattr(rembg, "run", only_small)
    job = submit(site, "u2net")
    child._sound.clear()  # as after the model was opened anew
    assert site.work(child) == f"{job}: 0 done, 2 failed (operation_failed 2)"
    assert site.lanes.closed() == {}
    assert rembg.runs == ["u2net", "u2net"], "it is tried once at the start, and once more"


def test_engine_that_needs_more_than_a_test_image_is_not_tried(
    site: Site, rembg: CutOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_points(*_: Any) -> Any:
        raise OperationFailed("no points")

    put(site, "u2net")
    monkeypatch.setattr(rembg, "prepare", needs_points)
    child = child_of(site, rembg)
    assert U2NET in child.lanes()
    assert rembg.runs == []
