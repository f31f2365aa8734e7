"""From a rough mask to a cut-out: soft edges at the result's size, and a rim without the old background's colour.

Common to all engines that find a mask or matte at a smaller size.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from worker.operations.base import Pixels

Map = NDArray[np.float32]
"""float32, [height, width] or [height, width, 3], 0..1."""

REACH = 3  # pixels of the mask around its edge in which the picture's own edge is looked for
SMOOTH = 1e-3  # variance of colours (0..1) below which the guided filter smooths
FAR, NEAR = 90, 6  # radii of the two passes, as in the paper
SURE = 4  # power of alpha by which a pixel counts as the subject's: a half transparent one hardly does
STRIP = 256  # rows done at a time


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


def foreground_colours(rgb: Pixels, alpha: Map, *, rough: bool = False) -> Pixels:
    """The subject's own colours where alpha is partial, else `rgb` as it is: so that no halo remains.

    Blur fusion in two passes: Forte and Pitié, Approximate Fast Foreground Colour Estimation, ICIP 2021; the first,
    wide one at a size where its radius is small, and all of it only around the rim. `rough` says that alpha is a
    mask with softened edges: then colours between subject and background are laid to alpha, not to the subject.
    """
    partial = (alpha >= 0.5 / 255) & (alpha <= 254.5 / 255)
    if not partial.any():
        return rgb
    left, top, width, height = cv2.boundingRect(partial.view(np.uint8))
    pad = FAR
    rows = slice(max(0, top - pad), top + height + pad)
    columns = slice(max(0, left - pad), left + width + pad)
    picture, matte, edge = rgb[rows, columns], alpha[rows, columns], partial[rows, columns]
    size = (matte.shape[1], matte.shape[0])
    part = max(1, round(max(size) / 400))
    small_size = (max(1, size[0] // part), max(1, size[1] // part))
    small = _unit(cv2.resize(picture, small_size, interpolation=cv2.INTER_AREA))
    small_matte = np.asarray(cv2.resize(matte, small_size, interpolation=cv2.INTER_AREA), np.float32)
    wide = _fused(small, small, small, small_matte, max(1, FAR // part), rough)
    result = rgb.copy()
    target = result[rows, columns]
    for top in range(0, size[1], STRIP):  # the second pass takes a hundred bytes per pixel
        inner = slice(top, min(top + STRIP, size[1]))
        if not edge[inner].any():
            continue
        outer = slice(max(0, inner.start - NEAR), min(size[1], inner.stop + NEAR))
        front, back = (_rows(colours, size, outer) for colours in wide)
        found, _ = _fused(_unit(picture[outer]), front, back, matte[outer], NEAR, rough)
        found = found[inner.start - outer.start :][: inner.stop - inner.start]
        np.copyto(target[inner], np.rint(found * 255).astype(np.uint8), where=edge[inner][..., None])
    return result


def _unit(pixels: NDArray[np.generic]) -> Map:
    return np.asarray(pixels, np.float32) / np.float32(255)


def _rows(small: Map, size: tuple[int, int], rows: slice) -> Map:
    """Rows of `small` enlarged to `size`, without holding all of it."""
    at = np.clip((np.arange(rows.start, rows.stop) + 0.5) * len(small) / size[1] - 0.5, 0, len(small) - 1)  # centres
    above = at.astype(int)
    share = (at - above).astype(np.float32)[:, None, None]
    lines = small[above] * (1 - share) + small[np.minimum(above + 1, len(small) - 1)] * share
    return _enlarged(lines, (size[0], len(lines)))


def _fused(picture: Map, front: Map, back: Map, alpha: Map, radius: int, rough: bool) -> tuple[Map, Map]:
    """Foreground and background that explain `picture`, from the means of `front` and `back` nearby."""
    share = alpha[..., None]
    mean_front = _weighted(front, alpha, radius)
    mean_back = _weighted(back, 1 - alpha, radius)
    rest = picture - share * mean_front - (1 - share) * mean_back
    if rough:  # what of the rest lies between the two is an error of alpha; left in the colour it would be a halo
        away = mean_back - mean_front
        along = (rest * away).sum(axis=2, keepdims=True) / ((away**2).sum(axis=2, keepdims=True) + 1e-5)
        rest -= np.clip(along, -1, 1) * (1 - share**SURE) * away
    return np.clip(mean_front + share * rest, 0, 1), mean_back


def _weighted(colours: Map, share: Map, radius: int) -> Map:
    weight = share**SURE + np.float32(1e-4) * share  # where all is faint, the faint counts
    return _mean(colours * weight[..., None], radius) / (_mean(weight, radius)[..., None] + np.float32(1e-12))


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
