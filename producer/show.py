"""What the command line shows to people: messages, tables and progress, with colour only on a terminal."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from imagemill.producer.report import duration
from imagemill.producer.sources import BadRow
from imagemill.shared.messages import ENDED, ItemResult, JobState, JobStatus, Node
from imagemill.shared.quality import flags_of

MOST_BAD_ROWS = 20
STYLES = {"done": "green", "cancelled": "yellow", "running": "cyan", "finishing": "cyan"}


def make_console(*, stderr: bool) -> Console:
    """A console for one of the two streams; where it is no terminal, lines are not folded at 80 columns."""
    console = Console(stderr=stderr, highlight=False, emoji=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, emoji=False, width=200)


def plain(text: str, style: str = "") -> Text:
    """Text from strangers: no markup, and no control characters that could steer a terminal."""
    return Text(
        "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text), style=style
    )


def say(out: Console, text: str, style: str = "") -> None:
    """One line."""
    out.print(plain(text, style), soft_wrap=True)


def bad_rows(out: Console, rows: Sequence[BadRow], count: int) -> None:
    """The first of `count` rows that can't be used, each with its place and reason, then how many more there are."""
    say(out, "rows that can't be used:", "yellow")
    for row in rows[:MOST_BAD_ROWS]:
        say(out, f"  {row.place}: {row.reason}" + (f": {row.text}" if row.text else ""))
    if count > MOST_BAD_ROWS:
        say(out, f"  and {count - MOST_BAD_ROWS:,} more")


def counted(number: int, word: str) -> str:
    """`1 image`, `5 images`."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def outcome(status: JobStatus) -> str:
    """One sentence about how a job is or went."""
    text = f"{status.state}: {status.done:,} of {counted(status.total, 'image')} done"
    if status.failed:
        text += f", {status.failed:,} failed"
    if status.over and status.seconds > 0:
        text += f", in {duration(status.seconds)} ({status.done / status.seconds:.2f} images/s)"
    return text


def jobs_table(jobs: Sequence[JobStatus], unserved: Collection[str] = ()) -> Table:
    """Jobs, one per row, as they are given; `unserved` are those that no worker can take."""
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
            Text(f"{job.failed:,}", style="red" if job.failed else ""),
            duration(job.seconds),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created)),
        )
    return table


def status_table(status: JobStatus, unserved: Collection[str] = ()) -> Table:
    """One job, one fact per row."""
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    facts: list[tuple[str, str | Text]] = [
        ("job", status.job),
        ("operation", f"{status.operation} ({status.engine})"),
        ("state", _state(status, unserved)),
        (
            "images",
            f"{status.total:,}" + (f", {counted(status.duplicates, 'duplicate')} among them" if status.duplicates else ""),
        ),
        ("done", f"{status.done:,}"),
        ("failed", Text(f"{status.failed:,}", style="red" if status.failed else "")),
        ("priority", status.priority),
        ("output", plain(status.output)),
        ("time", duration(status.seconds)),
    ]
    for name, value in facts:
        table.add_row(name, value)
    return table


def fleet_table(nodes: Sequence[Node], memory: Mapping[str, tuple[float, int]]) -> Table:
    """Worker nodes, one per row; `memory` has of GPU nodes the highest share in use, and how often it was above 90 %."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("node", no_wrap=True)
    table.add_column("device", no_wrap=True)
    table.add_column("children", justify="right")
    table.add_column("state", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    table.add_column("offers", overflow="fold")
    for node in nodes:
        offers = sorted({queue.removeprefix("imagemill.") for queue in node.queues if not queue.endswith((".high", ".low"))})
        state = Text("ready", style="green") if node.ready else Text("loading", style="yellow")
        share, high = memory.get(node.node, (None, 0))
        held = "" if share is None else f"{share:.0%}" + (f", {high:,} above 90 %" if high else "")
        table.add_row(plain(node.node), node.device, str(node.children), state, held, plain(", ".join(offers)))
    return table


def summary_table(jobs: Iterable[JobStatus]) -> Table:
    """What several jobs came to: images, seconds and rate."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("operation", no_wrap=True)
    for name in ("images", "done", "failed", "seconds", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        rate = f"{job.done / job.seconds:.2f}" if job.seconds > 0 else ""
        failed = Text(f"{job.failed:,}", style="red" if job.failed else "")
        table.add_row(f"{job.operation} ({job.engine})", f"{job.total:,}", f"{job.done:,}", failed, f"{job.seconds:.1f}", rate)
    return table


@dataclass(frozen=True)
class Followed:
    """How a job went: its last status, how many images were flagged, and whether a failure is of a kind that may pass."""

    status: JobStatus
    flagged: int
    retryable: bool


def follow(updates: Iterator[tuple[JobStatus, list[ItemResult]]], out: Console) -> Followed:
    """Show a job's progress and its failures as they come, until `updates` ends."""
    last: JobStatus | None = None
    latest: dict[int, ItemResult] = {}  # of those that failed or are flagged; after a retry there may be several of one
    with Board(out) as board:
        for last, results in updates:
            board.show(last)
            for result in results:
                if result.state == "failed":
                    board.tell(f"image {result.index}: {result.code}: {result.message}")
                if result.state == "failed" or flags_of(result.notes):
                    latest[result.index] = result
                else:
                    latest.pop(result.index, None)
    if last is None:
        raise RuntimeError("a watch gives at least one status")
    flagged = sum(result.state == "done" for result in latest.values())
    return Followed(last, flagged, any(result.retryable for result in latest.values()))


class Board:
    """One progress bar per job on a terminal; elsewhere a line at each tenth of a job."""

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
        self._tasks = {}  # type: ignore[var-annotated]  # job -> rich's TaskID

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def tell(self, text: str) -> None:
        """A line above the bars."""
        say(self._out, text, "red")

    def show(self, status: JobStatus) -> None:
        """The present state of one job."""
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
    """Images per second of late."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="dim")


def _state(job: JobStatus, unserved: Collection[str]) -> Text:
    if job.job in unserved:
        return Text(f"{job.state}, no worker for {job.lane}", style="yellow")
    return Text(job.state, style=STYLES.get(job.state, ""))
