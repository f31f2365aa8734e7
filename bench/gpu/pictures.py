"""Pictures made of noise at all scales, which decode, scale and compress about like photos; no files are needed."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg

from imagemill.worker.imaging.picture import Grey, Pixels


def scene(width: int, height: int, seed: int = 0) -> Pixels:
    """RGB uint8 [height, width, 3] with large shapes, fine texture and a little grain."""
    random, total = np.random.default_rng(seed), np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((3, 50), (9, 35), (40, 18), (160, 8)):
        coarse = random.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    total += random.normal(0, 3, (height, width, 1)).astype(np.float32)
    return np.ascontiguousarray(np.clip(total, 0, 255), np.uint8)


def photos(width: int, height: int, count: int = 4) -> list[bytes]:
    """Different JPEGs at quality 90."""
    return [simplejpeg.encode_jpeg(scene(width, height, seed), quality=90) for seed in range(count)]


def hole(side: int) -> Grey:
    """A mask uint8 [side, side] of a quarter of the picture."""
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side * 3 // 4, side // 4 : side * 3 // 4] = 255
    return mask
