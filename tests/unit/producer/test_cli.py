"""The command line against a real Redis: status, jobs, fleet, cancel, errors and help."""

from __future__ import annotations

import json
import re

import pytest

from imagemill.producer.client import Client
from imagemill.shared.fleet import Fleet
from imagemill.shared.messages import Node
from imagemill.shared.queues import queue_name
from imagemill.shared.settings import Settings
from tests.ledgers import Ledger
from tests.unit.producer.jobs import Invoke, submitted, work


def test_unreachable_redis_exits_with_3(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    result = imagemill("status", "260101-12345678")
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith("error (broker_unavailable): ")
    assert "secret" not in line


def test_invalid_setting_is_named_and_exits_with_2(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_EXPIRE_DAYS", "soon")
    result = imagemill("jobs")
    assert result.exit_code == 2
    assert "IMAGEMILL_EXPIRE_DAYS" in result.stderr


def test_unexpected_exceptions_propagate(imagemill: Invoke) -> None:
    def broken(settings: Settings) -> Client:
        raise ZeroDivisionError

    assert isinstance(imagemill("jobs", client=broken).exception, ZeroDivisionError)


def test_fleet_lists_nodes_and_jobs_without_a_worker(imagemill: Invoke, ledger: Ledger, fleet: Fleet) -> None:
    assert "no worker is running" in imagemill("fleet").stderr
    job = submitted(imagemill)
    assert json.loads(imagemill("status", job, "--json").stdout)["served"] is False
    assert "queued, no worker for opencv" in imagemill("jobs").stdout
    lacks = ("no model of the engine rembg is in /models: imagemill models pull u2net",)
    node = Node(node="cpu@x", host="x", pid=1, device="cpu", queues=(), children=2, ready=True, lacks=lacks)
    fleet.report_node(node)
    result = imagemill("fleet")
    assert "cpu@x" in result.stdout
    assert f"cpu@x: {lacks[0]}" in result.stderr
    assert re.search(rf"no worker can take \d+ jobs?: .*{job}", result.stderr)
    fleet.report_node(node.model_copy(update={"queues": (queue_name("stylize", "opencv"),), "lacks": ()}))
    fleet.report_memory("cpu@x", 0.95, 3)
    result = imagemill("fleet", "--json")
    assert job not in result.stderr
    (line,) = json.loads(result.stdout)
    assert (line["node"], line["memory"]) == ("cpu@x", [0.95, 3])
    work(ledger, job)
    assert json.loads(imagemill("jobs", "--json").stdout)[0]["served"] is True


def test_status_and_jobs_show_a_finished_job(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    work(ledger, job)
    shown = json.loads(imagemill("status", job, "--json").stdout)
    assert (shown["job"], shown["state"], shown["done"], shown["failed"]) == (job, "done", 3, 1)
    assert json.loads(imagemill("jobs", "--json").stdout)[0]["job"] == job
    assert job in imagemill("jobs").stdout
    assert "s3://results/out" in imagemill("status", job).stdout


@pytest.mark.parametrize("command", ["status", "watch", "results", "retry", "cancel", "report"])
def test_unknown_job_exits_with_2(imagemill: Invoke, command: str) -> None:
    result = imagemill(command, "260101-12345678")
    assert result.exit_code == 2
    assert result.stderr.startswith("error (job_not_found): ")
    assert "260101-12345678" in result.stderr


def test_cancel_ends_a_job(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    assert imagemill("cancel", job).exit_code == 0
    assert ledger.status(job).state in ("finishing", "cancelled")


def test_help_lists_all_commands(imagemill: Invoke) -> None:
    assert imagemill("--version").stdout.startswith("imagemill, version ")
    listed = imagemill("--help").stdout
    for name in ("demo", "submit", "status", "watch", "results", "retry", "cancel", "report", "jobs", "fleet"):
        assert f"  {name} " in listed
