"""`imagemill watch`, `retry` and `--wait` against a real Redis."""

from __future__ import annotations

import pytest

from tests.ledgers import Ledger
from tests.unit.producer.jobs import GOOD, NUMBERED, STYLIZE, Checked, Interrupted, Invoke, Worked, submitted, work


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


def test_retry_does_nothing_when_no_image_failed(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, GOOD)
    work(ledger, job)
    result = imagemill("retry", job, "--wait")
    assert result.exit_code == 0
    assert "nothing to retry" in result.stderr
