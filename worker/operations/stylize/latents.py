"""The VAE: from pixels to latents and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Latents:
    """Encodes and decodes in the VAE's own precision, which may be higher than that of the latents, `dtype`.

    The generators are used in the same order as by diffusers' pipelines: first for the latents, then for the noise.
    """

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        self._vae, self._dtype = vae, dtype
        self._scale = float(vae.config.scaling_factor)

    def encoded(self, pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Latents [images, 4, h / 8, w / 8] of pixels [images, 3, h, w], 0 to 1, one image at a time."""
        pixels = (2.0 * pixels - 1.0).to(self._vae.dtype)
        found = [
            self._vae.encode(pixels[number : number + 1]).latent_dist.sample(generator)
            for number, generator in enumerate(generators)
        ]
        return torch.cat(found).to(self._dtype) * self._scale

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [images, 3, h, w], 0 to 1, of latents."""
        pixels: torch.Tensor = self._vae.decode((latents / self._scale).to(self._vae.dtype), return_dict=False)[0]
        return (pixels * 0.5 + 0.5).clamp(0, 1)
