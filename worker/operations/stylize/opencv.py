"""stylize without weights: OpenCV's non-photorealistic filters, and Reinhard's colour transfer."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shared.errors import BadReference, ImageError
from shared.options import OpencvStylize, Options
from shared.urls import shown
from worker.device import Device
from worker.operations.base import Inputs, Picture, Pixels, Sample, Spec, Work
from worker.operations.cv import fingerprint, set_up, translated
from worker.scale import fit, resize

REVISION = 1
"""Raise it when the same image and options give other pixels than before: what is remembered is then forgotten."""
REMEMBERED = 16  # references; a few jobs run at a time in one process
STEEPEST = 8.0  # a nearly flat image's noise is not stretched further than this
STRIP = 256  # rows; Lab in floats takes 16 times the bytes of the picture
TILE = 2048  # pixels; the filters take 130 bytes for each they see at a time
OWN_SIGMAS = {"stylization": (60.0, 0.45), "pencil-sketch": (60.0, 0.07), "detail": (10.0, 0.15)}
MARGIN = 3.0  # times sigma_s; a pixel further off than this changes nothing


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of an image in CIELAB, float32 [3] each; L 0..100."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]


@dataclass(frozen=True)
class Canvas:
    """The picture at the result's size, and the reference's colours for colour-transfer."""

    pixels: Pixels
    reference: Colours | None


@dataclass(frozen=True)
class Plan:
    picture: Picture  # at the result's size
    strength: float


class Stylize:
    """stylization and detailEnhance (Gastal, Oliveira, SIGGRAPH 2011), pencilSketch, colour transfer (Reinhard et al. 2001).

    Large pictures go through the filters in tiles, so that memory stays flat; time grows with the pixels.
    """

    spec = Spec("stylize", "opencv", restyles=True)

    def __init__(self) -> None:
        self._references: OrderedDict[str, tuple[weakref.ref[Pixels], Colours]] = OrderedDict()
        self._measuring = threading.Lock()

    def load(self, device: Device) -> None:
        set_up(device)

    def work_edge(self, options: Options) -> int | None:
        return options.long_edge if isinstance(options, OpencvStylize) else None

    def fingerprint(self, options: Options) -> str:  # noqa: ARG002  # the same for all
        return fingerprint(REVISION)

    @translated("scaling the image")
    def prepare(self, picture: Picture, inputs: Inputs) -> Work:
        options: OpencvStylize = inputs.options
        pixels = resize(picture.pixels, fit(picture.size, options.long_edge))
        reference = self._reference(options.reference, inputs.read) if options.reference else None
        return Work([Sample(Canvas(pixels, reference), options)], state=Plan(replace(picture, pixels=pixels), options.strength))

    def group_key(self, sample: Sample) -> Hashable:  # noqa: ARG002  # samples run one by one
        return self.spec.name

    @translated("applying the style")
    def run(self, samples: Sequence[Sample]) -> list[Any]:
        return [styled(sample.data, sample.options) for sample in samples]

    @translated("blending the style with the image")
    def finish(self, work: Work, outputs: Sequence[Any]) -> Picture:
        plan: Plan = work.state
        (rgb,) = outputs
        source, share = plan.picture.pixels, plan.strength
        if share < 1:
            rgb = np.asarray(cv2.addWeighted(rgb, share, np.ascontiguousarray(source[..., :3]), 1 - share, 0), np.uint8)
        return replace(plan.picture, pixels=np.dstack([rgb, source[..., 3]]) if source.shape[2] == 4 else rgb)

    def _reference(self, url: str, read: Callable[[str], Picture] | None) -> Colours:
        """The reference's colours, measured once for as long as `read` gives the same picture.

        Raises BadReference, or the error itself where trying again can help.
        """
        if read is None:
            raise BadReference(f"the reference {shown(url)} can't be read here")
        try:
            pixels = read(url).pixels
        except ImageError as error:
            if error.retryable:
                raise
            raise BadReference(f"the reference {shown(url)} can't be used: {error.message}") from error
        with self._measuring:
            known = self._references.get(url)
            if known is not None and known[0]() is pixels:  # another job may find other pixels at the same address
                return known[1]
            colours = colours_of(pixels)
            self._references[url] = weakref.ref(pixels), colours
            self._references.move_to_end(url)
            while len(self._references) > REMEMBERED:
                self._references.popitem(last=False)
            return colours


def styled(canvas: Canvas, options: OpencvStylize) -> Pixels:
    """RGB [h, w, 3] in the style of the options."""
    if canvas.reference is not None:
        return transferred(canvas.pixels, canvas.reference)
    bgr = cv2.cvtColor(np.ascontiguousarray(canvas.pixels[..., :3]), cv2.COLOR_RGB2BGR)  # the filters weigh channels as BGR
    reach, _ = _sigmas(options)
    margin = math.ceil(MARGIN * reach) + 2  # the filters take differences of neighbours
    height, width = bgr.shape[:2]
    made = np.empty_like(bgr)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            first_row, first_column = max(0, top - margin), max(0, left - margin)
            part = bgr[first_row : top + TILE + margin, first_column : left + TILE + margin]
            done = _filtered(np.ascontiguousarray(part), options)[top - first_row :, left - first_column :][:TILE, :TILE]
            made[top : top + TILE, left : left + TILE] = done
    return np.asarray(cv2.cvtColor(made, cv2.COLOR_BGR2RGB), np.uint8)


def _filtered(bgr: Pixels, options: OpencvStylize) -> Pixels:
    reach, alike = _sigmas(options)
    if options.style == "pencil-sketch":
        grey, made = cv2.pencilSketch(bgr, sigma_s=reach, sigma_r=alike, shade_factor=options.shade)
        return np.asarray(made if options.colour else cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), np.uint8)
    apply = cv2.detailEnhance if options.style == "detail" else cv2.stylization
    return np.asarray(apply(bgr, sigma_s=reach, sigma_r=alike), np.uint8)


def _sigmas(options: OpencvStylize) -> tuple[float, float]:
    """The given sigmas, else the style's own."""
    reach, alike = OWN_SIGMAS[options.style]
    return (
        reach if options.sigma_s is None else options.sigma_s,
        alike if options.sigma_r is None else options.sigma_r,
    )


def colours_of(pixels: Pixels) -> Colours:
    """Mean and deviation in CIELAB, each pixel weighing as much as it is opaque.

    Of at most a million pixels, taken evenly: more would change neither.
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

    In CIELAB instead of the paper's l-alpha-beta; what leaves the gamut is clipped.
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
