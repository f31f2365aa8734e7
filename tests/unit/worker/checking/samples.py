"""Synthetic pictures and flaws for the quality tests."""

from __future__ import annotations

import cv2
import numpy as np

from imagemill.worker.checking.measures import lab
from imagemill.worker.imaging.picture import Grey, Pixels


def greyish(height: int = 240, width: int = 320, seed: int = 0) -> Pixels:
    """Tiles and grain in greys between 70 and 180, so that small shifts don't clip."""
    rng = np.random.default_rng(seed)
    light = rng.uniform(85, 165, (height // 8 + 1, width // 8 + 1)).repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    light += rng.normal(0, 2, (height, width))
    return np.repeat(np.clip(light, 70, 180)[..., None], 3, axis=2).astype(np.uint8)


def tinted(pixels: Pixels, da: float, db: float, dl: float = 0) -> Pixels:
    moved = cv2.cvtColor(lab(pixels) + np.array([dl, da, db], np.float32), cv2.COLOR_LAB2RGB)
    return np.rint(np.clip(moved, 0, 1) * 255).astype(np.uint8)


def blurred(pixels: Pixels, sigma: float) -> Pixels:
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)


def all_of(pixels: Pixels) -> Grey:
    return np.full(pixels.shape[:2], 255, np.uint8)
