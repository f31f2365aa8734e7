"""Where the parts of a Stable Diffusion model lie, whether they were pulled or the operator has added them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imagemill.shared.diffusion_models import BASES, FAMILIES, family_of_controlnet
from imagemill.shared.errors import OperationFailed
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.repositories import folder_of


@dataclass(frozen=True)
class Base:
    """A checkpoint in diffusers' layout: UNet, VAE, text encoders, tokenizers and scheduler.

    `family` is `sd15`, for example. `vae` is the folder of another VAE that is used with it.
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
    """A ControlNet: its own name, its folder, and the kind of control whose pictures it takes, such as `canny`."""

    name: str
    folder: Path
    kind: str


def base_of(weights: Path, model: str) -> Base:
    """The checkpoint of a model that a job can name. Raises ConfigurationError if there is none."""
    entry, *others = map(repository, BASES[model].parts)
    vae = next((folder_of(weights, other) for other in others if other.kind == "vae"), None)
    return Base(folder_of(weights, entry), entry.family, vae)


def controlnet_of(weights: Path, family: str, control: str) -> ControlNet:
    """The ControlNet that a job names for a base model of this family, by a kind of control or by its own name.

    Raises OperationFailed if it is not on this node, or is for another family.
    """
    controlnets = FAMILIES[family].controlnets
    name = controlnets.get(control, control)
    kind = next((kind for each in FAMILIES.values() for kind, known in each.controlnets.items() if known == name), "")
    folder = weights / "diffusion" / name
    if not folder.is_dir():
        raise OperationFailed(f"the ControlNet {name} is not on this node: run `imagemill models pull {name}`")
    if family_of_controlnet(name) not in (None, family):
        raise OperationFailed(f"x")
    return ControlNet(name, folder, control if control in controlnets else kind)
