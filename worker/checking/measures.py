"""What can be measured of a result: pure functions on arrays.

A `Pair` is a result and its source at `EDGE` pixels, so that images of different sizes compare and a measure costs well
under a millisecond of one core.
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

EDGE = 512
THIN = 3  # of the small picture, one pixel in three each way
FEWEST = 64  # pixels; of fewer nothing is said
SOLID, FAINT = 250, 5  # alpha from which a pixel is opaque, and above which it can be seen
GREY, DARK = 10.0, 10.0  # chroma up to which, and L from which a pixel of the source tells a cast
FLAT = 2.0  # variance of a Laplacian that rounding alone makes
RING = 12  # pixels around a hole that are its surroundings
FEW_EDGES = 0.005  # share of pixels; of fewer, in a picture of sky, it is chance which are found again
NEAR = 2  # pixels by which two edges may miss each other
CANNY = 100, 200  # thresholds, ControlNet's own
POINTS = 4096  # places at which a border is looked at

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A result and its `source` at one size, RGB [h, w, 3]. Without a source that is comparable, that is the result too.

    `solid` [h, w] is 255 where both are opaque, `alpha` [h, w] the result's, where it has one.
    """

    rgb: Pixels
    source: Pixels
    solid: Grey
    alpha: Grey | None

    @classmethod
    def of(cls, result: Pixels, source: Pixels | None, alpha: Grey | None = None) -> Pair:
        """From RGB or RGBA of any sizes; `alpha`, of any size, stands for that of a result on a background."""
        size = fit((result.shape[1], result.shape[0]), EDGE)
        made = small(result, size)
        given = made if source is None else small(source, size)
        (rgb, seen), (before, given_alpha) = _parted(made), _parted(given)
        if seen is None and source is not None and alpha is not None:
            seen = small(alpha, size)
        solid = np.full(size[::-1], 255, np.uint8)
        for one in (seen, given_alpha):
            if one is not None:
                solid &= np.asarray(cv2.threshold(one, SOLID - 1, 255, cv2.THRESH_BINARY)[1], np.uint8)
        return cls(rgb, before, solid, seen)

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
    def labs(self) -> tuple[Map, Map, Grey]:
        """Result and source in CIELAB, and `solid`, of one pixel in `THIN` each way: they tell colours as well as all."""
        rgb, source, solid = (plane[::THIN, ::THIN] for plane in (self.rgb, self.source, self.solid))
        return lab(rgb), lab(source), np.ascontiguousarray(solid)


def _parted(pixels: Pixels) -> tuple[Pixels, Grey | None]:
    """RGB, and alpha if there is one."""
    if pixels.shape[2] == 3:
        return pixels, None
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), np.uint8), np.asarray(cv2.extractChannel(pixels, 3), np.uint8)


def small(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """`pixels` at `size`, each from four of its block: averaging all of a large picture takes twenty times as long.

    What that adds of fine grain, it adds to result and source alike.
    """
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def lab(rgb: Pixels) -> Map:
    """CIELAB of RGB [h, w, 3]; L 0..100."""
    return np.asarray(cv2.cvtColor(rgb.astype(np.float32) * np.float32(1 / 255), cv2.COLOR_RGB2LAB), np.float32)


def sharpness(grey: Grey, where: Grey) -> float | None:
    """Variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) over `where`, its rim left out; None where that is small."""
    inner = cv2.erode(where, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE)
    if cv2.countNonZero(inner) < FEWEST:
        return None
    return float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S), mask=inner)[1][0, 0] ** 2)


def kept(made: float | None, given: float | None) -> float | None:
    """One sharpness over another."""
    return (made + FLAT) / (given + FLAT) if made is not None and given is not None else None


def entropy(grey: Grey, where: Grey) -> float | None:
    """Shannon's, of the histogram over `where`, in bits."""
    counts = cv2.calcHist([grey], [0], where, [256], [0, 256]).ravel()
    if counts.sum() < FEWEST:
        return None
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def shift(pair: Pair) -> tuple[tuple[float, float, float], tuple[float, float]] | None:
    """Mean L, a, b of what is near grey in the source, and by how much its a and b have moved; None without any."""
    made, given, solid = pair.labs
    light, a, b = cv2.split(given)
    near = ((cv2.magnitude(a, b) < GREY) & (light > DARK) & (solid > 0)).view(np.uint8)
    if cv2.countNonZero(near) < FEWEST:
        return None
    was, now = cv2.mean(given, near), cv2.mean(made, near)
    return (was[0], was[1], was[2]), (now[1] - was[1], now[2] - was[2])


def cast(pair: Pair) -> float | None:
    """CIEDE2000 of `shift`, at the source's brightness: brighter or darker is no cast."""
    found = shift(pair)
    if found is None:
        return None
    (light, a, b), (da, db) = found
    return ciede2000((light, a, b), (light, a + da, b + db))


def shares(alpha: Grey) -> tuple[float, float]:
    """Share of opaque and of half-transparent pixels."""
    opaque = int(np.count_nonzero(alpha >= SOLID))
    return opaque / alpha.size, (int(np.count_nonzero(alpha > FAINT)) - opaque) / alpha.size


def edges(grey: Grey) -> Grey:
    """Canny's, 255 on 0, with grain smoothed away before."""
    return np.asarray(cv2.Canny(cv2.GaussianBlur(grey, (3, 3), 0), *CANNY), np.uint8)


def edge_map(asked: Grey, size: tuple[int, int]) -> Grey:
    """An edge map, 255 on 0, of any size at `size` (width, height)."""
    return np.asarray(cv2.threshold(small(asked, size), 64, 255, cv2.THRESH_BINARY)[1], np.uint8)


def agreement(found: Grey, asked: Grey) -> float | None:
    """F-measure of one edge map against another of its size; None where few are asked for.

    Martin, Fowlkes, Malik, IEEE TPAMI 26(5), 2004, with each edge pixel matched for itself.
    """
    counts = cv2.countNonZero(found), cv2.countNonZero(asked)
    if counts[1] < FEW_EDGES * asked.size:
        return None
    square = np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8)
    precision = cv2.countNonZero(cv2.bitwise_and(found, cv2.dilate(asked, square))) / max(counts[0], 1)
    recall = cv2.countNonZero(cv2.bitwise_and(asked, cv2.dilate(found, square))) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def look(colours: Map, where: Grey) -> Look | None:
    """Mean and deviation in CIELAB over `where`."""
    if cv2.countNonZero(where) < FEWEST:
        return None
    mean, deviation = cv2.meanStdDev(colours, mask=where)
    light, a, b, *spread = (round(value, 1) for value in (*mean.ravel().tolist(), *deviation.ravel().tolist()))
    return light, a, b, spread[0], spread[1], spread[2]


def rings(hole: Grey, size: tuple[int, int]) -> tuple[Grey, Grey]:
    """At `size`: 255 in a hole [h, w] but for its rim, and 255 in what surrounds it."""
    inside = small(hole, size)
    touched = cv2.dilate((inside > 0).astype(np.uint8) * 255, np.ones((3, 3), np.uint8))
    around = cv2.subtract(cv2.dilate(touched, np.ones((2 * RING + 1, 2 * RING + 1), np.uint8)), touched)
    return (inside == 255).astype(np.uint8) * np.uint8(255), np.asarray(around, np.uint8)


def border_step(pixels: Pixels, hole: Grey) -> float | None:
    """How steep a result is across its hole's border, over how steep it is just outside, along the same lines.

    1 is a border that can't be told; a level of noise is added to both. `hole` [h, w] is of the result's size. None without
    a border that has three pixels outside. At full size, at up to `POINTS` places: a seam is fine.
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
        fits = (far_y >= 0) & (far_y < hole.shape[0]) & (far_x >= 0) & (far_x < hole.shape[1])
        lines = [(rows[fits], columns[fits]) for rows, columns in reach]
        free = ~np.any([hole[place] > 0 for place in lines[1:]], axis=0)
        values = np.array([pixels[rows[free], columns[free], :3] for rows, columns in lines], np.int16)
        steps = np.abs(np.diff(values, axis=0)).mean(axis=2)  # [3, places]: across, then twice outside
        across, outside, count = across + steps[0].sum(), outside + steps[1:].sum() / 2, count + steps.shape[1]
    return float((across / count + 1) / (outside / count + 1)) if count else None


def ciede2000(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Difference of two CIELAB colours: Sharma, Wu, Dalal, Color Research and Application 30(1), 2005, equations 2 to 22.

    scikit-image has it too, for 31 MB more in each process and 170 MB on disk.
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
