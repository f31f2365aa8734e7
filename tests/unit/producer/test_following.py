"""`imagemill watch`, `retry` and `--wait` against a real Redis."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from imagemill.producer.following import follow
from imagemill.shared.ledger.leasing import Share
from imagemill.shared.messages import ItemResult, JobStatus
from tests.ledgers import Ledger
from tests.unit.producer.jobs import (
    GOOD,
    NUMBERED,
    STYLIZE,
    Checked,
    Interrupted,
    Invoke,
    Worked,
    asked,
    plain,
    status,
    submitted,
    work,
)

Update = tuple[JobStatus, list[ItemResult]]


def followed(updates: Iterable[Update], **terminal: Any) -> str:
    """What is printed while a job with these updates is followed."""
    out = io.StringIO()
    client: Any = SimpleNamespace(watch=lambda _: updates)
    follow(client, "260730-00000000", Console(file=out, **{"width": 200, **terminal}))
    return out.getvalue()


def test_watch_shows_failures_and_the_outcome(imagemill: Invoke) -> None:
    job = submitted(imagemill)
    result = imagemill("watch", job, client=Worked)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "image 3: not_found: there is" in result.stderr
    assert "\x1b" not in result.stderr
    assert "done: 3 of 4 images done, 1 failed" in result.stderr
    assert f"`imagemill results {job} --failed`\n" in result.stderr, "a retry can't help with not_found"


def test_watch_ends_with_the_number_of_flagged_images(imagemill: Invoke) -> None:
    job = submitted(imagemill, NUMBERED)
    result = imagemill("watch", job, client=Checked)
    assert result.exit_code == 0
    assert f"1 image flagged by the check: `imagemill results {job} --flagged`" in result.stderr


@pytest.mark.parametrize("command", [["watch"], ["submit", "--wait"]])
def test_ctrl_c_reports_that_the_job_continues(imagemill: Invoke, command: list[str]) -> None:
    job = submitted(imagemill)
    arguments = ["watch", job] if command == ["watch"] else [*STYLIZE, "--wait"]
    result = imagemill(*arguments, stdin=GOOD, client=Interrupted)
    assert result.exit_code == 130
    assert "the job continues; follow it with `imagemill watch" in result.stderr


def test_retry_queues_failed_images(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill)
    early = imagemill("retry", job)
    assert early.exit_code == 2
    assert "is still queued" in early.stderr
    work(ledger, job)
    assert "1 image queued again" in imagemill("retry", job).stderr
    assert ledger.status(job).state == "queued"
    work(ledger, job)
    assert imagemill("retry", job, "--wait", client=Worked).exit_code == 1


def test_watch_of_a_job_past_its_deadline_suggests_a_retry(imagemill: Invoke, ledger: Ledger, raw: Any) -> None:
    job = submitted(imagemill, NUMBERED, "--until", "1h")
    share = asked(ledger, images=4)
    assert isinstance(share, Share)
    raw.zadd("imagemill:alarms", {f"end {job}": 1})  # the hour is over
    raw.hset(f"imagemill:job:{job}", "until", 1)
    assert asked(ledger) == "none"
    for item in share.items:
        ledger.record(job, plain(item))
    ledger.give_back(share, "w/0")
    work(ledger, job)
    result = imagemill("watch", job)
    assert result.exit_code == 1
    assert "done: 4 of 30 images done, 26 failed" in result.stderr
    assert f"try again: `imagemill retry {job}`" in result.stderr
    rows = [json.loads(line) for line in imagemill("results", job, "--failed").stdout.splitlines()]
    assert {(row["state"], row["code"]) for row in rows} == {("failed", "expired")}
    assert "26 images queued again" in imagemill("retry", job).stderr
    work(ledger, job)
    assert ledger.status(job).done == 30


def test_retry_ends_a_pause_that_the_job_outlived(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, "https://example.com/bad.jpg\n")
    share = asked(ledger)
    assert isinstance(share, Share)
    imagemill("pause", job)
    assert ledger.status(job).state == "paused"
    ledger.record(job, plain(share.items[0]))
    ledger.give_back(share, "w/0")
    work(ledger, job)
    imagemill("retry", job)
    assert ledger.status(job).state == "queued"


def test_job_of_which_every_image_failed_ends_as_failed(imagemill: Invoke) -> None:
    result = imagemill("watch", submitted(imagemill, "https://example.com/bad.jpg\n"), client=Worked)
    assert result.exit_code == 1
    assert "failed: 0 of 1 image done, 1 failed" in result.stderr


def test_retry_does_nothing_when_no_image_failed(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, GOOD)
    work(ledger, job)
    result = imagemill("retry", job, "--wait")
    assert result.exit_code == 0
    assert "nothing to retry" in result.stderr


# --- progress ---


def updates() -> Iterator[Update]:
    for done in range(100):
        yield status(done), []
    yield status(99, 1), [ItemResult(index=7, state="failed", code="truncated", message="[bold]half[/bold] \x1b]0;x\x07")]
    yield status(99, 1, "done"), []


def test_progress_is_one_line_per_tenth_without_a_terminal() -> None:
    lines = followed(updates()).splitlines()
    assert len(lines) == 14  # ten tenths, the failure, all of them, the outcome, the hint
    assert "stylize (opencv) running: 10 of 100 images done" in lines[1]
    assert lines[-2].startswith("job 260730-00000000 done: 99 of 100 images done, 1 failed")


def test_failures_are_printed_literally_without_control_characters() -> None:
    assert "image 7: truncated: [bold]half[/bold] \ufffd]0;x\ufffd" in followed(updates())


def test_last_result_of_a_retried_image_counts() -> None:
    first = [
        ItemResult(index=1, state="failed", code="timeout", retryable=True),
        ItemResult(index=2, state="done", notes=("enlarged", "flag:blurred")),
        ItemResult(index=3, state="done", notes=("flag:cast", "flag:blurred")),
    ]
    again = [ItemResult(index=1, state="done"), ItemResult(index=2, state="done")]
    failed = ItemResult(index=4, state="failed", code="not_found")
    text = followed([(status(2, 1), first)])
    assert "2 images flagged" in text
    assert "try again: `imagemill retry 260730-00000000`" in text
    text = followed([(status(2, 1), first), (status(3, 1), [*again, failed])])
    assert "1 image flagged" in text
    assert "imagemill retry" not in text


def test_progress_is_a_bar_on_a_terminal() -> None:
    text = followed(updates(), force_terminal=True, width=120)
    assert "━" in text
    assert "100/100" in text
