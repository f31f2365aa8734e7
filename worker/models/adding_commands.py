"""The command `imagemill models add`, for models of the operator's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import ConfigurationError, UsageError
from imagemill.shared.settings import load_settings
from imagemill.worker.models import adding
from imagemill.worker.models.added import SELECTABLE, Added, Kind
from imagemill.worker.models.adding import Made
from imagemill.worker.models.command_parts import needing, prepare_variants
from imagemill.worker.models.sources import digest_of_files, format_of

OUTCOMES = {"present": "already there", "added": "added", "replaced": "replaced"}


class Numbers(click.ParamType[tuple[float, ...]]):
    """Three numbers, for red, green and blue, or one for all three: `0.485,0.456,0.406`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 3) or not all(abs(number) < 1000 for number in numbers):
            self.fail(f"{value!r} is neither one number nor three, such as 0.5,0.5,0.5", param, ctx)
        return numbers * (3 // len(numbers))


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("source", metavar="SOURCE")
@click.option("--family", metavar="NAME", help="What kind of network it is, if that can't be recognised.")
@click.option("--input-size", type=click.IntRange(16, 4096), help="Side of the input in pixels (ONNX).")
@click.option("--mean", type=Numbers(), metavar="R,G,B", help="What is subtracted from each channel, from 0 to 1 (ONNX).")
@click.option("--deviation", type=Numbers(), metavar="R,G,B", help="What each channel is divided by after that (ONNX).")
@click.option("--output", metavar="NAME", help="The output with the matte, by name or by place from 0 (ONNX).")
@click.option("--logits/--no-logits", default=None, help="Whether the output still needs a sigmoid (ONNX).")
@click.option("--replace", is_flag=True, help="Put it in the place of the model that has this name now.")
def add(name: str, source: str, replace: bool, family: str | None, **network: Any) -> None:
    """Add a model of your own, which jobs then name like any other: --set model=NAME.

    SOURCE is an ONNX file of a network that cuts out subjects: u2net, isnet, birefnet, modnet or ben, or another one with
    --mean and --deviation. It is tried out and copied; what doesn't fit is refused. Do this on each host, or once for a
    shared folder.
    """
    weights, path = load_settings().weights.folder.expanduser(), Path(source)
    adding.check_name(name)
    kind = format_of(path)
    if kind != "onnx":
        raise ConfigurationError(f"{source} is not an ONNX file")
    if not all(network["deviation"] or (1.0,)):
        raise UsageError("--deviation can't be 0")
    with needing("rembg", "adding an ONNX file"):
        from imagemill.worker.models import matting
    said = matting.Said(family, size=network.pop("input_size"), **network)
    with needing("rembg", "adding an ONNX file"):
        _add(weights, name, "matting", path, partial(matting.make, name, path, said), replace=replace, agrees=said.agrees)
    prepare_variants(name, weights / "rembg" / f"{name}.onnx", network.get("output"), again="add it again")


def _add(
    weights: Path,
    name: str,
    kind: Kind,
    path: Path,
    make: Callable[[Path], Made],
    *,
    replace: bool,
    agrees: Callable[[Added], bool] = lambda _: True,
) -> None:
    """Add a local file, and say what was recognised, where it is now, and how jobs name it."""
    origin = digest_of_files(path, ())
    where = str(path.absolute())
    outcome, record, found = adding.add(weights, name, kind, make, source=where, origin=origin, replace=replace, agrees=agrees)
    for line in found:
        click.echo(f"{name}: {line}")
    click.echo(f"{name}: {OUTCOMES[outcome]}: {weights / record.place}")
    if outcome != "present" and kind in SELECTABLE:
        (operation,) = (row.operation for row in ENGINES if row.name == record.engine)
        click.echo(f"use it with: --operation {operation} --engine {record.engine} --set model={name}")
