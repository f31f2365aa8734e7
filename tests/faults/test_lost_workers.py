"""Jobs survive processes that die, stall or stop: no image is lost and none is counted twice."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import psutil
import pytest
import redis
from PIL import Image

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from tests.conftest import photo
from tests.faults.jobs import check_complete, submit, wait_for_gate
from tests.integration.jobs import spec
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration


def test_images_of_a_killed_child_are_handed_out_at_once(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path, gate: Path
) -> None:
    """Long before its leases expire."""
    environment["IMAGEMILL_WORKER__LEASE_SECONDS"] = "3600"
    with WorkerProcess(environment, tmp_path, fake="Gated") as node:
        node.wait_ready()
        job = submit(client, images, tmp_path, 12)
        wait_for_gate(gate, 3)
        wait_until(lambda: client.status(job).done >= 2, "two images recorded")
        (child,) = node.children()
        os.kill(child, signal.SIGKILL)
        (gate / "open").touch()
        check_complete(client, job, 12, tmp_path)
    assert {row.attempts for row in client.results(job)} <= {1, 2}, "no other process died"


def test_job_completes_on_another_node_when_a_node_is_killed(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path, gate: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with WorkerProcess({**environment, "TMPDIR": str(temporary)}, tmp_path, fake="Gated", name="first") as first:
        first.wait_ready()
        job = submit(client, images, tmp_path, 12)
        wait_for_gate(gate, 3)
        with WorkerProcess(environment, tmp_path, fake="Gated", name="second") as second:
            second.wait_ready()
            first.kill()
            assert not list(temporary.iterdir())
            (gate / "open").touch()
            check_complete(client, job, 12, tmp_path)


def test_job_is_done_when_redis_loses_the_wake_ups(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path, own_redis: EmbeddedRedis
) -> None:
    job = submit(client, images, tmp_path, 6)
    with redis.Redis.from_url(own_redis.url) as raw:
        assert raw.delete("imagemill.stylize.opencv") == 1
    with WorkerProcess(environment, tmp_path, fake="Invert") as node:
        node.wait_ready()
        check_complete(client, job, 6, tmp_path)


@pytest.mark.parametrize("fake", ["Deadly", "Poisons"])
def test_image_that_kills_its_process_or_gpu_fails_and_the_rest_succeed(
    fake: str, environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    white = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(white, "PNG")
    images.routes["/white.png"] = white.getvalue()
    sources = [images.url("/white.png")]
    for n in range(15):
        images.routes[f"/{n}.png"] = photo(n)
        sources.append(images.url(f"/{n}.png"))
    with WorkerProcess(environment, tmp_path, fake=fake) as node:
        node.wait_ready()
        rows = [SourceRow(f"row {n}", {"source": source}) for n, source in enumerate(sources)]
        job = client.submit(rows, spec("stylize", tmp_path / "out")).job
        status = client.wait(job, timeout=120)
    assert (status.done, status.failed) == (15, 1)
    white_row, *others = client.results(job)
    assert (white_row.code, white_row.attempts) == ("worker_lost", 3)
    assert [row.state for row in others] == ["done"] * 15
    log = node.log.read_text()
    assert log.count("exited with 'signal 9 (SIGKILL)'") == 3
    assert log.count("the device is lost; this process ends") == (3 if fake == "Poisons" else 0)


def test_stopping_node_returns_unfinished_images_to_the_queue(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path, gate: Path
) -> None:
    with WorkerProcess(environment, tmp_path, fake="Gated", name="first") as first:
        first.wait_ready()
        job = submit(client, images, tmp_path, 40)
        wait_for_gate(gate, 3)
        first.process.terminate()
        wait_until(lambda: not client.nodes(), "the node signed off")
        (gate / "open").touch()
        assert first.process.wait(60) == 0, first.tail()
    assert client.status(job).failed == 0
    with WorkerProcess(environment, tmp_path, fake="Gated", name="second") as second:
        second.wait_ready()
        check_complete(client, job, 40, tmp_path)


def test_cancel_stops_images_that_have_not_started(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path, gate: Path
) -> None:
    with WorkerProcess(environment, tmp_path, fake="Gated") as node:
        node.wait_ready()
        job = submit(client, images, tmp_path, 60)
        wait_for_gate(gate, 3)
        client.cancel(job)
        (gate / "open").touch()
        status = client.wait(job, timeout=60)
    assert status.state == "cancelled"
    assert status.done < 60
    states = [row.state for row in client.results(job)]
    assert states.count("done") == status.done
    assert states.count("cancelled") == 60 - status.done


def test_slow_engine_is_loaded_once_per_child(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    """It takes 5 s to load, both in the first child and in the one that replaces it."""
    with WorkerProcess(environment, tmp_path, fake="SlowLoad") as node:
        node.wait_ready()
        os.kill(node.children()[0], signal.SIGKILL)
        job = submit(client, images, tmp_path, 4)
        check_complete(client, job, 4, tmp_path)
        assert node.log.read_text().count("engine loaded") == 2, node.tail()


def test_node_takes_no_task_when_its_engine_fails_to_load(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    job = submit(client, images, tmp_path, 3)
    with WorkerProcess(environment, tmp_path, fake="BrokenLoad") as node:
        assert node.process.wait(60) == 1
        assert "RuntimeError: the weights are not there" in node.tail()
    status = client.status(job)
    assert (status.state, status.done, status.failed) == ("queued", 0, 0)


def test_engine_unfit_for_the_machine_is_reported_without_a_traceback(environment: dict[str, str], tmp_path: Path) -> None:
    with WorkerProcess(environment, tmp_path, fake="Unfit") as node:
        assert node.process.wait(60) == 2
        assert "reason=there is no such GPU" in node.tail()
        assert "Traceback" not in node.log.read_text()


def test_job_is_done_without_a_manifest_when_writing_it_fails(
    environment: dict[str, str], client: Client, images: ImageServer, tmp_path: Path
) -> None:
    with WorkerProcess({**environment, "IMAGEMILL_WORKER__REUSE": "false"}, tmp_path, fake="Nameless") as node:
        node.wait_ready()
        status = client.wait(submit(client, images, tmp_path, 3), timeout=60)
    assert (status.state, status.done, status.manifest) == ("done", 3, None)
    assert "manifest failed" in node.log.read_text()


def test_parent_loads_neither_torch_nor_onnxruntime(environment: dict[str, str], tmp_path: Path) -> None:
    """Children inherit its state by fork; a CUDA context or an onnxruntime session would break in them."""

    def libraries(pid: int) -> set[str]:
        names = {Path(region.path).name for region in psutil.Process(pid).memory_maps()}
        return {part for part in ("libtorch", "onnxruntime", "multiarray", "cv2") if any(part in name for name in names)}

    with WorkerProcess(environment, tmp_path, fake="Heavy") as node:
        node.wait_ready()
        assert libraries(node.process.pid) == set()
        assert {"libtorch", "onnxruntime"} <= libraries(node.children()[0])


def test_child_is_pinned_to_its_gpu_before_the_engine_loads(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "".join(["#!/bin/sh\n", *(f'echo "GPU {n}: NVIDIA (UUID: GPU-{"abc" * (n == 5)}{n})"\n' for n in range(7))])
    )
    script.chmod(0o755)
    environment = {**environment, "PATH": f"{tmp_path}:{environment['PATH']}"}
    masked = {**environment, "CUDA_VISIBLE_DEVICES": "4,GPU-abc,6", "IMAGEMILL_WORKER__GPU": "1"}
    with WorkerProcess(masked, tmp_path, fake="Tells") as node:
        node.command = [*node.command[:3], "worker", "--gpu", "1", "--name", "gpu1"]
        node.stop()
        node.start()
        node.wait_ready()
        assert len(node.children()) == 1
        assert "CUDA_VISIBLE_DEVICES=GPU-abc" in node.log.read_text()
