"""Turns a rough mask into a cut-out: soft edges at full size, and a rim without the old background's colour.

Shared by all engines that find a mask or matte at a smaller size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.worker.imaging.picture import Grey, Pixels, rgb_of
from imagemill.worker.imaging.scale import reduced

Map = NDArray[np.float32]
"""float32, [height, width] or [height, width, 3], 0..1."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

EMPTY = "empty_cutout"
"""The note on an image in which no subject was found."""
SEEN = 12  # alpha above which a pixel counts as the subject's: around a subject, mattes are rarely exactly 0
SPECK, SPECK_SHARE = 64, 0.001  # pixels, and share of the largest part, below which a part is a speck; at most a 16th of it
SPECKS_AT = 1024  # longest side in pixels at which specks are looked for
REACH = 3  # radius in mask pixels around the mask's edge in which the image's own edge is searched for
SMOOTH = 1e-3  # variance of colours (0..1) below which the guided filter smooths
FAR, NEAR = 90, 6  # radii of the two passes, as in the paper
GRID = 16  # pixels
SMALL = 640  # longest edge in pixels at which colours are averaged
STRIP = 1 << 18  # pixels processed at once
MAP = 256  # places per row of a map
REPLICATE = cv2.BORDER_REPLICATE


def soft_alpha(rgb: Pixels, small: Pixels, mask: Map, feather: float) -> Map:
    """Alpha 0..1 for `rgb`, from a `mask` [h, w] of its smaller version `small` [h, w, 3], aligned to the edges in `rgb`.

    A fast guided filter: He, Sun, Tang, Guided Image Filtering, ECCV 2010 (equations 14-16, colour guide), with
    coefficients computed at the small size: He, Sun, Fast Guided Filter, 2015. Only a band around the mask's edge changes.
    `feather` is the width of the added blur in pixels of `rgb`.
    """
    size = (rgb.shape[1], rgb.shape[0])
    slope, offset = _guided(small.astype(np.float32) / np.float32(255), mask)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * REACH + 1, 2 * REACH + 1))
    # Borders are replicated: the edge of the image is not an edge of the subject.
    inner = _enlarged(np.asarray(cv2.erode(mask, kernel, borderType=REPLICATE), np.float32), size)
    outer = _enlarged(np.asarray(cv2.dilate(mask, kernel, borderType=REPLICATE), np.float32), size)
    alpha = _enlarged(offset, size)
    for channel in range(3):  # one by one, so that no full-size float array of three channels is held
        alpha += _enlarged(slope[..., channel], size) * rgb[..., channel] / np.float32(255)
    alpha = np.clip((alpha - 0.15) / 0.7, inner, outer)
    if feather > 0:
        alpha = cv2.GaussianBlur(alpha, (0, 0), feather / 2, borderType=REPLICATE)
    return np.asarray(np.clip(alpha, 0, 1), np.float32)


def _enlarged(small: Map, size: tuple[int, int]) -> Map:
    return np.asarray(cv2.resize(small, size, interpolation=cv2.INTER_LINEAR), np.float32)


def _mean(values: Map, radius: int) -> Map:
    return np.asarray(cv2.blur(values, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT_101), np.float32)


def _guided(guide: Map, mask: Map) -> tuple[Map, Map]:
    """Slope [h, w, 3] and offset [h, w] of the local linear model mask = slope . guide + offset, averaged."""
    mean_guide, mean_mask = _mean(guide, REACH), _mean(mask, REACH)
    pairs = guide[..., :, None] * guide[..., None, :]
    spread = _mean(pairs.reshape(*guide.shape[:2], 9), REACH).reshape(pairs.shape)
    spread = spread - mean_guide[..., :, None] * mean_guide[..., None, :] + SMOOTH * np.eye(3, dtype=np.float32)
    together = _mean(guide * mask[..., None], REACH) - mean_guide * mean_mask[..., None]
    slope = np.linalg.solve(spread, together[..., None])[..., 0]
    offset = mean_mask - (slope * mean_guide).sum(axis=2)
    return _mean(slope, REACH), _mean(offset, REACH)


def foreground_colours(rgb: Pixels, alpha: Map | Grey, *, rough: bool = False, out: Pixels | None = None) -> Pixels:
    """`rgb` with the subject's own colours where alpha is partial, so that no halo remains.

    Blur fusion in two passes: Forte and Pitié, Approximate Fast Foreground Colour Estimation, ICIP 2021. Averages have no
    detail, so both passes run at a small size, around the rim only; the image's detail is added afterwards for each rim
    pixel. `rough` means that alpha is a mask with softened edges: colours between those of subject and background are then
    attributed to errors in alpha, not to the subject.
    `alpha` [h, w] is float32 0..1 or uint8 0..255; only the first three channels of `rgb` [h, w, 3 or 4] are used.
    If `out` [h, w, 3 or 4] is passed, which must not be `rgb`, only the rim's colours are written to it, and the
    function needs a few dozen MB more, regardless of the size.
    """
    result = rgb.copy() if out is None else out
    box = _bounding_box(alpha, _partial)
    if box is None:
        return result
    left, top, right, bottom = box
    rows, columns = _around(top, bottom), _around(left, right)
    picture, matte, target = rgb[rows, columns], alpha[rows, columns], result[rows, columns]
    halvings = max(0, math.ceil(math.log2(max(matte.shape) / SMALL)))
    front, back = _near_colours(_unit(reduced(picture, halvings)[..., :3]), _share(reduced(matte, halvings)), halvings, rough)
    for some in _strips(matte):
        rim = _partial(matte[some])
        at = np.flatnonzero(rim)
        if not len(at):
            continue
        maps = _maps(at, matte.shape[1], some.start, 2**halvings)
        near, beyond = _sampled(front, maps, len(at)), _sampled(back, maps, len(at))
        colours = _explained(_unit(_taken(picture[some], at)[:, :, :3]), _share(_taken(matte[some], at)), near, beyond, rough)
        for channel, values in enumerate(cv2.split(np.rint(colours * 255).astype(np.uint8))):
            target[some, :, channel][rim] = values[:, 0]
    return result


def _around(start: int, stop: int) -> slice:
    """A range with the surroundings that matter. Halving needs no copy if it is a multiple of `GRID`."""
    return slice(max(0, start - FAR) // GRID * GRID, -(-(stop + FAR) // GRID) * GRID)


def _near_colours(picture: Map, matte: Map, halvings: int, rough: bool) -> tuple[Map, Map]:
    """The mean colours [h, w, 3] of subject and background near each pixel, of images that were halved this many times."""
    wide, near = max(1, round(FAR / 2**halvings / 2)), max(1, round(NEAR / 2**halvings))
    # Of so large an area, half the size gives the same averages: the result changes by less than 0.1 of 255.
    far, far_share = reduced(picture, 1), reduced(matte, 1)
    size = 2 * far.shape[1], 2 * far.shape[0]
    front, back = (
        _enlarged(_weighted(far, share, wide), size)[: len(matte), : matte.shape[1]] for share in (far_share, 1 - far_share)
    )
    # Where alpha is near 0, the first pass estimates the background better than the subject; near 1, the subject.
    front = _explained(picture, matte, front, back, rough)
    return _weighted(front, matte, near), back  # which another pass would hardly change: it has no detail


def _maps(at: NDArray[np.intp], width: int, top: int, part: int) -> tuple[Map, Map]:
    """For the pixels at flat indices of a strip that begins at row `top`: their places in an image smaller by `part`.

    As x and y for OpenCV's remap, in rows of `MAP` places, as it limits their length; the last row is filled up.
    """
    y, x = np.divmod(np.resize(at.astype(np.int32), (-(-len(at) // MAP), MAP)), np.int32(width))
    y += np.int32(top)
    return _scaled_down(x, part), _scaled_down(y, part)


def _scaled_down(places: NDArray[np.int32], part: int) -> Map:
    return (places.astype(np.float32) + np.float32(0.5)) / np.float32(part) - np.float32(0.5)  # centres map to centres


def _sampled(average: Map, maps: tuple[Map, Map], count: int) -> Map:
    """`average` [h, w, 3] at the first `count` places of `maps`, interpolated linearly: [count, 1, 3]."""
    sampled = cv2.remap(average, *maps, cv2.INTER_LINEAR, borderMode=REPLICATE)
    return np.asarray(sampled.reshape(-1, 1, 3)[:count], np.float32)


def _taken(pixels: NDArray[np.uint8] | Map, at: NDArray[np.intp]) -> Any:
    """The pixels at flat indices: [n, 1] or [n, 1, channels]. Ten times as fast as indexing by row and column."""
    flat = pixels.reshape(-1, 1, *pixels.shape[2:])
    return np.take(flat, at, axis=0, mode="clip")


def _partial(alpha: Map | Grey) -> NDArray[np.bool_]:
    low, high = (3, 252) if alpha.dtype == np.uint8 else (2.5 / 255, 252.5 / 255)  # outside, the effect is invisible
    return np.asarray((alpha >= low) & (alpha <= high))


def _strips(pixels: NDArray[np.generic]) -> Iterator[slice]:
    """The rows of an image in strips that fit into a CPU's cache."""
    step = max(1, STRIP // max(1, pixels.shape[1]))
    for top in range(0, len(pixels), step):
        yield slice(top, min(top + step, len(pixels)))


def subject_box(alpha: Grey) -> Box | None:
    """Bounding box of the subject, the pixels with alpha above `SEEN`, without specks; None if there are none."""
    halvings = max(0, math.ceil(math.log2(max(alpha.shape) / SPECKS_AT)))
    small = reduced(alpha, halvings, lambda strip: np.where(strip > SEEN, np.uint8(255), np.uint8(0)))
    _, labels, stats, _ = cv2.connectedComponentsWithStats((small > 0).astype(np.uint8), connectivity=8)
    area = np.bincount(labels.ravel(), weights=small.ravel()) * 4.0**halvings / 255
    area[0] = 0  # the background
    kept = area >= max(SPECK_SHARE * area.max(), min(SPECK, area.max() / 16))
    kept[0] = False
    if (kept[1:]).all():
        return _bounding_box(alpha, lambda strip: strip > SEEN)
    corners = stats[kept][:, :2].min(axis=0), (stats[kept][:, :2] + stats[kept][:, 2:4]).max(axis=0)
    (left, top), (right, bottom) = (corner * 2**halvings for corner in corners)
    box = _bounding_box(alpha[top:bottom, left:right], lambda strip: strip > SEEN)
    return box and (box[0] + int(left), box[1] + int(top), box[2] + int(left), box[3] + int(top))


def _bounding_box(alpha: Map | Grey, chosen: Callable[[Map | Grey], NDArray[np.bool_]]) -> Box | None:
    """Bounding box of the pixels that `chosen` selects, strip by strip."""
    boxes = []
    for rows in _strips(alpha):
        x, y, width, height = cv2.boundingRect(chosen(alpha[rows]).view(np.uint8))
        y += rows.start
        if width:
            boxes.append((-x, -y, x + width, y + height))
    if not boxes:
        return None
    left, top, right, bottom = (int(most) for most in np.max(boxes, axis=0))
    return -left, -top, right, bottom


def _unit(pixels: NDArray[np.generic]) -> Map:
    return np.asarray(pixels, np.float32) / np.float32(255)


def _share(alpha: NDArray[np.generic]) -> Map:
    return _unit(alpha) if alpha.dtype == np.uint8 else np.asarray(alpha, np.float32)


def _explained(picture: Map, share: Map, front: Map, back: Map, rough: bool) -> Map:
    """The subject's colours [h, w, 3] that explain `picture`, given alpha [h, w] and the mean colours near each pixel."""
    share = _thrice(share)
    away = back - front
    rest = picture - back
    rest += share * away  # what is left of `picture` after share * front + (1 - share) * back
    if rough:  # a residual between the two colours is an error in alpha; left in the colour, it would be a halo
        along = (rest * away).sum(axis=2, keepdims=True) / ((away**2).sum(axis=2, keepdims=True) + 1e-5)
        rest -= np.clip(along, -1, 1) * (1 - _sure(share)) * away
    rest *= share
    rest += front
    return np.clip(rest, 0, 1, out=rest)


def _sure(share: Map) -> Map:
    """Weight of a pixel as a sample of the subject, from its alpha; half transparent pixels hardly count."""
    return np.asarray(np.square(np.square(share)), np.float32)


def _weighted(colours: Map, share: Map, radius: int) -> Map:
    weight = _sure(share) + np.float32(1e-4) * share  # so that faint pixels count where there are no others
    mean = _mean(colours * _thrice(weight), radius)
    mean /= _thrice(_mean(weight, radius) + np.float32(1e-12))
    return mean


def _thrice(values: Map) -> Map:
    """`values` [h, w] for each of three colours, because numpy would broadcast them slowly."""
    return np.asarray(cv2.merge([values] * 3), np.float32)


def is_cut_out(pixels: Pixels) -> bool:
    """Whether the subject is cut out already, by an edge that must stay as it is: most of the outermost pixels are hidden."""
    if pixels.shape[2] == 3:
        return False
    alpha = pixels[..., 3]
    return bool((np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]]) <= SEEN).mean() > 0.5)


def cut_out(pixels: Pixels, alpha: Map, background: str | None, *, rough: bool = False, clean_rim: bool = True) -> Pixels:
    """RGBA with `alpha` 0..1 multiplied by any alpha of `pixels`, or RGB composited over `background` (#rrggbb).

    `rough` is explained at `foreground_colours`, which `clean_rim` applies.
    """
    if pixels.shape[2] == 4:
        alpha = alpha * (pixels[..., 3].astype(np.float32) / np.float32(255))
    rgb = np.ascontiguousarray(pixels[..., :3])
    rgb = foreground_colours(rgb, alpha, rough=rough) if clean_rim else rgb
    if background is None:
        return np.dstack([rgb, np.rint(alpha * 255).astype(np.uint8)])
    colour = np.array(rgb_of(background), np.float32)
    result = np.empty_like(rgb)
    for some in _strips(rgb):
        result[some] = np.rint(colour + (rgb[some] - colour) * alpha[some, :, None])
    return result
