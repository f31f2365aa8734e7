"""A real prefork worker between a real Redis, a server of images and a real S3 server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from celery.events.state import State
from PIL import Image

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared import s3
from imagemill.shared.broker import make_app
from imagemill.shared.messages import Job, Row
from imagemill.shared.settings import S3Settings, Settings
from tests import services
from tests.conftest import client_for, environment_for, photo
from tests.services import ImageServer, S3Server
from tests.workers import ROOT, WorkerProcess, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def environment(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment_for(redis_server.url, tmp_path_factory.getbasetemp(), IMAGEMILL_FETCH__TOTAL_TIMEOUT="2")


@pytest.fixture(scope="module")
def worker(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(environment, tmp_path_factory.mktemp("worker"), concurrency=2) as node:
        yield node.wait_ready()


@pytest.fixture
def client(redis_server: EmbeddedRedis) -> Iterator[Client]:
    with client_for(redis_server.url) as made:
        yield made


def spec(operation: str, output: str, *, key: str | None = None, attempts: int = 3, **options: Any) -> Job:
    wanted = {"url": output} | ({"key": key} if key else {})
    fields = {"operation": operation, "output": wanted, "options": options, "policy": {"attempts": attempts}}
    return Job.model_validate(fields)


def run(client: Client, sources: list[str | dict[str, Any]], job: Job) -> list[Row]:
    """Submit, wait, and return the rows in the list's order."""
    rows = [SourceRow(f"row {n}", s if isinstance(s, dict) else {"source": s}) for n, s in enumerate(sources)]
    submission = client.submit(rows, job)
    assert submission.served
    status = client.wait(submission.job, timeout=120)
    found = list(client.results(submission.job))
    assert status.state == "done"
    assert status.total == len(sources) == len(found)
    assert status.done == sum(row.state == "done" for row in found)
    assert status.failed == sum(row.state == "failed" for row in found)
    return found


def path(row: Row) -> Path:
    assert row.output is not None, row
    return Path(unquote(row.output.removeprefix("file://")))


def opened(row: Row) -> Image.Image:
    return Image.open(io.BytesIO(path(row).read_bytes()))


@pytest.mark.parametrize("operation", ["remove-background", "inpaint", "stylize"])
def test_urls_in_images_out(operation: str, worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path) -> None:
    options = {"boxes": ["10,10,20,20"]} if operation == "inpaint" else {}
    images.routes |= {"/a.png": photo(1), "/b.jpg": photo(2, kind="JPEG"), "/c.webp": photo(3, kind="WEBP")}
    rows = run(
        client,
        [images.url("/a.png"), images.url("/b.jpg"), images.url("/c.webp")],
        spec(operation, f"file://{tmp_path}", **options),
    )
    assert [row.state for row in rows] == ["done"] * 3
    cut = operation == "remove-background"
    assert [opened(row).format for row in rows] == ["PNG", "PNG" if cut else "JPEG", "WEBP"]
    assert all(opened(row).size == (96, 72) for row in rows)
    assert [opened(row).mode for row in rows] == ["RGBA" if cut else "RGB"] * 3


def test_results_are_measured_flagged_and_mended(
    worker: WorkerProcess, environment: dict[str, str], images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/flagged.png"] = photo(1)
    asked = [images.url("/flagged.png"), "--operation", "stylize", "--output", str(tmp_path), "--wait", "--json"]
    told = []
    for flags in ([], ["--limit", "least_sharpness=9"], ["--check", "repair", "--limit", "least_sharpness=9"]):
        job = json.loads(cli(environment, "submit", *asked, *flags).stdout)["job"]
        flagged = cli(environment, "results", job, "--flagged").stdout.splitlines()
        told.append([json.loads(line)["flags"] for line in flagged])
        (line,) = map(json.loads, (tmp_path / job / "manifest.jsonl").read_text().splitlines())
        assert {"sharpness", "kept", "entropy", "look", "before"} <= line["quality"].keys()
        assert ("flag:blurred" in line["notes"]) == bool(flagged)
    assert told == [[], [["blurred"]], [["blurred"]]]
    assert "repaired_sharpness" in line["notes"], "which is nearer to the limit"


def test_from_url_to_s3_and_back(
    worker: WorkerProcess,
    redis_server: EmbeddedRedis,
    environment: dict[str, str],
    s3_server: S3Server,
    images: ImageServer,
    tmp_path: Path,
) -> None:
    """With a node that knows the S3 server: outputs, content types, manifest, presigned links, and S3 as the source."""
    with_s3 = {**environment, **s3_environment(s3_server), "IMAGEMILL_WORKER__OPERATIONS": '["stylize"]'}
    images.routes["/a.png"] = photo(1)
    settings = S3Settings(endpoint_url=s3_server.endpoint_url)
    with services.changed_environment(s3_environment(s3_server)):
        storage = s3.make_client(settings)
    storage.create_bucket(Bucket="sources")
    storage.put_object(Bucket="sources", Key="in/b.png", Body=photo(2))
    worker.stop()  # it knows no S3 server and would take these images
    try:
        with WorkerProcess(with_s3, tmp_path, name="s3") as node:
            node.wait_ready()
            sources = tmp_path / "list.txt"
            sources.write_text(f"{images.url('/a.png')}\ns3://sources/in/b.png\ns3://sources/in/none.png\n")
            out = cli(
                with_s3, "submit", str(sources), "--operation", "stylize", "--output", "s3://results/jobs", "--wait", "--json"
            )
            assert out.returncode == 1
            summary = json.loads(out.stdout)
            assert {"state": "done", "total": 3, "done": 2, "failed": 1}.items() <= summary.items()
            lines = cli(with_s3, "results", summary["job"], "--format", "jsonl", "--presign", "600").stdout.splitlines()
    finally:
        worker.start()
        worker.wait_ready()
    rows = [json.loads(line) for line in lines]
    assert [row["code"] for row in rows] == [None, None, "not_found"]
    for row in rows[:2]:
        bucket, key = s3.split(row["output"])
        stored = storage.get_object(Bucket=bucket, Key=key)
        assert stored["ContentType"] == "image/png"
        body = stored["Body"].read()
        assert Image.open(io.BytesIO(body)).size == (96, 72)
        assert download(row["link"]) == body
    manifest = storage.get_object(Bucket="results", Key=f"jobs/{summary['job']}/manifest.jsonl")["Body"].read()
    assert [json.loads(line)["state"] for line in manifest.splitlines()] == ["done", "done", "failed"]


def download(link: str) -> bytes:
    with urllib.request.urlopen(link, timeout=10) as answer:
        return bytes(answer.read())


def s3_environment(server: S3Server) -> dict[str, str]:
    return {
        "IMAGEMILL_S3__ENDPOINT_URL": server.endpoint_url,
        "IMAGEMILL_S3__CREATE_BUCKET": "true",
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }


def cli(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imagemill.producer.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_each_bad_input_gets_its_code_and_spares_its_neighbours(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    good = photo(1)
    jpeg = photo(2, 400, 300, "JPEG")
    images.routes |= {
        "/good.png": good,
        "/404.png": services.answers(404),
        "/403.png": services.answers(403),
        "/500.png": services.answers(500),
        "/flaky.png": services.failing(1, 503, good),
        "/stall.png": images.hang,
        "/page.png": services.html(),
        "/empty.png": b"",
        "/cut.jpg": jpeg[: len(jpeg) // 2],
        "/bomb.png": one_colour_png(30_000),
        "/really-a.jpg": good,
        "/to-private.png": services.redirect("http://10.255.255.1/secret.png"),
    }
    expected = {
        images.url("/good.png"): None,
        images.url("/404.png"): "not_found",
        images.url("/403.png"): "access_denied",
        images.url("/500.png"): "server_error",
        images.url("/flaky.png"): None,
        images.url("/stall.png"): "timeout",
        images.url("/page.png"): "not_an_image",
        images.url("/empty.png"): "empty_file",
        images.url("/cut.jpg"): "truncated",
        images.url("/bomb.png"): "too_many_pixels",
        images.url("/really-a.jpg"): None,
        "http://10.255.255.1/private.png": "forbidden_address",
        images.url("/to-private.png"): "forbidden_address",
        "http://no-such-host.invalid/a.png": "unreachable",
    }
    rows = run(client, list(expected), spec("stylize", f"file://{tmp_path}", attempts=2))
    assert {row.source: row.code for row in rows} == expected
    attempts = {row.source: row.attempts for row in rows}
    assert attempts[images.url("/500.png")] == attempts[images.url("/flaky.png")] == 2
    assert attempts[images.url("/404.png")] == 1
    for row in rows:
        assert (row.message is None) == (row.code is None)


def one_colour_png(edge: int) -> bytes:
    """A black square PNG of 1 bit per pixel: a few kB that would be gigabytes of pixels."""
    file = io.BytesIO()
    Image.new("1", (edge, edge)).save(file, "PNG", optimize=True)
    return file.getvalue()


def test_masks(worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path) -> None:
    """A mask per image, a wrong one and a missing one; what lies outside the mask stays as it was."""
    mask = np.zeros((72, 96), np.uint8)
    mask[20:40, 30:50] = 255
    images.routes |= {"/a.png": photo(1), "/mask.png": png(mask), "/wide.png": png(np.zeros((10, 96), np.uint8))}
    a = images.url("/a.png")
    rows = run(
        client,
        [
            {"source": a, "mask": images.url("/mask.png")},
            {"source": a, "mask": images.url("/wide.png")},
            {"source": a, "mask": images.url("/none.png")},
        ],
        spec("inpaint", f"file://{tmp_path}"),
    )
    assert [row.code for row in rows] == [None, "bad_mask", "bad_mask"]
    before, after = np.asarray(Image.open(io.BytesIO(photo(1)))), np.asarray(opened(rows[0]))
    assert np.array_equal(before[mask == 0], after[mask == 0])
    assert not np.array_equal(before[mask == 255], after[mask == 255])


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_duplicates_are_processed_once_and_reported_each(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {"/a.png": photo(1), "/b.png": photo(2)}
    a, b = images.url("/a.png"), images.url("/b.png")
    rows = run(client, [a, b, a, a], spec("stylize", f"file://{tmp_path}"))
    assert [row.duplicate_of for row in rows] == [None, None, 0, 0]
    assert rows[0].output == rows[2].output == rows[3].output != rows[1].output
    assert images.hits["/a.png"] == 1
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_odd_names_stay_apart_and_below_the_output(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    paths = ["/with space.png", "/%2e%2e/%2e%2e/up.png", "/日本-ünï.png", "/same.png?v=1", "/same.png?v=2"]
    images.fallback = photo(1)
    rows = run(client, [images.url(path) for path in paths], spec("stylize", f"file://{tmp_path}"))
    assert [row.state for row in rows] == ["done"] * len(paths), rows
    files = [path(row) for row in rows]
    assert len(set(files)) == len(paths)
    assert all(file.is_file() and tmp_path in file.parents for file in files)


def test_an_output_folder_that_is_not_allowed_fails_each_image_clearly(
    worker: WorkerProcess, client: Client, images: ImageServer
) -> None:
    images.routes["/a.png"] = photo(1)
    (row,) = run(client, [images.url("/a.png")], spec("stylize", "file:///etc/imagemill-test"))
    assert row.code == "storage_refused"
    assert "IMAGEMILL_FILES__WRITE_ROOTS" in (row.message or "")


def test_the_manifest_tells_what_the_ledger_forgets(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    rows = run(client, [images.url("/a.png"), images.url("/none.png")], spec("stylize", f"file://{tmp_path}", style="detail"))
    (manifest,) = tmp_path.rglob("manifest.jsonl")
    first, second = (json.loads(line) for line in manifest.read_text().splitlines())
    assert first["output"] == rows[0].output
    assert first["source_bytes"] == len(photo(1))
    assert first["source_size"] == first["output_size"] == [96, 72]
    assert first["output_bytes"] == path(rows[0]).stat().st_size
    assert {"fetch", "decode", "prepare", "run", "finish", "encode", "store"} <= first["seconds"].keys()
    assert first["options"]["style"] == "detail"
    assert first["versions"]["imagemill"]
    assert second["code"] == "not_found"
    assert second["message"]


def test_retry_does_only_the_failed_again(worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path) -> None:
    images.routes["/a.png"] = photo(1)
    rows = run(client, [images.url("/a.png"), images.url("/late.png")], spec("stylize", f"file://{tmp_path}"))
    assert [row.code for row in rows] == [None, "not_found"]
    images.routes["/late.png"] = photo(2)
    job = rows[0].output.split("/")[-2] if rows[0].output else ""
    assert client.retry(job) == 1
    status = client.wait(job, timeout=60)
    assert (status.done, status.failed) == (2, 0)
    assert [row.state for row in client.results(job)] == ["done", "done"]
    assert images.hits["/a.png"] == 1
    (manifest,) = tmp_path.rglob("manifest.jsonl")
    assert [json.loads(line)["state"] for line in manifest.read_text().splitlines()] == ["done", "done"]


def test_the_canary_answers_and_celery_sees_the_node(worker: WorkerProcess, environment: dict[str, str]) -> None:
    assert cli(environment, "doctor", "--worker").returncode == 0
    listed = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "imagemill.worker.app", "inspect", "registered", "--json"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (tasks,) = json.loads(listed.stdout).values()
    assert {"imagemill.remove-background", "imagemill.inpaint", "imagemill.stylize"} <= set(tasks)


def test_watchers_of_events_see_progress_under_the_name_of_the_node(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path
) -> None:
    """What Flower shows: readable names and arguments, PROGRESS while a chunk runs, what came of it, and no other nodes."""
    images.routes |= {"/a.png": photo(1), "/none.png": services.answers(404), "/slow.png": images.hang}
    seen = State()
    app = make_app(Settings(_env_file=None, redis_url=own_redis.url))  # type: ignore[call-arg]
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__OPERATIONS='["stylize"]')
    rows = [SourceRow(path, {"source": images.url(path)}) for path in ("/a.png", "/none.png", "/slow.png")]
    with app.connection() as connection, client_for(own_redis.url) as client:
        receiver = app.events.Receiver(connection, handlers={"*": seen.event})
        capture = closing(receiver.itercapture(limit=None, timeout=60, wakeup=False))
        with capture as events, WorkerProcess(environment, tmp_path, name="cpu") as node:
            node.wait_ready()
            next(events)  # its heartbeat: from here on we miss nothing
            client.submit(rows, spec("stylize", f"file://{tmp_path}"))
            task = until(events, seen, "PROGRESS", "2 of 3 images, 1 failed")
            assert task.name == "imagemill.stylize"
            assert task.kwargs.startswith("job=")
            assert task.kwargs.endswith(", chunk=0, images=3")
            images.routes["/slow.png"] = photo(2)
            images.released.set()
            until(events, seen, "SUCCESS", "'2 done, 1 failed'")
    assert len(seen.workers) == 1
    assert next(iter(seen.workers)).startswith("cpu@")


def until(events: Iterator[Any], seen: State, state: str, result: str) -> Any:
    """Take events until a task has come so far; that task."""
    for _ in events:
        for _, task in seen.itertasks():
            if (task.state, task.result) == (state, result):
                return task
    raise AssertionError(f"no task became {state}")


def test_plain_celery_runs_a_node_too(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    images.routes["/a.png"] = photo(1)
    node = WorkerProcess(environment_for(own_redis.url, tmp_path), tmp_path, name="plain")
    node.command = [sys.executable, "-m", "celery", "-A", "imagemill.worker.app", "worker", "-c", "1", "--hostname", "plain@%h"]
    with node, client_for(own_redis.url) as client:
        node.wait_ready()
        (row,) = run(client, [images.url("/a.png")], spec("stylize", f"file://{tmp_path}"))
    assert row.state == "done"


def test_a_message_that_is_not_ours_is_dropped(worker: WorkerProcess, environment: dict[str, str]) -> None:
    before = worker.log.read_text().count("message refused")
    app = make_app(Settings(_env_file=None, redis_url=environment["IMAGEMILL_REDIS_URL"]))  # type: ignore[call-arg]
    payload = {"version": 1, "job": "../../etc", "number": 0, "images": 1}
    app.send_task("imagemill.stylize", kwargs=payload, queue="imagemill.stylize.opencv")
    wait_until(lambda: worker.log.read_text().count("message refused") == before + 1, "the message is refused")
