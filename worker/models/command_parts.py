"""What the `imagemill models` commands share: progress bars, missing packages, variants of ONNX files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from imagemill.shared.errors import MissingExtra
from imagemill.worker.models.files import Kind, variant_record

PREPARED: dict[Kind, dict[str, str]] = {
    "fp32": {
        "made": "the file is in half precision; made a variant in single precision for CPUs ({reason})",
        "refused": "the file is in half precision and can't be converted, so CPUs run it slowly, if at all ({reason})",
        "killed": "precision not checked: the trial was killed, perhaps out of memory ({again} to retry)",
    },
    "dynamic": {
        "made": "the batch axis was fixed at 1; made a variant that takes batches ({reason})",
        "refused": "the batch axis stays fixed at 1, images run one by one ({reason})",
        "killed": "batch axis not checked: the trial was killed, perhaps out of memory ({again} to retry)",
    },
}
"""What to say about each outcome of making a variant."""


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


def prepare_variants(name: str, path: Path, output: str | None = None, *, again: str = "pull again") -> None:
    """Make the variants of an ONNX file that nodes need: in single precision for CPUs, and with a free batch axis for GPUs.

    `output` names the output that nodes read; None stands for the first. Without onnx, or if a graph can't be changed, nodes
    run the file as it is. `again` says how to retry.
    """
    before = {kind: variant_record(path, kind) for kind in PREPARED}
    try:
        from imagemill.worker.models import batch_axis, single_precision
        from imagemill.worker.models.trials import Outcome, tried

        outcomes: dict[Kind, Outcome] = {
            "fp32": tried(path, "fp32", single_precision.make, output),
            "dynamic": tried(path, "dynamic", batch_axis.make, output),
        }
    except ModuleNotFoundError as error:
        hint = f"pip install 'imagemill[rembg]', then {again}"
        click.echo(f"{name}: precision and batch axis not checked: {error.name} is not installed ({hint})", err=True)
        return
    for kind, outcome in outcomes.items():
        record = variant_record(path, kind)
        if outcome in PREPARED[kind] and (record != before[kind] or outcome == "killed"):
            click.echo(f"{name}: {PREPARED[kind][outcome].format(reason=record.get('reason'), again=again)}")
