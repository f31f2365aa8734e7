"""Jobs in a real ledger, with a real fetcher and folder, and engines that misbehave in one way each."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from imagemill.shared.messages import Item, Job, Row
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings, Settings, WorkerSettings
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.line.records import Records, Tally
from imagemill.worker.operations.base import Inputs, Sample, Spec, Work
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.store import open_store
from tests.conftest import photo
from tests.fakes import Invert
from tests.ledgers import Ledger
from tests.services.images import ImageServer

FETCH: dict[str, Any] = {"allow_networks": ["127.0.0.0/8"], "total_timeout": 20}
NO_S3: Any = None
SIZE = 96 * 72  # pixels of tests.conftest.photo


def settings_for(*, threads: int = 16, look_ahead: int = 10**8, wait: float = 0.0) -> Settings:
    """Settings of a worker that may fetch from loopback."""
    return Settings(
        _env_file=None,  # type: ignore[call-arg]
        fetch=FetchSettings.model_validate(FETCH | {"threads": threads}),
        worker=WorkerSettings(look_ahead=look_ahead, batch_wait=wait),
    )


class LineJob:
    """A job in a real ledger, and a line that works on it. Further jobs can `join` the line of the first."""

    context: Context

    def __init__(self, ledger: Ledger, server: ImageServer, folder: Path, network: Network) -> None:
        self.ledger, self.server, self.folder, self.network = ledger, server, folder, network
        self.name = f"line-{uuid.uuid4().hex[:12]}"
        self.opened = False
        self.lines: list[Line] = []

    @property
    def stop(self) -> threading.Event:
        return self.context.stop

    def items(self, sources: Sequence[str | dict[str, Any]]) -> list[Item]:
        """Items from paths on the image server, or from rows whose `source` is one."""
        rows = [row if isinstance(row, dict) else {"source": row} for row in sources]
        return [Item.model_validate({"index": n, **{k: self._url(v) for k, v in row.items()}}) for n, row in enumerate(rows)]

    def photos(self, count: int) -> list[Item]:
        """Items for `count` different photos, which the server has."""
        self.server.routes |= {f"/{n}.png": photo(n) for n in range(count)}
        return self.items([f"/{n}.png" for n in range(count)])

    def line(
        self,
        *,
        node: str = "here",
        changed: Callable[[], object] = lambda: None,
        workers: int = 8,
        turn: AbstractContextManager[Any] | None = None,
        **settings: Any,
    ) -> Line:
        """A new line."""
        records = Records(self.ledger, node)
        line = Line(settings_for(**settings), records, self.network, changed, threads=workers, turn=turn)
        self.lines.append(line)
        return line

    def join(
        self,
        line: Line,
        operation: Invert,
        items: list[Item],
        *,
        kind: str = "stylize",
        form: str = "png",
        metadata: str = "copyright",
        attempts: int = 3,
        sizes: BatchSizes | None = None,
        batch: str = "throughput",
        quality: dict[str, Any] | None = None,
        cache: Cache | None = None,
        first: bool = False,
        enter: bool = True,
        **options: Any,
    ) -> list[ImageInFlight]:
        """Create the job on the first call, and send its images down the line."""
        fields = {
            "operation": kind,
            "output": {"url": self.folder.as_uri(), "format": form, "metadata": metadata, "key": "{index}"},
            "options": options,
            "policy": {"attempts": attempts, "batch": batch, "quality": quality or {}},
        }
        spec = Job.model_validate(fields)
        if not self.opened:
            self.opened = True
            self.ledger.open_job(self.name, spec)
            self.ledger.add_packs(self.name, [(0, items)])
            self.ledger.seal(self.name, size=len(items), total=len(items), duplicates={})
        files = FileSettings(write_roots=(self.folder,))
        settings = settings_for()
        self.context = Context.of(
            self.name,
            spec,
            settings,
            operation=operation,
            sizes=sizes or BatchSizes(),
            fetcher=Fetcher(settings.fetch, files, NO_S3, self.network),
            store=open_store(spec.output.url, s3=NO_S3, files=files, s3_settings=S3Settings()),
            budget=line.budget,
            cache=cache,
        )
        images = [ImageInFlight(item, self.context, first=first) for item in items]
        if enter:
            line.enter(images)
        return images

    def begin(self, operation: Invert, items: list[Item], **settings: Any) -> tuple[Line, list[ImageInFlight]]:
        """A new line with the job's images in it, whose device nobody runs yet."""
        names = {"threads", "look_ahead", "wait", "node", "workers"} & settings.keys()
        line = self.line(**{name: settings.pop(name) for name in names})
        return line, self.join(line, operation, items, **settings)

    def run(self, operation: Invert, items: list[Item], **settings: Any) -> Tally:
        """Take the job's images through a new line, and return what became of them."""
        line, images = self.begin(operation, items, **settings)
        drain(line, images)
        return line.records.tally

    @contextmanager
    def running(self, operation: Invert, items: list[Item], **settings: Any) -> Iterator[Line]:
        """Do the same in a thread, which must end by itself on leaving."""
        line, images = self.begin(operation, items, **settings)
        with draining(line, images):
            yield line

    def rows(self) -> list[Row]:
        return list(self.ledger.rows(self.name))

    def codes(self) -> list[str | None]:
        """Each image's error code, `done`, or `pending` if it has no record."""
        return [row.code or row.state for row in self.rows()]

    def recorded(self) -> set[int]:
        return {row.index for row in self.rows() if row.state != "pending"}

    def entries(self) -> list[int]:
        """The index of every result ever recorded."""
        return [result.index for result in self.ledger.follow(self.name, wait=0.001)[1]]

    def close(self) -> None:
        for line in self.lines:
            line.abandon()
            line.records.close(60)

    def _url(self, path: Any) -> Any:
        return self.server.url(path) if isinstance(path, str) and path.startswith("/") else path


def waiting(line: Line) -> int:
    """How many images of one sample wait for a device that is busy, or that nobody runs."""
    return line.device.waiting


def drain(line: Line, images: Sequence[ImageInFlight]) -> None:
    """Run the line until these images have left it."""
    line.device.run(time.monotonic() + 60, lambda: any(image.place != "over" for image in images))


@contextmanager
def draining(line: Line, images: Sequence[ImageInFlight]) -> Iterator[None]:
    """Do the same in a thread, which must end by itself on leaving."""
    thread = threading.Thread(target=drain, args=(line, images), daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive(), "the line hangs"


def pixels(row: Row) -> np.ndarray:
    assert row.output is not None, row
    with Image.open(unquote(urlsplit(row.output).path)) as image:
        return np.asarray(image)


def source(number: int) -> np.ndarray:
    """The pixels of tests.conftest.photo."""
    noise = np.random.default_rng(number).integers(0, 60, (72, 96, 3), np.uint8)
    noise[18:-18, 24:-24] += np.uint8(150)
    return noise


class Bands(Invert):
    """Four samples per image, each a band of rows; bands of one shape share batches."""

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        return Work([Sample(band, None) for band in np.array_split(picture.pixels, 4)], plan=picture)

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        return Picture(np.vstack(outputs))


class Faulty(Invert):
    """Raises `fault` at `stage` for image 1."""

    def __init__(self, stage: str = "", fault: Exception | None = None) -> None:
        self.stage, self.fault = stage, fault

    def _at(self, stage: str, index: int) -> None:
        if stage == self.stage and index == 1 and self.fault is not None:
            raise self.fault

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        index = inputs.item.index
        self._at("prepare", index)
        if self.stage == "empty" and index == 1:
            return Work([], plan=None)
        return Work([Sample((index, picture.pixels), None)], plan=(index, picture))

    def group_key(self, sample: Sample[Any, Any]) -> Hashable:
        self._at("group", sample.data[0])
        return "all"

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        for sample in samples:
            self._at("run", sample.data[0])
        return [255 - sample.data[1] for sample in samples]

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        index, picture = work.plan
        self._at("finish", index)
        return Picture(outputs[0], picture.format)


class Gate(Invert):
    """Runs one image at once. Run number `at` signals `inside` and waits for `open`; no image finishes before."""

    spec = Spec("stylize", "opencv", max_batch=1)

    def __init__(self, at: int = 1) -> None:
        self.at, self.begun = at, 0
        self.inside, self.open = threading.Event(), threading.Event()

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.begun += 1
        if self.begun == self.at:
            self.inside.set()
            assert self.open.wait(60)
        return super().run(samples)

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        assert self.inside.wait(20), "the device is waiting for a result to be stored"
        return super().finish(work, outputs)


class Masked(Invert):
    """Writes the mask's brightness into the corner of the result."""

    spec = Spec("inpaint", "opencv", needs_mask=True, max_batch=4)

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        level = 0 if inputs.mask is None else int(inputs.mask.max())
        corner = picture.pixels.copy()
        corner[0, 0] = 255 - level
        return Work([Sample(corner, None)], plan=picture)
