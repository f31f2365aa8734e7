"""inpaint without weights: OpenCV fills each hole from its rim inwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from imagemill.shared.options.inpaint import OpencvInpaint
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.opencv import fingerprint, set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import resize
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Untouched, Work
from imagemill.worker.operations.inpaint.mask import Region, find_hole, mix, regions, shrunk, zone_of

REVISION = 2
"""Raise it when the same image and options give other pixels than before: what is remembered is then forgotten."""
STRIP = 256  # rows mixed at a time; floats take four times the bytes of the picture
EFFORT = 1e9
"""Pixels filled times pixels looked at for each, per image: about 15 s on one core. Beyond it the fill gets coarser."""
METHODS = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}


@dataclass(frozen=True)
class Crop:
    """One region of an image and the fill's share in it; views, so that waiting costs no memory.

    `shrink` is how many times smaller the fill is made: 1 but for enormous holes.
    """

    rgb: Pixels
    shares: Grey
    shrink: float


@dataclass(frozen=True)
class Plan:
    picture: Picture
    places: list[Region]


Filling = Work[OpencvInpaint, Crop, Plan]


class Inpaint(Operation[OpencvInpaint, Crop, Pixels, Plan]):
    """Telea (Journal of Graphics Tools 9(1), 2004) or Navier-Stokes (Bertalmio, Bertozzi, Sapiro, CVPR 2001).

    A sample is a region around holes that lie close together, so time follows the mask and not the image, up
    to a limit: what would take longer than `EFFORT` is filled at a smaller size and enlarged.
    """

    spec = Spec("inpaint", "opencv", needs_mask=True, max_batch=16)

    def load(self, device: Device) -> None:
        set_up(device)

    def fingerprint(self, options: OpencvInpaint) -> str:  # noqa: ARG002
        return fingerprint(REVISION)

    @translated("finding what to fill")
    def prepare(self, picture: Picture, inputs: Inputs[OpencvInpaint]) -> Filling | Untouched:
        options = inputs.options
        hole = find_hole(picture.size, inputs)
        if isinstance(hole, Untouched):
            return hole
        shares = hole.shares
        # Beyond the fade, the filters look `radius` further and need a pixel for differences.
        places = regions(shares, options.radius + 3)
        parts = [shares[one.rows, one.columns] for one in places]
        area = sum(np.count_nonzero(zone_of(part)) for part in parts)
        # Pixels shrink with the square of the size, and so does what each looks at.
        shrink = max(1.0, (area * math.pi * options.radius**2 / EFFORT) ** 0.25)
        rgb = picture.pixels[..., :3]
        crops = [Crop(rgb[one.rows, one.columns], part, shrink) for one, part in zip(places, parts, strict=True)]
        samples = [Sample(crop, options) for crop in crops]
        return Work(samples, plan=Plan(picture, places), notes=hole.notes, evidence=hole.evidence)

    @translated("filling the holes")
    def run(self, samples: Sequence[Sample[OpencvInpaint, Crop]]) -> list[Pixels]:
        return [fill(sample.data, sample.options) for sample in samples]

    @translated("putting the fill into the image")
    def finish(self, work: Filling, outputs: Sequence[Pixels]) -> Picture:
        plan = work.plan
        for place, filled, sample in zip(plan.places, outputs, work.samples, strict=True):
            target = plan.picture.pixels[place.rows, place.columns, :3]
            for top in range(0, len(filled), STRIP):
                rows = slice(top, top + STRIP)
                mix(target[rows], filled[rows], sample.data.shares[rows])
        return plan.picture


def fill(crop: Crop, options: OpencvInpaint) -> Pixels:
    """The region [h, w, 3] with its hole, and the fade around it, filled."""
    zone = zone_of(crop.shares)
    size = (zone.shape[1], zone.shape[0])
    small = (max(1, round(size[0] / crop.shrink)), max(1, round(size[1] / crop.shrink)))
    if small == size:
        return _filled(crop.rgb, zone, options.radius, options.method)
    rgb = resize(np.ascontiguousarray(crop.rgb), small)
    coarse = _filled(rgb, shrunk(zone, small), max(1.0, options.radius / crop.shrink), options.method)
    return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def _filled(rgb: Pixels, zone: Grey, radius: float, method: str) -> Pixels:
    # cv2.inpaint (5.0) reads beyond pictures of one row or column; a border, repeated, keeps it inside.
    rgb, zone = (np.pad(array, ((2, 2), (2, 2), (0, 0))[: array.ndim], mode="edge") for array in (rgb, zone))
    filled = cv2.inpaint(rgb, zone, radius, METHODS[method])
    return np.ascontiguousarray(filled[2:-2, 2:-2], np.uint8)
