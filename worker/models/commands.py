"""The `imagemill models` commands: list, pull, verify, quantize."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from imagemill.shared.errors import MissingExtra, UsageError
from imagemill.shared.options.base import nearest
from imagemill.shared.settings import WeightsSettings, load_settings
from imagemill.worker.models import download, files, repositories
from imagemill.worker.models.catalogue import CONVERTED, MODELS, REPOSITORIES, WEIGHTS, Repository, Weights
from imagemill.worker.models.checksums import read_json
from imagemill.worker.models.files import is_current, path_of, record_variant, required_file, variant, variant_record
from imagemill.worker.models.repositories import RECORD, folder_of

ENGINES = sorted({entry.engine for entry in WEIGHTS} | {entry.engine for entry in REPOSITORIES})
COLOURS = {"there": "green", "unconverted": "yellow", "unchecked": "yellow", "damaged": "red", "missing": "dim"}
OUTCOMES = {"present": "already there", "pulled": "pulled"}


@click.group()
def models() -> None:
    """List, pull, verify and quantise model files."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model.")
def list_models(as_json: bool) -> None:
    """List every model that imagemill can use, and the state of its files.

    `unchecked` files were not put there by `imagemill models pull`; `imagemill models verify` checks them. Nodes can't load
    `unconverted` files; `imagemill models pull` converts them.
    """
    settings = load_settings().weights
    folder = settings.folder.expanduser()
    rows = [files.describe(entry, settings) for entry in WEIGHTS]
    rows += [repositories.describe(folder, entry) for entry in REPOSITORIES]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    table = Table("model", "engine", "state", "variants", "size", "licence", "source", box=box.SIMPLE, show_edge=False)
    for row in rows:
        size = row["bytes"] or row["about_bytes"]
        table.add_row(
            row["name"],
            row["engine"],
            f"[{COLOURS[row['state']]}]{row['state']}[/]",
            ", ".join(row["also"]),
            "" if size is None else f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB",
            row["licence"],
            f"{row['source']} {row['revision'][:12]}",
        )
    console = Console(emoji=False, highlight=False)
    (console if console.is_terminal else Console(emoji=False, highlight=False, width=200)).print(table)
    click.echo(f"in {folder}")


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--engine", type=click.Choice(ENGINES), help="Pull all models of this engine that allow commercial use.")
@click.option("--accept-licence", is_flag=True, help="I have read the licences of the non-commercial models that I name.")
@click.option(
    "--from",
    "own_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Convert your own file of the model instead of downloading it: best.ckpt, big-lama.zip, TorchScript or safetensors.",
)
@click.option("--revision", metavar="REV", help="Override the pinned commit (models from the Hugging Face Hub only).")
def pull(names: tuple[str, ...], engine: str | None, accept_licence: bool, own_file: Path | None, revision: str | None) -> None:
    """Download models and check them against their checksums; models already there are kept.

    Resumes interrupted downloads. Workers never download: run this on each host, or once for a shared folder.
    """
    settings = load_settings().weights
    weights, folders = _select(names)
    if own_file is not None:
        if engine or len(weights) != 1 or folders or weights[0].engine not in CONVERTED:
            convertible = ", ".join(entry.name for entry in WEIGHTS if entry.engine in CONVERTED)
            raise UsageError(f"--from FILE needs exactly one model that is converted ({convertible}), and no --engine")
        _convert(weights[0], own_file, settings)
        return
    if revision is not None and (weights or len(folders) != 1):
        names_of_all = ", ".join(entry.name for entry in REPOSITORIES)
        raise UsageError(f"--revision needs exactly one model from the Hugging Face Hub: {names_of_all}")
    for entry in weights:
        if not entry.commercial and not accept_licence:
            raise UsageError(
                f"{entry.name} is not for commercial use ({entry.licence}): "
                "read its licence, and add --accept-licence if you may use it"
            )
    weights += [entry for entry in WEIGHTS if entry.engine == engine and entry.commercial and entry not in weights]
    folders += [entry for entry in REPOSITORIES if entry.engine == engine and entry not in folders]
    if not weights and not folders:
        raise UsageError(f"name a model (see `imagemill models list`), or use --engine {' or '.join(ENGINES)}")
    for entry in weights:
        _pull_file(entry, settings)
    for folder in folders:
        _pull_repository(folder, settings, revision)


def _pull_file(entry: Weights, settings: WeightsSettings) -> None:
    with _progress(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(entry.name, total=entry.about_bytes)
        outcome = download.pull(
            entry,
            settings,
            lambda size, total: progress.update(task, completed=size, total=total),
            waiting=lambda: click.echo(f"{entry.name}: waiting for another process that is pulling it", err=True),
        )
    path = path_of(entry, settings)
    click.echo(f"{entry.name}: {OUTCOMES[outcome]}, checksum correct: {path}")
    if entry.engine not in CONVERTED:
        _free_batch_axis(entry, path)
    elif not is_current(path, "safetensors"):
        _convert(entry, path, settings)


def _pull_repository(entry: Repository, settings: WeightsSettings, revision: str | None) -> None:
    with _extra(entry.engine, entry.name):
        from imagemill.worker.models import hugging_face
    outcome = hugging_face.pull(entry, settings, revision)
    folder = folder_of(settings.folder.expanduser(), entry)
    click.echo(f"{entry.name}: {OUTCOMES[outcome]}, commit {read_json(folder / RECORD)['commit']}, checksums correct: {folder}")


def _convert(entry: Weights, source: Path, settings: WeightsSettings) -> None:
    """Convert a file, which may contain code, to the safetensors file that nodes load."""
    with _extra(entry.engine, f"converting {entry.name}"):
        from imagemill.worker.models.conversion import convert
    original, target = path_of(entry, settings), required_file(entry, settings)
    parameters = convert(source, target)
    if original.is_file() and not source.samefile(original):
        original.unlink(missing_ok=True)  # nodes load another model now
    record_variant(original, "safetensors", accepted=True, details={"source": source.name})
    click.echo(f"{entry.name}: converted {source.name} ({parameters / 1e6:.1f} million parameters): {target}")


def _free_batch_axis(entry: Weights, path: Path) -> None:
    """Make a variant that takes batches; without onnx, or if a graph can't be changed, images run one by one."""
    before = variant_record(path, "dynamic")
    try:
        from imagemill.worker.models.batch_axis import free

        outcome = free(path)
    except ModuleNotFoundError as error:
        hint = "pip install 'imagemill[rembg]', then pull again"
        click.echo(f"{entry.name}: batch axis not checked: {error.name} is not installed ({hint})", err=True)
        return
    record = variant_record(path, "dynamic")
    if record != before and outcome == "made":
        click.echo(f"{entry.name}: the batch axis was fixed at 1; made a variant that takes batches ({record['reason']})")
    elif record != before and outcome == "refused":
        click.echo(f"{entry.name}: the batch axis stays fixed at 1, images run one by one ({record['reason']})")
    elif outcome == "killed":
        click.echo(f"{entry.name}: batch axis not checked: the trial was killed, perhaps out of memory (pull again to retry)")


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Check the model files on disk, and the variants made from them, against their checksums."""
    settings = load_settings().weights
    weights, folders = _select(names)
    folder = settings.folder.expanduser()
    if not names:
        weights = [entry for entry in WEIGHTS if files.state(entry, settings) != "missing"]
        folders = [entry for entry in REPOSITORIES if folder_of(folder, entry).is_dir()]
    if not weights and not folders:
        click.echo(f"no models in {folder}")
    findings = chain(
        *(files.verify(entry, settings) for entry in weights), *(repositories.verify(folder, entry) for entry in folders)
    )
    failed = False
    for correct, finding in findings:
        click.secho(finding, fg=None if correct else "red", err=not correct)
        failed |= not correct
    sys.exit(1 if failed else 0)


@models.command()
@click.argument("name", metavar="MODEL")
@click.option(
    "--images",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of typical images; some calibrate the model, the others compare its masks.",
)
@click.option(
    "--accept",
    type=click.FloatRange(0, 1),
    default=0.98,
    show_default=True,
    help="Minimum mean IoU between the 8-bit model's masks and the original's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def quantize(name: str, images: Path, accept: float, as_json: bool) -> None:
    """Make an 8-bit variant of a model, which is faster on a CPU, and keep it if its masks are nearly the same.

    Nodes use it if IMAGEMILL_ONNX__INT8=true. Exits with status 1 if the variant is rejected.
    """
    weights, _ = _select((name,))
    if not weights or weights[0].engine in CONVERTED:
        raise UsageError(f"{name} can't be quantised: it doesn't run on onnxruntime")
    settings = load_settings().weights
    with _progress() as progress, _extra("rembg", "quantising"):
        from imagemill.worker.models.quantize import quantize as make_int8

        tasks: dict[str, Any] = {}

        def show_progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step)
            progress.update(tasks[step], completed=done, total=total)

        folder = settings.folder.expanduser()
        report = make_int8(name, folder, images, engine=weights[0].engine, accept=accept, progress=show_progress)
    click.echo(json.dumps({**asdict(report), "speed_up": report.speed_up}) if as_json else report.summary())
    if report.accepted:
        file = variant(path_of(weights[0], settings), "int8")
        click.echo(f"accepted: {file}; nodes use it if IMAGEMILL_ONNX__INT8=true", err=as_json)
    else:
        click.secho(f"rejected: the 8-bit masks of {name} differ too much; nothing was kept", fg="red", err=True)
        sys.exit(1)


@contextmanager
def _extra(extra: str, purpose: str) -> Iterator[None]:
    """Raise MissingExtra with the install command in place of ModuleNotFoundError for a missing library."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise  # a bug, not a missing library
        raise MissingExtra(f"{purpose} needs {error.name}, which is not installed: pip install 'imagemill[{extra}]'") from error


def _select(names: Iterable[str]) -> tuple[list[Weights], list[Repository]]:
    """The files and the repositories that the names stand for, each once. Raises UsageError for an unknown name."""
    known = [*(entry.name for entry in WEIGHTS), *MODELS, *(entry.name for entry in REPOSITORIES)]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no model {name!r}{nearest(name, known)}")
    parts = [part for name in names for part in MODELS.get(name, (name,))]
    weights = {entry.name: entry for entry in WEIGHTS}
    return [weights[name] for name in dict.fromkeys(parts) if name in weights], [
        entry for entry in REPOSITORIES if entry.name in parts
    ]


def _progress(*columns: Any) -> Progress:
    """A progress bar per task, shown only on a terminal: elsewhere it would fill logs."""
    console = Console(stderr=True, emoji=False, highlight=False)
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*shown, console=console, disable=not console.is_terminal)
