"""Jobs that show when a result is computed and when it is reused."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from imagemill.shared import s3
from imagemill.shared.messages import Item, ItemResult, Job
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings, Settings
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import ImageInFlight
from imagemill.worker.line.line import Line
from imagemill.worker.line.records import Records
from imagemill.worker.operations.base import Inputs, Sample, Work
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.store import open_store
from tests.fakes import Invert
from tests.integration.jobs import local_path
from tests.ledgers import Ledger
from tests.services.images import ImageServer
from tests.stores import ClientOnly, NoS3

NOTE = "repaired_sharpness"
"""The same image gets it on every run, so the result is reused."""
NAMES = (f"cache-{os.getpid()}-{n}" for n in itertools.count())


class Counted(Invert):
    """Inverts images, and counts them in `runs`. Each instance has its own fingerprint, as another engine would."""

    def __init__(self) -> None:
        self.mark = next(NAMES)
        self.runs = 0
        self.before_return: Callable[[], object] = lambda: None

    def fingerprint(self, options: Any) -> str:
        return self.mark

    def group_key(self, sample: Sample[Any, Any]) -> Hashable:
        return id(sample)

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Work[Any, Any, Any]:
        work = super().prepare(picture, inputs)
        work.notes.append(NOTE)
        return work

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.runs += len(samples)
        self.before_return()
        return super().run(samples)


class Place:
    """Two output URLs in one store, a folder or S3, with direct access to the stored results."""

    def __init__(self, name: str, folder: Path, client: Any = None) -> None:
        self.client, self.folder = client, folder
        self.urls = [f"s3://{name}-{n}/jobs" if client else (folder / str(n)).as_uri() for n in range(2)]
        self.settings = S3Settings(create_bucket=True)

    def read(self, output: str) -> tuple[bytes, str | None]:
        """The bytes and, on S3, the content type of a result."""
        if not self.client:
            return local_path(output).read_bytes(), None
        bucket, key = s3.split(output)
        stored = self.client.get_object(Bucket=bucket, Key=key)
        return stored["Body"].read(), stored["ContentType"]

    def delete(self, output: str) -> None:
        if self.client:
            bucket, key = s3.split(output)
            self.client.delete_object(Bucket=bucket, Key=key)
        else:
            local_path(output).unlink()

    def write(self, output: str, data: bytes) -> None:
        """Overwrite a result."""
        if self.client:
            bucket, key = s3.split(output)
            self.client.put_object(Bucket=bucket, Key=key, Body=data)
        else:
            local_path(output).write_bytes(data)


class Jobs:
    """Runs jobs of one image each, every job in its own flow."""

    def __init__(self, redis_url: str, images: ImageServer) -> None:
        self.network = Network()
        self.ledger, self.cache, self.images = Ledger(redis_url), Cache(redis_url, 60), images
        self.settings = Settings(_env_file=None, fetch=FetchSettings.model_validate({"allow_networks": ["127.0.0.0/8"]}))  # type: ignore[call-arg]

    def run(
        self,
        operation: Counted,
        place: Place,
        *,
        at: int = 0,
        path: str = "/a.jpg",
        reuse: bool = True,
        key: str = "{job}/{index}",
        quality: dict[str, Any] | None = None,
    ) -> ItemResult:
        """Run a job of one image and return its result."""
        job = next(NAMES)
        output = {"url": place.urls[at], "format": "png", "key": key}
        policy = {"reuse": reuse, "quality": quality or {}}
        spec = Job.model_validate({"operation": "stylize", "output": output, "policy": policy})
        items = [Item(index=0, source=self.images.url(path))]
        self.ledger.open_job(job, spec)
        self.ledger.add_packs(job, [(0, items)])
        self.ledger.seal(job, size=1, total=1, duplicates={})
        files = FileSettings(write_roots=(place.folder,))
        fetcher = Fetcher(self.settings.fetch, files, NoS3(self.network), self.network)
        s3 = ClientOnly(place.client, self.network)
        store = open_store(spec.output.url, s3=s3, files=files, s3_settings=place.settings)
        line = Line(self.settings, Records(self.ledger, "here"), self.network)
        context = Context.of(
            job,
            spec,
            self.settings,
            operation=operation,
            sizes=BatchSizes(),
            fetcher=fetcher,
            store=store,
            budget=line.budget,
            cache=self.cache,
        )
        image = ImageInFlight(items[0], context)
        line.enter([image])
        line.device.run(time.monotonic() + 60, lambda: image.place != "over")
        line.abandon()
        line.records.close(60)
        _, (result,) = self.ledger.follow(job)
        tally = line.records.tally
        assert (tally.done, tally.failed) == ((1, 0) if result.state == "done" else (0, 1))
        assert tally.reused == ("cached" in result.notes)
        return result

    def output(self, *args: Any, **kwargs: Any) -> str:
        result = self.run(*args, **kwargs)
        assert result.output is not None, result
        return result.output

    def close(self) -> None:
        self.network.close()
        self.ledger.close()
        self.cache.close()
