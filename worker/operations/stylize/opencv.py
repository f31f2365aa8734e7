"""stylize without weights: OpenCV's non-photorealistic filters, and Reinhard's colour transfer."""

from __future__ import annotations

import threading
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
from worker.operations.cv import fitted, resize, set_up, translated

REMEMBERED = 16  # references; a few jobs run at a time in one process
STEEPEST = 8.0  # a nearly flat image's noise is not stretched further than this


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


class Stylize:
    """stylization and detailEnhance (Gastal, Oliveira, SIGGRAPH 2011), pencilSketch, colour transfer (Reinhard et al. 2001).

    The filters' time and memory grow with the pixels: `long_edge` bounds both.
    """

    spec = Spec("stylize", "opencv")

    def __init__(self) -> None:
        self._references: OrderedDict[str, Colours] = OrderedDict()
        self._reading = threading.Lock()

    def load(self, device: Device) -> None:
        set_up(device)

    def work_edge(self, options: Options) -> int | None:
        return options.long_edge if isinstance(options, OpencvStylize) else None

    @translated("scaling the image")
    def prepare(self, picture: Picture, inputs: Inputs) -> Work:
        options: OpencvStylize = inputs.options
        pixels = resize(picture.pixels, fitted(picture.size, options.long_edge))
        reference = self._reference(options.reference, inputs.read) if options.reference else None
        return Work([Sample(Canvas(pixels, reference), options)], state=(replace(picture, pixels=pixels), options))

    def group_key(self, sample: Sample) -> Hashable:  # noqa: ARG002  # samples run one by one
        return self.spec.name

    @translated("applying the style")
    def run(self, samples: Sequence[Sample]) -> list[Any]:
        return [styled(sample.data, sample.options) for sample in samples]

    @translated("blending the style with the image")
    def finish(self, work: Work, outputs: Sequence[Any]) -> Picture:
        picture, options = work.state
        (rgb,) = outputs
        source = picture.pixels
        if options.strength < 1:
            rgb = cv2.addWeighted(rgb, options.strength, np.ascontiguousarray(source[..., :3]), 1 - options.strength, 0)
        return replace(picture, pixels=np.dstack([rgb, source[..., 3]]) if source.shape[2] == 4 else rgb)

    def _reference(self, url: str, read: Callable[[str], Picture] | None) -> Colours:
        """The reference's colours; read once, however many threads ask.

        Raises BadReference, or the error itself where trying again can help.
        """
        with self._reading:
            if url in self._references:
                self._references.move_to_end(url)
                return self._references[url]
            if read is None:
                raise BadReference(f"the reference {shown(url)} can't be read here")
            try:
                colours = colours_of(read(url).pixels)
            except ImageError as error:
                if error.retryable:
                    raise
                raise BadReference(f"the reference {shown(url)} can't be used: {error.message}") from error
            self._references[url] = colours
            while len(self._references) > REMEMBERED:
                self._references.popitem(last=False)
            return colours


def styled(canvas: Canvas, options: OpencvStylize) -> Pixels:
    """RGB [h, w, 3] in the style of the options."""
    if canvas.reference is not None:
        return transferred(canvas.pixels, canvas.reference)
    bgr = cv2.cvtColor(np.ascontiguousarray(canvas.pixels[..., :3]), cv2.COLOR_RGB2BGR)  # the filters weigh channels as BGR
    if options.style == "pencil-sketch":
        reach, alike = _sigmas(options, 60, 0.07)
        grey, coloured = cv2.pencilSketch(bgr, sigma_s=reach, sigma_r=alike, shade_factor=options.shade)
        return cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB) if options.colour else cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if options.style == "detail":
        reach, alike = _sigmas(options, 10, 0.15)
        return cv2.cvtColor(cv2.detailEnhance(bgr, sigma_s=reach, sigma_r=alike), cv2.COLOR_BGR2RGB)
    reach, alike = _sigmas(options, 60, 0.45)
    return cv2.cvtColor(cv2.stylization(bgr, sigma_s=reach, sigma_r=alike), cv2.COLOR_BGR2RGB)


def _sigmas(options: OpencvStylize, reach: float, alike: float) -> tuple[float, float]:
    """The given sigmas, else the style's own."""
    return (
        reach if options.sigma_s is None else options.sigma_s,
        alike if options.sigma_r is None else options.sigma_r,
    )


def colours_of(pixels: Pixels) -> Colours:
    """Mean and deviation in CIELAB, each pixel weighing as much as it is opaque."""
    lab = _lab(pixels)
    weights = pixels[..., 3].astype(np.float64) if pixels.shape[2] == 4 and pixels[..., 3].any() else np.ones(lab.shape[:2])
    weights /= weights.sum()
    mean = np.einsum("yx,yxc->c", weights, lab)
    variance = np.einsum("yx,yxc->c", weights, (lab - mean) ** 2)
    return Colours(mean.astype(np.float32), np.sqrt(variance).astype(np.float32))


def transferred(pixels: Pixels, reference: Colours) -> Pixels:
    """RGB with the reference's mean and deviation: Reinhard et al., Color Transfer between Images, IEEE CG&A 21(5), 2001.

    In CIELAB instead of the paper's l-alpha-beta; what leaves the gamut is clipped.
    """
    own = colours_of(pixels)
    slope = np.minimum(reference.deviation / np.maximum(own.deviation, 1e-3), STEEPEST)
    lab = (_lab(pixels) - own.mean) * slope + reference.mean
    np.clip(lab[..., 0], 0, 100, out=lab[..., 0])
    return np.rint(np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1) * 255).astype(np.uint8)


def _lab(pixels: Pixels) -> NDArray[np.float32]:
    return cv2.cvtColor(pixels[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
