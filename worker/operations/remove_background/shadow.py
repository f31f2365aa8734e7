"""Finds the shadow that a subject casts on a plain backdrop."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.imaging.scale import fit
from imagemill.worker.operations.remove_background.matte import Map, subject_box

EDGE = 320  # longest edge in pixels at which the shadow is looked for
NEAR = 1.0  # radius around the subject for fitting the backdrop and keeping a shadow, in lengths of the subject's longer side
GAP = 2  # pixels around the matte, at the small size, that may still belong to the subject
FAINT = 0.02  # a shadow is darker than the backdrop by at least this share, and by three times the backdrop's noise
DARKEST = 0.85  # anything darker is an object, not a shadow
TINT = 0.35  # largest difference in darkening between red, green and blue, as a share of the darkening
ROUGHEST = 0.05  # noise of a backdrop, as a share of its level, above which shadows can't be identified
LARGEST = 1.5  # largest area of a shadow, in areas of the subject


def find_shadow(pixels: Pixels, alpha: Grey) -> Map | None:
    """Density of the subject's shadow, 0..1, at a small size [h, w]; None if no shadow can be identified.

    `pixels` is RGB or RGBA [h, w, 3 or 4], `alpha` the matte [h, w]. A model of the backdrop is fitted to the subject's
    surroundings. A shadow is darker than the model by about the same share in red, green and blue, and touches the subject's
    lower half. Below the subject's edge it continues with the density it has next to it.
    """
    size = fit((alpha.shape[1], alpha.shape[0]), EDGE)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    rgb = small[..., :3].astype(np.float32) / np.float32(255)
    matte = np.asarray(cv2.resize(alpha, size, interpolation=cv2.INTER_AREA), np.uint8)
    box = subject_box(matte)
    if box is None or box[3] > len(matte) - GAP:  # cut off by the lower edge: the ground is not visible
        return None
    subject = cv2.dilate((matte > 4).view(np.uint8), np.ones((2 * GAP + 1, 2 * GAP + 1), np.uint8)).view(np.bool_)
    left, top, right, bottom = box
    reach = NEAR * max(right - left, bottom - top)
    around = np.outer(_fading(len(matte), top, bottom, reach), _fading(matte.shape[1], left, right, reach))
    ground = (around > 0) & ~subject
    if small.shape[2] == 4:
        ground &= small[..., 3] > 250
    fitted = _fitted(rgb, ground)
    if fitted is None:
        return None
    backdrop, noise = fitted
    ratio = rgb / np.maximum(backdrop, 0.05)
    dark, tint = 1 - ratio.mean(axis=2), ratio.max(axis=2) - ratio.min(axis=2)
    faint = max(FAINT, 3 * noise)
    like = ground & (dark > faint) & (dark < DARKEST) & (tint < faint + TINT * dark)
    own = _standing_on(like, subject, (top + bottom) // 2)
    if own is None:
        return None
    density = np.where(ground & own, np.maximum(dark, 0) * around, 0).astype(np.float32)
    _, nearest = cv2.distanceTransformWithLabels(subject.view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    values = np.zeros(int(nearest.max()) + 1, np.float32)
    values[nearest[~subject]] = density[~subject]
    return np.asarray(np.clip(cv2.GaussianBlur(values[nearest], (0, 0), 1), 0, DARKEST), np.float32)


def _fading(length: int, first: int, last: int, reach: float) -> Map:
    """1 between `first` and `last` and near them, falling to 0 at distance `reach`: a shadow must not end abruptly."""
    at = np.arange(length)
    away = np.maximum(first - at, at - last + 1) / max(reach, 1)
    return np.clip((1 - away) * 4, 0, 1).astype(np.float32)


def _fitted(rgb: Map, ground: NDArray[np.bool_]) -> tuple[Map, float] | None:
    """The backdrop [h, w, 3], a quadratic fitted to the brighter part of `ground`, and its noise as a share of its level."""
    if np.count_nonzero(ground) < 200:
        return None
    height, width = ground.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j] if min(height, width) > 1 else np.zeros((2, height, width))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2)
    light = rgb.mean(axis=2)
    used = ground
    for _ in range(8):
        weights = np.linalg.lstsq(terms[used], rgb[used], rcond=None)[0]
        rest = light - (terms @ weights).mean(axis=2)
        spread = max(1.4826 * float(np.median(abs(rest[used]))), 1 / 255)
        used = ground & (rest > -1.5 * spread) & (rest < 3 * spread)  # darker pixels may be the shadow
        if np.count_nonzero(used) < 100:
            return None
    backdrop = terms @ weights
    noise = spread / max(float(light[used].mean()), 0.05)
    return (np.asarray(backdrop, np.float32), noise) if noise < ROUGHEST else None


def _standing_on(like: NDArray[np.bool_], subject: NDArray[np.bool_], middle: int) -> NDArray[np.bool_] | None:
    """The parts of `like` that touch the subject below row `middle`, slightly enlarged; None if there are none or too large."""
    square = np.ones((3, 3), np.uint8)
    _, labels = cv2.connectedComponents(cv2.morphologyEx(like.view(np.uint8), cv2.MORPH_OPEN, square), connectivity=8)
    touching = cv2.dilate(subject.view(np.uint8), np.ones((5, 5), np.uint8)).view(np.bool_)
    touching[:middle] = False
    wanted = np.setdiff1d(labels[touching], [0])
    own = np.isin(labels, wanted)
    if not len(wanted) or np.count_nonzero(own) > LARGEST * np.count_nonzero(subject):
        return None
    return cv2.dilate(own.view(np.uint8), np.ones((5, 5), np.uint8)).view(np.bool_)
