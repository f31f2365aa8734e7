"""`imagemill watch`, `retry` and `--wait` against a real Redis."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from imagemill.producer import following
from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.following import Following
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.ledger import reading
from imagemill.shared.ledger.leasing import Share
from imagemill.shared.messages import ItemResult, JobStatus, Row
from imagemill.shared.settings import Settings
from tests.ledgers import Ledger
from tests.services.proxy import Proxy
from tests.unit.producer.jobs import (
    GOOD,
    MIXED,
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


def followed(updates: Iterable[Update], each: bool = True, **terminal: Any) -> str:
    """What is printed while a job with these updates is followed."""
    out = io.StringIO()
    client: Any = SimpleNamespace(watch=lambda *_, **__: updates)
    Following("260730-00000000", Console(file=out, **{"width": 200, **terminal}), each=each).follow(client)
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


# --- Redis is lost ---


class Cut:
    """A proxy in front of Redis that breaks down when told to, and works again as soon as somebody has noticed."""

    def __init__(self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxy, self.pauses = proxy, list[float]()
        monkeypatch.setattr(following.time, "sleep", self._wait)

    def _wait(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if len(self.pauses) % 3 == 0:  # the third attempt succeeds
            self.proxy.set("pass")

    def __call__(self) -> None:
        self.proxy.set("refuse")


@pytest.fixture
def cut(redis_server: EmbeddedRedis, imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cut]:
    """`imagemill` reaches Redis through this from now on."""
    with Proxy(redis_server.port) as proxy:
        monkeypatch.setenv("IMAGEMILL_REDIS_URL", proxy.url("redis", "/0"))
        yield Cut(proxy, monkeypatch)


def cut_off(cut: Cut, after: int) -> Callable[[Settings], Client]:
    """A client whose connection is lost after this many updates or rows, while the job is being done."""

    class CutOff(Worked):
        def watch(self, job: str, **more: Any) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
            for count, update in enumerate(Client.watch(self, job, every=0.01, **more), 1):
                if count == after:
                    with closing(Ledger(redis_of(cut))) as ledger:
                        work(ledger, job, self.outcome)
                    cut()
                yield update

        def results(self, job: str, **more: Any) -> Iterator[Row]:
            for count, row in enumerate(super().results(job, **more), 1):
                if count == after:
                    cut()
                yield row

    return CutOff


def redis_of(cut: Cut) -> str:
    return f"redis://127.0.0.1:{cut.proxy.target}/0"


def test_watch_survives_a_lost_connection_and_says_so_once(imagemill: Invoke, cut: Cut) -> None:
    result = imagemill("watch", submitted(imagemill), client=cut_off(cut, 1))
    assert result.exit_code == 1
    assert result.stderr.count("; trying again until it responds") == 1
    assert result.stderr.count("Redis responds again") == 1
    assert result.stderr.count("image 3: not_found") == 1
    assert "done: 3 of 4 images done, 1 failed" in result.stderr
    assert cut.pauses == [0.5, 1.0, 2.0]


def test_pauses_between_attempts_stay_below_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()
    monkeypatch.setattr(following.time, "sleep", pauses.append)
    outage = following.Outage(Console(file=io.StringIO()), reached=True)
    for _ in range(2000):
        outage(BrokerUnavailable("Redis: gone"))
    assert pauses[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert max(pauses) == 10.0


@pytest.mark.parametrize("command", [["watch", "x"], ["results", "x"], ["report", "x"]])
def test_wrong_address_of_redis_fails_at_once(imagemill: Invoke, cut: Cut, command: list[str]) -> None:
    cut()
    assert imagemill(*command).exit_code == 3
    assert cut.pauses == []


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_results_survive_a_lost_connection_without_gaps_or_repeats(
    imagemill: Invoke, cut: Cut, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(reading, "PACKS_PER_READ", 1)
    job = submitted(imagemill, "".join(f"https://example.com/{n}.jpg\n" for n in range(100)))
    right = imagemill("results", job, "--format", form).stdout
    for after in (1, 31, 32, 33, 99):
        result = imagemill("results", job, "--format", form, client=cut_off(cut, after))
        assert (result.exit_code, result.stdout) == (0, right)
        cut.proxy.set("pass")
    assert "trying again" in result.stderr or after == 99


def counts(stdout: str) -> tuple[str, int, int, int]:
    """The object on stdout, which is all that is there."""
    told = json.loads(stdout)
    assert set(told) == {"job", "state", "total", "done", "failed", "seconds", "advice", "warnings"}
    return told["state"], told["total"], told["done"], told["failed"]


def test_submit_wait_json_survives_a_lost_connection(imagemill: Invoke, cut: Cut) -> None:
    result = imagemill(*STYLIZE, "--wait", "--json", stdin=MIXED, client=cut_off(cut, 1))
    assert counts(result.stdout) == ("done", 4, 3, 1)
    assert result.stderr.startswith(f"job {json.loads(result.stdout)['job']}: 4 images queued")
    assert "trying again until it responds" in result.stderr
    assert "  not_found: 1 image, image 3: there is" in result.stderr
    assert result.exit_code == 1


def test_submit_wait_json_prints_its_object_after_ctrl_c(imagemill: Invoke) -> None:
    result = imagemill(*STYLIZE, "--wait", "--json", stdin=GOOD, client=Interrupted)
    assert counts(result.stdout) == ("queued", 3, 0, 0)
    assert result.exit_code == 130


def test_submit_wait_json_prints_its_object_after_ctrl_c_while_redis_is_gone(
    imagemill: Invoke, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Client):
        def watch(self, job: str, **more: Any) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
            cut()
            return super().watch(job, **more)

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", stop)
    result = imagemill(*STYLIZE, "--wait", "--json", stdin=GOOD, client=Gone)
    assert counts(result.stdout) == ("queued", 3, 0, 0)
    assert result.exit_code == 130


def test_submit_wait_json_prints_its_object_after_an_error(imagemill: Invoke, raw: Any) -> None:
    class Emptied(Client):
        def watch(self, job: str, **more: Any) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
            raw.flushall()
            return super().watch(job, **more)

    result = imagemill(*STYLIZE, "--wait", "--json", stdin=GOOD, client=Emptied)
    assert counts(result.stdout) == ("queued", 3, 0, 0)
    assert "error (job_not_found)" in result.stderr
    assert result.exit_code == 2


def test_job_that_is_queued_when_redis_is_lost_is_named(imagemill: Invoke, cut: Cut) -> None:
    class CutAfterSealing(Client):
        def _wake(self, *arguments: Any) -> Any:
            cut()
            return super()._wake(*arguments)

    result = imagemill(*STYLIZE, "--json", stdin=GOOD, client=CutAfterSealing)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["total"] == 3
    assert "no worker offers" not in result.stderr, "nobody knows"


# --- Ctrl-C ---


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


def test_wait_counts_failures_by_code() -> None:
    failures = [
        *(ItemResult(index=n, state="failed", code="not_found", message=f"no {n}\x1b") for n in (7, 3, 9)),
        ItemResult(index=4, state="failed", code="timeout", message="too slow", retryable=True),
        ItemResult(index=5, state="failed", code="timeout", message="too slow", retryable=True),
    ]
    again = ItemResult(index=5, state="done")  # a retry
    text = followed([(status(90, 5), failures), (status(95, 4, "done"), [again])], each=False)
    assert text.splitlines()[-4:] == [
        "job 260730-00000000 done: 95 of 100 images done, 4 failed, in 5.0 s (19.00 images/s)",
        "  not_found: 3 images, such as image 3: no 3\ufffd",
        "  timeout: 1 image, image 4: too slow",
        "reasons: `imagemill results 260730-00000000 --failed`; try again: `imagemill retry 260730-00000000`",
    ]
    text = followed([(status(93, 7, "done"), failures)], each=False)
    assert "  and 2 duplicates of these" in text


def test_progress_is_a_bar_on_a_terminal() -> None:
    text = followed(updates(), force_terminal=True, width=120)
    assert "━" in text
    assert "100/100" in text


def test_bar_shows_reasons_literally() -> None:
    why = status(5).model_copy(update={"why": "[blink]no[/blink]\x1b]0;x\x07"})
    text = followed([(why, [])], force_terminal=True, width=160)
    assert "[blink]no[/blink]\ufffd]0;x\ufffd" in text
