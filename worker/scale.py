"""Sizes and turns of pictures, by OpenCV."""

from __future__ import annotations

from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.uint8]


def fit(size: tuple[int, int], edge: int | None) -> tuple[int, int]:
    """`size` (width, height) with its longest edge at most `edge`: aspect kept, at least 1 pixel, never enlarged."""
    longest = max(size)
    if edge is None or longest <= edge:
        return size
    width, height = (max(1, (2 * side * edge + longest) // (2 * longest)) for side in size)  # rounded half up
    return width, height


def resize(pixels: Array, size: tuple[int, int]) -> Array:
    """`pixels` (grey [h, w], RGB [h, w, 3] or RGBA [h, w, 4], uint8) at `size` (width, height).

    Area averaging where it gets smaller, bicubic where it gets larger in either direction. RGBA
    is averaged weighted by alpha, so what is hidden never bleeds into a visible rim.
    """
    height, width = pixels.shape[:2]
    if size == (width, height):
        return pixels
    how = cv2.INTER_CUBIC if size[0] > width or size[1] > height else cv2.INTER_AREA
    if pixels.ndim < 3 or pixels.shape[2] != 4 or int(pixels[:, :, 3].min()) == 255:
        return cast(Array, cv2.resize(pixels, size, interpolation=how))
    # 16 bits hold colour times alpha exactly (255 * 255), so a faint pixel keeps its hue. Bicubic overshoots at an edge,
    # and where that were cut off for alpha alone, colour would be off.
    weighted: NDArray[Any] = pixels.astype(np.uint16 if how == cv2.INTER_AREA else np.float32)
    weighted[:, :, :3] *= weighted[:, :, 3:]
    weighted[:, :, 3] *= 255
    scaled = cv2.resize(weighted, size, interpolation=how).astype(np.float32, copy=False)
    alpha = scaled[:, :, 3:]
    scaled[:, :, :3] *= 255 / np.maximum(alpha, 1)
    alpha /= 255
    return np.asarray(np.clip(scaled + 0.5, 0, 255.5), np.uint8)


def upright(pixels: Array, orientation: int) -> Array:
    """`pixels` turned as the EXIF `orientation` (1 to 8) asks for."""
    match orientation:
        case 2:
            turned = cv2.flip(pixels, 1)
        case 3:
            turned = cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            turned = cv2.flip(pixels, 0)
        case 5:
            turned = cv2.transpose(pixels)
        case 6:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            turned = cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180)
        case 8:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
        case _:
            return pixels
    return cast(Array, turned)
