"""From a rough mask to a cut-out: soft edges at the result's size, and a rim without the old background's colour.

Common to all engines that find a mask or matte at a smaller size.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from worker.operations.base import Grey, Pixels

Map = NDArray[np.float32]
"""float32, [height, width] or [height, width, 3], 0..1."""

Tile = tuple[slice, slice]
"""Rows and columns."""

REACH = 3  # pixels of the mask around its edge in which the picture's own edge is looked for
SMOOTH = 1e-3  # variance of colours (0..1) below which the guided filter smooths
FAR, NEAR = 90, 6  # radii of the two passes, as in the paper
STRIP = 128  # rows done at a time, or side of a square where columns are parted too


def soft_alpha(rgb: Pixels, small: Pixels, mask: Map, feather: float) -> Map:
    """A mask [h, w] found on `small` [h, w, 3] as alpha 0..1 for `rgb`, its edge moved onto the picture's edge.

    A fast guided filter: He, Sun, Tang, Guided Image Filtering, ECCV 2010 (equations 14-16, colour guide), with the
    coefficients found at the small size: He, Sun, Fast Guided Filter, 2015. Outside a band around the mask's
    edge nothing changes. `feather` is the softness added, in pixels of `rgb`.
    """
    size = (rgb.shape[1], rgb.shape[0])
    slope, offset = _guided(small.astype(np.float32) / np.float32(255), mask)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * REACH + 1, 2 * REACH + 1))
    # Borders are repeated: the picture's own edge is no edge of the subject.
    inner = _enlarged(np.asarray(cv2.erode(mask, kernel, borderType=cv2.BORDER_REPLICATE), np.float32), size)
    outer = _enlarged(np.asarray(cv2.dilate(mask, kernel, borderType=cv2.BORDER_REPLICATE), np.float32), size)
    alpha = _enlarged(offset, size)
    for channel in range(3):  # one at a time: a full-size float picture of three channels is never held
        alpha += _enlarged(slope[..., channel], size) * rgb[..., channel] / np.float32(255)
    alpha = np.clip((alpha - 0.15) / 0.7, inner, outer)
    if feather > 0:
        alpha = cv2.GaussianBlur(alpha, (0, 0), feather / 2, borderType=cv2.BORDER_REPLICATE)
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
    """The subject's own colours where alpha is partial, else `rgb` as it is: so that no halo remains.

    Blur fusion in two passes: Forte and Pitié, Approximate Fast Foreground Colour Estimation, ICIP 2021; the first,
    wide one at a size where its radius is small, and all of it only around the rim. `rough` says that alpha is a
    mask with softened edges: then colours between subject and background are laid to alpha, not to the subject.
    `alpha` [h, w] is float32 0..1 or uint8 0..255; of `rgb` [h, w, 3 or 4] the first three channels count.
    With `out` [h, w, 3 or 4], which must not be `rgb`, the rim's colours are written there and nothing else is;
    what is held besides then is a few dozen MB whatever the size.
    """
    box = _rim_box(alpha)
    if box is None:
        return rgb if out is None else out
    left, top, right, bottom = box
    rows, columns = slice(max(0, top - FAR), bottom + FAR), slice(max(0, left - FAR), right + FAR)
    picture, matte = rgb[rows, columns], alpha[rows, columns]
    size = (matte.shape[1], matte.shape[0])
    part = max(1, round(max(size) / 400))
    small_size = (max(1, size[0] // part), max(1, size[1] // part))
    small = _unit(cv2.resize(picture, small_size, interpolation=cv2.INTER_AREA)[..., :3])
    small_matte = _share(cv2.resize(matte, small_size, interpolation=cv2.INTER_AREA))
    wide = _fused(small, small, small, small_matte, max(1, FAR // part), rough)
    result = rgb.copy() if out is None else out
    target = result[rows, columns]
    for inner in tiles(size):  # the second pass takes a hundred bytes per pixel
        edge = _partial(matte[inner])
        if not edge.any():
            continue
        outer = (_wider(inner[0], size[1]), _wider(inner[1], size[0]))
        front, back = (enlarged_part(colours, size, outer) for colours in wide)
        found, _ = _fused(_unit(picture[outer][..., :3]), front, back, _share(matte[outer]), NEAR, rough)
        found = found[inner[0].start - outer[0].start :, inner[1].start - outer[1].start :][: edge.shape[0], : edge.shape[1]]
        np.copyto(target[inner][..., :3], np.rint(found * 255).astype(np.uint8), where=edge[..., None])
    return result


def tiles(size: tuple[int, int]) -> Iterator[Tile]:
    """All of a picture of `size` (width, height) in squares of `STRIP`, row by row."""
    for top in range(0, size[1], STRIP):
        for left in range(0, size[0], STRIP):
            yield slice(top, min(top + STRIP, size[1])), slice(left, min(left + STRIP, size[0]))


def _partial(alpha: Map | Grey) -> NDArray[np.bool_]:
    low, high = (3, 252) if alpha.dtype == np.uint8 else (2.5 / 255, 252.5 / 255)  # beyond, it can't be seen
    return np.asarray((alpha >= low) & (alpha <= high))


def _rim_box(alpha: Map | Grey) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of all that is partial."""
    boxes = []
    for top in range(0, len(alpha), STRIP):
        x, y, width, height = cv2.boundingRect(_partial(alpha[top : top + STRIP]).view(np.uint8))
        if width:
            boxes.append((-x, -y - top, x + width, top + y + height))
    if not boxes:
        return None
    left, top, right, bottom = (int(most) for most in np.max(boxes, axis=0))
    return -left, -top, right, bottom


def _wider(inner: slice, length: int) -> slice:
    return slice(max(0, inner.start - NEAR), min(length, inner.stop + NEAR))


def _unit(pixels: NDArray[np.generic]) -> Map:
    return np.asarray(pixels, np.float32) / np.float32(255)


def _share(alpha: NDArray[np.generic]) -> Map:
    return _unit(alpha) if alpha.dtype == np.uint8 else np.asarray(alpha, np.float32)


def enlarged_part(small: Map, size: tuple[int, int], part: Tile) -> Map:
    """`part` (rows and columns) of `small` [h, w] or [h, w, c] enlarged to `size`, linearly, without holding all of it."""
    rows, down = _weights(len(small), size[1], part[0])
    columns, across = _weights(small.shape[1], size[0], part[1])
    some = np.swapaxes(small[rows, columns], 0, 1)
    lines = np.swapaxes(_product(across, some), 0, 1)
    return _product(down, lines)


def _product(weights: Map, lines: Map) -> Map:
    flat = np.ascontiguousarray(lines).reshape(len(lines), -1)
    # numpy's product would wake a thread per core for each tile.
    product = cv2.gemm(weights, flat, 1, None, 0)  # type: ignore[call-overload]
    return np.asarray(product, np.float32).reshape(len(weights), *lines.shape[1:])


def _weights(small: int, length: int, part: slice) -> tuple[slice, Map]:
    """Which of `small` samples `part` of `length` needs, and how much of each: [part, needed]."""
    at = np.clip((np.arange(part.start, part.stop) + 0.5) * small / length - 0.5, 0, small - 1)  # centres on centres
    above = at.astype(int)
    first, last = int(above[0]), min(int(above[-1]) + 1, small - 1)
    result = np.zeros((len(at), last - first + 1), np.float32)
    each = np.arange(len(at))
    result[each, np.minimum(above + 1, small - 1) - first] = at - above
    result[each, above - first] += (1 - (at - above)).astype(np.float32)
    return slice(first, last + 1), result


def _fused(picture: Map, front: Map, back: Map, alpha: Map, radius: int, rough: bool) -> tuple[Map, Map]:
    """Foreground and background that explain `picture`, from the means of `front` and `back` nearby."""
    share = np.asarray(cv2.merge([alpha] * 3), np.float32)  # numpy is slow at one alpha for three colours
    mean_front = _weighted(front, share, radius)
    mean_back = _weighted(back, 1 - share, radius)
    rest = picture - share * mean_front - (1 - share) * mean_back
    if rough:  # what of the rest lies between the two is an error of alpha; left in the colour it would be a halo
        away = mean_back - mean_front
        along = (rest * away).sum(axis=2, keepdims=True) / ((away**2).sum(axis=2, keepdims=True) + 1e-5)
        rest -= np.clip(along, -1, 1) * (1 - _sure(share)) * away
    return np.clip(mean_front + share * rest, 0, 1), mean_back


def _sure(share: Map) -> Map:
    """How much a pixel counts as the subject's, by its alpha: a half transparent one hardly does."""
    return np.asarray(np.square(np.square(share)), np.float32)


def _weighted(colours: Map, share: Map, radius: int) -> Map:
    weight = _sure(share) + np.float32(1e-4) * share  # where all is faint, the faint counts
    return _mean(colours * weight, radius) / (_mean(weight, radius) + np.float32(1e-12))


def cut_out(pixels: Pixels, alpha: Map, background: str | None, *, rough: bool = False) -> Pixels:
    """RGBA with alpha 0..1 applied on top of any that `pixels` has; RGB on `background` (#rrggbb) if there is one.

    `rough` as in `foreground_colours`.
    """
    if pixels.shape[2] == 4:
        alpha = alpha * (pixels[..., 3].astype(np.float32) / np.float32(255))
    rgb = foreground_colours(np.ascontiguousarray(pixels[..., :3]), alpha, rough=rough)
    if background is None:
        return np.dstack([rgb, np.rint(alpha * 255).astype(np.uint8)])
    colour = np.array([int(background[at : at + 2], 16) for at in (1, 3, 5)], np.float32)
    result = np.empty_like(rgb)
    for top in range(0, len(rgb), STRIP):
        some = slice(top, top + STRIP)
        result[some] = np.rint(colour + (rgb[some] - colour) * alpha[some, :, None])
    return result
