"""Whatever raises, once, in any thread: every image is recorded exactly once, and the job ends."""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any

import pytest

from imagemill.worker.line.pixel_budget import PixelBudget
from tests.services.images import ImageServer
from tests.unit.worker.node.site import LANE, Site, paths

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw", "quick")]

IMAGES = 5
PLACES = [
    "transfer.fetch:Fetcher.fetch",
    "transfer.store:FolderStore.check",
    "transfer.store:FolderStore.put",
    "imaging.codec:probe",
    "imaging.codec:decode",
    "imaging.codec:encode",
    "checking.quality:check",
    "line.pixel_budget:PixelBudget.enter_now",
    "line.pixel_budget:PixelBudget.look",
    "line.pixel_budget:PixelBudget.release",
    "line.image:ImageInFlight.move",
    "line.image:ImageInFlight.start",
    "line.image:ImageInFlight.keep_better",
    "line.image:ImageInFlight.keep_file",
    "line.image:ImageInFlight.drop_pixels",
    "line.batching:Batcher.add",
    "line.batching:Batcher.take",
    "line.batching:Batcher.patience",
    "line.batching:Batcher.remove",
    "line.batch_sizes:BatchSizes.limit",
    "line.batch_sizes:BatchSizes.running",
    "line.speed:Speed.ran",
    "line.speed:Speed.resume",
    "line.front:Front.submit",
    "line.front:Front.over",
    "line.front:Front.prepared",
    "line.front:Front._next",
    "line.line:Line.enter",
    "line.line:Line._wait_for_room",
    "line.pixel_budget:PixelBudget.enter",
    "line.line:Line._begin_fetch",
    "line.line:Line._fetched",
    "line.line:Line._prepare",
    "line.line:Line._prepared",
    "line.line:Line.computed",
    "line.line:Line._after_device",
    "line.line:Line._deliver",
    "line.line:Line.settle",
    "line.line:Line.free",
    "line.line:Line._over",
    "line.line:Line.retry",
    "line.device_loop:DeviceLoop.put",
    "line.device_loop:DeviceLoop._take_in",
    "line.device_loop:DeviceLoop._run_batch",
    "line.device_loop:DeviceLoop._begin",
    "line.outages:Outages.due",
    "line.records:Records.record",
    "line.records:Records._result",
    "line.records:Records._written",
    "line.recorder:Recorder._record",
    "line.records:Tally.count",
    "node.feeder:Feeder._step",
    "node.feeder:Feeder._renew",
    "node.feeder:Feeder._settle_shares",
    "node.feeder:Feeder._top_up",
    "node.feeder:Feeder._start",
    "node.feeder:Feeder._close_lanes",
    "node.appetite:Appetite.room",
    "node.appetite:ahead",
    "node.feeder:Feeder.begin",
    "node.feeder:Feeder.end",
    "node.shares:Held.divided",
    "node.child:Child._load_engines",
    "node.child:Child.open",
    "node.child:Child.progress",
    "node.child:Child.write_manifest",
    "node.child:write_manifest",
    "node.child:give_back",
]
WITHOUT_ROOM = ("line.line:Line._wait_for_room", "line.pixel_budget:PixelBudget.enter")
"""What happens to images that don't get into the pixel budget at once."""
LEDGER = ["take", "renew", "give_back", "record_all", "end_job", "report_rate", "spec"]


class Bug(RuntimeError):
    """Nobody expects it."""


@pytest.mark.parametrize("place", [*PLACES, *(f"shared:{name}" for name in LEDGER)])
def test_every_image_is_recorded_once(
    place: str, site: Site, raw: Any, images: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place in WITHOUT_ROOM:
        monkeypatch.setattr(PixelBudget, "enter_now", lambda *_: False)
    owner, name = target(place)
    genuine, calls = vars(owner)[name], []

    def raising(*args: Any, **kwargs: Any) -> Any:
        if not calls:
            calls.append(name)
            raise Bug(place)
        return genuine(*args, **kwargs)

    child = site.child()
    job = site.submit(*paths(IMAGES))
    for _ in range(10):
        with monkeypatch.context() as patch, contextlib.suppress(Bug):
            patch.setattr(owner, name, raising)
            site.work(child)
        child.ledger.bury(child.name)  # or else its leases lapse, but later
        for due in raw.zrange(f"imagemill:manifests:{LANE}", 0, -1):
            raw.zadd(f"imagemill:manifests:{LANE}", {due: 1})
        if child.ledger.status(job).over:
            break
    status = child.ledger.status(job)
    assert calls, "it was never called"
    assert status.over
    assert status.done + status.failed == IMAGES
    assert status.failed <= 1
    _, results = child.ledger.follow(job, wait=0.001)
    assert sorted(result.index for result in results) == list(range(IMAGES))


def target(place: str) -> tuple[Any, str]:
    """The object and attribute to replace."""
    module, _, path = place.partition(":")
    if module == "shared":
        leasing = import_module("imagemill.shared.ledger.leasing").WorkLedger
        return next(kind for kind in leasing.__mro__ if path in vars(kind)), path
    owner: Any = import_module(f"imagemill.worker.{module}")
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name
