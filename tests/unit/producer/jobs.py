"""Jobs for tests of the command line, and a worker that processes them at once by writing to the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from click.testing import Result

from imagemill.producer.client import Client
from imagemill.shared.ledger.leasing import ManifestDue, Request, Share
from imagemill.shared.messages import Item, ItemResult, JobState, JobStatus, Node
from imagemill.shared.quality import Measures
from tests.ledgers import Ledger

Invoke = Callable[..., Result]
Outcome = Callable[[Item], ItemResult]

GOOD = "https://example.com/a.jpg\nhttps://example.com/b.jpg\nhttps://example.com/a.jpg\n"
MIXED = GOOD + "https://example.com/bad.jpg\n"
NUMBERED = "".join(f"https://example.com/{n}.jpg\n" for n in range(30))
LANE = "stylize.opencv"
STYLIZE = ("submit", "-", "--operation", "stylize", "--output", "s3://results/out")
STYLED = Measures(sharpness=500, kept=1, edges=0.8, look=(60, 0, 0, 20, 5, 5), before=(50, 0, 0, 20, 5, 5))


def submitted(imagemill: Invoke, rows: str = MIXED, *more: str) -> str:
    """Submit a list and return the job's id."""
    result = imagemill(*STYLIZE, *more, stdin=rows)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def plain(item: Item) -> ItemResult:
    """Every image is done, except those with `bad` in their URL."""
    if "bad" in item.source:
        return ItemResult(index=item.index, state="failed", code="not_found", message="there is \x1b[31mnothing", attempts=2)
    return ItemResult(index=item.index, state="done", output=f"s3://results/out/{item.index}.png")


def checked(item: Item) -> ItemResult:
    """Every image is done and measured; the third is flagged, the fifth is an outlier."""
    odd = STYLED.model_copy(update={"look": (60, 0, 40, 20, 5, 5)})
    notes = ("enlarged", "flag:cast") if item.index == 2 else ()
    output, measures = f"s3://results/out/{item.index}.png", odd if item.index == 4 else STYLED
    return ItemResult(index=item.index, state="done", output=output, notes=notes, quality=measures)


def asked(ledger: Ledger, lane: str = LANE, images: int = 8) -> Share | ManifestDue | str:
    """What a child without work is given."""
    return ledger.take(Request("w/0", [lane], {lane: images}))


def work(ledger: Ledger, job: str, outcome: Outcome = plain) -> None:
    """Do all work of a job's lane as a worker would, including manifests."""
    lane = ledger.status(job).lane
    while not isinstance(due := asked(ledger, lane), str):
        if isinstance(due, ManifestDue):
            ledger.end_job(due.job, f"s3://results/out/{due.job}/manifest.jsonl")
            continue
        for item in due.items:
            ledger.record(due.job, outcome(item))
        ledger.give_back(due, "w/0")


def node(*lanes: str, name: str = "cpu@x") -> Node:
    """A ready node of two children."""
    return Node(node=name, host="x", pid=1, device="cpu", lanes=lanes, children=2, ready=True)


def status(done: int, failed: int = 0, state: JobState = "running") -> JobStatus:
    """The status of a job of 100 images."""
    return JobStatus(
        job="260730-00000000",
        operation="stylize",
        engine="opencv",
        lane=LANE,
        state=state,
        total=100,
        done=done,
        failed=failed,
        duplicates=0,
        priority="normal",
        output="s3://b/p",
        created=0,
        seconds=5.0,
    )


class Worked(Client):
    """A client whose jobs are done as soon as they are watched."""

    outcome: Outcome = staticmethod(plain)

    def watch(self, job: str, **more: Any) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
        with closing(Ledger.of(self._settings)) as ledger:
            work(ledger, job, self.outcome)
        return super().watch(job, **more)


class Checked(Worked):
    """The same with measured images."""

    outcome = staticmethod(checked)


class Interrupted(Client):
    """A client that is interrupted with Ctrl-C while watching."""

    def watch(self, job: str, **more: Any) -> Iterator[tuple[JobStatus, list[ItemResult]]]:
        yield self.status(job), []
        raise KeyboardInterrupt
