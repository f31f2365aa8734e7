"""`imagemill tune`: measures which batch sizes fit on a device and how fast they are; nodes start from these results."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Column, Table

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import UsageError
from imagemill.shared.options.base import OPERATIONS, parse_settings
from imagemill.shared.presets import Presets, work_of
from imagemill.shared.settings import load_settings
from imagemill.worker.hardware.device import Device, pin

if TYPE_CHECKING:
    from imagemill.worker.tuning.trials import BatchTrials


@click.command()
@click.argument("operation", type=click.Choice(OPERATIONS), required=False)
@click.option("--engine", help="Engine to measure; default: the preset's, else opencv.")
@click.option("--preset", metavar="NAME", help="Measure a preset, with its options.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set an option of the operation, as for submit; repeatable."
)
@click.option("--size", default="1024x1024", show_default=True, metavar="WxH", help="Size of the images in pixels.")
@click.option("--gpu", metavar="N", type=click.IntRange(min=0), help="Run on this GPU.")
@click.option("--cpu", is_flag=True, help="Run on the CPU, with all of its cores.")
@click.option("--most", metavar="N", type=click.IntRange(min=1), help="Largest batch to try; default: the engine's limit.")
@click.option("--seconds", type=click.FloatRange(min=0), default=3.0, show_default=True, help="How long to time each batch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(
    operation: str | None,
    engine: str | None,
    preset: str | None,
    settings: Sequence[str],
    size: str,
    gpu: int | None,
    cpu: bool,
    most: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Measure how large batches can be, and how fast they run.

    The results are saved, and nodes on this type of device start from them.

    A batch fits if it takes at most 80 % of the free memory. Stop the
    device's node first.
    """
    if (gpu is not None) == cpu:
        raise UsageError("choose a device: --gpu N or --cpu")
    dimensions = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if dimensions is None:
        raise UsageError(f"--size takes WIDTHxHEIGHT in pixels, such as 1024x768, not {size!r}")
    config = load_settings()
    config = config.model_copy(update={"worker": config.worker.model_copy(update={"gpu": gpu})})
    look = Presets(config.presets).get(preset) if preset is not None else None
    if look is None and operation is None:
        raise UsageError(f"choose an operation ({', '.join(OPERATIONS)}) or --preset NAME")
    operation, engine = work_of(operation, engine, look)
    options = parse_options(operation, engine, {**(look.options if look else {}), **parse_settings(settings)})
    device = Device.of(config, children=1)
    pin(device)
    # Only now: these imports may start threads and touch the GPU.
    from imagemill.worker.hardware.memory import memory_of
    from imagemill.worker.line.batch_sizes import BatchSizes
    from imagemill.worker.operations.registry import create
    from imagemill.worker.tuning.trials import BatchTrials

    loaded = create(operation, engine)
    loaded.load(device)
    sizes = BatchSizes(memory_of(device, loaded.spec.runtime), measures=True)
    batches = BatchTrials(loaded, options, sizes, (int(dimensions[1]), int(dimensions[2])))
    result = _measure(batches, most or loaded.spec.max_batch, seconds, device.weights)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


def _measure(batches: BatchTrials, most: int, seconds: float, weights: Path) -> dict[str, Any]:
    """Run the trials and save their results for nodes."""
    from imagemill.worker.tuning import saved_sizes

    spec, sizes, trials = batches.operation.spec, batches.sizes, []
    with Console(stderr=True).status("") as status:
        for trial in batches.run(most, seconds):
            trials.append(trial)
            status.update(f"{spec.engine}: a batch of {trial.batch} {'fits' if trial.fits else 'does not fit'}")
    try:
        path = saved_sizes.write(weights, sizes.memory.name, spec, {batches.kind: sizes.known(batches.kind)})
    except OSError as error:
        raise UsageError(f"can't save the results in {weights}: {error.strerror}") from error
    fitting = [trial for trial in trials if trial.fits]
    fastest = max(fitting, key=lambda trial: trial.images_per_second or 0.0, default=None)
    return {
        "operation": spec.name,
        "engine": spec.engine,
        "device": sizes.memory.name,
        "kind": batches.kind,
        "batch": max((trial.batch for trial in fitting), default=0),
        "fastest": fastest.batch if fastest else 0,
        "tries": [{**asdict(trial), "fits": trial.fits} for trial in sorted(trials, key=lambda trial: trial.batch)],
        "path": str(path),
    }


def _print(result: dict[str, Any]) -> None:
    headings = (Column(heading, justify="right") for heading in ("batch", "images/s", "peak memory"))
    table = Table(*headings, box=box.SIMPLE, show_edge=False)
    for trial in result["tries"]:
        if trial["fits"]:
            table.add_row(str(trial["batch"]), f"{trial['images_per_second']:.3g}", f"{trial['peak_bytes'] / 1e9:.2f} GB")
        else:
            table.add_row(str(trial["batch"]), "", "does not fit", style="red")
    Console(emoji=False, highlight=False).print(table)
    summary = "not even one image fits"
    if result["batch"]:
        summary = f"largest batch that fits {result['batch']}, fastest {result['fastest']}"
    click.echo(f"{result['operation']} ({result['engine']}) on {result['device']}: {summary}")
    click.echo(f"saved to {result['path']}")
