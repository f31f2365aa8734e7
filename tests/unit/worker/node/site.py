"""Children with a real ledger and fleet, an engine that fills a pretend GPU, and jobs for them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import Item, Job
from imagemill.shared.settings import FetchSettings, FileSettings, Settings, WeightsSettings
from imagemill.worker.hardware.device import Device
from imagemill.worker.node import child as module
from imagemill.worker.node.child import Child
from imagemill.worker.node.offer import lanes
from imagemill.worker.node.offered import Offered
from imagemill.worker.operations.base import Sample
from tests.conftest import photo
from tests.devices import FakeGpu
from tests.fakes import Invert
from tests.services.images import ImageServer

LANE = "stylize.opencv"
PIXELS = 96 * 72  # of conftest's photo


class Fills(Invert):
    """Takes one byte per pixel. Raises `fault` if it is set."""

    gpu: FakeGpu
    fault: BaseException | None = None

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        if self.fault is not None:
            raise self.fault
        self.gpu.take(sum(sample.data.shape[0] * sample.data.shape[1] for sample in samples))
        return super().run(samples)


class Publisher:
    """Records wake-ups, as (lane, node). With `down`, Redis does not take them."""

    down = False

    def __init__(self) -> None:
        self.woken: list[tuple[str, str | None]] = []

    def wake(self, lane: str, count: int = 1, *, node: str | None = None) -> None:
        self.woken.append((lane, node))
        if self.down:
            raise BrokerUnavailable("Redis: gone")


class Site:
    """Makes a child, and jobs for it."""

    def __init__(self, url: str, images: ImageServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url, self.images, self.folder, self.monkeypatch = url, images, folder, monkeypatch
        self.publisher: Any = Publisher()
        self.engine = Fills()
        self.told: list[str] = []
        self.children: list[Child] = []
        self.weights = folder / "weights"

    def child(self, room: float = 100.0, make: Callable[[str, str], Any] | None = None, **worker: Any) -> Child:
        """A child whose engine fills a GPU with room for `room` photos, unless its engines are made by `make`."""
        gpu = self.engine.gpu = FakeGpu(int(room * PIXELS))
        self.monkeypatch.setattr(module, "create", make or (lambda *_: self.engine))
        self.monkeypatch.setattr(module, "memory_of", lambda *_: gpu)
        settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            redis_url=self.url,  # type: ignore[arg-type]
            fetch=FetchSettings.model_validate({"allow_networks": ["127.0.0.0/8"], "threads": 2}),
            files=FileSettings(write_roots=(self.folder,)),
            weights=WeightsSettings(folder=self.weights),
            worker={"operations": ["stylize"], "engines": ["opencv"], "reuse": False, **worker},  # type: ignore[arg-type]
        )
        node = f"gpu0@{uuid.uuid4().hex[:8]}"
        who = dict(node=node, seat=f"{node}/0", name=f"{node}/0/17")
        self.lanes, self.parts = Offered(lanes(settings)), Offered()
        shared: Any = dict(lanes=self.lanes, parts=self.parts, publisher=self.publisher)
        self.children.append(Child(settings, Device(), **who, **shared, stopping=lambda: False))
        return self.children[-1]

    def submit(self, *paths: str, owner: str | None = None) -> str:
        """A job of images at these paths on the server."""
        self.images.routes |= {path: photo(number) for number, path in enumerate(paths) if path != "/none.png"}
        items = [Item(index=number, source=self.images.url(path)) for number, path in enumerate(paths)]
        job = f"child-{uuid.uuid4().hex[:12]}"
        fields = {"operation": "stylize", "output": {"url": self.folder.as_uri()}, "policy": {"owner": owner}}
        producer = SubmitLedger(self.url)
        producer.open_job(job, Job.model_validate(fields))
        producer.add_packs(job, [(0, items)])
        producer.seal(job, size=len(items), total=len(items), duplicates={})
        producer.close()
        return job

    def work(self, child: Child) -> str:
        """What a shift returns; `told` is what it reports meanwhile."""
        return child.work(LANE, lambda text, **_: self.told.append(text))


def paths(count: int) -> list[str]:
    return [f"/{number}.png" for number in range(count)]
