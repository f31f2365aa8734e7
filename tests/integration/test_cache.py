"""Results remembered: real flows and a real worker between Redis, a folder and a real S3 server."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared import s3
from imagemill.shared.errors import NotFound
from imagemill.shared.messages import Item, ItemResult, Job
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings, Settings
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.line import Line
from imagemill.worker.line.stages import Context
from imagemill.worker.operations.base import Inputs, Sample, Work
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.store import open_store
from tests.conftest import environment_for, photo
from tests.fakes import Invert
from tests.ledgers import Ledger
from tests.services import ImageServer, S3Server, changed_environment
from tests.workers import ROOT, WorkerProcess

pytestmark = pytest.mark.integration

JOBS = (f"cache-{os.getpid()}-{n}" for n in itertools.count())
NOTE = "repaired_sharpness"  # the same image gets it on every run
FILE = photo(1, kind="JPEG")


class Counted(Invert):
    """Counts the images that it works on; the fingerprint is the test's own."""

    def __init__(self, mark: str = "") -> None:
        self.mark = mark or next(JOBS)
        self.runs = 0
        self.meet: Callable[[], object] = lambda: None

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
        self.meet()
        return super().run(samples)


class Place:
    """Two places for results in one store, a folder or S3, and what lies there."""

    def __init__(self, name: str, folder: Path, client: Any = None) -> None:
        self.client, self.folder = client, folder
        self.urls = [f"s3://{name}-{n}/jobs" if client else (folder / str(n)).as_uri() for n in range(2)]
        self.settings = S3Settings(create_bucket=True)

    def read(self, output: str) -> tuple[bytes, str | None]:
        """Bytes, and content type where there is one."""
        if not self.client:
            return self._path(output).read_bytes(), None
        bucket, key = s3.split(output)
        found = self.client.get_object(Bucket=bucket, Key=key)
        return found["Body"].read(), found["ContentType"]

    def delete(self, output: str) -> None:
        if self.client:
            bucket, key = s3.split(output)
            self.client.delete_object(Bucket=bucket, Key=key)
        else:
            self._path(output).unlink()

    def write(self, output: str, data: bytes) -> None:
        """Something else under a result's address."""
        if self.client:
            bucket, key = s3.split(output)
            self.client.put_object(Bucket=bucket, Key=key, Body=data)
        else:
            self._path(output).write_bytes(data)

    def _path(self, output: str) -> Path:
        return Path(unquote(output.removeprefix("file://")))


@pytest.fixture(scope="module")
def client(s3_server: S3Server) -> Iterator[Any]:
    with changed_environment(s3_server.environment):
        yield s3.make_client(S3Settings(endpoint_url=s3_server.endpoint_url))


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return Place(next(JOBS), tmp_path)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(next(JOBS), tmp_path, request.getfixturevalue("client") if request.param == "s3" else None)


class Jobs:
    """Makes jobs of one image and takes each through a flow of its own."""

    def __init__(self, redis_url: str, images: ImageServer) -> None:
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
        """What became of the image, in a job of its own."""
        job = next(JOBS)
        output = {"url": place.urls[at], "format": "png", "key": key}
        policy = {"reuse": reuse, "quality": quality or {}}
        spec = Job.model_validate({"operation": "stylize", "output": output, "policy": policy})
        items = [Item(index=0, source=self.images.url(path))]
        self.ledger.open_job(job, spec)
        self.ledger.add_chunks(job, [(0, items)])
        self.ledger.seal(job, chunks=1, total=1, duplicates={})
        files = FileSettings(write_roots=(place.folder,))
        fetcher = Fetcher(self.settings.fetch, files, no_s3)
        store = open_store(spec.output.url, s3=lambda: place.client, files=files, s3_settings=place.settings)
        context = Context.of(
            job,
            spec,
            self.settings,
            operation=operation,
            fetcher=fetcher,
            store=store,
            stop=threading.Event(),
            cache=self.cache,
        )
        line = Line(context, ledger=self.ledger, settings=self.settings, node="here")
        line.run(items)
        fetcher.close()
        _, (result,) = self.ledger.follow(job)
        assert (line.records.done, line.records.failed) == ((1, 0) if result.state == "done" else (0, 1))
        assert line.records.reused == ("cached" in result.notes)
        return result

    def output(self, *args: Any, **kwargs: Any) -> str:
        result = self.run(*args, **kwargs)
        assert result.output is not None, result
        return result.output


def no_s3() -> NoReturn:
    raise AssertionError("S3 was asked")


@pytest.fixture
def jobs(redis_server: EmbeddedRedis, images: ImageServer) -> Iterator[Jobs]:
    images.routes |= {"/a.jpg": FILE, "/same.jpg": FILE, "/other.jpg": photo(2, kind="JPEG")}
    made = Jobs(redis_server.url, images)
    yield made
    made.ledger.close()
    made.cache.close()


@pytest.mark.parametrize("at", [0, 1], ids=["same bucket", "another bucket"])
def test_the_same_image_in_another_job_is_copied_and_says_so(jobs: Jobs, place: Place, at: int) -> None:
    operation = Counted()
    first = jobs.run(operation, place)
    again = jobs.run(operation, place, at=at, path="/same.jpg")
    assert operation.runs == 1
    assert first.output
    assert again.output
    assert first.output != again.output
    assert again.output.startswith(place.urls[at])
    assert place.read(first.output) == place.read(again.output)
    assert place.read(again.output)[1] in (None, "image/png")
    assert first.notes == (NOTE,)
    assert again.notes == (NOTE, "cached")
    assert again.seconds.keys() == {"fetch", "store"}
    facts = {"source_format", "source_bytes", "source_size", "output_bytes", "output_size", "attempts", "node"}
    assert again.model_dump(include=facts) == first.model_dump(include=facts)
    assert again.output_bytes == len(place.read(again.output)[0])


def test_another_image_or_engine_is_computed(jobs: Jobs, folder: Place) -> None:
    operation, updated = Counted(), Counted()
    results = [
        jobs.run(one, folder, path=path)
        for one, path in [(operation, "/a.jpg"), (operation, "/other.jpg"), (updated, "/a.jpg")]
    ]
    assert (operation.runs, updated.runs) == (2, 1)
    assert all(result.notes == (NOTE,) for result in results)


def test_what_was_deleted_is_computed_and_remembered_anew(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    first = jobs.output(operation, place)
    data = place.read(first)
    place.delete(first)
    assert place.read(jobs.output(operation, place)) == data
    assert operation.runs == 2
    assert jobs.run(operation, place).notes[-1] == "cached"
    assert operation.runs == 2


def test_what_was_replaced_by_other_bytes_is_never_taken_for_the_result(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    first = jobs.output(operation, place)
    data, kind = place.read(first)
    place.write(first, data[:-1] + bytes([data[-1] ^ 1]))
    assert place.read(jobs.output(operation, place)) == (data, kind)
    assert operation.runs == 2


def test_the_newest_copy_is_remembered_and_outlives_the_first(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    first, copy = jobs.output(operation, place), jobs.output(operation, place)
    place.delete(first)
    assert place.read(jobs.output(operation, place)) == place.read(copy)
    assert operation.runs == 1


def test_a_result_may_be_its_own_copy(jobs: Jobs, place: Place) -> None:
    """As where a worker is killed between storing and recording."""
    operation = Counted()
    first = jobs.output(operation, place, key="{index}")
    before = place.read(first)
    assert jobs.output(operation, place, key="{index}") == first
    assert place.read(first) == before
    assert operation.runs == 1


def test_a_copy_that_fails_leaves_what_is_there(place: Place) -> None:
    files = FileSettings(write_roots=(place.folder,))
    one, other = (open_store(url, s3=lambda: place.client, files=files, s3_settings=place.settings) for url in place.urls)
    one.check()
    other.check()
    source, kept = one.put("a.png", b"other bytes", "image/png"), other.put("b.png", b"before", "image/png")
    with pytest.raises(NotFound, match="changed"):
        other.copy(source, "b.png", "image/png", md5="0" * 32)
    assert place.read(kept)[0] == b"before"


def test_fresh_computes_and_is_remembered(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    first = jobs.output(operation, folder)
    fresh = jobs.run(operation, folder, reuse=False)
    assert operation.runs == 2
    assert "cached" not in fresh.notes
    folder.delete(first)
    assert jobs.run(operation, folder).notes[-1] == "cached"


def test_a_remembered_result_is_judged_by_the_limits_of_each_job(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    runs = [jobs.run(operation, folder, quality=limits) for limits in ({}, {"least_entropy": 8}, {"mode": "off"}, {})]
    assert operation.runs == 1
    assert [result.notes[1:] for result in runs] == [(), ("flag:blank", "cached"), ("cached",), ("cached",)]
    assert runs[0].quality == runs[1].quality == runs[3].quality
    assert runs[0].quality is not None


def test_what_was_never_measured_is_computed_where_it_is_to_be_judged(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    for mode, runs in (("off", 1), ("off", 1), ("flag", 2), ("flag", 2), ("off", 2), ("repair", 3), ("repair", 3)):
        jobs.run(operation, folder, quality={"mode": mode})
        assert operation.runs == runs


def test_folder_and_bucket_remember_each_their_own(jobs: Jobs, folder: Place, client: Any, tmp_path: Path) -> None:
    operation, bucket = Counted(), Place(next(JOBS), tmp_path, client)
    results = [jobs.run(operation, place) for place in (folder, bucket, folder, bucket)]
    assert operation.runs == 2
    assert ["cached" in result.notes for result in results] == [False, False, True, True]


def test_two_workers_at_once_both_end_well(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    meeting = threading.Barrier(2, timeout=60)
    operation.meet = meeting.wait  # neither stores before both have found that nothing is remembered
    found: list[ItemResult] = []
    threads = [threading.Thread(target=lambda: found.append(jobs.run(operation, place))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert operation.runs == 2
    one, other = (place.read(result.output or "") for result in found)
    assert one == other
    assert jobs.run(operation, place).notes[-1] == "cached"


def test_what_could_not_be_stored_is_not_remembered(jobs: Jobs, folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither half a result nor half a copy is ever found by anybody."""
    operation = Counted()

    def full(_: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("imagemill.worker.transfer.store.os.fsync", full)
        assert jobs.run(operation, folder).code == "storage_unavailable"
    assert [path for path in folder.folder.rglob("*") if path.is_file()] == []
    first = jobs.output(operation, folder)
    assert operation.runs == 2
    with monkeypatch.context() as patch:
        patch.setattr("imagemill.worker.transfer.store.os.fsync", full)
        assert jobs.run(operation, folder).code == "storage_unavailable"
    copy = jobs.run(operation, folder)
    assert copy.notes[-1] == "cached"
    stored = {path for path in folder.folder.rglob("*") if path.is_file()}
    assert stored == {Path(unquote((output or "").removeprefix("file://"))) for output in (first, copy.output)}


def test_an_image_is_done_though_the_cache_is_away(jobs: Jobs, folder: Place, own_redis: EmbeddedRedis) -> None:
    operation = Counted()
    jobs.cache = Cache(own_redis.url, 60)
    own_redis.kill()
    assert [jobs.run(operation, folder).state for _ in range(2)] == ["done", "done"]
    assert operation.runs == 2
    jobs.cache.close()


def test_a_limit_on_pixels_holds_for_remembered_images_too(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    jobs.run(operation, folder)
    jobs.settings = jobs.settings.model_copy(update={"worker": jobs.settings.worker.model_copy(update={"max_pixels": 100})})
    assert jobs.run(operation, folder).code == "too_many_pixels"


def test_users_see_it_on_the_command_line(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    images.routes["/a.jpg"] = FILE
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__REUSE="true")
    arguments = [
        images.url("/a.jpg"),
        "--operation",
        "remove-background",
        "--output",
        str(tmp_path / "out"),
        "--wait",
        "--json",
    ]
    with WorkerProcess(environment, tmp_path) as node:
        node.wait_ready()
        for flags in ([], [], ["--fresh"]):
            command = [sys.executable, "-m", "imagemill.producer.cli", "submit", *arguments, *flags]
            subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=120, check=True)
    manifests = sorted((tmp_path / "out").rglob("manifest.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    lines = [json.loads(path.read_text()) for path in manifests]
    assert ["cached" in line["notes"] for line in lines] == [False, True, False]
    assert len({Path(unquote(line["output"].removeprefix("file://"))).read_bytes() for line in lines}) == 1
