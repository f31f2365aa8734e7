"""`imagemill doctor --worker`: which nodes work, whatever the others do."""

from __future__ import annotations

import io
import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import cli, spec
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration


def health(environment: dict[str, str], *arguments: str) -> dict[str, dict[str, Any]]:
    """The findings of `doctor --worker`, by node."""
    found = cli(environment, "doctor", "--worker", "--json", *arguments)
    findings = [json.loads(line) for line in found.stdout.splitlines()]
    assert (found.returncode == 0) == all(finding["state"] == "ok" for finding in findings), found.stderr
    return {finding["found"].partition("@")[0]: finding for finding in findings}


def submit(redis: EmbeddedRedis, images: ImageServer, folder: Path, *files: bytes) -> None:
    images.routes |= {f"/{number}.png": file for number, file in enumerate(files)}
    rows = [SourceRow(str(number), {"source": images.url(f"/{number}.png")}) for number in range(len(files))]
    with client_for(redis.url) as client:
        client.submit(rows, spec("stylize", folder))


def test_node_in_a_long_batch_is_healthy(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_TEST_GATE=str(tmp_path))
    with WorkerProcess(environment, tmp_path, fake="Gated") as node:
        node.wait_ready()
        assert "ran a task" in health(environment)["cpu"]["found"]
        submit(own_redis, images, tmp_path, *map(photo, range(4)))
        wait_until(lambda: len(list(tmp_path.glob("at-*"))) == 3, "a batch waits at the gate")
        found = health(environment)["cpu"]
        assert (found["state"], "is busy and making progress" in found["found"]) == ("ok", True)
        (tmp_path / "open").touch()
        wait_until(lambda: len(list(tmp_path.glob("at-*"))) == 4, "it goes on")


def test_node_whose_engine_never_returns_is_unhealthy(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    """Its leases are renewed all the time, by another thread."""
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__STALL_LIMIT="2")
    with WorkerProcess(environment, tmp_path, fake="Hangs") as node:
        node.wait_ready()
        submit(own_redis, images, tmp_path, photo(1), white())
        wait_until(lambda: any(report.problem for report in node.fleet.nodes()), "the node notices")
        assert "hangs: one batch has taken" in health(environment)["cpu"]["found"]
        assert "hangs" in cli(environment, "fleet").stderr
        os.kill(node.children()[0], signal.SIGKILL)


def white() -> bytes:
    """An image for which the fake engine hangs."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(file, "PNG")
    return file.getvalue()


def test_nodes_answer_whatever_the_others_do(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """One has a frozen child, one is frozen itself, one still loads, one can't load."""
    environment = environment_for(own_redis.url, tmp_path)
    with ExitStack() as stack:
        nodes = [WorkerProcess(environment, tmp_path, name=name) for name in ("well", "child", "parent")]
        well, child, parent = [stack.enter_context(node) for node in nodes]
        broken = stack.enter_context(WorkerProcess(environment, tmp_path, name="broken", fake="BrokenLoad"))
        for node in nodes:
            node.wait_ready()
        assert broken.process.wait(60) == 1
        frozen = child.children()[0]
        try:
            os.kill(frozen, signal.SIGSTOP)
            os.kill(parent.process.pid, signal.SIGSTOP)
            wait_until(lambda: any("does not run" in node.problem for node in well.fleet.nodes()), "the child is missed")
            found = health(environment)
            assert {name: finding["state"] for name, finding in found.items()} == {
                **dict.fromkeys(("child", "parent", "broken"), "failed"),
                "well": "ok",
            }
            assert "the weights are not there" in found["broken"]["found"]
            assert health(environment, "--node", "well").keys() == {"well"}
            parent.age()
            assert "has stopped reporting" in health(environment, "--node", "parent")["parent"]["found"]
        finally:
            os.kill(parent.process.pid, signal.SIGCONT)
            os.kill(frozen, signal.SIGCONT)
        wait_until(lambda: not any(node.problem for node in well.fleet.nodes() if not node.gone), "all is well again")
        assert health(environment, "--node", "child")["child"]["state"] == "ok"


def test_node_that_loads_says_so(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    environment = environment_for(own_redis.url, tmp_path)
    with WorkerProcess(environment, tmp_path, fake="SlowLoad") as node:
        wait_until(node.fleet.nodes, "it has a name")
        assert "is still loading" in health(environment)["cpu"]["found"]
        assert health(environment, "--node", "other")["no node other is running on this host"]["state"] == "failed"
