"""Estimates where the subject is from colours alone: unlike the border, and near the centre."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.worker.imaging.picture import Pixels

Map = NDArray[np.float32]
"""float32, [height, width]."""

EDGE = 200  # longest edge in pixels; saliency needs no more, and the sweeps run in Python
CLUSTERS = 3  # colours per side of the border
NOISE = 40.0  # variance in Lab added to each cluster, so that a difference of 6 is insignificant
ALIKE = 2.5  # a border pixel closer than this to another side's colours is background
FULL = 0.85  # share of the line after a bar that must differ from it; less may be a straight subject in front of a plain wall
FAINT = 1.5  # if no pixel is further than this from the border's colours, there is no subject


def content_box(rgb: Pixels) -> tuple[slice, slice]:
    """Rows and columns inside any letterbox bars: straight bars of one colour, across the full width or height."""
    columns = rgb.transpose(1, 0, 2)
    height, width = rgb.shape[:2]
    return (
        slice(_bar(rgb), height - _bar(rgb[::-1])),
        slice(_bar(columns), width - _bar(columns[::-1])),
    )


def _bar(lines: Pixels) -> int:
    """Thickness in lines of the bar at the start: at most a third of the image, with a straight end."""
    most = len(lines) // 3
    colour = np.median(lines[0], axis=0)
    foreign = (np.abs(lines[: most + 6].astype(np.int16) - colour).max(axis=2) > 16).mean(axis=1)
    if foreign[0] > 0.02 or (foreign <= 0.02).all():
        return 0
    ends = int(np.argmax(foreign > 0.02))
    full = np.flatnonzero(foreign[ends : ends + 6] >= FULL)  # scaling blurs the bar's edge over a few lines
    return ends + int(full[0]) if len(full) and ends + full[0] <= most else 0


def saliency(rgb: Pixels, border: float) -> tuple[Map, NDArray[np.bool_]] | None:
    """Likelihood 0..1 that each pixel is the subject, and a mask of certain background; None if nothing stands out.

    `rgb` is [h, w, 3]; `border` is the share of the longer side that is learnt as background. Three cues: distance from the
    border's colours (per side, in case the subject touches one side), minimum barrier distance from the border, and
    nearness to a centre: first the image's, then that of the salient pixels. After Zhang et al., Minimum Barrier
    Salient Object Detection at 80 FPS, ICCV 2015.
    """
    height, width = rgb.shape[:2]
    scale = min(1.0, EDGE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    sharp = cv2.cvtColor(small.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB)
    lab = np.asarray(cv2.GaussianBlur(sharp, (0, 0), 1.0), np.float32)
    distances = _border_distances(lab, max(2, round(border * max(size))))
    foreign = np.sort(distances, axis=0)[:3].mean(axis=0)  # ignoring the side with the largest distance
    if np.percentile(foreign, 99.5) < FAINT:
        return None
    background = _background_rim(distances)
    stands_out = _spread(foreign) + _spread(barrier_distance(lab, background))
    first = _spread(stands_out * _centre_prior(size))
    likely = _spread((stands_out + 0.3) * _prior_around(first))
    rim = cv2.resize(background.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    return np.asarray(cv2.resize(likely, (width, height), interpolation=cv2.INTER_LINEAR), np.float32), rim


def _border_distances(lab: Map, depth: int) -> Map:
    """Mahalanobis distance [4, height, width] to the nearest colour of the top, bottom, left and right side."""
    sides = (lab[:depth], lab[-depth:], lab[:, :depth], lab[:, -depth:])
    return np.stack([_nearest_colour(lab, side.reshape(-1, 3)) for side in sides])


def _nearest_colour(lab: Map, samples: Map) -> Map:
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    count = min(CLUSTERS, len(samples))
    _, labels, _ = cv2.kmeans(samples, count, np.empty(0, np.int32), criteria, 2, cv2.KMEANS_PP_CENTERS)
    nearest = np.full(lab.shape[:2], np.inf, np.float32)
    for cluster in range(count):
        members = samples[labels.ravel() == cluster]
        if len(members) <= 0.03 * len(samples):
            continue
        offset = lab - members.mean(axis=0)
        spread = (members - members.mean(axis=0)).T @ (members - members.mean(axis=0)) / len(members)
        inverse = np.linalg.inv(spread + NOISE * np.eye(3)).astype(np.float32)
        np.minimum(nearest, np.einsum("yxi,ij,yxj->yx", offset, inverse, offset), out=nearest)
    return np.sqrt(nearest)


def _background_rim(distances: Map) -> NDArray[np.bool_]:
    """The outermost two pixels, except those with a colour that no other side has: there the subject touches the edge."""
    height, width = distances.shape[1:]
    rim = np.zeros((height, width), bool)
    sides = ((slice(2), slice(None)), (slice(-2, None), slice(None)), (slice(None), slice(2)), (slice(None), slice(-2, None)))
    outermost = rim.copy()
    for index, side in enumerate(sides):
        others = np.delete(distances, index, axis=0).min(axis=0)
        outermost[side] = True
        rim[side] |= others[side] < ALIKE
    return rim if rim.sum() >= 0.3 * outermost.sum() else outermost


def barrier_distance(lab: Map, seeds: NDArray[np.bool_], rounds: int = 3) -> Map:
    """Minimum barrier distance: over all paths from a seed, the smallest difference between highest and lowest value.

    Summed over the channels and approximated by sweeps from all four sides (Zhang et al. 2015, after Strand et al. 2013).
    """
    high, low = lab.copy(), lab.copy()
    distance = np.where(seeds[..., None], np.float32(0), np.float32(1e6)) * np.ones_like(lab)
    arrays = (lab, distance, high, low)
    for _ in range(rounds):
        _sweep(*arrays)
        _sweep(*(array[::-1] for array in arrays))
        _sweep(*(array.transpose(1, 0, 2) for array in arrays))
        _sweep(*(array[:, ::-1].transpose(1, 0, 2) for array in arrays))
    return np.asarray(np.minimum(distance, 1e3).sum(axis=2), np.float32)


def _sweep(lab: Map, distance: Map, high: Map, low: Map) -> None:
    for line in range(1, len(lab)):
        up = np.maximum(high[line - 1], lab[line])
        down = np.minimum(low[line - 1], lab[line])
        better = up - down < distance[line]
        np.copyto(distance[line], up - down, where=better)
        np.copyto(high[line], up, where=better)
        np.copyto(low[line], down, where=better)


def _centre_prior(size: tuple[int, int]) -> Map:
    x = (np.arange(size[0], dtype=np.float32) + 0.5) / size[0] - 0.5
    y = (np.arange(size[1], dtype=np.float32) + 0.5) / size[1] - 0.5
    return np.exp(-((x / 0.5) ** 2) - ((y / 0.5) ** 2)[:, None])


def _prior_around(likely: Map, reach: float = 2.5) -> Map:
    """A Gaussian with the mean of the salient pixels and `reach` times their spread."""
    y, x = np.mgrid[: likely.shape[0], : likely.shape[1]].astype(np.float32)
    weight = likely**2 / max(float((likely**2).sum()), 1e-6)
    x -= (weight * x).sum()
    y -= (weight * y).sum()
    shared = (weight * x * y).sum()
    inverse = np.linalg.inv([[(weight * x * x).sum() + 4, shared], [shared, (weight * y * y).sum() + 4]])
    square = inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y
    return np.asarray(np.exp(-0.5 * square / reach**2), np.float32)


def _spread(values: Map) -> Map:
    """`values` scaled so that their 1st and 99th percentile become 0 and 1, clipped."""
    low, high = np.percentile(values, (1, 99))
    if high - low < 1e-6:  # the subject covers less than a hundredth
        high = values.max()
    return np.asarray(np.clip((values - low) / max(high - low, 1e-6), 0, 1), np.float32)
