"""Messages and tables on the terminal. Colour is used only where the stream is a terminal."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Column, Table
from rich.text import Text

from imagemill.producer.sources import BadRow
from imagemill.shared.messages import JobStatus, Node

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


def counted(number: int, word: str) -> str:
    """`1 image`, `5 images`."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


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
    numbers = _columns("images", "done", "failed", "time", "started", justify="right")
    table = Table(*_columns("job", "operation", "engine", "state"), *numbers, box=box.SIMPLE_HEAD)
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created))
        counts = f"{job.total:,}", f"{job.done:,}", _failures(job)
        table.add_row(job.job, job.operation, job.engine, _state(job, unserved), *counts, duration(job.seconds), started)
    return table


def status_table(status: JobStatus, unserved: Collection[str] = ()) -> Table:
    """One job, one property per row."""
    table = Table(Column(style="dim"), Column(overflow="fold"), box=None, show_header=False)
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
    children, offers = Column("children", justify="right"), Column("offers", overflow="fold")
    table = Table(*_columns("node", "device"), children, *_columns("state", "peak memory"), offers, box=box.SIMPLE_HEAD)
    for node in nodes:
        queues = sorted({queue.removeprefix("imagemill.") for queue in node.queues if not queue.endswith((".high", ".low"))})
        state = Text("ready", style="green") if node.ready else Text("loading", style="yellow")
        share, high = memory.get(node.node, (None, 0))
        peak = "" if share is None else f"{share:.0%}" + (f", {high:,} above 90 %" if high else "")
        table.add_row(plain(node.node), node.device, str(node.children), state, peak, plain(", ".join(queues)))
    return table


def summary_table(jobs: Iterable[JobStatus]) -> Table:
    """Images, seconds and rate of several jobs."""
    numbers = _columns("images", "done", "failed", "seconds", "images/s", justify="right")
    table = Table(*_columns("operation"), *numbers, box=box.SIMPLE_HEAD)
    for job in jobs:
        rate = f"{job.done / job.seconds:.2f}" if job.seconds > 0 else ""
        name = f"{job.operation} ({job.engine})"
        table.add_row(name, f"{job.total:,}", f"{job.done:,}", _failures(job), f"{job.seconds:.1f}", rate)
    return table


def _columns(*names: str, justify: JustifyMethod = "left") -> list[Column]:
    return [Column(name, justify=justify, no_wrap=True) for name in names]


def _state(job: JobStatus, unserved: Collection[str]) -> Text:
    if job.job in unserved:
        return Text(f"{job.state}, no worker for {job.lane}", style="yellow")
    return Text(job.state, style=STYLES.get(job.state, ""))


def _failures(job: JobStatus) -> Text:
    return Text(f"{job.failed:,}", style="red" if job.failed else "")
