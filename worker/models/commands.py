"""The `imagemill models` commands: add, list, pull, verify, remove, quantize."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn
from rich.table import Table

from imagemill.shared.errors import UsageError
from imagemill.shared.options.base import nearest
from imagemill.shared.settings import WeightsSettings, load_settings
from imagemill.worker.models import added, adding, download, files, repositories
from imagemill.worker.models.added import TITLES, Added
from imagemill.worker.models.adding_commands import add
from imagemill.worker.models.catalogue import CONVERTED, MODELS, REPOSITORIES, WEIGHTS, Repository, Weights, is_part
from imagemill.worker.models.checksums import read_json
from imagemill.worker.models.command_parts import needing, prepare_variants, progress_bar
from imagemill.worker.models.files import is_current, path_of, record_variant, required_file, variant
from imagemill.worker.models.repositories import RECORD, folder_of

if TYPE_CHECKING:  # it needs numpy
    from imagemill.worker.models.eight_bit_search import Try

COLOURS = {"there": "green", "unconverted": "yellow", "unchecked": "yellow", "damaged": "red", "missing": "dim"}
OUTCOMES = {"present": "already there", "pulled": "pulled"}


def _all() -> list[Weights | Repository]:
    return [*WEIGHTS, *REPOSITORIES]


ENGINES = sorted({entry.engine for entry in _all()})


@click.group()
def models() -> None:
    """List, pull, add, verify, remove and quantise model files."""


models.add_command(add)


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model.")
def list_models(as_json: bool) -> None:
    """List every model that imagemill can use, what it is, and the state of its files.

    The list has all models in the catalogue, and your own.


    The list has all models in the catalogue, and your own.

    `unchecked` files did not come from `imagemill models pull`; check them with `imagemill models verify`. Nodes can't load
    `unconverted` files; convert them with `imagemill models pull`.
    """
    folder = load_settings().weights.folder.expanduser()
    own, faults = added.everything(folder)
    rows = [files.describe(folder, entry) for entry in WEIGHTS]
    rows += [repositories.describe(folder, entry) for entry in REPOSITORIES]
    rows += [added.describe(folder, record) for record in own]
    for fault in faults:
        click.secho(fault, fg="red", err=True)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    table = Table(
        "model", "kind", "family", "engine", "state", "variants", "size", "licence", "source", box=box.SIMPLE, show_edge=False
    )
    for row in rows:
        size = row["bytes"] or row.get("about_bytes", 0)
        table.add_row(
            row["name"],
            TITLES[row["kind"]],
            row["family"],
            row["engine"],
            f"[{COLOURS[row['state']]}]{row['state']}[/]",
            ", ".join(row["also"]),
            f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB",
            row["licence"],
            f"{row['source']} {row['revision'][:12]}".rstrip(),
        )
    console = Console(emoji=False, highlight=False)
    (console if console.is_terminal else Console(emoji=False, highlight=False, width=200)).print(table)
    click.echo(f"in {folder}")


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--engine", type=click.Choice(ENGINES), help="Pull all models of this engine that allow commercial use.")
@click.option("--accept-licence", is_flag=True, help="I have read the licences of the non-commercial models named here.")
@click.option(
    "--from",
    "own_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Convert your own copy of the model instead of downloading it: best.ckpt, big-lama.zip, TorchScript or safetensors.",
)
@click.option("--revision", metavar="REV", help="Override the pinned commit (models from the Hugging Face Hub only).")
def pull(names: tuple[str, ...], engine: str | None, accept_licence: bool, own_file: Path | None, revision: str | None) -> None:
    """Download models and verify their checksums.

    Models already here are kept, and interrupted downloads are resumed. Workers never download: run this on each host, or once
    for a shared folder.
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
    with progress_bar(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(entry.name, total=entry.about_bytes)
        outcome = download.pull(
            entry,
            settings,
            lambda size, total: progress.update(task, completed=size, total=total),
            waiting=lambda: click.echo(f"{entry.name}: waiting for another process that is pulling it", err=True),
        )
    path = path_of(folder, entry)
    click.echo(f"{entry.name}: {OUTCOMES[outcome]}, checksum correct: {path}")
    if not entry.commercial:
        files.accept_licence(folder, entry)
    if entry.engine not in CONVERTED:
        if not is_part(entry.name):  # parts run one image at a time
            prepare_variants(entry.name, path)
    elif not is_current(path, "safetensors"):
        _convert(entry, path, folder)


def _pull_repository(entry: Repository, settings: WeightsSettings, weights: Path, revision: str | None) -> None:
    with needing(entry.engine, entry.name):
        from imagemill.worker.models import hugging_face
    outcome, folder = hugging_face.pull(entry, settings, revision), folder_of(weights, entry)
    click.echo(f"{entry.name}: {OUTCOMES[outcome]}, commit {read_json(folder / RECORD)['commit']}, checksums correct: {folder}")


def _convert(entry: Weights, source: Path, folder: Path) -> None:
    """Convert a file, which may contain code, to the safetensors file that nodes load."""
    with needing(entry.engine, f"converting {entry.name}"):
        from imagemill.worker.models.conversion import convert
    original, target = path_of(folder, entry), required_file(folder, entry)
    parameters = convert(source, target)
    if original.is_file() and not source.samefile(original):
        original.unlink(missing_ok=True)  # nodes load another model now
    record_variant(original, "safetensors", accepted=True, details={"source": source.name})
    click.echo(f"{entry.name}: converted {source.name} ({parameters / 1e6:.1f} million parameters): {target}")


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Check model files against their checksums.

    This includes the variants that imagemill made from them. Without NAME, it checks all models on this host.
    """
    folder = load_settings().weights.folder.expanduser()
    own, faults = added.everything(folder)
    entries: list[Weights | Repository | Added] = [*_select(names, own)]
    entries += [record for record in own if not names or record.name in names]
    if not names:
        entries += [entry for entry in WEIGHTS if files.state(folder, entry) != "missing"]
        entries += [entry for entry in REPOSITORIES if folder_of(folder, entry).is_dir()]
    if not entries and not faults:
        click.echo(f"no models in {folder}")
    findings = chain.from_iterable(_verified(folder, entry) for entry in entries)
    failed = False
    for correct, finding in chain(((False, fault) for fault in faults if not names), findings):
        click.secho(finding, fg=None if correct else "red", err=not correct)
        failed |= not correct
    sys.exit(1 if failed else 0)


def _verified(folder: Path, entry: Weights | Repository | Added) -> Iterator[tuple[bool, str]]:
    if isinstance(entry, Added):
        return added.verify(folder, entry)
    return files.verify(folder, entry) if isinstance(entry, Weights) else repositories.verify(folder, entry)


@models.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def remove(names: tuple[str, ...]) -> None:
    """Delete models from this host, whether added or pulled.

    Running nodes stop offering them within seconds.
    """
    folder = load_settings().weights.folder.expanduser()
    own, _ = added.everything(folder)
    mine = [name for name in names if name in added.names(folder)]
    freed: dict[str, int | None] = {}
    for entry in _select([name for name in names if name not in mine], own):
        module = files if isinstance(entry, Weights) else repositories
        freed[entry.name] = module.remove(folder, entry)
    freed |= {name: adding.remove(folder, name) for name in mine}
    for name, size in freed.items():
        click.echo(f"{name} is not there" if size is None else f"{name}: removed, {size / 1e6:.1f} MB freed")


@models.command()
@click.argument("name", metavar="MODEL")
@click.option(
    "--images",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of typical images; two thirds calibrate the model, the rest compare its masks.",
)
@click.option(
    "--accept",
    type=click.FloatRange(0, 1),
    default=0.97,
    show_default=True,
    help="Minimum mean IoU between the 8-bit model's masks and the original's; none may be below 0.9.",
)
@click.option(
    "--faster",
    type=click.FloatRange(0),
    show_default="1.8; 1.2 on a CPU without VNNI",
    help="How many times as fast as the original the 8-bit model must be on this CPU.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def quantize(name: str, images: Path, accept: float, faster: float | None, as_json: bool) -> None:
    """Make an 8-bit variant of a model, for CPUs.

    Tries several ways, and keeps the first variant that is fast enough and makes nearly the same masks. Nodes use it if
    IMAGEMILL_ONNX__INT8=true. Exits with status 1 if no variant is good enough.
    """
    folder = load_settings().weights.folder.expanduser()
    _check_quantisable(folder, name)
    original = folder / "rembg" / f"{name}.onnx"
    with progress_bar() as progress, needing("rembg", "quantising"):
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
        kept = "the earlier 8-bit model stays" if is_current(original, "int8") else "nothing was kept"
        click.secho(f"rejected: {report.shortcoming()}; {kept}", fg="red", err=True)
        sys.exit(1)
    made = variant(original, "int8")
    click.echo(f"accepted: {made}; nodes use it if IMAGEMILL_ONNX__INT8=true", err=as_json)


def _check_quantisable(folder: Path, name: str) -> None:
    """Raise UsageError for a model that can't be quantised, whatever is in its files."""
    record = added.find(folder, name)
    engine = record.engine if record is not None else _select((name,), added.everything(folder)[0])[0].engine
    if engine != "rembg":
        raise UsageError(f"{name} can't be quantised: it doesn't run on onnxruntime")
    for model, parts in MODELS.items():
        if len(parts) > 1 and name in (model, *parts):
            if model.endswith("-quant"):
                raise UsageError(f"{name} has 8 bits already")
            raise UsageError(
                f"{name} can't be quantised, since its masks depend on points and boxes; "
                f"{model}-quant is the same model with 8 bits: imagemill models pull {model}-quant"
            )


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


def _select(names: Iterable[str], own: Iterable[Added] = ()) -> list[Weights | Repository]:
    """The catalogue entries that the names stand for, each once; names of `own` models are left out.

    Raises UsageError for an unknown name.
    """
    entries = {entry.name: entry for entry in _all()}
    others = {record.name for record in own}
    known = [*dict.fromkeys((*entries, *MODELS, *others))]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no model {name!r}{nearest(name, known)}")
    chosen = [name for name in names if name not in others]
    return [entries[part] for part in dict.fromkeys(part for name in chosen for part in MODELS.get(name, (name,)))]
