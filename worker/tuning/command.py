"""`imagemill tune`: how many images fit on a device at a time, and how fast they are; nodes begin with what it finds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import UsageError
from imagemill.shared.options.base import OPERATIONS, EngineOptions
from imagemill.shared.presets import Presets, work_of
from imagemill.shared.settings import Settings, load_settings
from imagemill.worker.hardware.device import Device, pin


@click.command()
@click.argument("operation", type=click.Choice(OPERATIONS), required=False)
@click.option("--engine", help="What does it; default opencv, or as the preset says.")
@click.option("--preset", metavar="NAME", help="A look by its name, with its options.")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="An option of the operation, as for submit.")
@click.option("--size", default="1024x1024", show_default=True, metavar="WxH", help="Of the images to come, in pixels.")
@click.option("--gpu", metavar="N", type=click.IntRange(min=0), help="Try them on this GPU.")
@click.option("--cpu", is_flag=True, help="Try them on the CPU, with all of its cores.")
@click.option("--most", metavar="N", type=click.IntRange(min=1), help="Largest batch to try; default: the engine's own.")
@click.option("--seconds", type=click.FloatRange(min=0), default=3.0, show_default=True, help="To time each batch for.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def tune(
    operation: str | None,
    engine: str | None,
    preset: str | None,
    options: Sequence[str],
    size: str,
    gpu: int | None,
    cpu: bool,
    most: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Try batches of an operation on a device, and remember how much memory they take.

    A batch fits where it takes at most 80 % of the memory that is free. Stop the device's node meanwhile.
    """
    if (gpu is not None) == cpu:
        raise UsageError("say where to try: --gpu N or --cpu")
    settings = load_settings()
    settings = settings.model_copy(update={"worker": settings.worker.model_copy(update={"gpu": gpu})})
    look = Presets(settings.presets).get(preset) if preset is not None else None
    if look is None and operation is None:
        raise UsageError(f"say what to try: {', '.join(OPERATIONS)}, or --preset NAME")
    operation, engine = work_of(operation, engine, look)
    said = {**look.options} if look is not None else {}
    given = parse_options(operation, engine, {**said, **dict(_pair(one) for one in options)})
    found = _found(settings, operation, engine, given, _size(size), most, seconds)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found)


def _found(
    settings: Settings,
    operation: str,
    engine: str,
    options: EngineOptions,
    size: tuple[int, int],
    most: int | None,
    seconds: float,
) -> dict[str, Any]:
    device = Device.of(settings, children=1)
    pin(device)
    # Only now: these imports may start threads and touch the GPU.
    from imagemill.worker.hardware.memory import memory_of
    from imagemill.worker.line.batch_sizes import BatchSizes
    from imagemill.worker.operations.registry import create
    from imagemill.worker.tuning import saved_sizes as tuned
    from imagemill.worker.tuning.trials import Tuning

    made = create(operation, engine)
    made.load(device)
    sizes = BatchSizes(memory_of(device, made.spec), measures=True)
    tuning = Tuning(made, options, sizes, size)
    with Console(stderr=True).status("") as status:
        tries = []
        for one in tuning.tries(most or made.spec.max_batch, seconds):
            tries.append(one)
            status.update(f"{engine}: a batch of {one.batch} {'fits' if one.fits else 'does not fit'}")
    folder, known = settings.weights.folder.expanduser(), sizes.known(tuning.kind)
    try:
        path = tuned.write(folder, sizes.memory.name, made.spec, {tuning.kind: known})
    except OSError as error:
        raise UsageError(f"what was found can't be written below {folder}: {error.strerror}") from error
    fitting = [one for one in tries if one.fits]
    fastest = max(fitting, key=lambda one: one.images_per_second or 0.0, default=None)
    return {
        "operation": operation,
        "engine": engine,
        "device": sizes.memory.name,
        "kind": tuning.kind,
        "batch": max((one.batch for one in fitting), default=0),
        "fastest": fastest.batch if fastest else 0,
        "tries": [{**asdict(one), "fits": one.fits} for one in sorted(tries, key=lambda one: one.batch)],
        "path": str(path),
    }


def _show(found: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE, show_edge=False)
    for heading in ("batch", "images/s", "peak memory"):
        table.add_column(heading, justify="right")
    for one in found["tries"]:
        if one["fits"]:
            table.add_row(str(one["batch"]), f"{one['images_per_second']:.3g}", f"{one['peak_bytes'] / 1e9:.2f} GB")
        else:
            table.add_row(str(one["batch"]), "", "does not fit", style="red")
    Console(emoji=False, highlight=False).print(table)
    if found["batch"]:
        told = f"batches of up to {found['batch']} fit, of {found['fastest']} are the fastest"
        click.echo(f"{found['operation']} ({found['engine']}) on {found['device']}: {told}")
    else:
        click.echo(f"{found['operation']} ({found['engine']}) on {found['device']}: not even one image fits")
    click.echo(f"remembered in {found['path']}")


def _pair(setting: str) -> tuple[str, str]:
    name, mark, value = setting.partition("=")
    if not mark or not name.strip():
        raise UsageError(f"--set takes KEY=VALUE, not {setting!r}")
    return name.strip().replace("-", "_"), value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise UsageError(f"--size takes WIDTHxHEIGHT in pixels, as 1024x768, not {text!r}")
    return int(match[1]), int(match[2])
