"""Logs of real nodes: every line is JSON, and together they tell the story of a job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.log_fields import trace_id
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import cli, spec
from tests.services.images import ImageServer, answers
from tests.workers import ROOT, WorkerProcess, wait_until

pytestmark = pytest.mark.integration


def json_lines(log: Path) -> list[dict[str, Any]]:
    """All lines of a log, each of which must be JSON and say where it is from."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        assert {"time", "level", "logger", "pid", "message", "node"} <= line.keys(), line
        assert ("job" in line) == ("trace_id" in line), line
    return lines


def test_two_nodes_log_json_only_and_tell_the_story_of_a_job(
    own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path
) -> None:
    """Through a start, work, a killed child, failures, a restart of Redis and a stop."""
    images.routes |= {f"/{number}.png": photo(number) for number in range(4)}
    images.routes |= {"/none.png": answers(404), "/slow.png": images.hang}
    settings = {"IMAGEMILL_LOG_JSON": "true", "IMAGEMILL_WORKER__OPERATIONS": '["stylize"]'}
    environment = environment_for(own_redis.url, tmp_path, **settings)
    paths = [*(f"/{number}.png" for number in range(4)), "/none.png", "/slow.png"]
    rows = [SourceRow(path, {"source": images.url(path)}) for path in paths]
    one, two = WorkerProcess(environment, tmp_path, name="one"), WorkerProcess(environment, tmp_path, name="two")
    with client_for(own_redis.url) as client:
        with one, two:
            one.wait_ready()
            two.wait_ready()
            job = client.submit(rows, spec("stylize", tmp_path)).job
            other = client.submit(rows[:1], spec("stylize", tmp_path)).job
            wait_until(lambda: client.status(job).failed == 1 and client.status(job).done == 4, "all but one are done")
            wait_until(lambda: len(at_work(one, two, job)) == 1, "one child has the last image")
            (victim,) = at_work(one, two, job)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: "child died" in one.log.read_text() + two.log.read_text(), "the death is logged")
            own_redis.stop()
            own_redis.start()
            images.routes["/slow.png"] = photo(9)
            images.released.set()
            wait_until(lambda: client.status(job).over and client.status(other).over, "the jobs are over")
        lines = json_lines(one.log) + json_lines(two.log)
    about = [line for line in lines if line.get("job") == job]
    assert {line["trace_id"] for line in about} == {trace_id(job)}
    assert all(line["logger"].startswith("imagemill.") for line in about)
    assert any(line["logger"].startswith("celery") for line in lines)
    assert {line["node"].partition("@")[0] for line in lines} == {"one", "two"}
    (failed,) = [line for line in about if line["message"] == "image failed"]
    assert (failed["code"], failed["item"][:6], "share" in failed) == ("not_found", "000004", True)

    told = cli(environment, "logs", job, str(one.log), str(two.log))
    assert told.returncode == 0, told.stderr
    story = ["job begun", "share begun", "image failed", "child died", "share begun", "share done", "job over"]
    position = 0
    for event in story:
        position = told.stdout.index(event, position)
    assert other not in told.stdout
    merged = [json.loads(line) for line in cli(environment, "logs", "--json", job, str(tmp_path / "*.log")).stdout.splitlines()]
    assert [line["time"] for line in merged] == sorted(line["time"] for line in merged)


def at_work(one: WorkerProcess, two: WorkerProcess, job: str) -> set[int]:
    """Children with a share of the job that is not done."""
    lines = [json.loads(line) for node in (one, two) for line in node.log.read_text().splitlines()]
    shares = [(line["message"], line["pid"], line["share"]) for line in lines if line.get("job") == job and "share" in line]
    ended = {(pid, share) for message, pid, share in shares if message == "share done"}
    return {pid for message, pid, share in shares if message == "share begun" and (pid, share) not in ended}


@pytest.mark.parametrize("flags", [["--gpu", "0"], ["--cpu", "--operations", "engraving"], ["--cpu"]])
def test_node_that_cannot_start_says_so_in_json(flags: list[str], tmp_path: Path) -> None:
    wrong = {"IMAGEMILL_LOG_LEVEL": "loud"} if flags == ["--cpu"] else {"CUDA_VISIBLE_DEVICES": ""}
    environment = environment_for("redis://127.0.0.1:1", tmp_path, IMAGEMILL_LOG_JSON="true", **wrong)
    done = cli(environment, "worker", *flags)
    (line,) = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert (done.returncode, line["level"], line["message"]) == (2, "CRITICAL", "the node can't start")
    assert line["reason"]


def test_banner_of_the_celery_command_is_json(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_LOG_JSON="true")
    command = [sys.executable, "-m", "celery", "-A", "imagemill.worker.app", "worker", "--concurrency", "1", "-n", "own@host"]
    log = tmp_path / "own.log"
    with log.open("ab") as file, subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file) as node:
        wait_until(lambda: "node ready" in log.read_text() or node.poll() is not None, "the node is ready")
        node.terminate()
    messages = [line["message"] for line in json_lines(log)]
    assert any("[queues]" in message for message in messages)
    assert "worker: Warm shutdown (MainProcess)" in messages
