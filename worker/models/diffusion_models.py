"""Where the parts of a Stable Diffusion model lie, whether they were pulled or the operator has added them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models import added
from imagemill.worker.models.catalogue import MODELS, REPOSITORIES, repository
from imagemill.worker.models.repositories import folder_of


@dataclass(frozen=True)
class Base:
    """A checkpoint in diffusers' layout: UNet, VAE, text encoder, tokenizer and scheduler. `family` is `sd15`, for example."""

    folder: Path
    family: str


def base_of(weights: Path, model: str) -> Base:
    """The checkpoint of a model that a job can name. Raises ConfigurationError if there is none."""
    if model in MODELS:
        entry = repository(MODELS[model][0])
        return Base(folder_of(weights, entry), entry.family)
    record = _record(weights, model, "checkpoint")
    return Base(added_folder(weights, model), record.family)


def controlnet_of(weights: Path, name: str) -> Path:
    """The folder of a ControlNet, by its own name. Raises ConfigurationError if there is none."""
    if name in {entry.name for entry in REPOSITORIES}:
        return folder_of(weights, repository(name))
    _record(weights, name, "controlnet")
    return added_folder(weights, name)


def added_folder(weights: Path, name: str) -> Path:
    """Where an added checkpoint, ControlNet or VAE belongs: `{weights}/diffusion/{name}`."""
    return weights / "diffusion" / name


def _record(weights: Path, name: str, kind: added.Kind) -> added.Added:
    record = added.find(weights, name)
    if record is None or record.kind != kind:
        raise ConfigurationError(f"there is no {kind} called {name} in {weights}: run `imagemill models add {name} SOURCE`")
    return record
