"""What differs between the families of Stable Diffusion; each has its own module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """diffusers' classes for the two modes, without and with ControlNets, and what their constructors need.

    `vae_overflows` in half precision, unless its configuration says otherwise: then it works in float32.
    """

    text_to_image: Any
    image_to_image: Any
    controlled_text_to_image: Any
    controlled_image_to_image: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    vae_overflows: bool = False

    def kind(self, mode: str, *, controlled: bool) -> Any:
        """The class for a job's mode."""
        plain, with_controls = {
            "text-to-image": (self.text_to_image, self.controlled_text_to_image),
            "image-to-image": (self.image_to_image, self.controlled_image_to_image),
        }[mode]
        return with_controls if controlled else plain
