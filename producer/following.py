"""Follow a job from the command line: `imagemill watch`, `imagemill retry`, `--wait`, and progress bars."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn, TypeAlias, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from imagemill.producer.lazy_commands import INTERRUPTED
from imagemill.producer.terminal import counted, make_console, outcome, say
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.messages import ItemResult, JobState, JobStatus
from imagemill.shared.plain_text import harmless
from imagemill.shared.quality import flags_of
from imagemill.shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from imagemill.producer.client import Client

T = TypeVar("T")
Connect: TypeAlias = "Callable[[Settings], Client]"


FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds between attempts to reach Redis again."""


@click.command()
@click.argument("job")
@click.pass_obj
def watch(connect: Connect, job: str) -> None:
    """Show a job's progress and failures until it ends."""
    with connect(load_settings()) as client:
        Following(job, make_console(stderr=True), each=True).to_the_end(client)


@click.command()
@click.argument("job")
@click.option("--wait", is_flag=True, help="Show progress until the job ends.")
@click.pass_obj
def retry(connect: Connect, job: str, wait: bool) -> None:
    """Queue a job's failed, expired and cancelled images again."""
    out = make_console(stderr=True)
    with connect(load_settings()) as client:
        count, last = client.retry(job), client.status(job)
        if count:
            say(out, f"{counted(count, 'image')} queued again; follow with `imagemill watch {job}`")
        else:
            say(out, f"nothing to retry: job {job} {outcome(last)}")
        if wait:
            Following(job, out, last=last).to_the_end(client)


class Outage:
    """Waits until Redis responds again, longer each time, and says so once. For `Client.watch` and `Client.results`.

    If Redis has not been `reached` before, its URL may be wrong, and the error is raised.
    """

    def __init__(self, out: Console, *, reached: bool = False) -> None:
        self._out, self._reached, self._tries = out, reached, 0

    def __call__(self, error: BrokerUnavailable) -> None:
        """Wait before the next attempt."""
        if not self._reached:
            raise error
        if not self._tries:
            say(self._out, f"{error.message.rstrip('.')}; trying again until it responds", "yellow")
        time.sleep(min(FIRST_PAUSE * 2**self._tries, LONGEST_PAUSE))
        self._tries = min(self._tries + 1, 16)

    def between(self, rows: Iterable[T]) -> Iterator[T]:
        """The same rows; each that arrives ends an outage."""
        for row in rows:
            self.over()
            yield row

    def over(self) -> None:
        """Redis has responded."""
        if self._tries:
            say(self._out, "Redis responds again")
        self._reached, self._tries = True, 0


class Following:
    """Follows a job until it ends: its progress, its failures, its outcome and what to do next.

    Failures are shown `each` as it happens, or at the end, counted by code. `last` is the latest known status of the job.
    """

    def __init__(self, job: str, out: Console, *, each: bool = False, last: JobStatus | None = None) -> None:
        self._job, self._out, self._each = job, out, each
        self.last = last
        self._notable: dict[int, ItemResult] = {}  # failed and flagged images; a retried image is reported more than once

    def to_the_end(self, client: Client, *, as_json: bool = False, also: Mapping[str, object] = {}) -> NoReturn:
        """Exit with 0 if every image is done, with 1 otherwise, after Ctrl-C with 130.

        With `as_json`, the latest known status comes last on stdout, with what it is to say `also`, whatever has ended this.
        """
        try:
            last = self.follow(client)
            code = 0 if last.state == "done" and not last.failed else 1
        except KeyboardInterrupt:
            job = self._job
            say(self._out, f"the job continues; follow it with `imagemill watch {job}`, stop it with `imagemill cancel {job}`")
            code = INTERRUPTED
        finally:
            if as_json and self.last is not None:
                status = self.last.model_dump(mode="json", include={"job", "state", "total", "done", "failed", "seconds"})
                click.echo(json.dumps({**status, **also}))
        sys.exit(code)

    def follow(self, client: Client) -> JobStatus:
        """Show everything; the final status."""
        outage = Outage(self._out, reached=self.last is not None)
        with Board(self._out) as board:
            for status, results in outage.between(client.watch(self._job, lost=outage)):
                self.last = status
                board.show(status)
                for result in results:
                    self._note(result)
        say(self._out, f"job {self._job} {outcome(status)}")
        if status.failed:
            self._tell_failures(status)
        if flagged := sum(result.state == "done" for result in self._notable.values()):
            say(self._out, f"{counted(flagged, 'image')} flagged by the check: `imagemill results {self._job} --flagged`")
        return status

    def _note(self, result: ItemResult) -> None:
        if result.state == "failed" and self._each:
            say(self._out, f"image {result.index}: {result.code}: {result.message}", "red")
        if result.state == "failed" or flags_of(result.notes):
            self._notable[result.index] = result
        else:
            self._notable.pop(result.index, None)

    def _tell_failures(self, last: JobStatus) -> None:
        failed = [result for result in self._notable.values() if result.state == "failed"]
        late = last.until is not None and last.ended is not None and last.ended >= last.until  # expired images have no result
        if not self._each:
            self._count_by_code(failed, last.failed, late)
        retryable = late or any(result.retryable for result in failed)
        again = f"; try again: `imagemill retry {self._job}`" if retryable else ""
        say(self._out, f"reasons: `imagemill results {self._job} --failed`{again}")

    def _count_by_code(self, failed: list[ItemResult], total: int, late: bool) -> None:
        codes = Counter(result.code for result in failed)
        for code, count in codes.most_common():
            first = min((result for result in failed if result.code == code), key=lambda result: result.index)
            example = f"image {first.index}: {first.message}"
            say(self._out, f"  {code}: {counted(count, 'image')}, {'such as ' if count > 1 else ''}{example}", "red")
        if others := total - len(failed):
            rest = (
                f"{counted(others, 'image')} that expired or are duplicates"
                if late
                else f"{counted(others, 'duplicate')} of these"
            )
            say(self._out, f"  and {rest}", "red")


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
            description=f"{escape(harmless(name))} [dim]{escape(harmless(status.why or status.state))}[/dim]",
            completed=ended,
            failed=f"{status.failed:,} failed" if status.failed else "",
        )


class _Rate(ProgressColumn):
    """Recent images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="dim")
