"""A node as Celery sees it: canary, events, the plain `celery worker` command and foreign messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery.events.state import State

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.broker import make_app
from imagemill.shared.settings import Settings
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import cli, run, spec
from tests.services.images import ImageServer, answers
from tests.workers import ROOT, WorkerProcess, wait_until

pytestmark = pytest.mark.integration


def test_node_answers_the_canary_and_celery_inspect(worker: WorkerProcess, environment: dict[str, str]) -> None:
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


def test_celery_events_show_progress_and_outcome_of_a_shift(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path
) -> None:
    """These are what Flower shows. Only this node reports events, under its own name."""
    images.routes |= {"/a.png": photo(1), "/none.png": answers(404), "/slow.png": images.hang}
    seen = State()
    app = make_app(Settings(_env_file=None, redis_url=own_redis.url))  # type: ignore[call-arg]
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__OPERATIONS='["stylize"]')
    rows = [SourceRow(path, {"source": images.url(path)}) for path in ("/a.png", "/none.png", "/slow.png")]
    with app.connection() as connection, client_for(own_redis.url) as client:
        receiver = app.events.Receiver(connection, handlers={"*": seen.event})
        capture = closing(receiver.itercapture(limit=None, timeout=60, wakeup=False))
        with capture as events, WorkerProcess(environment, tmp_path, name="cpu") as node:
            node.wait_ready()
            next(events)  # a heartbeat: the receiver is listening
            job = client.submit(rows, spec("stylize", tmp_path)).job
            task = wait_for_task(events, seen, "PROGRESS", f"{job}: 1 done, 1 failed (not_found 1); now 1 of {job}")
            assert (task.name, task.kwargs) == ("imagemill.stylize", "stylize.opencv")
            images.routes["/slow.png"] = photo(2)
            images.released.set()
            wait_for_task(events, seen, "SUCCESS", f"'{job}: 2 done, 1 failed (not_found 1)'")
    assert len(seen.workers) == 1
    assert next(iter(seen.workers)).startswith("cpu@")


def wait_for_task(events: Iterator[Any], seen: State, state: str, result: str) -> Any:
    """Consume events until a task has this state and result; return that task."""
    for _ in events:
        for _, task in seen.itertasks():
            if (task.state, task.result) == (state, result):
                return task
    raise AssertionError(f"no task became {state}")


def test_celery_command_can_start_a_node(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    images.routes["/a.png"] = photo(1)
    node = WorkerProcess(environment_for(own_redis.url, tmp_path), tmp_path, name="plain")
    node.command = [sys.executable, "-m", "celery", "-A", "imagemill.worker.app", "worker", "-c", "1", "--hostname", "plain@%h"]
    with node, client_for(own_redis.url) as client:
        node.wait_ready()
        (row,) = run(client, [images.url("/a.png")], spec("stylize", tmp_path))
    assert row.state == "done"


def test_nodes_with_the_same_name_are_distinguished(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """Both run tasks; the first to leave takes only itself away; a node that is killed gets its name back."""
    environment = environment_for(own_redis.url, tmp_path)
    nodes = [WorkerProcess(environment, tmp_path / name) for name in ("first", "second", "celery")]
    nodes[2].command = [sys.executable, "-m", "celery", "-A", "imagemill.worker.app", "worker", "-c", "1", "-n", "cpu@%h"]
    first, second, plain = nodes
    with ExitStack() as stack, client_for(own_redis.url) as client:
        for node in nodes:
            node.log.parent.mkdir()
            stack.enter_context(node).wait_ready()
        assert names(client) == {first.process.pid: "cpu", second.process.pid: "cpu-2", plain.process.pid: "cpu-3"}
        assert "name in use; the node takes another" in second.log.read_text()
        assert "name in use" not in first.log.read_text()
        canaries = cli(environment, "doctor", "--worker", "--json")
        assert [json.loads(line)["state"] for line in canaries.stdout.splitlines()] == ["ok", "ok", "ok"]
        assert first.stop() == 0
        assert names(client) == {second.process.pid: "cpu-2", plain.process.pid: "cpu-3"}
        second.kill()
        second.start()
        second.wait_ready()
        assert names(client)[second.process.pid] == "cpu"
        plain.kill()
        plain.command = [*plain.command[:-1], "cpu-3@%h"]
        plain.start()
        plain.wait_ready()
        assert names(client)[plain.process.pid] == "cpu-3", "the old process is gone, so its report does not count"


def names(client: Client) -> dict[int, str]:
    """The first parts of the live nodes' names, by process ID; without those killed nodes that still count as alive."""
    return {node.pid: node.node.partition("@")[0] for node in client.nodes() if psutil.pid_exists(node.pid)}


def test_node_starts_before_redis_and_can_be_stopped_while_it_waits(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    own_redis.stop()
    with WorkerProcess(environment_for(own_redis.url, tmp_path), tmp_path) as node:
        wait_until(lambda: "the node waits for Redis" in node.tail(), "it waits")
        assert node.stop() == 0
        node.log.unlink()
        node.start()
        wait_until(lambda: "the node waits for Redis" in node.tail(), "it waits again")
        own_redis.start()
        node.wait_ready()


def test_message_with_invalid_arguments_is_dropped(worker: WorkerProcess, environment: dict[str, str]) -> None:
    before = worker.log.read_text().count("message refused")
    app = make_app(Settings(_env_file=None, redis_url=environment["IMAGEMILL_REDIS_URL"]))  # type: ignore[call-arg]
    payload = {"version": 2, "lane": "../../etc"}
    app.send_task("imagemill.stylize", kwargs=payload, queue="imagemill.stylize.opencv")
    wait_until(lambda: worker.log.read_text().count("message refused") == before + 1, "the message is refused")
