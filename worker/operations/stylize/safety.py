"""Stable Diffusion's safety checker, for the results of every family."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.operations.stylize.loading import from_disk


class SafetyChecker:
    """Loaded from its folder to a device."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.network = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker", **from_disk(folder, dtype))
        self.network.to(device)
        self._dtype, self._device = dtype, device
        self._prepare = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)

    def refuses(self, images: Pixels) -> list[bool]:
        """Which of the images, RGB uint8 [images, h, w, 3], are unsafe."""
        prepared = self._prepare([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        _, refused = self.network(images=list(images), clip_input=prepared.to(self._device, self._dtype))
        return [bool(each) for each in refused]
