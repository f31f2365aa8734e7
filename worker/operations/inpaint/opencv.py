"""inpaint without weights: OpenCV fills each hole from its rim inwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from imagemill.shared.options.inpaint import OpencvInpaint
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.extend import extended
from imagemill.worker.imaging.opencv import fingerprint, set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import resize
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Untouched, Work
from imagemill.worker.operations.inpaint.mask import blend, fill_mask, find_hole, rectangles_around, reveal, shrunk
from imagemill.worker.operations.inpaint.rectangle import Rectangle

REVISION = 3
"""Raise this whenever the same image and options give different pixels, so that cached results are not reused."""

EFFORT = 1e9
"""Pixels to fill times pixels examined for each, per image: about 15 s on one core. Larger holes get a coarser fill."""

METHODS = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}


@dataclass(frozen=True)
class Crop:
    """Part of an image and the opacity of its fill; views, so that a waiting crop takes no memory.

    `shrink` is how many times smaller the fill is computed: 1 except for enormous holes.
    """

    rgb: Pixels
    opacity: Grey
    shrink: float


@dataclass(frozen=True)
class Plan:
    """The image, and where each sample's crop lies in it."""

    picture: Picture
    places: list[Rectangle]


Filling = Work[OpencvInpaint, Crop, Plan]


class Inpaint(Operation[OpencvInpaint, Crop, Pixels, Plan]):
    """Telea (Journal of Graphics Tools 9(1), 2004) or Navier-Stokes (Bertalmio, Bertozzi, Sapiro, CVPR 2001).

    A sample is a crop around holes that lie close together, so time depends on the mask and not on the image, up to a
    limit: a fill that would exceed `EFFORT` is computed at a smaller size and enlarged.
    """

    spec = Spec("inpaint", "opencv", needs_mask=True, max_batch=16)

    def load(self, device: Device) -> None:
        set_up(device)

    def fingerprint(self, options: OpencvInpaint) -> str:  # noqa: ARG002
        return fingerprint(REVISION)

    @translated("finding the hole")
    def prepare(self, picture: Picture, inputs: Inputs[OpencvInpaint]) -> Filling | Untouched:
        options = inputs.options
        hole = find_hole(picture.size, inputs)
        if isinstance(hole, Untouched):
            return hole
        # Outside the fade, the filters look `radius` pixels further and need another pixel for differences.
        places = rectangles_around(hole.opacity, options.radius + 3)
        area = sum(np.count_nonzero(fill_mask(hole.opacity[place])) for place in places)
        # The number of pixels falls with the square of the size, and so does the number examined for each.
        shrink = max(1.0, (area * math.pi * options.radius**2 / EFFORT) ** 0.25)
        rgb = extended(picture.pixels)
        samples = [Sample(Crop(rgb[place], hole.opacity[place], shrink), options) for place in places]
        return Work(samples, plan=Plan(picture, places), notes=hole.notes, evidence=hole.evidence, filled=hole.outline)

    @translated("filling the hole")
    def run(self, samples: Sequence[Sample[OpencvInpaint, Crop]]) -> list[Pixels]:
        return [fill(sample.data, sample.options) for sample in samples]

    @translated("blending the fill into the image")
    def finish(self, work: Filling, outputs: Sequence[Pixels]) -> Picture:
        picture = work.plan.picture
        for place, sample, output in zip(work.plan.places, work.samples, outputs, strict=True):
            blend(picture.pixels[place][..., :3], output, sample.data.opacity)
            reveal(picture.pixels[place], sample.data.opacity)
        return picture


def fill(crop: Crop, options: OpencvInpaint) -> Pixels:
    """The crop [h, w, 3] with its hole, and the fade around it, filled."""
    mask = fill_mask(crop.opacity)
    size = (mask.shape[1], mask.shape[0])
    small = (max(1, round(size[0] / crop.shrink)), max(1, round(size[1] / crop.shrink)))
    if small == size:
        return _inpainted(crop.rgb, mask, options.radius, options.method)
    rgb = resize(np.ascontiguousarray(crop.rgb), small)
    coarse = _inpainted(rgb, shrunk(mask, small), max(1.0, options.radius / crop.shrink), options.method)
    return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def _inpainted(rgb: Pixels, mask: Grey, radius: float, method: str) -> Pixels:
    # cv2.inpaint (5.0) reads outside pictures of one row or column; repeating the edge pixels keeps it inside.
    rgb, mask = (np.pad(array, ((2, 2), (2, 2), (0, 0))[: array.ndim], mode="edge") for array in (rgb, mask))
    filled = cv2.inpaint(rgb, mask, radius, METHODS[method])
    return np.ascontiguousarray(filled[2:-2, 2:-2], np.uint8)
