"""A feeder with a real ledger, a line, and a device that waits for the test's permission."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from imagemill.shared.errors import ModelUnavailable, StorageUnavailable
from imagemill.shared.ledger.leasing import ManifestDue, Renewal, Request, Share
from imagemill.shared.messages import Item, ItemResult, Job, Node, Row
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings, Settings, WorkerSettings
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.context import Context
from imagemill.worker.line.line import Line
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.records import Records
from imagemill.worker.line.speed import Speed
from imagemill.worker.node.feeder import Feeder
from imagemill.worker.node.offered import Offered
from imagemill.worker.node.parts import Lack, Parts
from imagemill.worker.operations.base import Inputs, Sample, Work
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.store import open_store
from tests.conftest import photo
from tests.fakes import Invert
from tests.ledgers import Ledger
from tests.services.images import ImageServer
from tests.workers import wait_until

NO_S3: Any = None
LANE = "stylize.opencv"
CHILD = "cpu@a/0/17"
NAMES = (f"fed-{os.getpid()}-{number}" for number in itertools.count())


class Turnstile(Invert):
    """Runs one image at a time, each when the test lets one pass. `begun` holds their names, such as `JOB/3`."""

    spec = replace(Invert.spec, max_batch=1)

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.at_begin: Callable[[str], object] = lambda _: None
        self.at_finish: Callable[[], object] = lambda: None
        self._passes = threading.Semaphore(0)

    def let(self, images: int) -> None:
        """Let this many images pass."""
        self._passes.release(images)

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        return Work([Sample(picture.pixels, inputs.options, inputs.item.source.partition("/of/")[2])], plan=picture)

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.at_begin(samples[0].footprint)
        self.begun.append(samples[0].footprint)
        assert self._passes.acquire(timeout=60)
        return super().run(samples)

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        self.at_finish()
        return super().finish(work, outputs)


class Steady(Speed):
    """So many images per second, known for long."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def rates(self) -> dict[str, float]:
        return {LANE: self.rate}

    def pace(self, lane: str | None = None) -> float:
        return self.rate

    def computed(self, lane: str) -> int:
        return 1000


class WatchedLedger(Ledger):
    """Remembers how many images each share had, and how often leases were renewed."""

    scripts = Ledger.scripts

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self.sizes: list[int] = []
        self.renewals = 0

    def renew(
        self, child: str, lanes: Sequence[str], leases: Sequence[Share | ManifestDue], avoid: Sequence[str] = ()
    ) -> Renewal:
        renewal = super().renew(child, lanes, leases, avoid)
        self.renewals += 1
        return renewal

    def take(self, request: Request) -> Share | ManifestDue | Literal["none", "drain"]:
        answer = super().take(request)
        if isinstance(answer, Share):
            self.sizes.append(len(answer.items))
        return answer


class Feeding:
    """Jobs, and a feeder that takes them. It stands in for the child as far as the feeder knows one."""

    def __init__(
        self, url: str, raw: Any, server: ImageServer, folder: Path, *, threads: int = 8, lanes: Sequence[str] = (LANE,)
    ) -> None:
        server.fallback = photo(1)
        self.raw, self.server, self.folder = raw, server, folder
        self.ledger = WatchedLedger(url)
        self.operation, self.sizes = Turnstile(), BatchSizes()
        self.stopping = threading.Event()
        self.offered = list(lanes)
        self.node_parts = Offered()
        self.parts = Parts(self.node_parts)
        self.nodes: list[Node] = []
        """The fleet."""
        self.repaired = False
        """Whether the files of a lane have been replaced by the time when it is to be closed."""
        self.has_room = False
        """For all models at once."""
        self.down: set[str] = set()
        """Jobs whose store does not respond."""
        self.calls: list[str] = []
        """Lanes in which the feeder has called for another shift."""
        self.manifests: list[ManifestDue] = []
        self.before_manifest: Callable[[ManifestDue], object] = lambda _: None
        self.settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            fetch=FetchSettings.model_validate({"allow_networks": ["127.0.0.0/8"], "total_timeout": 20, "threads": threads}),
            files=FileSettings(write_roots=(folder,)),
            worker=WorkerSettings(),
        )
        self.network = Network()
        self.fetcher = Fetcher(self.settings.fetch, self.settings.files, NO_S3, self.network)
        self.records = Records(self.ledger, "cpu@a")
        self.feeder = Feeder(
            lambda changed: Line(self.settings, self.records, self.network, changed, threads=threads),
            self.ledger,
            self,
            child=CHILD,
            seat="cpu@a/0",
            seconds=3.0,
            stopping=self.stopping.is_set,
        )
        self.line = self.feeder.line

    # --- what the feeder asks ---

    def open(self, job: str, budget: PixelBudget) -> Context:
        spec = self.ledger.spec(job)
        store: Any = open_store(spec.output.url, s3=NO_S3, files=self.settings.files, s3_settings=S3Settings())
        put = store.put

        async def put_unless_down(*args: Any, **kwargs: Any) -> str:
            if job in self.down:
                raise StorageUnavailable(f"{store.service}: no connection")
            return str(await put(*args, **kwargs))

        store.put = put_unless_down
        return Context.of(
            job,
            spec,
            self.settings,
            operation=self.operation,
            sizes=self.sizes,
            fetcher=self.fetcher,
            store=store,
            budget=budget,
        )

    def write_manifest(self, due: ManifestDue) -> None:
        self.manifests.append(due)
        self.before_manifest(due)
        self.ledger.end_job(due.job, f"file:///{due.job}/manifest.jsonl")

    def lanes(self) -> list[str]:
        return self.offered

    def report_fault(self, lane: str, error: ModelUnavailable, since: float) -> None:
        if error.part:
            self.parts.close(lane, error, since)
        elif not self.repaired:
            self.offered = [other for other in self.offered if other != lane]

    def lack(self, context: Context) -> Lack | None:
        return self.parts.lack(context.spec.lane, context.companions)

    def why_waiting(self, context: Context, lack: Lack) -> str | None:
        return lack.shown("cpu@a", context.spec.lane, context.companions, self.nodes)

    def roomy(self) -> bool:
        return self.has_room

    def grows(self, lane: str) -> bool:
        return self.sizes.memory.grows

    def call_for_shift(self, lane: str) -> None:
        self.calls.append(lane)

    def progress(self, *now: tuple[Context, int]) -> None:
        pass

    # --- what the tests do and see ---

    def submit(
        self,
        count: int,
        *,
        model: str | None = None,
        loras: str = "",
        folder: str = "",
        hosts: Sequence[str] = ("127.0.0.1",),
        **policy: Any,
    ) -> str:
        """A job of `count` images, from these hosts in turn, on opencv or a model of rembg or, with `loras`, of diffusion, with
        results in this folder.
        """
        job = next(NAMES)
        work: dict[str, Any] = {"operation": "stylize"}
        if loras:
            work["options"] = {"engine": "diffusion", "model": model, "loras": loras, "control": "none"}
        elif model is not None:
            work = {"operation": "remove-background", "options": {"engine": "rembg", "model": model}}
        output = {"url": (self.folder / folder).as_uri(), "format": "png"}
        self.ledger.open_job(job, Job.model_validate({**work, "output": output, "policy": policy}))
        urls = [self.server.url(f"/of/{job}/{index}", hosts[index % len(hosts)]) for index in range(count)]
        items = [Item(index=index, source=url) for index, url in enumerate(urls)]
        self.ledger.add_packs(job, [(place // 32, items[place : place + 32]) for place in range(0, count, 32)])
        self.ledger.seal(job, size=count, total=count, duplicates={})
        return job

    @contextmanager
    def shift(self, seconds: float = 60.0) -> Iterator[None]:
        """A shift in a thread. On leaving, it must end by itself."""
        thread = threading.Thread(target=self.work, args=(seconds,), daemon=True)
        thread.start()
        yield
        thread.join(60)
        assert not thread.is_alive(), "the shift does not end"

    def work(self, seconds: float = 60.0) -> bool:
        """A shift; returns whether work remains in the line."""
        self.feeder.begin()
        self.line.device.run(time.monotonic() + seconds, self.feeder.busy)
        return self.feeder.end()

    def leased(self) -> int:
        """How many images are leased, of all owners."""
        return sum(map(int, self.raw.hvals("imagemill:running")))

    def in_line(self) -> int:
        """How many images are in the line."""
        return sum(len(held.left()) for held in list(self.feeder._held))

    def wait_for(self, *, begun: int, leased: int) -> None:
        """Return when this many images have reached the device, and this many are leased."""
        wait_until(lambda: len(self.operation.begun) >= begun, f"image {begun} reached the device")
        wait_until(lambda: self.leased() == leased, f"{leased} images are leased")

    def wait_for_renewals(self, more: int) -> None:
        enough = self.ledger.renewals + more
        wait_until(lambda: self.ledger.renewals >= enough, f"{more} renewals")

    def results(self, job: str) -> list[ItemResult]:
        """Every result ever recorded, in the order of images."""
        return sorted(self.ledger.follow(job, wait=0.001)[1], key=lambda result: result.index)

    def check_done(self, job: str, count: int) -> None:
        """Every image was recorded once, and is done; and the job is over."""
        wait_until(lambda: self.ledger.status(job).over, "the job is over")
        assert [(result.index, result.state) for result in self.results(job)] == [(index, "done") for index in range(count)]
        assert self.ledger.status(job).state == "done"

    def rows(self, job: str) -> list[Row]:
        return list(self.ledger.rows(job))

    def close(self) -> None:
        self.operation.let(10_000)
        self.feeder.close()
        self.records.close(60)
        self.network.close()
        self.ledger.close()
