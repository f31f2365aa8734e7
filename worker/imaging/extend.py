"""Colours for what is hidden: those of the visible pixels nearby, so that filters and models see no edge there."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.imaging.scale import fit, resize

SIDE = 1024  # longest side in pixels at which the colours are spread: they are smooth anyway

Map = NDArray[np.float32]


def extended(pixels: Pixels) -> Pixels:
    """RGB [h, w, 3] of `pixels`, where alpha is 0 with the colours around it; the file's own colour there means nothing.

    Pixels with any alpha keep their colour, which is not mixed with a background. Returns a view if nothing is hidden, or all.
    """
    rgb = pixels[:, :, :3]
    if pixels.shape[2] == 3 or pixels[:, :, 3].all() or not pixels[:, :, 3].any():
        return rgb
    size = (pixels.shape[1], pixels.shape[0])
    small: Map = resize(pixels, fit(size, SIDE)).astype(np.float32)
    weight: Map = small[:, :, 3:] / np.float32(255)
    if not weight.any():  # specks that scaling made invisible
        return rgb
    spread = _spread(small[:, :, :3] * weight, weight)
    result = np.asarray(cv2.resize(np.rint(spread).astype(np.uint8), size, interpolation=cv2.INTER_LINEAR), np.uint8)
    return np.asarray(cv2.copyTo(np.ascontiguousarray(rgb), pixels[:, :, 3], result), np.uint8)


def _spread(colours: Map, weight: Map) -> Map:
    """Means of weighted `colours` [h, w, 3] / `weight` [h, w, 1], over areas that are as large as it takes to see something."""
    height, width = weight.shape[:2]
    own = colours / np.maximum(weight, np.float32(1e-4))
    if min(height, width) == 1 and max(height, width) == 1:
        return np.asarray(own, np.float32)
    half = ((width + 1) // 2, (height + 1) // 2)
    fewer, less = (
        np.asarray(cv2.resize(values, half, interpolation=cv2.INTER_AREA), np.float32) for values in (colours, weight)
    )
    around = cv2.resize(_spread(fewer, less.reshape(half[1], half[0], 1)), (width, height), interpolation=cv2.INTER_LINEAR)
    sure = np.minimum(1, 8 * weight)
    return np.asarray(own * sure + around.reshape(colours.shape) * (1 - sure), np.float32)
