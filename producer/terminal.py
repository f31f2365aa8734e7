"""Messages, tables and progress on the terminal. Colour is used only where the stream is a terminal."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from imagemill.producer.sources import BadRow
from imagemill.producer.units import counted, duration
from imagemill.shared.messages import ENDED, ItemResult, JobState, JobStatus, Node
from imagemill.shared.quality import flags_of

MOST_BAD_ROWS = 20
STYLES = {"done": "green", "cancelled": "yellow", "running": "cyan", "finishing": "cyan"}


def make_console(*, stderr: bool) -> Console:
    """A console on stdout or stderr. If the stream is not a terminal, lines do not wrap at 80 columns."""
    console = Console(stderr=stderr, highlight=False, emoji=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, emoji=False, width=200)


def plain(text: str, style: str = "") -> Text:
    """Untrusted text: markup is printed literally, and control characters that could steer a terminal are replaced."""
    return Text(
        "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text), style=style
    )


def say(out: Console, text: str, style: str = "") -> None:
    """Print one line."""
    out.print(plain(text, style), soft_wrap=True)


def bad_rows(out: Console, rows: Sequence[BadRow], count: int) -> None:
    """List the first invalid rows with place and reason, then how many more of the `count` there are."""
    say(out, "invalid rows:", "yellow")
    for row in rows[:MOST_BAD_ROWS]:
        say(out, f"  {row.place}: {row.reason}" + (f": {row.text}" if row.text else ""))
    if count > MOST_BAD_ROWS:
        say(out, f"  and {count - MOST_BAD_ROWS:,} more")


def outcome(status: JobStatus) -> str:
    """A job's progress or result in one line."""
    text = f"{status.state}: {status.done:,} of {counted(status.total, 'image')} done"
    if status.failed:
        text += f", {status.failed:,} failed"
    if status.over and status.seconds > 0:
        text += f", in {duration(status.seconds)} ({status.done / status.seconds:.2f} images/s)"
    return text


def jobs_table(jobs: Sequence[JobStatus], unserved: Collection[str] = ()) -> Table:
    """One job per row, in the given order; `unserved` holds the ids of jobs that no worker can take."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("job", "operation", "engine", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("images", "done", "failed", "time", "started"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        table.add_row(
            job.job,
            job.operation,
            job.engine,
            _state(job, unserved),
            f"{job.total:,}",
            f"{job.done:,}",
            _failures(job),
            duration(job.seconds),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created)),
        )
    return table


def status_table(status: JobStatus, unserved: Collection[str] = ()) -> Table:
    """One job, one property per row."""
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    duplicates = f", including {counted(status.duplicates, 'duplicate')}" if status.duplicates else ""
    table.add_row("job", status.job)
    table.add_row("operation", f"{status.operation} ({status.engine})")
    table.add_row("state", _state(status, unserved))
    table.add_row("images", f"{status.total:,}{duplicates}")
    table.add_row("done", f"{status.done:,}")
    table.add_row("failed", _failures(status))
    table.add_row("priority", status.priority)
    table.add_row("output", plain(status.output))
    table.add_row("time", duration(status.seconds))
    return table


def fleet_table(nodes: Sequence[Node], memory: Mapping[str, tuple[float, int]]) -> Table:
    """One worker node per row; `memory` holds each GPU node's peak share of memory and its count of batches above 90 %."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("node", no_wrap=True)
    table.add_column("device", no_wrap=True)
    table.add_column("children", justify="right")
    table.add_column("state", no_wrap=True)
    table.add_column("peak memory", no_wrap=True)
    table.add_column("offers", overflow="fold")
    for node in nodes:
        offers = sorted({queue.removeprefix("imagemill.") for queue in node.queues if not queue.endswith((".high", ".low"))})
        state = Text("ready", style="green") if node.ready else Text("loading", style="yellow")
        share, high = memory.get(node.node, (None, 0))
        peak = "" if share is None else f"{share:.0%}" + (f", {high:,} above 90 %" if high else "")
        table.add_row(plain(node.node), node.device, str(node.children), state, peak, plain(", ".join(offers)))
    return table


def summary_table(jobs: Iterable[JobStatus]) -> Table:
    """Images, seconds and rate of several jobs."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("operation", no_wrap=True)
    for name in ("images", "done", "failed", "seconds", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        rate = f"{job.done / job.seconds:.2f}" if job.seconds > 0 else ""
        name = f"{job.operation} ({job.engine})"
        table.add_row(name, f"{job.total:,}", f"{job.done:,}", _failures(job), f"{job.seconds:.1f}", rate)
    return table


@dataclass(frozen=True)
class Followed:
    """A job's last status, how many of its images were flagged, and whether any failure is worth retrying."""

    status: JobStatus
    flagged: int
    retryable: bool


def follow(updates: Iterator[tuple[JobStatus, list[ItemResult]]], out: Console) -> Followed:
    """Show a job's progress and each failure as it is reported, until `updates` ends."""
    last: JobStatus | None = None
    latest: dict[int, ItemResult] = {}  # failed and flagged images; a retried image is reported more than once
    with Board(out) as board:
        for last, results in updates:
            board.show(last)
            for result in results:
                if result.state == "failed":
                    say(out, f"image {result.index}: {result.code}: {result.message}", "red")
                if result.state == "failed" or flags_of(result.notes):
                    latest[result.index] = result
                else:
                    latest.pop(result.index, None)
    if last is None:
        raise RuntimeError("no status was received")
    flagged = sum(result.state == "done" for result in latest.values())
    return Followed(last, flagged, any(result.retryable for result in latest.values()))


class Board:
    """Progress of jobs: one bar per job on a terminal, otherwise a line for every tenth of a job."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._lines: dict[str, tuple[int, JobState]] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[red]{task.fields[failed]}"),
            _Rate(),
            TimeRemainingColumn(),
            console=out,
            disable=not out.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, status: JobStatus) -> None:
        """Update one job."""
        if not self._out.is_terminal:
            self._show_line(status)
            return
        if status.job not in self._tasks:
            self._tasks[status.job] = self._progress.add_task("", total=status.total, failed="")
        self._progress.update(
            self._tasks[status.job],
            description=f"{status.operation} ({status.engine}) [dim]{status.state}[/dim]",
            total=status.total,
            completed=status.done + status.failed,
            failed=f"{status.failed:,} failed" if status.failed else "",
        )

    def _show_line(self, status: JobStatus) -> None:
        tenth = 10 * (status.done + status.failed) // max(status.total, 1)
        if self._lines.get(status.job) != (tenth, status.state):
            self._lines[status.job] = tenth, status.state
            if status.state not in ENDED:
                say(self._out, f"{status.operation} ({status.engine}) {outcome(status)}")


class _Rate(ProgressColumn):
    """Recent images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="dim")


def _state(job: JobStatus, unserved: Collection[str]) -> Text:
    if job.job in unserved:
        return Text(f"{job.state}, no worker for {job.lane}", style="yellow")
    return Text(job.state, style=STYLES.get(job.state, ""))


def _failures(job: JobStatus) -> Text:
    return Text(f"{job.failed:,}", style="red" if job.failed else "")
