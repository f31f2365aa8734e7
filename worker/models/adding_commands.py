"""The command `imagemill models add`, for the operator's own models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from imagemill.shared.diffusion_models import FAMILIES
from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import UsageError
from imagemill.shared.settings import WeightsSettings, load_settings
from imagemill.worker.models import added, adding, own_diffusion
from imagemill.worker.models.added import SELECTABLE, TITLES, Added
from imagemill.worker.models.adding import Made
from imagemill.worker.models.command_parts import needing, prepare_variants
from imagemill.worker.models.own_diffusion import CONTROLS
from imagemill.worker.models.sources import Format, OnHub, check_no_address, digest_of_files, format_of, on_hub
from imagemill.worker.models.tensor_names import Contents

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
@click.option("--family", metavar="NAME", help="u2net, isnet, birefnet, modnet, ben, sd15 or sdxl; usually recognised.")
@click.option("--vae", metavar="NAME", help="Build this VAE, which you have already added, into the checkpoint.")
@click.option(
    "--control",
    type=click.Choice(CONTROLS),
    help="What to draw from each image for the ControlNet; usually recognised by its name.",
)
@click.option("--revision", metavar="REV", help="Commit, tag or branch, for a SOURCE on the Hugging Face Hub; default main.")
@click.option("--input-size", type=click.IntRange(16, 4096), help="Side of the input in pixels (ONNX).")
@click.option("--mean", type=Numbers(), metavar="R,G,B", help="What is subtracted from each channel, from 0 to 1 (ONNX).")
@click.option("--deviation", type=Numbers(), metavar="R,G,B", help="What each channel is divided by after that (ONNX).")
@click.option("--output", metavar="NAME", help="The output with the matte, by name or by number from 0 (ONNX).")
@click.option("--logits/--no-logits", default=None, help="Whether the output still needs a sigmoid (ONNX).")
@click.option("--replace", is_flag=True, help="Replace the model that has this name now.")
def add(name: str, source: str, replace: bool, **said: Any) -> None:
    """Add a model of your own. Jobs name it like any other: in --set model=NAME, or in control, vae or loras.

    \b
    SOURCE is one of these:
    - an ONNX file that cuts out subjects, of the family u2net, isnet,
      birefnet, modnet or ben, or any other with --mean and --deviation
    - a checkpoint of Stable Diffusion 1.5 or SDXL, a ControlNet or a VAE:
      one file, a folder in diffusers' layout, or
      owner/repository[/file]@revision on the Hugging Face Hub
    - a LoRA, or LaMa's weights

    The model is tried out and copied; one that doesn't fit is refused. Run this on each host, or once for a shared folder.
    """
    settings, path = load_settings().weights, Path(source)
    adding.check_name(name)
    addition = _Addition(settings, name, path, replace)
    place = None if os.path.lexists(path) else on_hub(source)
    if place is not None:
        _only(said, "a model on the Hugging Face Hub", "family", "vae", "control", "revision")
        addition.from_hub(place, said["family"], said["vae"], said["control"], said["revision"])
        return
    check_no_address(source)
    kind = format_of(path)
    if kind == "onnx":
        _only(said, "an ONNX file", "family", "input_size", "mean", "deviation", "output", "logits")
        addition.onnx(said)
    else:
        _only(said, "a file or folder of tensors", "family", "vae", "control")
        addition.tensors(kind, said["family"], said["vae"], said["control"])


def _only(said: dict[str, Any], what: str, *fitting: str) -> None:
    """Raise UsageError for a flag that does not apply to this kind of source."""
    for flag, value in said.items():
        if value is not None and flag not in fitting:
            raise UsageError(f"--{flag.replace('_', '-')} is not for {what}")


@dataclass(frozen=True)
class _Addition:
    """One use of the command, and what it prints."""

    settings: WeightsSettings
    name: str
    path: Path
    replace: bool

    @property
    def weights(self) -> Path:
        return self.settings.folder.expanduser()

    def onnx(self, said: dict[str, Any]) -> None:
        if not all(said["deviation"] or (1.0,)):
            raise UsageError("--deviation can't be 0")
        with needing("rembg", "adding an ONNX file"):
            from imagemill.worker.models import matting

            network = {flag: said[flag] for flag in ("family", "mean", "deviation", "output", "logits")}
            wanted = matting.Said(size=said["input_size"], **network)
            make = partial(matting.make, self.name, self.path, wanted)
            origin = digest_of_files(self.path, ())
            record = self._add("rembg", make, str(self.path.absolute()), origin, agrees=wanted.agrees)
        output = record.parameters.get("output")
        prepare_variants(self.name, self.weights / record.place, None if output is None else f"{output}", again="add it again")

    def tensors(self, kind: Format, family: str | None, vae: str | None, control: str | None) -> None:
        with needing("lama", "reading a checkpoint"):
            what = own_diffusion.contents_of_folder(self.path) if kind == "folder" else own_diffusion.contents_of(self.path)
        what = self._as_said(what, family, vae, control)
        make = own_diffusion.from_folder if kind == "folder" else own_diffusion.from_file
        ready = partial(make, self.name, self.path, what, self.weights, vae, control)
        origin = digest_of_files(self.path, [self.path / file for file in what.files])
        engine = added.ENGINES[what.kind]
        with needing(engine, f"adding a {TITLES[what.kind]}"):
            self._add(engine, ready, str(self.path.absolute()), origin, agrees=_with(family, vae, control))

    def from_hub(self, place: OnHub, family: str | None, vae: str | None, control: str | None, revision: str | None) -> None:
        if place.revision and revision:
            raise UsageError(f"--revision can't be combined with the revision in {self.path}")
        with needing("diffusion", "adding a model from the Hugging Face Hub"):
            from imagemill.worker.models import own_from_hub

            found = own_from_hub.resolved(place, place.revision or revision or "main", self.settings)
            check = partial(self._as_said, family=family, vae=vae, control=control)
            make = partial(own_from_hub.make, self.name, found, self.settings, vae, control, check)
            origin = hashlib.sha256(found.source.encode()).hexdigest()
            self._add("diffusion", make, found.source, origin, agrees=_with(family, vae, control))

    def _as_said(self, what: Contents, family: str | None, vae: str | None, control: str | None) -> Contents:
        """What was recognised, with the given family if none was. Raises UsageError for flags that don't fit it."""
        if family not in (None, what.family, *FAMILIES):
            raise UsageError(f"there is no family {family!r} of Stable Diffusion; there are {' and '.join(FAMILIES)}")
        if family is not None and what.family and family != what.family:
            raise UsageError(f"{self.path} is a {TITLES[what.kind]} of the family {what.family}, not {family}")
        if vae is not None and what.kind != "checkpoint":
            raise UsageError(f"--vae is for checkpoints, and {self.path} is a {TITLES[what.kind]}")
        if control is not None and what.kind != "controlnet":
            raise UsageError(f"--control is for ControlNets, and {self.path} is a {TITLES[what.kind]}")
        if what.kind == "lora":
            own_diffusion.check_lora_name(self.name)
        return replace(what, family=what.family or family or "")

    def _add(
        self, engine: str, make: Callable[[Path], Made], source: str, origin: str, *, agrees: Callable[[Added], bool]
    ) -> Added:
        """Add it, and say what was recognised, where it is now, and how jobs name it. Returns its record."""
        weights, name = self.weights, self.name
        outcome, record, found = adding.add(
            weights, name, engine, make, source=source, origin=origin, replace=self.replace, agrees=agrees
        )
        for line in found:
            click.echo(f"{name}: {line}")
        click.echo(f"{name}: {OUTCOMES[outcome]}: {weights / record.place}")
        if outcome != "present" and record.kind in (*SELECTABLE, "controlnet"):
            (operation,) = (row.operation for row in ENGINES if row.name == record.engine)
            chosen = f"model={record.family} --set control={name}" if record.kind == "controlnet" else f"model={name}"
            click.echo(f"use it with: --operation {operation} --engine {record.engine} --set {chosen}")
        return record


def _with(family: str | None, vae: str | None, control: str | None) -> Callable[[Added], bool]:
    """Whether a model that was added has this family, this VAE and this kind of control, where they are given."""
    given = {name: value for name, value in (("family", family), ("vae", vae), ("control", control)) if value is not None}
    return lambda record: given.items() <= {**record.parameters, "family": record.family}.items()
