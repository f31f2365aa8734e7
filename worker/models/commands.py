"""The `imagemill models` commands: list, pull, verify, quantize."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from imagemill.shared.errors import MissingExtra, UsageError
from imagemill.shared.options.base import nearest
from imagemill.shared.settings import WeightsSettings, load_settings
from imagemill.worker.models import added, download, files, repositories
from imagemill.worker.models.catalogue import CONVERTED, MODELS, REPOSITORIES, WEIGHTS, Repository, Weights
from imagemill.worker.models.checksums import read_json
from imagemill.worker.models.files import Kind, is_current, path_of, record_variant, required_file, variant, variant_record
from imagemill.worker.models.repositories import RECORD, folder_of

if TYPE_CHECKING:  # it needs numpy
    from imagemill.worker.models.quantize import Try
    from imagemill.worker.models.trials import Outcome

COLOURS = {"there": "green", "unconverted": "yellow", "unchecked": "yellow", "damaged": "red", "missing": "dim"}
OUTCOMES = {"present": "already there", "pulled": "pulled"}
PREPARED: dict[Kind, dict[str, str]] = {
    "fp32": {
        "made": "the file is in half precision; made a variant in single precision for CPUs ({})",
        "refused": "the file is in half precision and can't be converted, so CPUs run it slowly, if at all ({})",
        "killed": "precision not checked: the trial was killed, perhaps out of memory (pull again to retry)",
    },
    "dynamic": {
        "made": "the batch axis was fixed at 1; made a variant that takes batches ({})",
        "refused": "the batch axis stays fixed at 1, images run one by one ({})",
        "killed": "batch axis not checked: the trial was killed, perhaps out of memory (pull again to retry)",
    },
}
"""What to say about each outcome of making a variant."""


def _all() -> list[Weights | Repository]:
    return [*WEIGHTS, *REPOSITORIES]


ENGINES = sorted({entry.engine for entry in _all()})


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
    folder = load_settings().weights.folder.expanduser()
    rows = [files.describe(folder, entry) for entry in WEIGHTS]
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
            f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB",
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
    folder = settings.folder.expanduser()
    entries = _select(names)
    if own_file is not None:
        chosen = [entry for entry in entries if isinstance(entry, Weights) and entry.engine in CONVERTED]
        if engine or len(entries) != 1 or not chosen:
            convertible = ", ".join(row.name for row in WEIGHTS if row.engine in CONVERTED)
            raise UsageError(f"--from FILE needs exactly one model that is converted ({convertible}), and no --engine")
        _convert(chosen[0], own_file, folder)
        return
    if revision is not None and [type(entry) for entry in entries] != [Repository]:
        names_of_all = ", ".join(entry.name for entry in REPOSITORIES)
        raise UsageError(f"--revision needs exactly one model from the Hugging Face Hub: {names_of_all}")
    for entry in entries:
        if not entry.commercial and not accept_licence:
            raise UsageError(
                f"{entry.name} is not for commercial use ({entry.licence}): "
                "read its licence, and add --accept-licence if you may use it"
            )
    entries += [entry for entry in _all() if entry.engine == engine and entry.commercial and entry not in entries]
    if not entries:
        raise UsageError(f"name a model (see `imagemill models list`), or use --engine {' or '.join(ENGINES)}")
    for entry in entries:
        if isinstance(entry, Weights):
            _pull_file(entry, settings, folder)
        else:
            _pull_repository(entry, settings, folder, revision)


def _pull_file(entry: Weights, settings: WeightsSettings, folder: Path) -> None:
    with _progress(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(entry.name, total=entry.about_bytes)
        outcome = download.pull(
            entry,
            settings,
            lambda size, total: progress.update(task, completed=size, total=total),
            waiting=lambda: click.echo(f"{entry.name}: waiting for another process that is pulling it", err=True),
        )
    path = path_of(folder, entry)
    click.echo(f"{entry.name}: {OUTCOMES[outcome]}, checksum correct: {path}")
    if entry.engine not in CONVERTED:
        _prepare(entry.name, path)
    elif not is_current(path, "safetensors"):
        _convert(entry, path, folder)


def _pull_repository(entry: Repository, settings: WeightsSettings, weights: Path, revision: str | None) -> None:
    with _extra(entry.engine, entry.name):
        from imagemill.worker.models import hugging_face
    outcome, folder = hugging_face.pull(entry, settings, revision), folder_of(weights, entry)
    click.echo(f"{entry.name}: {OUTCOMES[outcome]}, commit {read_json(folder / RECORD)['commit']}, checksums correct: {folder}")


def _convert(entry: Weights, source: Path, folder: Path) -> None:
    """Convert a file, which may contain code, to the safetensors file that nodes load."""
    with _extra(entry.engine, f"converting {entry.name}"):
        from imagemill.worker.models.conversion import convert
    original, target = path_of(folder, entry), required_file(folder, entry)
    parameters = convert(source, target)
    if original.is_file() and not source.samefile(original):
        original.unlink(missing_ok=True)  # nodes load another model now
    record_variant(original, "safetensors", accepted=True, details={"source": source.name})
    click.echo(f"{entry.name}: converted {source.name} ({parameters / 1e6:.1f} million parameters): {target}")


def _prepare(name: str, path: Path, output: str | None = None) -> None:
    """Make the variants of an ONNX file that nodes need: in single precision for CPUs, and with a free batch axis for GPUs.

    `output` names the output that nodes read; None stands for the first. Without onnx, or if a graph can't be changed, nodes
    run the file as it is.
    """
    before = {kind: variant_record(path, kind) for kind in PREPARED}
    try:
        from imagemill.worker.models import batch_axis, single_precision
        from imagemill.worker.models.trials import tried

        outcomes: dict[Kind, Outcome] = {
            "fp32": tried(path, "fp32", single_precision.make, output),
            "dynamic": tried(path, "dynamic", batch_axis.make, output),
        }
    except ModuleNotFoundError as error:
        hint = "pip install 'imagemill[rembg]', then pull again"
        click.echo(f"{name}: precision and batch axis not checked: {error.name} is not installed ({hint})", err=True)
        return
    for kind, outcome in outcomes.items():
        record = variant_record(path, kind)
        if outcome in PREPARED[kind] and (record != before[kind] or outcome == "killed"):
            click.echo(f"{name}: {PREPARED[kind][outcome].format(record.get('reason'))}")


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Check the model files on disk, and the variants made from them, against their checksums."""
    folder = load_settings().weights.folder.expanduser()
    entries = _select(names)
    if not names:
        entries += [entry for entry in WEIGHTS if files.state(folder, entry) != "missing"]
        entries += [entry for entry in REPOSITORIES if folder_of(folder, entry).is_dir()]
    if not entries:
        click.echo(f"no models in {folder}")
    findings = chain.from_iterable(
        files.verify(folder, entry) if isinstance(entry, Weights) else repositories.verify(folder, entry) for entry in entries
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
    default=0.97,
    show_default=True,
    help="Minimum mean IoU between the 8-bit model's masks and the original's; no image may have less than 0.9.",
)
@click.option(
    "--faster",
    type=click.FloatRange(0),
    show_default="1.8; 1.2 on a CPU without VNNI",
    help="How many times as fast as the original the 8-bit model must be on this CPU.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def quantize(name: str, images: Path, accept: float, faster: float | None, as_json: bool) -> None:
    """Search for an 8-bit variant of a model that is faster on a CPU and makes nearly the same masks, and keep it.

    Nodes use it if IMAGEMILL_ONNX__INT8=true. Exits with status 1 if none of the variants is good enough.
    """
    folder = load_settings().weights.folder.expanduser()
    if added.find(folder, name) is None:
        (entry, *_) = _select((name,))
        if not isinstance(entry, Weights) or entry.engine in CONVERTED:
            raise UsageError(f"{name} can't be quantised: it doesn't run on onnxruntime")
    with _progress() as progress, _extra("rembg", "quantising"):
        from imagemill.worker.models.quantize import quantize as make_int8

        task = progress.add_task("")
        report = make_int8(
            name,
            folder,
            images,
            accept=accept,
            faster=faster,
            progress=lambda step, done, total: progress.update(task, description=step, completed=done, total=total),
        )
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        _print_tries(report.tried)
        click.echo(report.summary())
    if not report.accepted:
        click.secho(f"rejected: {report.shortcoming()}; nothing was kept", fg="red", err=True)
        sys.exit(1)
    made = variant(folder / "rembg" / f"{name}.onnx", "int8")
    click.echo(f"accepted: {made}; nodes use it if IMAGEMILL_ONNX__INT8=true", err=as_json)


def _print_tries(rows: Iterable[Try]) -> None:
    table = Table(box=box.SIMPLE, show_edge=False)
    for heading in ("tried", "mean IoU", "lowest", "ms", "times as fast", "MB"):
        table.add_column(heading, justify="left" if heading == "tried" else "right")
    for row in rows:
        figures = (
            f"{row.iou:.4f}",
            f"{row.worst:.4f}",
            f"{row.int8_ms:.0f}",
            f"{row.speed_up:.2f}",
            f"{row.int8_bytes / 1e6:.1f}",
        )
        table.add_row(row.method, *(("failed", row.error) if row.error else figures))
    console = Console(emoji=False, highlight=False)
    (console if console.is_terminal else Console(emoji=False, highlight=False, width=200)).print(table)


@contextmanager
def _extra(extra: str, purpose: str) -> Iterator[None]:
    """Raise MissingExtra with the install command in place of ModuleNotFoundError for a missing library."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise  # a bug, not a missing library
        raise MissingExtra(f"{purpose} needs {error.name}, which is not installed: pip install 'imagemill[{extra}]'") from error


def _select(names: Iterable[str]) -> list[Weights | Repository]:
    """The catalogue entries that the names stand for, each once. Raises UsageError for an unknown name."""
    entries = {entry.name: entry for entry in _all()}
    known = [*entries, *MODELS]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no model {name!r}{nearest(name, known)}")
    return [entries[part] for part in dict.fromkeys(part for name in names for part in MODELS.get(name, (name,)))]


def _progress(*columns: Any) -> Progress:
    """A progress bar per task, shown only on a terminal: elsewhere it would fill logs."""
    console = Console(stderr=True, emoji=False, highlight=False)
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*shown, console=console, disable=not console.is_terminal)
