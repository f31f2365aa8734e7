"""What the `imagemill models` commands share: progress bars, missing packages, the batch axis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from imagemill.shared.errors import MissingExtra
from imagemill.worker.models.files import variant_record


@contextmanager
def needing(extra: str, purpose: str) -> Iterator[None]:
    """Raise MissingExtra with the install command in place of ModuleNotFoundError for a missing library."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise  # a bug, not a missing library
        raise MissingExtra(f"{purpose} needs {error.name}, which is not installed: pip install 'imagemill[{extra}]'") from error


def progress_bar(*columns: Any) -> Progress:
    """A progress bar per task, shown only on a terminal: elsewhere it would fill logs."""
    console = Console(stderr=True, emoji=False, highlight=False)
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*shown, console=console, disable=not console.is_terminal)


def free_batch_axis(name: str, path: Path, again: str = "pull again") -> None:
    """Make a variant that takes batches; without onnx, or if a graph can't be changed, images run one by one.

    `again` is what to do to have it tried again.
    """
    before = variant_record(path, "dynamic")
    try:
        from imagemill.worker.models.batch_axis import free

        outcome = free(path)
    except ModuleNotFoundError as error:
        hint = f"pip install 'imagemill[rembg]', then {again}"
        click.echo(f"{name}: batch axis not checked: {error.name} is not installed ({hint})", err=True)
        return
    record = variant_record(path, "dynamic")
    messages = {
        "made": f"the batch axis was fixed at 1; made a variant that takes batches ({record.get('reason')})",
        "refused": f"the batch axis stays fixed at 1, images run one by one ({record.get('reason')})",
        "killed": f"batch axis not checked: the trial was killed, perhaps out of memory ({again} to retry)",
    }
    if outcome in messages and (record != before or outcome == "killed"):
        click.echo(f"{name}: {messages[outcome]}")
