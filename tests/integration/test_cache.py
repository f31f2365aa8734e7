"""Results reused by later jobs: real flows and a real worker with Redis, a folder and a real S3 server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared import s3
from imagemill.shared.errors import NotFound
from imagemill.shared.messages import ItemResult
from imagemill.shared.settings import FileSettings, S3Settings
from imagemill.worker.line.cache import Cache
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.store import open_store
from tests.conftest import environment_for, photo
from tests.integration.cache_jobs import NAMES, NOTE, Counted, Jobs, Place
from tests.integration.jobs import cli, local_path
from tests.services.images import ImageServer
from tests.services.s3 import S3Server, changed_environment
from tests.stores import BlockingStore, ClientOnly
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration

FILE = photo(1, kind="JPEG")


@pytest.fixture(scope="module")
def storage(s3_server: S3Server) -> Iterator[Any]:
    with changed_environment(s3_server.environment):
        yield s3.make_client(S3Settings(endpoint_url=s3_server.endpoint_url))


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return Place(next(NAMES), tmp_path)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(next(NAMES), tmp_path, request.getfixturevalue("storage") if request.param == "s3" else None)


@pytest.fixture
def jobs(redis_server: EmbeddedRedis, images: ImageServer) -> Iterator[Jobs]:
    images.routes |= {"/a.jpg": FILE, "/same.jpg": FILE, "/other.jpg": photo(2, kind="JPEG")}
    jobs = Jobs(redis_server.url, images)
    yield jobs
    jobs.close()


@pytest.mark.parametrize("at", [0, 1], ids=["same bucket", "another bucket"])
def test_same_image_in_another_job_is_copied_and_marked_cached(jobs: Jobs, place: Place, at: int) -> None:
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


def test_different_image_or_fingerprint_is_computed(jobs: Jobs, folder: Place) -> None:
    operation, updated = Counted(), Counted()
    cases = [(operation, "/a.jpg"), (operation, "/other.jpg"), (updated, "/a.jpg")]
    results = [jobs.run(engine, folder, path=path) for engine, path in cases]
    assert (operation.runs, updated.runs) == (2, 1)
    assert all(result.notes == (NOTE,) for result in results)


def test_deleted_result_is_computed_and_cached_again(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    first = jobs.output(operation, place)
    data = place.read(first)
    place.delete(first)
    assert place.read(jobs.output(operation, place)) == data
    assert operation.runs == 2
    assert jobs.run(operation, place).notes[-1] == "cached"
    assert operation.runs == 2


def test_overwritten_result_is_not_reused(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    first = jobs.output(operation, place)
    data, kind = place.read(first)
    place.write(first, data[:-1] + bytes([data[-1] ^ 1]))
    assert place.read(jobs.output(operation, place)) == (data, kind)
    assert operation.runs == 2


def test_newest_copy_is_reused_when_the_first_result_is_deleted(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    first, copy = jobs.output(operation, place), jobs.output(operation, place)
    place.delete(first)
    assert place.read(jobs.output(operation, place)) == place.read(copy)
    assert operation.runs == 1


def test_result_can_be_copied_onto_itself(jobs: Jobs, place: Place) -> None:
    """This happens when a worker is killed after storing a result but before recording it."""
    operation = Counted()
    first = jobs.output(operation, place, key="{index}")
    before = place.read(first)
    assert jobs.output(operation, place, key="{index}") == first
    assert place.read(first) == before
    assert operation.runs == 1


def test_failed_copy_keeps_the_existing_file(place: Place, network: Network) -> None:
    files = FileSettings(write_roots=(place.folder,))
    s3 = ClientOnly(place.client, network)
    opened = (open_store(url, s3=s3, files=files, s3_settings=place.settings) for url in place.urls)
    first, second = (BlockingStore(store, network.call) for store in opened)
    first.check()
    second.check()
    source, kept = first.put("a.png", b"other bytes", "image/png"), second.put("b.png", b"before", "image/png")
    with pytest.raises(NotFound, match="changed"):
        second.copy(source, "b.png", "image/png", md5="0" * 32)
    assert place.read(kept)[0] == b"before"


def test_fresh_result_is_computed_and_cached(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    first = jobs.output(operation, folder)
    fresh = jobs.run(operation, folder, reuse=False)
    assert operation.runs == 2
    assert "cached" not in fresh.notes
    folder.delete(first)
    assert jobs.run(operation, folder).notes[-1] == "cached"


def test_cached_result_is_judged_by_the_limits_of_each_job(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    runs = [jobs.run(operation, folder, quality=limits) for limits in ({}, {"least_entropy": 8}, {"mode": "off"}, {})]
    assert operation.runs == 1
    assert [result.notes[1:] for result in runs] == [(), ("flag:blank", "cached"), ("cached",), ("cached",)]
    assert runs[0].quality == runs[1].quality == runs[3].quality
    assert runs[0].quality is not None


def test_unmeasured_result_is_computed_again_when_the_job_checks_quality(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    for mode, runs in (("off", 1), ("off", 1), ("flag", 2), ("flag", 2), ("off", 2), ("repair", 3), ("repair", 3)):
        jobs.run(operation, folder, quality={"mode": mode})
        assert operation.runs == runs


def test_folder_and_bucket_have_separate_caches(jobs: Jobs, folder: Place, storage: Any, tmp_path: Path) -> None:
    operation, bucket = Counted(), Place(next(NAMES), tmp_path, storage)
    results = [jobs.run(operation, place) for place in (folder, bucket, folder, bucket)]
    assert operation.runs == 2
    assert ["cached" in result.notes for result in results] == [False, False, True, True]


def test_two_workers_can_compute_the_same_result_at_once(jobs: Jobs, place: Place) -> None:
    operation = Counted()
    barrier = threading.Barrier(2, timeout=60)
    operation.before_return = barrier.wait  # both miss the cache before either stores
    results: list[ItemResult] = []
    threads = [threading.Thread(target=lambda: results.append(jobs.run(operation, place))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert operation.runs == 2
    first, second = (place.read(result.output or "") for result in results)
    assert first == second
    assert jobs.run(operation, place).notes[-1] == "cached"


def test_result_that_cannot_be_stored_is_not_cached(jobs: Jobs, folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No partial result or copy is left behind either."""
    operation = Counted()

    def full(_: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("imagemill.worker.transfer.files.os.fsync", full)
        assert jobs.run(operation, folder).code == "storage_full"
    assert [path for path in folder.folder.rglob("*") if path.is_file()] == []
    first = jobs.output(operation, folder)
    assert operation.runs == 2
    with monkeypatch.context() as patch:
        patch.setattr("imagemill.worker.transfer.files.os.fsync", full)
        assert jobs.run(operation, folder).code == "storage_full"
    copy = jobs.run(operation, folder)
    assert copy.notes[-1] == "cached"
    stored = {path for path in folder.folder.rglob("*") if path.is_file()}
    assert stored == {local_path(output or "") for output in (first, copy.output)}


def test_image_is_processed_when_the_cache_is_unreachable(jobs: Jobs, folder: Place, own_redis: EmbeddedRedis) -> None:
    operation = Counted()
    jobs.cache = Cache(own_redis.url, 60)
    own_redis.kill()
    assert [jobs.run(operation, folder).state for _ in range(2)] == ["done", "done"]
    assert operation.runs == 2
    jobs.cache.close()


def test_pixel_limit_applies_to_cached_results(jobs: Jobs, folder: Place) -> None:
    operation = Counted()
    jobs.run(operation, folder)
    jobs.settings = jobs.settings.model_copy(update={"worker": jobs.settings.worker.model_copy(update={"max_pixels": 100})})
    assert jobs.run(operation, folder).code == "too_many_pixels"


def test_command_line_reuses_results_unless_fresh_is_given(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.jpg"] = FILE
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__REUSE="true")
    out = tmp_path / "out"
    submit = ["submit", images.url("/a.jpg"), "--operation", "remove-background", "--output", str(out), "--wait"]
    with WorkerProcess(environment, tmp_path) as node:
        node.wait_ready()
        for flags in ([], [], ["--fresh"]):
            cli(environment, *submit, *flags).check_returncode()
    manifests = sorted(out.rglob("manifest.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    lines = [json.loads(path.read_text()) for path in manifests]
    assert ["cached" in line["notes"] for line in lines] == [False, True, False]
    assert len({local_path(line["output"]).read_bytes() for line in lines}) == 1
