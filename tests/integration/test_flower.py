"""`imagemill flower`: a real Flower alongside a real node."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import spec
from tests.services.images import ImageServer, answers
from tests.workers import WorkerProcess, wait_until

pytest.importorskip("flower")
pytestmark = pytest.mark.integration

PASSWORD = "secret"
START = """
from imagemill.producer.flower import command, state
command.LOOK_SECONDS, state.LOST_SECONDS = 0.5, 5.0
command.flower()
"""


class RunningFlower:
    """A Flower process, and what it answers."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.environment = environment | {"FLOWER_PORT": str(self.port)}
        self.log = folder / "flower.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", START]
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        wait_until(self.answers, f"Flower answers; log: {self.log}")

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/healthcheck", password=None) == (200, "OK")
        except OSError:
            return False

    def get(self, path: str, *, password: str | None = PASSWORD) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if password:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"operator:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def tasks(self) -> list[dict[str, Any]]:
        return list(json.loads(self.get("/api/tasks")[1]).values())

    def workers(self) -> list[dict[str, Any]]:
        return list(json.loads(self.get("/workers?json=1")[1])["data"])


@contextmanager
def running(redis_url: str, folder: Path) -> Iterator[RunningFlower]:
    db = str(folder / "history.json")
    environment = environment_for(redis_url, folder, FLOWER_BASIC_AUTH=f"operator:{PASSWORD}", FLOWER_DB=db)
    environment["FLOWER_STATE_SAVE_INTERVAL"] = "500"
    flower = RunningFlower(environment, folder)
    try:
        yield flower
    finally:
        flower.process.terminate()
        flower.process.wait(30)


def test_everything_but_the_health_check_needs_the_password(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    with running(own_redis.url, tmp_path) as flower:
        for path in (
            "/",
            "/tasks",
            "/broker",
            "/metrics",
            "/api/workers",
            "/api/tasks",
            "/job/x",
            "/task/x",
            "/workers?json=1",
        ):
            assert flower.get(path, password=None)[0] == 401, path
            assert flower.get(path, password="wrong")[0] == 401, path
        assert "flower_" in flower.get("/metrics")[1]
        assert flower.get("/job/x")[0] == 404


def test_flower_without_a_password_does_not_start(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    environment = environment_for(own_redis.url, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "FLOWER_BASIC_AUTH" in done.stderr


def test_failures_lost_shifts_reports_and_history(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    """A node's failures are counted and named; killed, it leaves no shift running; Flower, killed, forgets nothing."""
    paths = ["/a.png", *(f"/none-{number}.png" for number in range(4))]
    images.routes |= {path: answers(404) for path in paths} | {"/a.png": photo(1), "/slow.png": images.hang}
    with running(own_redis.url, tmp_path) as flower, client_for(own_redis.url) as client:
        with WorkerProcess(flower.environment, tmp_path) as node:
            node.wait_ready()
            rows = [SourceRow(path, {"source": images.url(path)}) for path in paths]
            job = client.submit(rows, spec("stylize", tmp_path)).job
            client.wait(job, 60)
            wait_until(lambda: [task["state"] for task in flower.tasks()] == ["FAILURE"], "the shift has failures")
            (task,) = flower.tasks()
            assert task["result"] == f"'{job}: 1 done, 4 failed (not_found 4)'"
            (worker,) = flower.workers()
            assert [worker[f"task-{kind}"] for kind in ("received", "succeeded", "failed")] == [5, 1, 4]
            page = flower.get(f"/task/{task['uuid']}")[1]
            assert f'href="/job/{job}"' in page
            assert f"{job}: 1 done, 4 failed (not_found 4)" in page
            assert "not_found" in flower.get(f"/job/{job}")[1]
            wait_until(lambda: "imagemill-node.cpu@" in flower.get("/broker")[1], "the node's queue is listed")

            client.submit([SourceRow("slow", {"source": images.url("/slow.png")})], spec("stylize", tmp_path))
            wait_until(lambda: "PROGRESS" in [task["state"] for task in flower.tasks()], "the shift runs")
            node.age()
            node.kill()
        wait_until(lambda: {"PROGRESS", "STARTED"}.isdisjoint(task["state"] for task in flower.tasks()), "the shift is lost")
        assert any(task["result"].startswith("lost with its process") for task in flower.tasks())
        wait_until(lambda: "imagemill-node.cpu@" not in flower.get("/broker")[1], "its queue is gone")
        images.released.set()
        known = sorted((task["uuid"], task["state"], task["result"]) for task in flower.tasks())
        saved = tmp_path / "history.json"
        wait_until(lambda: "lost with its process" in saved.read_text(), "it is saved")

        flower.process.kill()
        flower.process.wait()
        flower.start()
        assert sorted((task["uuid"], task["state"], task["result"]) for task in flower.tasks()) == known

        flower.process.kill()
        flower.process.wait()
        saved.write_text(saved.read_text()[:-20])
        flower.start()
        assert flower.tasks() == []
        assert saved.with_name("history.json.damaged").exists()
