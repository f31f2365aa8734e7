"""stylize without a model: OpenCV's non-photorealistic filters, and Reinhard's colour transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from imagemill.shared.options.stylize import OpencvStylize
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.extend import extended
from imagemill.worker.imaging.opencv import fingerprint, set_up, translated
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.operations.base import Evidence, Inputs, Operation, Sample, Spec, Work
from imagemill.worker.operations.stylize.palette import Colours, Palettes, transferred

REVISION = 2
"""Raise this whenever the same image and options give different pixels, so that cached results are not reused."""
TILE = 2048  # side of a tile in pixels; the filters take 130 bytes of memory per pixel
SHADE = 0.05  # brightness of a pencil sketch, as in OpenCV's own demo
SIGMAS = {"stylization": (60.0, 0.45), "pencil-sketch": (60.0, 0.07), "detail": (10.0, 0.15)}
"""sigma_s (reach in pixels) and sigma_r (how different colours may be that are smoothed together) of each style."""
MARGIN = 3.0  # in sigma_s; pixels further away have no effect


@dataclass(frozen=True)
class Canvas:
    """The picture at the result's size, and the reference's colours for colour-transfer."""

    pixels: Pixels
    reference: Colours | None


@dataclass(frozen=True)
class Plan:
    """What `finish` needs: the picture at the result's size, and the share of the style in the result."""

    picture: Picture
    strength: float


Styling = Work[OpencvStylize, Canvas, Plan]


class Stylize(Operation[OpencvStylize, Canvas, Pixels, Plan]):
    """stylization and detailEnhance (Gastal, Oliveira, SIGGRAPH 2011), pencilSketch, colour transfer (Reinhard et al. 2001).

    Large images are filtered in tiles, so memory is bounded.
    """

    spec = Spec("stylize", "opencv", restyles=True)

    def __init__(self) -> None:
        self._palettes = Palettes()

    def load(self, device: Device) -> None:
        set_up(device)

    def fingerprint(self, options: OpencvStylize) -> str:  # noqa: ARG002
        return fingerprint(REVISION)

    def work_edge(self, options: OpencvStylize) -> int | None:
        return options.long_edge

    @translated("scaling the image")
    def prepare(self, picture: Picture, inputs: Inputs[OpencvStylize]) -> Styling:
        options = inputs.options
        pixels = resize(picture.pixels, fit(picture.size, options.long_edge))
        reference = self._palettes.of(options.reference, inputs.read) if options.reference else None
        plan, evidence = Plan(replace(picture, pixels=pixels), options.strength), Evidence(recoloured=reference is not None)
        return Work([Sample(Canvas(pixels, reference), options)], plan=plan, evidence=evidence)

    @translated("applying the style")
    def run(self, samples: Sequence[Sample[OpencvStylize, Canvas]]) -> list[Pixels]:
        return [styled(sample.data, sample.options) for sample in samples]

    @translated("blending the style with the image")
    def finish(self, work: Styling, outputs: Sequence[Pixels]) -> Picture:
        plan, (rgb,) = work.plan, outputs
        source, share = plan.picture.pixels, plan.strength
        if share < 1:
            rgb = np.asarray(cv2.addWeighted(rgb, share, np.ascontiguousarray(source[..., :3]), 1 - share, 0), np.uint8)
        return replace(plan.picture, pixels=np.dstack([rgb, source[..., 3]]) if source.shape[2] == 4 else rgb)


def styled(canvas: Canvas, options: OpencvStylize) -> Pixels:
    """The canvas as RGB uint8 [h, w, 3] in the style of the options."""
    if canvas.reference is not None:
        return transferred(canvas.pixels, canvas.reference)
    bgr = cv2.cvtColor(np.ascontiguousarray(extended(canvas.pixels)), cv2.COLOR_RGB2BGR)  # the filters expect BGR
    reach, _ = SIGMAS[options.style]
    margin = math.ceil(MARGIN * reach) + 2  # plus 2 because the filters use differences of neighbours
    height, width = bgr.shape[:2]
    result = np.empty_like(bgr)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            first_row, first_column = max(0, top - margin), max(0, left - margin)
            part = bgr[first_row : top + TILE + margin, first_column : left + TILE + margin]
            tile = _filtered(np.ascontiguousarray(part), options)[top - first_row :, left - first_column :][:TILE, :TILE]
            result[top : top + TILE, left : left + TILE] = tile
    return np.asarray(cv2.cvtColor(result, cv2.COLOR_BGR2RGB), np.uint8)


def _filtered(bgr: Pixels, options: OpencvStylize) -> Pixels:
    reach, alike = SIGMAS[options.style]
    if options.style == "pencil-sketch":
        grey, coloured = cv2.pencilSketch(bgr, sigma_s=reach, sigma_r=alike, shade_factor=SHADE)
        return np.asarray(coloured if options.colour else cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), np.uint8)
    apply = cv2.detailEnhance if options.style == "detail" else cv2.stylization
    return np.asarray(apply(bgr, sigma_s=reach, sigma_r=alike), np.uint8)
