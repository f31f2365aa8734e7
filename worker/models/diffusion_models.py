"""Where the parts of a Stable Diffusion model are, whether they were pulled or added by the operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from imagemill.shared.diffusion_models import FAMILIES
from imagemill.shared.errors import ConfigurationError, ModelUnavailable
from imagemill.worker.models import added
from imagemill.worker.models.catalogue import MODELS, REPOSITORIES, Repository, RepositoryKind, repository
from imagemill.worker.models.repositories import folder_of, state


@dataclass(frozen=True)
class Base:
    """A checkpoint in diffusers' layout: UNet, VAE, text encoders, tokenizers and scheduler.

    `family` is `sd15`, for example. `vae` is the folder of another VAE to use with it.
    """

    folder: Path
    family: str
    vae: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """All folders that it is loaded from."""
        return [self.folder] if self.vae is None else [self.folder, self.vae]


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet: its own name, its folder, and the kind of control picture that it takes, such as `canny`."""

    name: str
    folder: Path
    kind: str


def base_of(weights: Path, model: str, vae: str | None = None) -> Base:
    """The checkpoint of a model that a job can name, with another VAE if it names one.

    Raises ConfigurationError if there is no such model, and ModelUnavailable if there is no such VAE or it doesn't fit.
    """
    base = _checkpoint(weights, model)
    if vae is None:
        return base
    entry, record = _entry(vae, "vae"), _record(weights, vae)
    if entry is not None and state(weights, entry) != "missing":
        own = entry.family
    elif record is not None and record.kind == "vae":
        own = record.family
    else:
        raise ModelUnavailable.of_part(vae, f"the VAE {vae} is not on this node: run {_getting(vae, entry)}")
    _check_family("VAE", vae, own or base.family, base.family)  # most don't say what they were trained for
    return replace(base, vae=added_folder(weights, vae))


def _checkpoint(weights: Path, model: str) -> Base:
    if model in MODELS:
        entry, *others = map(repository, MODELS[model])
        vae = next((folder_of(weights, other) for other in others if other.kind == "vae"), None)
        return Base(folder_of(weights, entry), entry.family, vae)
    record = added.find(weights, model)
    if record is None or record.kind != "checkpoint":
        raise ConfigurationError(
            f"there is no checkpoint called {model} in {weights}: run `imagemill models add {model} SOURCE`"
        )
    return Base(added_folder(weights, model), record.family)


def controlnet_of(weights: Path, family: str, control: str) -> ControlNet:
    """The ControlNet that a job names, by a kind of control or by its own name, for a base model of this family.

    The record of an added one names the kind of pictures that it takes in its parameter `control`. Raises ModelUnavailable if
    there is no such ControlNet on this node, or if it is for another family.
    """
    name = FAMILIES[family].controlnets.get(control, control)
    entry = _entry(name, "controlnet")
    record = _record(weights, name) if entry is None else None
    if entry is not None and state(weights, entry) != "missing":
        own, kind = entry.family, _kind_in_catalogue(name)
    elif record is not None and record.kind == "controlnet":
        own, kind = record.family, str(record.parameters.get("control", ""))
    else:
        raise ModelUnavailable.of_part(name, f"the ControlNet {name} is not on this node: run {_getting(name, entry)}")
    _check_family("ControlNet", name, own, family)
    return ControlNet(name, added_folder(weights, name), control if control in FAMILIES[family].controlnets else kind)


def check_lora(weights: Path, family: str, name: str) -> None:
    """Raise ModelUnavailable if a LoRA is known to be for another family than this one."""
    entry, record = _entry(name, "lora"), _record(weights, name)
    own = entry.family if entry is not None else record.family if record is not None and record.kind == "lora" else ""
    _check_family("LoRA", name, own or family, family)


def added_folder(weights: Path, name: str) -> Path:
    """Where an added checkpoint, ControlNet or VAE belongs: `{weights}/diffusion/{name}`."""
    return weights / "diffusion" / name


def _entry(name: str, kind: RepositoryKind) -> Repository | None:
    return next((entry for entry in REPOSITORIES if (entry.name, entry.kind) == (name, kind)), None)


def _record(weights: Path, part: str) -> added.Added | None:
    """The record of an added part. Raises ModelUnavailable if it is damaged."""
    try:
        return added.find(weights, part)
    except ConfigurationError as error:
        raise ModelUnavailable.of_part(part, error.message) from error


def _getting(name: str, entry: Repository | None) -> str:
    return f"`imagemill models pull {name}`" if entry is not None else f"`imagemill models add {name} SOURCE`"


def _check_family(kind: str, name: str, own: str, wanted: str) -> None:
    if own != wanted:
        trained = FAMILIES[own].title if own in FAMILIES else own
        reason = f"the {kind} {name} is for {trained}, not for {FAMILIES[wanted].title}"
        raise ModelUnavailable.of_part(name, reason, misfit=True)


def _kind_in_catalogue(name: str) -> str:
    return next(kind for family in FAMILIES.values() for kind, known in family.controlnets.items() if known == name)
