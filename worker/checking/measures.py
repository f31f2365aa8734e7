"""Quality measures of a result: pure functions on arrays.

A `Pair` holds a result and its source scaled to `EDGE` pixels, which makes images of different sizes comparable and keeps
each measure well under a millisecond on one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.quality import Look
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.imaging.scale import fit

EDGE = 512  # longest edge, in pixels, of the pictures compared
THIN = 3  # colours are sampled at every third pixel in each direction
FEWEST = 64  # pixels needed for a measurement
SOLID, FAINT = 250, 5  # a pixel is opaque from the first alpha, visible above the second
GREY, DARK = 10.0, 10.0  # a source pixel is neutral below the first chroma, if brighter than the second L
FLAT = 2.0  # Laplacian variance caused by rounding alone
RING = 12  # width in pixels of a hole's surroundings
FEW_EDGES = 0.005  # share of edge pixels (a picture of sky) below which agreement would be a matter of chance
NEAR = 2  # pixels by which matching edges may be apart
CANNY = 100, 200  # ControlNet's thresholds
POINTS = 4096  # border pixels sampled

Map = NDArray[np.float32]
RIM = np.ones((3, 3), np.uint8)  # what `without_rim` takes away around a pixel
PIXEL = np.dtype("V3")  # an RGB pixel as one item, of which NumPy copies every third faster


@dataclass(frozen=True)
class Pair:
    """A result and its source at the same size, RGB [h, w, 3]; `source` is the result again if there is none to compare.

    `solid` [h, w] is 255 where both are opaque, otherwise 0. `alpha` [h, w] is the result's, if it has one.
    """

    rgb: Pixels
    source: Pixels
    solid: Grey
    alpha: Grey | None

    @classmethod
    def of(cls, result: Pixels, source: Pixels | None, alpha: Grey | None = None) -> Pair:
        """From RGB or RGBA of any size; `alpha`, of any size, is the matte of a result composited on a background."""
        size = fit((result.shape[1], result.shape[0]), EDGE)
        rgb, own_alpha = _split(small(result, size))
        source_rgb, source_alpha = (rgb, own_alpha) if source is None else _split(small(source, size))
        if own_alpha is None and source is not None and alpha is not None:
            own_alpha = small(alpha, size)
        solid = np.full(size[::-1], 255, np.uint8)
        for plane in (own_alpha, source_alpha):
            if plane is not None:
                solid &= np.asarray(cv2.threshold(plane, SOLID - 1, 255, cv2.THRESH_BINARY)[1], np.uint8)
        return cls(rgb, source_rgb, solid, own_alpha)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.solid.shape[1], self.solid.shape[0]

    @cached_property
    def grey(self) -> Grey:
        """The result's brightness [h, w]."""
        return np.asarray(cv2.cvtColor(self.rgb, cv2.COLOR_RGB2GRAY), np.uint8)

    @cached_property
    def source_grey(self) -> Grey:
        """The source's brightness [h, w]."""
        return np.asarray(cv2.cvtColor(self.source, cv2.COLOR_RGB2GRAY), np.uint8)

    @cached_property
    def inner(self) -> Grey:
        """`solid` without its rim."""
        return without_rim(self.solid)

    @cached_property
    def labs(self) -> tuple[Map, Map, Grey]:
        """Result and source in CIELAB, and `solid`, at every `THIN`th pixel: enough to measure colours."""
        return lab(_thinned(self.rgb)), lab(_thinned(self.source)), np.ascontiguousarray(self.solid[::THIN, ::THIN])


def _split(pixels: Pixels) -> tuple[Pixels, Grey | None]:
    """RGB, and alpha if present."""
    if pixels.shape[2] == 3:
        return pixels, None
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), np.uint8), np.asarray(cv2.extractChannel(pixels, 3), np.uint8)


def _thinned(rgb: Pixels) -> Pixels:
    """Every `THIN`th pixel in each direction."""
    thin = np.ascontiguousarray(rgb.view(PIXEL)[::THIN, ::THIN])
    return thin.view(np.uint8).reshape(*thin.shape[:2], 3)


def small(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Scale `pixels` to `size` (width, height), interpolating four source pixels each, in a twentieth of the time of averaging.

    The grain this adds is the same in result and source.
    """
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def lab(rgb: Pixels) -> Map:
    """CIELAB, float32 with L from 0 to 100, of RGB uint8 [h, w, 3]."""
    return np.asarray(cv2.cvtColor(rgb.astype(np.float32) * np.float32(1 / 255), cv2.COLOR_RGB2LAB), np.float32)


def without_rim(where: Grey) -> Grey:
    """The mask `where`, 255 on 0, less the pixels along its border, whose neighbours belong to something else."""
    return np.asarray(cv2.erode(where, RIM, borderType=cv2.BORDER_REPLICATE), np.uint8)


def sharpness(grey: Grey, inner: Grey) -> float | None:
    """Variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) inside mask `inner`, 255 on 0; None if that is too small.

    The same number as by `cv2.meanStdDev`, sooner; all sums are whole numbers, so their order does not matter.
    """
    count = cv2.countNonZero(inner)
    if count < FEWEST:
        return None
    steps = cv2.copyTo(cv2.Laplacian(grey.astype(np.float32), cv2.CV_32F), inner)
    mean, square = (cv2.sumElems(values)[0] * (1 / count) for values in (steps, cv2.multiply(steps, steps)))
    return math.sqrt(max(0.0, square - mean * mean)) ** 2


def kept(result: float | None, source: float | None) -> float | None:
    """Sharpness of a result relative to its source; None if either is unknown."""
    return (result + FLAT) / (source + FLAT) if result is not None and source is not None else None


def entropy(grey: Grey, where: Grey) -> float | None:
    """Shannon entropy in bits of the histogram inside mask `where`; None if that is too small."""
    counts = cv2.calcHist([grey], [0], where, [256], [0, 256]).ravel()
    if counts.sum() < FEWEST:
        return None
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def shift(pair: Pair) -> tuple[tuple[float, float, float], tuple[float, float]] | None:
    """Mean L, a, b of the source's neutral pixels, and the change of their mean a and b; None if there are too few."""
    result, source, solid = pair.labs
    light, a, b = cv2.split(source)
    neutral = ((cv2.magnitude(a, b) < GREY) & (light > DARK) & (solid > 0)).view(np.uint8)
    if cv2.countNonZero(neutral) < FEWEST:
        return None
    before, after = cv2.mean(source, neutral), cv2.mean(result, neutral)
    return (before[0], before[1], before[2]), (after[1] - before[1], after[2] - before[2])


def cast(pair: Pair) -> float | None:
    """Colour cast: CIEDE2000 of `shift` at the source's brightness, so that a change of brightness doesn't count."""
    moved = shift(pair)
    if moved is None:
        return None
    (light, a, b), (da, db) = moved
    return ciede2000((light, a, b), (light, a + da, b + db))


def shares(alpha: Grey) -> tuple[float, float]:
    """Shares of opaque and of partially transparent pixels."""
    opaque = int(np.count_nonzero(alpha >= SOLID))
    return opaque / alpha.size, (int(np.count_nonzero(alpha > FAINT)) - opaque) / alpha.size


def edges(grey: Grey) -> Grey:
    """Canny edges, 255 on 0, after smoothing away grain."""
    return np.asarray(cv2.Canny(cv2.GaussianBlur(grey, (3, 3), 0), *CANNY), np.uint8)


def edge_map(control: Grey, size: tuple[int, int]) -> Grey:
    """Scale an edge map, 255 on 0, to `size` (width, height)."""
    return np.asarray(cv2.threshold(small(control, size), 64, 255, cv2.THRESH_BINARY)[1], np.uint8)


def agreement(found: Grey, wanted: Grey) -> float | None:
    """F-measure of edge map `found` against `wanted`, of the same size; None if few edges are wanted.

    Martin, Fowlkes, Malik, IEEE TPAMI 26(5), 2004, except that each edge pixel is matched independently.
    """
    counts = cv2.countNonZero(found), cv2.countNonZero(wanted)
    if counts[1] < FEW_EDGES * wanted.size:
        return None
    square = np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8)
    precision = cv2.countNonZero(cv2.bitwise_and(found, cv2.dilate(wanted, square))) / max(counts[0], 1)
    recall = cv2.countNonZero(cv2.bitwise_and(wanted, cv2.dilate(found, square))) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def look(colours: Map, where: Grey) -> Look | None:
    """Mean and standard deviation in CIELAB inside mask `where`; None if that is too small."""
    if cv2.countNonZero(where) < FEWEST:
        return None
    mean, deviation = cv2.meanStdDev(colours, mask=where)
    light, a, b, *spread = (round(value, 1) for value in (*mean.ravel().tolist(), *deviation.ravel().tolist()))
    return light, a, b, spread[0], spread[1], spread[2]


def rings(hole: Grey, size: tuple[int, int]) -> tuple[Grey, Grey]:
    """Masks at `size` (width, height) of the inside of a `hole` [h, w], without its rim, and of its surroundings."""
    inside = small(hole, size)
    touched = cv2.dilate((inside > 0).astype(np.uint8) * 255, np.ones((3, 3), np.uint8))
    around = cv2.subtract(cv2.dilate(touched, np.ones((2 * RING + 1, 2 * RING + 1), np.uint8)), touched)
    return (inside == 255).astype(np.uint8) * np.uint8(255), np.asarray(around, np.uint8)


def border_step(pixels: Pixels, hole: Grey) -> float | None:
    """Mean step across the border of a hole relative to the steps just outside, along the same lines; 1 is an invisible seam.

    One level is added to both as noise. `hole` [h, w] has the result's size. None if the border nowhere has three pixels
    outside it. Measured at full size, since seams are thin, at up to `POINTS` places.
    """
    contours, _ = cv2.findContours(hole, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return None
    border = np.concatenate(contours)[:, 0]
    x, y = border[:: math.ceil(len(border) / POINTS)].T
    across, outside, count = 0.0, 0.0, 0
    for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        reach = [(y + n * down, x + n * right) for n in range(4)]
        far_y, far_x = reach[3]
        inside = (far_y >= 0) & (far_y < hole.shape[0]) & (far_x >= 0) & (far_x < hole.shape[1])
        lines = [(rows[inside], columns[inside]) for rows, columns in reach]
        free = ~np.any([hole[place] > 0 for place in lines[1:]], axis=0)
        values = np.array([pixels[rows[free], columns[free], :3] for rows, columns in lines], np.int16)
        steps = np.abs(np.diff(values, axis=0)).mean(axis=2)  # [3, places]: one across, two outside
        across, outside, count = across + steps[0].sum(), outside + steps[1:].sum() / 2, count + steps.shape[1]
    return float((across / count + 1) / (outside / count + 1)) if count else None


def ciede2000(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Difference between two CIELAB colours: Sharma, Wu, Dalal, Color Research and Application 30(1), 2005, equations 2 to 22.

    scikit-image has it too, but costs 31 MB per process and 170 MB on disk.
    """
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean_chroma = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * math.sqrt(mean_chroma**7 / (mean_chroma**7 + 25**7))
    c1, c2 = math.hypot(a1 * stretch, b1), math.hypot(a2 * stretch, b2)
    h1, h2 = math.atan2(b1, a1 * stretch) % math.tau, math.atan2(b2, a2 * stretch) % math.tau
    turn = (h2 - h1 + math.pi) % math.tau - math.pi if c1 and c2 else 0.0
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    hue = (h1 + h2) / 2 if c1 and c2 else h1 + h2
    if c1 and c2 and abs(h1 - h2) > math.pi:
        hue += math.pi
    t = 1 - 0.17 * math.cos(hue - math.radians(30)) + 0.24 * math.cos(2 * hue)
    t += 0.32 * math.cos(3 * hue + math.radians(6)) - 0.20 * math.cos(4 * hue - math.radians(63))
    degrees = math.degrees(hue) % 360
    rotation = -2 * math.sqrt(chroma**7 / (chroma**7 + 25**7))
    rotation *= math.sin(math.radians(60) * math.exp(-(((degrees - 275) / 25) ** 2)))
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * math.sqrt(c1 * c2) * math.sin(turn / 2) / (1 + 0.015 * chroma * t)
    return math.sqrt(max(0.0, dl**2 + dc**2 + dh**2 + rotation * dc * dh))
