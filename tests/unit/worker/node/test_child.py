"""A child with a real ledger and fleet, and an engine that fills a pretend GPU."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.submitting import SubmitLedger
from imagemill.shared.messages import Chunk, Item, Job
from imagemill.shared.settings import FetchSettings, FileSettings, Settings
from imagemill.worker.hardware.device import Device
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.node import child as module
from imagemill.worker.node.child import Child
from imagemill.worker.operations.base import Sample
from tests.conftest import photo
from tests.devices import FakeGpu
from tests.fakes import Invert
from tests.services.images import ImageServer

pytestmark = pytest.mark.integration

PIXELS = 96 * 72  # of conftest's photo


class Fills(Invert):
    """Takes one byte per pixel."""

    gpu: FakeGpu

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.gpu.take(sum(sample.data.shape[0] * sample.data.shape[1] for sample in samples))
        return super().run(samples)


class NoPublisher:
    """A publisher that must not be used: each chunk is completed here."""

    def publish(self, chunks: Any) -> int:
        raise AssertionError("a chunk was published")


@pytest.fixture
def made(redis_server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Child]]:
    """Makes a child whose engine fills a GPU with room for `room` photos."""
    children: list[Child] = []

    def make(room: float) -> Child:
        gpu = FakeGpu(int(room * PIXELS))
        engine = Fills()
        engine.gpu = gpu
        monkeypatch.setattr(module, "create", lambda *_: engine)
        monkeypatch.setattr(module, "memory_of", lambda *_: gpu)
        settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            redis_url=redis_server.url,  # type: ignore[arg-type]
            fetch=FetchSettings.model_validate({"allow_networks": ["127.0.0.0/8"], "threads": 2}),
            files=FileSettings(write_roots=(tmp_path,)),
            worker={"operations": ["stylize"], "engines": ["opencv"], "reuse": False},  # type: ignore[arg-type]
        )
        publisher: Any = NoPublisher()
        node = f"gpu0@{uuid.uuid4().hex[:8]}"
        children.append(Child(settings, Device(), node=node, publisher=publisher, stopping=lambda: False))
        return children[-1]

    yield make
    for one in children:
        one.ledger.close()
        one.fleet.close()


def worked(child: Child, images: ImageServer, folder: Path, count: int) -> str:
    """The outcome of a chunk of `count` photos."""
    images.routes |= {f"/{number}.png": photo(number) for number in range(count)}
    items = [Item(index=number, source=images.url(f"/{number}.png")) for number in range(count)]
    job, spec = (
        f"child-{uuid.uuid4().hex[:12]}",
        Job.model_validate({"operation": "stylize", "output": {"url": folder.as_uri()}}),
    )
    producer = SubmitLedger.of(child.settings)
    producer.open_job(job, spec)
    producer.add_chunks(job, [(0, items)])
    producer.seal(job, chunks=1, total=count, duplicates={})
    producer.close()
    return child.work(Chunk(job=job, number=0, images=count), task="task", tell=lambda *_: None)


@pytest.mark.parametrize(
    ("room", "share", "flagged"),
    [(1.05, 0.95, 3), (2.5, 0.8, 0)],
    ids=["each image takes more than 90 %", "two images take 80 %"],
)
def test_memory_above_90_percent_is_flagged_and_reported_to_the_fleet(
    room: float, share: float, flagged: int, made: Callable[[float], Child], images: ImageServer, tmp_path: Path
) -> None:
    child = made(room)
    assert worked(child, images, tmp_path, 3) == "3 done, 0 failed"
    assert child.fleet.memory()[child.node] == (pytest.approx(share, abs=0.01), flagged)


def test_memory_report_keeps_the_highest_share_of_all_engines(
    made: Callable[[float], Child], images: ImageServer, tmp_path: Path
) -> None:
    child = made(2.5)
    other = child.sizes["inpaint", "lama"] = BatchSizes(FakeGpu(100))
    other.top, other.flagged = 0.97, 5
    worked(child, images, tmp_path, 1)
    assert child.fleet.memory()[child.node] == (0.97, 5)
