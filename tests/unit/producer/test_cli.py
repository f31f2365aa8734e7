"""The command line against a real Redis: status, jobs, fleet, steering jobs, errors and help."""

from __future__ import annotations

import json
import re

import pytest

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.dead import DeadLetters
from imagemill.shared.fleet import Fleet
from imagemill.shared.settings import Settings
from tests.ledgers import Ledger
from tests.unit.producer.jobs import LANE, NUMBERED, Invoke, asked, node, submitted, work


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
    assert f"no node offers {LANE}" in imagemill("jobs").stdout
    lacks = ("no model of the engine rembg is in /models: imagemill models pull u2net",)
    faults = {LANE: "the model can't be opened"}
    fleet.report_node(node().model_copy(update={"lacks": lacks, "faults": faults}))
    assert f"no node offers {LANE}: out of service on cpu@x, the model can't be opened" in imagemill("status", job).stdout
    result = imagemill("fleet")
    assert f"cpu@x: {LANE} is out of service: the model can't be opened" in result.stderr
    assert "cpu@x" in result.stdout
    assert f"cpu@x: {lacks[0]}" in result.stderr
    assert re.search(rf"no worker can take \d+ jobs?: .*{job}", result.stderr)
    fleet.report_node(node(LANE))
    fleet.report_memory("cpu@x", 0.95, 3)
    for child in ("cpu@x/0", "cpu@x/1", "gone@x/0"):
        ledger.report_rate(LANE, child, 1.5)
    result = imagemill("fleet", "--json")
    assert job not in result.stderr
    (line,) = json.loads(result.stdout)
    assert (line["node"], line["memory"], line["lanes"], line["rates"]) == ("cpu@x", [0.95, 3], [LANE], {LANE: 3.0})
    assert f"{LANE} (3)" in imagemill("fleet").stdout
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


@pytest.mark.parametrize("command", ["status", "watch", "results", "retry", "cancel", "pause", "resume", "report"])
def test_unknown_job_exits_with_2(imagemill: Invoke, command: str) -> None:
    result = imagemill(command, "260101-12345678")
    assert result.exit_code == 2
    assert result.stderr.startswith("error (job_not_found): ")
    assert "260101-12345678" in result.stderr


def test_cancel_ends_a_job_at_once_unless_images_of_it_run(imagemill: Invoke, ledger: Ledger) -> None:
    waiting, running = submitted(imagemill), submitted(imagemill)
    assert f"job {waiting} cancelled: 0 of 4 images done" in imagemill("cancel", waiting).stderr
    ledger.end_job(waiting, None)
    asked(ledger, images=1)
    assert f"job {running} running: 0 of 4 images done; being cancelled" in imagemill("cancel", running).stderr


def test_pause_resume_and_priority_steer_a_job(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    assert f"job {job} paused: 0 of 4 images done\n" in imagemill("pause", job).stderr
    assert json.loads(imagemill("status", job, "--json").stdout)["why"] == "paused"
    assert asked(ledger) == "none"
    assert f"job {job} queued: 0 of 4 images done\n" in imagemill("resume", job).stderr
    assert f"job {job}, now of high priority, queued: " in imagemill("priority", job, "high").stderr
    assert ledger.status(job).priority == "high"
    assert imagemill("priority", job, "urgent").exit_code == 2


@pytest.mark.parametrize("command", [("pause",), ("resume",), ("priority", "low")], ids=["pause", "resume", "priority"])
def test_job_that_is_over_can_not_be_steered(imagemill: Invoke, ledger: Ledger, command: tuple[str, ...]) -> None:
    job = submitted(imagemill)
    work(ledger, job)
    result = imagemill(command[0], job, *command[1:])
    assert result.exit_code == 2
    assert f"job {job} is done; only waiting or running jobs can be " in result.stderr


def test_status_and_jobs_explain_the_order(imagemill: Invoke, ledger: Ledger, fleet: Fleet) -> None:
    fleet.report_node(node(LANE))
    first, second = submitted(imagemill, NUMBERED, "--owner", "ann"), submitted(imagemill, NUMBERED, "--owner", "ann")
    urgent = submitted(imagemill, NUMBERED, "--priority", "high")
    ledger.report_rate(LANE, "cpu@x/0", 5)
    ledger.tend()
    shown = {job["job"]: job for job in json.loads(imagemill("jobs", "--json").stdout)}
    assert [(shown[job]["position"], shown[job]["ahead"]) for job in (urgent, first, second)] == [(0, 0), (1, 30), (2, 60)]
    assert shown[second]["why"] == "behind 60 images of other jobs"
    assert shown[second]["ends"] - shown[second]["starts"] == pytest.approx(3, abs=0.1), "30 images at 2 x 5 images/s"
    assert shown[second]["starts"] - shown[urgent]["starts"] == pytest.approx(6, abs=0.1)
    status = imagemill("status", second).stdout
    for text in ("ann", "2 jobs ahead, 60 images of other jobs before it ends", "behind 60 images of other jobs"):
        assert text in status
    assert "2 jobs" in imagemill("jobs").stdout


def test_help_lists_all_commands(imagemill: Invoke) -> None:
    assert imagemill("--version").stdout.startswith("imagemill, version ")
    listed = imagemill("--help").stdout
    for name in ("demo", "submit", "status", "watch", "results", "retry", "cancel", "pause", "resume", "priority", "report"):
        assert f"  {name} " in listed


def test_jobs_lists_what_was_set_aside(imagemill: Invoke, redis_server: EmbeddedRedis) -> None:
    letters = DeadLetters(redis_server.url)
    letters.add("imagemill:nodes", "not \x1b[31mJSON", b"null")
    letters.close()
    shown = imagemill("jobs", "--dead").stdout
    assert "imagemill:nodes" in shown
    assert "\x1b" not in shown
    assert json.loads(imagemill("jobs", "--dead", "--json").stdout)[0]["content"] == "null"


def test_errors_can_not_steer_the_terminal(imagemill: Invoke) -> None:
    result = imagemill("status", "x\x1b[2J\u202e\n")
    assert result.exit_code == 2
    assert "x\ufffd[2J\ufffd\ufffd not found" in result.stderr
