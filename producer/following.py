"""Follow a job from the command line: `imagemill watch`, `imagemill retry`, `--wait`, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from imagemill.producer.lazy_commands import INTERRUPTED
from imagemill.producer.terminal import counted, make_console, outcome, say
from imagemill.shared.messages import ItemResult, JobState, JobStatus
from imagemill.shared.quality import flags_of
from imagemill.shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from imagemill.producer.client import Client

Connect: TypeAlias = "Callable[[Settings], Client]"


@click.command()
@click.argument("job")
@click.pass_obj
def watch(connect: Connect, job: str) -> None:
    """Show a job's progress and failures until it ends."""
    with connect(load_settings()) as client:
        exit_with(follow(client, job, make_console(stderr=True)))


@click.command()
@click.argument("job")
@click.option("--wait", is_flag=True, help="Show progress until the job ends.")
@click.pass_obj
def retry(connect: Connect, job: str, wait: bool) -> None:
    """Queue a job's failed, expired and cancelled images again."""
    out = make_console(stderr=True)
    with connect(load_settings()) as client:
        count = client.retry(job)
        if count:
            say(out, f"{counted(count, 'image')} queued again; follow with `imagemill watch {job}`")
        else:
            say(out, f"nothing to retry: job {job} {outcome(client.status(job))}")
        if wait:
            exit_with(follow(client, job, out))


def follow(client: Client, job: str, out: Console) -> JobStatus:
    """Show a job's progress and failures until it ends, then its outcome and what to do next. Ctrl-C exits with 130."""
    latest: dict[int, ItemResult] = {}  # failed and flagged images; a retried image is reported more than once
    try:
        with Board(out) as board:
            for last, results in client.watch(job):
                board.show(last)
                for result in results:
                    if result.state == "failed":
                        say(out, f"image {result.index}: {result.code}: {result.message}", "red")
                    if result.state == "failed" or flags_of(result.notes):
                        latest[result.index] = result
                    else:
                        latest.pop(result.index, None)
    except KeyboardInterrupt:
        say(out, f"the job continues; follow it with `imagemill watch {job}`, stop it with `imagemill cancel {job}`")
        sys.exit(INTERRUPTED)
    say(out, f"job {job} {outcome(last)}")
    if last.failed:
        late = last.until is not None and last.ended is not None and last.ended >= last.until  # expired images have no result
        retryable = late or any(result.retryable for result in latest.values())
        again = f"; try again: `imagemill retry {job}`" if retryable else ""
        say(out, f"reasons: `imagemill results {job} --failed`{again}")
    if flagged := sum(result.state == "done" for result in latest.values()):
        say(out, f"{counted(flagged, 'image')} flagged by the check: `imagemill results {job} --flagged`")
    return last


def exit_with(last: JobStatus, as_json: bool = False) -> NoReturn:
    """Exit with 0 if every image is done, otherwise with 1."""
    if as_json:
        click.echo(last.model_dump_json(include={"job", "state", "total", "done", "failed", "seconds"}))
    sys.exit(0 if last.state == "done" and not last.failed else 1)


class Board(Progress):
    """Progress of jobs: one bar per job on a terminal, otherwise a line for every tenth of a job."""

    def __init__(self, out: Console) -> None:
        failed = TextColumn("[red]{task.fields[failed]}")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), failed, _Rate(), TimeRemainingColumn()
        super().__init__(*columns, console=out, disable=not out.is_terminal)
        self._lines: dict[str, tuple[int, JobState]] = {}
        self._bars: dict[str, TaskID] = {}

    def show(self, status: JobStatus) -> None:
        """Update one job."""
        name, ended = f"{status.operation} ({status.engine})", status.done + status.failed
        if self.disable:
            line = 10 * ended // max(status.total, 1), status.state
            if self._lines.get(status.job) != line and not status.over:
                say(self.console, f"{name} {outcome(status)}")
            self._lines[status.job] = line
            return
        if status.job not in self._bars:
            self._bars[status.job] = self.add_task("", total=status.total, failed="")
        self.update(
            self._bars[status.job],
            description=f"{name} [dim]{status.why or status.state}[/dim]",
            completed=ended,
            failed=f"{status.failed:,} failed" if status.failed else "",
        )


class _Rate(ProgressColumn):
    """Recent images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="dim")
