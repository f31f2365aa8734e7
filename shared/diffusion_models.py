"""The families of Stable Diffusion, and the base models in the catalogue: what both producers and workers need to know.

A new family takes a row here and a module in worker/operations/stylize/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Models with the same architecture, which can share ControlNets and LoRAs.

    `side` is that of the squares it was trained on, in pixels. `controlnets` is the ControlNet of each kind of control.
    """

    title: str
    side: int
    controlnets: Mapping[str, str]


FAMILIES: dict[str, Family] = {
    "sd15": Family(
        "Stable Diffusion 1.5",
        512,
        {
            "canny": "controlnet-canny",
            "scribble": "controlnet-scribble",
            "lineart": "controlnet-lineart",
            "tile": "controlnet-tile",
        },
    ),
    "sdxl": Family(
        "SDXL",
        1024,
        {
            "canny": "controlnet-sdxl-canny",
            "scribble": "controlnet-sdxl-scribble",
            "lineart": "controlnet-sdxl-scribble",  # trained on lines of every kind
            "tile": "controlnet-sdxl-tile",
        },
    ),
}


@dataclass(frozen=True)
class Base:
    """A base model: its family, its entries in the catalogue, and the options that jobs get unless they set them."""

    family: str
    parts: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)


BASES: dict[str, Base] = {
    "sd15-canny": Base("sd15", ("sd15", "controlnet-canny")),
    "sd15": Base("sd15", ("sd15",)),
    "sdxl": Base("sdxl", ("sdxl", "sdxl-vae")),
    "sdxl-turbo": Base(
        "sdxl", ("sdxl-turbo", "sdxl-vae"), {"steps": 4, "cfg": 1.0, "scheduler": "euler-trailing", "size": 512}
    ),
}
"""By the name that jobs give. `sd15-canny` is `sd15` on nodes that also have the ControlNet of the default control."""


def kind_of_control(name: str) -> str | None:
    """The kind of pictures that a control takes, named by its kind or by a ControlNet in the catalogue; None for any other."""
    named = [kind for family in FAMILIES.values() for kind, known in family.controlnets.items() if name in (kind, known)]
    return named[0] if named else None


def family_of_controlnet(name: str) -> str | None:
    """The family of a ControlNet in the catalogue; None for any other name."""
    return next((key for key, family in FAMILIES.items() if name in family.controlnets.values()), None)
