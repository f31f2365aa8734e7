"""rembg's `post_process_mask`: specks of a pixel or two vanish, the outline is smoothed, and no pixel is half transparent."""

from __future__ import annotations

import cv2
import numpy as np

from imagemill.worker.imaging.picture import Grey

SIGMA = 2  # of the blur in pixels
HALF = 127  # level from which the blurred mask belongs to the subject
REACH = 9  # pixels around one that decide about it: the blur's, at four sigmas, and one for the opening
STRIP = 1 << 20  # pixels blurred at once; as doubles they take eight times the memory


def post_processed(mask: Grey) -> Grey:
    """The mask [h, w] with levels 0 and 255 only."""
    blurred = cv2.GaussianBlur(_opened(mask), (0, 0), SIGMA, borderType=cv2.BORDER_REFLECT)
    return np.where(blurred < HALF, np.uint8(0), np.uint8(255))


def rembgs_post_processed(mask: Grey) -> Grey:
    """The same, bit for bit as in rembg, which blurs in double precision."""
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]  # only `exact` needs it

    opened, result = _opened(mask), np.empty_like(mask)
    step = max(2 * REACH, STRIP // mask.shape[1])
    for top in range(0, len(mask), step):
        first = max(0, top - REACH)
        blurred = gaussian_filter(opened[first : top + step + REACH].astype(np.float64), sigma=SIGMA)
        result[top : top + step] = np.where(blurred < HALF, 0, 255)[top - first : top - first + step]
    return result


def _opened(mask: Grey) -> Grey:
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return np.asarray(cv2.morphologyEx(mask, cv2.MORPH_OPEN, cross), np.uint8)
