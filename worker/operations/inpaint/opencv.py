"""inpaint without weights: OpenCV fills each hole from its rim inwards."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from shared.options import OpencvInpaint, Options
from worker.device import Device
from worker.operations.base import Grey, Inputs, Picture, Pixels, Sample, Spec, Work
from worker.operations.cv import set_up, translated
from worker.operations.inpaint.mask import Region, build_mask, feather_weights, regions

EMPTY = "empty_mask"
NOWHERE = Region(slice(0, 1), slice(0, 1))  # every work has a sample, this one has nothing to fill
METHODS = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}


@dataclass(frozen=True)
class Crop:
    """One region of an image and the hole in it; views, so that waiting costs no memory."""

    rgb: Pixels
    hole: Grey


@dataclass(frozen=True)
class Plan:
    picture: Picture
    places: list[Region]


class Inpaint:
    """Telea (Journal of Graphics Tools 9(1), 2004) or Navier-Stokes (Bertalmio, Bertozzi, Sapiro, CVPR 2001).

    A sample is a region around holes that lie close together, so time follows the mask and not the image.
    """

    spec = Spec("inpaint", "opencv", needs_mask=True, max_batch=16)

    def load(self, device: Device) -> None:
        set_up(device)

    def work_edge(self, options: Options) -> int | None:  # noqa: ARG002  # what lies outside the mask is kept as it is
        return None

    @translated("finding what to fill")
    def prepare(self, picture: Picture, inputs: Inputs) -> Work:
        options: OpencvInpaint = inputs.options
        hole = build_mask(picture.size, inputs)
        # Beyond the fade, the filters look `radius` further and need a pixel for differences.
        places = regions(hole, options.mask_feather + options.radius + 3) if hole.any() else [NOWHERE]
        rgb = picture.pixels[..., :3]
        samples = [Sample(Crop(rgb[one.rows, one.columns], hole[one.rows, one.columns]), options) for one in places]
        return Work(samples, state=Plan(picture, places), notes=[] if hole.any() else [EMPTY])

    def group_key(self, sample: Sample) -> Hashable:  # noqa: ARG002  # samples run one by one
        return self.spec.name

    @translated("filling the holes")
    def run(self, samples: Sequence[Sample]) -> list[Any]:
        return [fill(sample.data, sample.options) for sample in samples]

    @translated("putting the fill into the image")
    def finish(self, work: Work, outputs: Sequence[Any]) -> Picture:
        plan: Plan = work.state
        if plan.places == [NOWHERE]:
            return plan.picture
        pixels = plan.picture.pixels.copy()
        for place, filled, sample in zip(plan.places, outputs, work.samples, strict=True):
            weight = feather_weights(sample.data.hole, sample.options.mask_feather)[..., None]
            target = pixels[place.rows, place.columns, :3]
            mixed = np.rint(target + (filled - target.astype(np.float32)) * weight).astype(np.uint8)
            np.copyto(target, mixed, where=weight > 0)  # the rest stays bit for bit
        return replace(plan.picture, pixels=pixels)


def fill(crop: Crop, options: OpencvInpaint) -> Pixels:
    """The region [h, w, 3] with its hole, and the fade around it, filled."""
    zone = (feather_weights(crop.hole, options.mask_feather) > 0).astype(np.uint8)
    if zone.all():  # a fade as wide as the image leaves nothing to fill from
        zone = (crop.hole > 0).astype(np.uint8)
    # cv2.inpaint (5.0) reads beyond pictures of one row or column; a border, repeated, keeps it inside.
    rgb, zone = (np.pad(array, ((2, 2), (2, 2), (0, 0))[: array.ndim], mode="edge") for array in (crop.rgb, zone))
    filled = cv2.inpaint(rgb, zone, options.radius, METHODS[options.method])
    return np.ascontiguousarray(filled[2:-2, 2:-2], np.uint8)
