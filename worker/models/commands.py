"""The `imagemill models` commands: what there is, fetching it, checking it, and making it smaller."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from imagemill.shared.errors import MissingExtra, UsageError
from imagemill.shared.options.base import nearest
from imagemill.shared.settings import Settings, load_settings
from imagemill.worker.models import download as pulling
from imagemill.worker.models import repositories
from imagemill.worker.models.catalogue import CONVERTED, MODELS, REPOSITORIES, WEIGHTS, Repository, Weights
from imagemill.worker.models.checksums import check, read_json
from imagemill.worker.models.files import KINDS, is_current, made_of, needed, path_of, put_on_record, state, variant
from imagemill.worker.models.repositories import RECORD, folder_of

ENGINES = sorted({weights.engine for weights in WEIGHTS} | {one.engine for one in REPOSITORIES})
STYLES = {"there": "green", "unconverted": "yellow", "unchecked": "yellow", "damaged": "red", "missing": "dim"}


@click.group()
def models() -> None:
    """List, pull, verify and quantise the models' files."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per model.")
def list_models(as_json: bool) -> None:
    """List all models that imagemill knows of, and which are here.

    A file that is `unchecked` was put here by something else than `imagemill models pull`; `imagemill models verify` checks it.
    One that is `unconverted` is not what nodes load: `imagemill models pull` makes that of it.
    """
    settings = load_settings()
    rows = [_row(weights, settings) for weights in WEIGHTS] + [_folder_row(one, settings) for one in REPOSITORIES]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    table = Table("model", "engine", "state", "also", "size", "licence", "from", box=box.SIMPLE, show_edge=False)
    for row in rows:
        size = row["bytes"] or row["about_bytes"]
        table.add_row(
            row["name"],
            row["engine"],
            f"[{STYLES[row['state']]}]{row['state']}[/]",
            ", ".join(row["also"]),
            "" if size is None else f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB",
            row["licence"],
            f"{row['source']} {row['revision'][:12]}",
        )
    console = Console(emoji=False, highlight=False)
    (console if console.is_terminal else Console(emoji=False, highlight=False, width=200)).print(table)
    click.echo(f"in {settings.weights.folder.expanduser()}")


def _row(weights: Weights, settings: Settings) -> dict[str, Any]:
    original, path = path_of(weights, settings.weights), needed(weights, settings.weights)
    also = [kind for kind in KINDS if original.is_file() and is_current(original, kind)]
    size = path.stat().st_size if path.is_file() else None
    return {**asdict(weights), "state": state(weights, settings.weights), "path": str(path), "bytes": size, "also": also}


def _folder_row(one: Repository, settings: Settings) -> dict[str, Any]:
    weights = settings.weights.folder.expanduser()
    folder, found = folder_of(weights, one), repositories.state(weights, one)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if found != "missing" else None
    return {**asdict(one), "state": found, "path": str(folder), "bytes": size, "also": [], "commercial": True}


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--engine", type=click.Choice(ENGINES), help="All models of an engine that may be used commercially.")
@click.option("--accept-licence", is_flag=True, help="I have read the licence of the non-commercial models that I name.")
@click.option(
    "--from",
    "own",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Instead of downloading the one model named, convert a file of it: best.ckpt, big-lama.zip, TorchScript, safetensors.",
)
@click.option("--revision", metavar="REV", help="Another commit, tag or branch than the pinned one (of a model from the hub).")
def pull(names: tuple[str, ...], engine: str | None, accept_licence: bool, own: Path | None, revision: str | None) -> None:
    """Download models, checked against their checksums; what is here already stays as it is.

    Goes on where it was interrupted. Workers never download: run this on each host, or once for a folder that they share.
    """
    settings = load_settings()
    chosen, folders = _named(names), _folders(names)
    if own is not None:
        if engine or len(chosen) != 1 or chosen[0].engine not in CONVERTED:
            able = ", ".join(weights.name for weights in WEIGHTS if weights.engine in CONVERTED)
            raise UsageError(f"--from FILE goes with one model that is converted ({able}), and without --engine")
        _convert(chosen[0], own, settings)
        return
    if revision is not None and (chosen or len(folders) != 1):
        raise UsageError("--revision is for one model from the hub at a time: " + ", ".join(one.name for one in REPOSITORIES))
    for weights in chosen:
        if not weights.commercial and not accept_licence:
            raise UsageError(
                f"{weights.name} may not be used commercially ({weights.licence}): "
                "read its licence, and say --accept-licence if you may use it"
            )
    chosen += [one for one in WEIGHTS if one.engine == engine and one.commercial and one not in chosen]
    folders += [one for one in REPOSITORIES if one.engine == engine and one not in folders]
    if not chosen and not folders:
        raise UsageError(f"say which: NAME..., or --engine {' or '.join(ENGINES)} (`imagemill models list` lists them)")
    for weights in chosen:
        _pull_one(weights, settings)
    for one in folders:
        _pull_folder(one, settings, revision)


def _pull_folder(one: Repository, settings: Settings, revision: str | None) -> None:
    try:
        from imagemill.worker.models import hugging_face as hub
    except ModuleNotFoundError as error:
        raise MissingExtra(f"this needs {error.name}, which is not installed: pip install 'imagemill[diffusion]'") from error
    outcome = hub.pull(one, settings.weights, revision)
    folder = folder_of(settings.weights.folder.expanduser(), one)
    commit = read_json(folder / RECORD)["commit"]
    click.echo(f"{one.name}: {'is there already' if outcome == 'there' else 'pulled'}, commit {commit}, checked: {folder}")


def _pull_one(weights: Weights, settings: Settings) -> None:
    with _progress(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(weights.name, total=weights.about_bytes)
        outcome = pulling.pull(
            weights,
            settings.weights,
            lambda size, total: progress.update(task, completed=size, total=total),
            waiting=lambda: click.echo(f"{weights.name}: another process is pulling it; waiting", err=True),
        )
    path = path_of(weights, settings.weights)
    click.echo(f"{weights.name}: {'is there already' if outcome == 'there' else 'pulled'}, its checksum is right: {path}")
    if weights.engine not in CONVERTED:
        _free_batch_axis(weights, path)
    elif not is_current(path, "safetensors"):
        _convert(weights, path, settings)


def _convert(weights: Weights, source: Path, settings: Settings) -> None:
    """Make of a file, which may hold code, the one with numbers alone that nodes load. Raises MissingExtra."""
    try:
        from imagemill.worker.models.conversion import convert
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise  # a fault of ours, not a missing library
        command = f"pip install 'imagemill[{weights.engine}]', then pull again"
        raise MissingExtra(f"{weights.name} can't be converted: {error.name} is not installed: {command}") from error
    original, target = path_of(weights, settings.weights), needed(weights, settings.weights)
    numbers = convert(source, target)
    if original.is_file() and not source.samefile(original):
        original.unlink(missing_ok=True)  # nodes load another model now
    put_on_record(original, "safetensors", accepted=True, told={"source": source.name})
    click.echo(f"{weights.name}: converted {source.name} ({numbers / 1e6:.1f} million numbers): {target}")


def _free_batch_axis(weights: Weights, path: Path) -> None:
    """Batches need it; without onnx, or for a graph that won't, the model works on one image at a time."""
    before = made_of(path, "dynamic")
    try:
        from imagemill.worker.models.batch_axis import free

        outcome = free(path)
    except ModuleNotFoundError as error:
        click.echo(f"{weights.name}: not looked whether it takes batches: {error.name} is not installed ({EXTRA})", err=True)
        return
    record = made_of(path, "dynamic")
    if record != before and outcome == "made":
        click.echo(f"{weights.name}: its batch axis was fixed at 1; made a file with a free one ({record['told']})")
    elif record != before and outcome == "refused":
        click.echo(f"{weights.name}: its batch axis stays fixed at 1, images run one by one ({record['told']})")
    elif outcome == "killed":
        click.echo(
            f"{weights.name}: not known whether it takes batches: the trial was killed, perhaps for its memory ({AGAIN})"
        )


EXTRA = "pip install 'imagemill[rembg]', then pull again"
AGAIN = "pull again to repeat it"


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Compute the checksums of the models that are here again, and of what was made of them."""
    settings = load_settings()
    folder, chosen, folders = settings.weights.folder.expanduser(), _named(names), _folders(names)
    if not names:
        chosen = [one for one in WEIGHTS if state(one, settings.weights) != "missing"]
        folders = [one for one in REPOSITORIES if folder_of(folder, one).is_dir()]
    if not chosen and not folders:
        click.echo(f"no model is in {folder}")
    wrong = [fault for weights in chosen for fault in _faults(weights, settings)]
    for one in folders:
        faults = list(repositories.faults(folder, one))
        wrong += [f"{fault}: imagemill models pull {one.name}" for fault in faults]
        if not faults:
            click.echo(f"{one.name}: right (commit {read_json(folder_of(folder, one) / RECORD)['commit']})")
    for fault in wrong:
        click.secho(fault, fg="red", err=True)
    sys.exit(1 if wrong else 0)


def _faults(weights: Weights, settings: Settings) -> Iterable[str]:
    """What is wrong with a model's files, in sentences; says which are right."""
    path, mend = path_of(weights, settings.weights), f"imagemill models pull {weights.name}"
    if state(weights, settings.weights) == "missing":
        yield f"{weights.name} is missing: {mend}"
        return
    original = None
    if path.is_file():
        found = check(path, weights.checksum)
        original = found.sha256
        if found.checksum != weights.checksum:
            yield f"{path} is not the published file: its checksum is {found.checksum}, not {weights.checksum}: {mend}"
        else:
            click.echo(f"{weights.name}: right ({found.checksum}, sha256:{found.sha256})")
    for kind in KINDS:
        file, made = variant(path, kind), made_of(path, kind)
        if not file.is_file():
            continue
        if not made and original is None:
            click.echo(
                f"{file.name}: put here by somebody (sha256:{check(file, 'sha256:').sha256}); nothing to compare it with"
            )
        elif made.get("original") != original:
            yield f"{file} was made of another {path.name}, and is not used: remove it"
        elif check(file, "sha256:").sha256 != made.get("sha256"):
            yield f"{file} has changed since it was made: remove it, and make it again"
        else:
            click.echo(f"{file.name}: right (sha256:{made['sha256']})")


@models.command()
@click.argument("name", metavar="MODEL")
@click.option(
    "--images",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with images of the kind that the model will work on, some of which are held back to compare with.",
)
@click.option(
    "--accept",
    type=click.FloatRange(0, 1),
    default=0.98,
    show_default=True,
    help="Least mean IoU of the masks with the original's.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def quantize(name: str, images: Path, accept: float, as_json: bool) -> None:
    """Make a model in 8 bits, which is faster on a CPU, and keep it if its masks are nearly the same.

    Nodes use it where IMAGEMILL_ONNX__INT8=true. Exits 1 where it is refused.
    """
    if name not in {weights.name for weights in WEIGHTS}:
        _named((name,))
        raise UsageError(f"{name} can't be made in 8 bits: only the files of rembg can")
    (weights,) = _named((name,))
    if weights.engine in CONVERTED:
        raise UsageError(f"{name} can't be made in 8 bits: that is for models on onnxruntime")
    settings = load_settings()
    make = _quantizer()
    with _progress() as progress:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        folder = settings.weights.folder.expanduser()
        report = make(weights.name, folder, images, engine=weights.engine, accept=accept, tell=tell)
    if as_json:
        click.echo(json.dumps({**asdict(report), "speed_up": report.speed_up}))
    else:
        click.echo(
            f"calibrated on {report.calibrated} images, compared on {report.held_back} others"
            + (f"; {report.passed_over} files passed over" if report.passed_over else "")
        )
        click.echo(f"masks: IoU {report.iou:.4f} in the mean, {report.worst:.4f} at worst; at least {accept:g} is wanted")
        click.echo(f"speed: {report.int8_ms:.0f} ms for {report.fp32_ms:.0f} ms per image, {report.speed_up:.2f} times as fast")
        click.echo(f"size: {report.int8_bytes / 1e6:.1f} MB for {report.fp32_bytes / 1e6:.1f} MB")
    if report.accepted:
        made = variant(path_of(weights, settings.weights), "int8")
        click.echo(f"accepted: {made}; nodes use it where IMAGEMILL_ONNX__INT8=true", err=as_json)
    else:
        click.secho(f"refused: the masks of {name} in 8 bits differ too much; nothing was kept", fg="red", err=True)
        sys.exit(1)


def _quantizer() -> Callable[..., Any]:
    try:
        from imagemill.worker.models.quantize import quantize as make
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise  # a fault of ours, not a missing library
        raise MissingExtra(f"this needs {error.name}, which is not installed: pip install 'imagemill[rembg]'") from error
    return make


def _named(names: Iterable[str]) -> list[Weights]:
    """The files of these names, each once. Raises UsageError with the nearest name for one that there isn't."""
    table = {weights.name: weights for weights in WEIGHTS}
    known = [*table, *MODELS, *(one.name for one in REPOSITORIES)]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no model {name!r}{nearest(name, known)}")
    return [table[name] for name in dict.fromkeys(names) if name in table]


def _folders(names: Iterable[str]) -> list[Repository]:
    """The repositories of these names, or that models of these names are made of, each once."""
    wanted = {part for name in names for part in MODELS.get(name, (name,))}
    return [one for one in REPOSITORIES if one.name in wanted]


def _progress(*columns: Any) -> Progress:
    """A bar per task on a terminal; nothing elsewhere, where it would only fill a log."""
    console = Console(stderr=True, emoji=False, highlight=False)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
