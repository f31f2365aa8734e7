"""Follow a job from the command line: `imagemill watch`, `imagemill retry`, and `--wait`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import click
from rich.console import Console

from imagemill.producer import terminal
from imagemill.producer.lazy_commands import INTERRUPTED
from imagemill.producer.units import counted
from imagemill.shared.messages import JobStatus
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
        exit_with(follow(client, job, terminal.make_console(stderr=True)))


@click.command()
@click.argument("job")
@click.option("--wait", is_flag=True, help="Show progress until the job ends.")
@click.pass_obj
def retry(connect: Connect, job: str, wait: bool) -> None:
    """Queue a job's failed images again."""
    out = terminal.make_console(stderr=True)
    with connect(load_settings()) as client:
        count = client.retry(job)
        if count:
            terminal.say(out, f"{counted(count, 'image')} queued again; follow with `imagemill watch {job}`")
        else:
            terminal.say(out, f"nothing to retry: job {job} {terminal.outcome(client.status(job))}")
        if wait:
            exit_with(follow(client, job, out))


def follow(client: Client, job: str, out: Console) -> JobStatus:
    """Show a job's progress until it ends, then its outcome and what to do next. Ctrl-C exits with 130."""
    try:
        followed = terminal.follow(client.watch(job), out)
    except KeyboardInterrupt:
        terminal.say(out, f"the job continues; follow it with `imagemill watch {job}`, stop it with `imagemill cancel {job}`")
        sys.exit(INTERRUPTED)
    last = followed.status
    terminal.say(out, f"job {job} {terminal.outcome(last)}")
    if last.failed:
        again = f"; try again: `imagemill retry {job}`" if followed.retryable else ""
        terminal.say(out, f"reasons: `imagemill results {job} --failed`{again}")
    if followed.flagged:
        terminal.say(out, f"{counted(followed.flagged, 'image')} flagged by the check: `imagemill results {job} --flagged`")
    return last


def exit_with(last: JobStatus, as_json: bool = False) -> NoReturn:
    """Exit with 0 if every image is done, otherwise with 1."""
    if as_json:
        click.echo(last.model_dump_json(include={"job", "state", "total", "done", "failed", "seconds"}))
    sys.exit(0 if last.state == "done" and not last.failed else 1)
