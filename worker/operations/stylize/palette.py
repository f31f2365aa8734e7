"""Reinhard's colour transfer from a reference image, for every engine of stylize."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.job_images import job_image

REMEMBERED = 16  # references; a process works on a few jobs at once
STEEPEST = 8.0  # largest contrast gain, so that the noise of a nearly flat image is not blown up
STRIP = 256  # rows processed at once; Lab as floats takes 16 times the image's memory


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of an image in CIELAB, float32 [3] each; L 0..100."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]


class Palettes:
    """The colours of references, measured once per reference while `read` returns the same picture. Thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[weakref.ref[Pixels], Colours]] = OrderedDict()
        self._measuring = threading.Lock()

    def of(self, url: str, read: Callable[[str], Picture]) -> Colours:
        """The colours of the reference at `url`. Raises BadReference, or a retryable error unchanged."""
        pixels = job_image("reference", url, read)
        with self._measuring:
            known = self._known.get(url)
            if known is not None and known[0]() is pixels:  # the same URL may return different pixels for another job
                return known[1]
            colours = colours_of(pixels)
            self._known[url] = weakref.ref(pixels), colours
            self._known.move_to_end(url)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return colours


def colours_of(pixels: Pixels) -> Colours:
    """Mean and standard deviation in CIELAB of RGB or RGBA [h, w, 3 or 4], weighted by alpha.

    Measured on an even sample of at most a million pixels; more would not change the result.
    """
    step = math.ceil(math.sqrt(pixels.shape[0] * pixels.shape[1] / 1e6))
    sample = pixels[::step, ::step]
    lab = _lab(sample)
    weights = np.ones(lab.shape[:2])
    if sample.shape[2] == 4 and sample[..., 3].any():
        weights = sample[..., 3].astype(np.float64)
    weights /= weights.sum()
    mean = np.einsum("yx,yxc->c", weights, lab)
    variance = np.einsum("yx,yxc->c", weights, (lab - mean) ** 2)
    return Colours(mean.astype(np.float32), np.sqrt(variance).astype(np.float32))


def transferred(pixels: Pixels, reference: Colours) -> Pixels:
    """RGB with the reference's mean and deviation: Reinhard et al., Color Transfer between Images, IEEE CG&A 21(5), 2001.

    Uses CIELAB instead of the paper's l-alpha-beta; colours outside the gamut are clipped.
    """
    own = colours_of(pixels)
    slope = np.minimum(reference.deviation / np.maximum(own.deviation, 1e-3), STEEPEST).astype(np.float32)
    result = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), STRIP):
        lab = (_lab(pixels[top : top + STRIP]) - own.mean) * slope + reference.mean
        np.clip(lab[..., 0], 0, 100, out=lab[..., 0])
        rgb = np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1)
        result[top : top + STRIP] = np.rint(rgb * 255)
    return result


def _lab(pixels: Pixels) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(pixels[..., :3].astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB), np.float32)
