"""Messages and tables on the terminal. Colour is used only where the stream is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Column, Table
from rich.text import Text

from imagemill.producer.sources import BadRow
from imagemill.producer.times import brief, written
from imagemill.shared.messages import DeadLetter, JobStatus, Node
from imagemill.shared.plain_text import harmless

MOST_BAD_ROWS = 20
STYLES = {
    "done": "green",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "running": "cyan",
    "finishing": "cyan",
}


def make_console(*, stderr: bool) -> Console:
    """A console on stdout or stderr. If the stream is not a terminal, lines do not wrap at 80 columns."""
    console = Console(stderr=stderr, highlight=False, emoji=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, emoji=False, width=200)


def plain(text: str, style: str = "") -> Text:
    """Untrusted text: markup is printed literally, and what could steer a terminal is replaced."""
    return Text(harmless(text), style=style)


def say(out: Console, text: str, style: str = "") -> None:
    """Print one line."""
    out.print(plain(text, style), soft_wrap=True)


def warn(out: Console, warnings: Iterable[str], advice: str | None = None) -> None:
    """Print what has no effect on a job, and what to do so that nodes can work on it, if anything."""
    for warning in (*warnings, *([] if advice is None else [advice])):
        say(out, f"warning: {warning}", "yellow")


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
    """List the first invalid rows with place, reason and text, then how many more of the `count` there are."""
    say(out, "invalid rows:", "yellow")
    for row in rows[:MOST_BAD_ROWS]:
        say(out, f"  {row.place}: {row.reason}" + (f": {row.text}" if row.text not in row.reason else ""))
    if count > MOST_BAD_ROWS:
        say(out, f"  and {count - MOST_BAD_ROWS:,} more")


def outcome(status: JobStatus) -> str:
    """A job's progress or result in one line."""
    text = f"{status.state}: {status.done:,} of {counted(status.total, 'image')} done"
    if status.failed:
        text += f", {status.failed:,} failed"
    if status.over and status.seconds > 0:
        text += f", in {duration(status.seconds)} ({status.done / status.seconds:.2f} images/s)"
    return text if status.why in (None, status.state) else f"{text}; {status.why}"


def jobs_table(jobs: Sequence[JobStatus]) -> Table:
    """One job per row, in the given order. Columns about owners and waiting are left out where they would be empty."""
    wrapped = [Column(name, overflow="fold") for name in ("operation", "owner", "state")]
    numbers = _columns("images", "done", "failed", "waiting", "running", "ahead", "time", justify="right")
    columns = [*_columns("job"), *wrapped, *numbers, Column("submitted", overflow="fold"), Column("expected", overflow="fold")]
    optional = ("owner", "waiting", "running", "ahead", "expected")
    rows = [_cells(job) for job in jobs]
    kept = [place for place, column in enumerate(columns) if column.header not in optional or any(row[place] for row in rows)]
    table = Table(*(columns[place] for place in kept), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    return table


def dead_table(letters: Sequence[DeadLetter]) -> Table:
    """One entry that was set aside per row."""
    columns = (Column("when", no_wrap=True), *(Column(name, overflow="fold") for name in ("where", "reason", "content")))
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for letter in letters:
        table.add_row(brief(letter.time), plain(letter.where), plain(letter.reason), plain(letter.content[:200]))
    return table


def _cells(job: JobStatus) -> list[str | Text]:
    """A job's row with all columns."""
    state = job.state if job.why in (None, job.state) else f"{job.state}, {job.why}"
    ahead = "" if job.position is None else "next" if job.position == 0 else counted(job.position, "job")
    begins = brief(job.starts) if job.starts and not job.over else ""
    ends = f"to {brief(job.ends)}" if job.ends and not job.over else ""
    return [
        *(
            plain(job.job),
            plain(f"{job.operation} ({job.engine})"),
            plain(job.owner or ""),
            plain(state, STYLES.get(job.state, "")),
        ),
        *(f"{job.total:,}", f"{job.done:,}", _failures(job)),
        *(f"{number:,}" if number else "" for number in (job.waiting, job.running)),
        *(ahead, duration(job.seconds), brief(job.created), f"{begins} {ends}".strip()),
    ]


def status_table(status: JobStatus) -> Table:
    """One job, one property per row; what does not apply is left out."""
    position = None
    if status.position is not None:
        position = f"{counted(status.position, 'job')} ahead" if status.position else "next"
        position += f", {counted(status.ahead, 'image')} of other jobs before it ends" if status.ahead else ""
    duplicates = f", including {counted(status.duplicates, 'duplicate')}" if status.duplicates else ""
    rows: list[tuple[str, str | Text | None]] = [
        ("job", plain(status.job)),
        ("operation", plain(f"{status.operation} ({status.engine})")),
        ("owner", plain(status.owner) if status.owner else None),
        ("state", Text(status.state, style=STYLES.get(status.state, ""))),
        ("why it is waiting", plain(status.why) if status.why else None),
        ("images", f"{status.total:,}{duplicates}"),
        ("done", f"{status.done:,}"),
        ("failed", _failures(status)),
        ("running", None if status.over else f"{status.running:,}"),
        ("waiting", None if status.over else f"{status.waiting:,}"),
        ("position", position),
        ("priority", status.priority),
        ("submitted", written(status.created)),
        ("starts", written(status.starts) if status.starts else None),
        ("ends", f"about {written(status.ends)}" if status.ends else None),
        ("deadline", written(status.until) if status.until else None),
        ("output", plain(status.output)),
        ("time", duration(status.seconds)),
    ]
    table = Table(Column(style="dim"), Column(overflow="fold"), box=None, show_header=False)
    for name, value in rows:
        if value is not None:
            table.add_row(name, value)
    return table


def fleet_table(
    nodes: Sequence[Node], memory: Mapping[str, tuple[float, int]], rates: Mapping[str, Mapping[str, float]]
) -> Table:
    """One worker node per row.

    `memory` holds each GPU node's peak share of memory and its count of batches above 90 %, `rates` each node's images per
    second by lane.
    """
    children, offers = Column("children", justify="right"), Column("offers (images/s)", overflow="fold")
    table = Table(*_columns("node", "device"), children, *_columns("state", "peak memory"), offers, box=box.SIMPLE_HEAD)
    for node in nodes:
        speeds = rates.get(node.node, {})
        lanes = [f"{lane} ({speeds[lane]:.3g})" if lane in speeds else lane for lane in sorted(node.lanes)]
        state = Text("ready", style="green") if node.ready else Text("loading", style="yellow")
        if node.problem:
            state = Text("failed" if node.gone else "stuck", style="red")
        share, high = memory.get(node.node, (None, 0))
        peak = "" if share is None else f"{share:.0%}" + (f", {high:,} above 90 %" if high else "")
        table.add_row(plain(node.node), plain(node.device), str(node.children), state, peak, plain(", ".join(lanes)))
    return table


def summary_table(jobs: Iterable[JobStatus]) -> Table:
    """Images, seconds and rate of several jobs."""
    numbers = _columns("images", "done", "failed", "seconds", "images/s", justify="right")
    table = Table(*_columns("operation"), *numbers, box=box.SIMPLE_HEAD)
    for job in jobs:
        rate = f"{job.done / job.seconds:.2f}" if job.seconds > 0 else ""
        name = f"{job.operation} ({job.engine})"
        table.add_row(plain(name), f"{job.total:,}", f"{job.done:,}", _failures(job), f"{job.seconds:.1f}", rate)
    return table


def _columns(*names: str, justify: JustifyMethod = "left") -> list[Column]:
    return [Column(name, justify=justify, no_wrap=True) for name in names]


def _failures(job: JobStatus) -> Text:
    return Text(f"{job.failed:,}", style="red" if job.failed else "")
