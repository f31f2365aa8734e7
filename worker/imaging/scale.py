"""Scale and rotate pictures with OpenCV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.uint8]
Map = NDArray[np.float32]
Samples = TypeVar("Samples", bound=Array | Map)

LITTLE = 4 / 3
"""Largest reduction done by linear interpolation: at 2000 pixels it takes a fifth of the time of area averaging, and on
four photos it came as close to Pillow's LANCZOS (PSNR 35.5, 36.7, 39.0, 40.3 dB against 35.0, 36.4, 39.6, 40.0)."""

_STRIP = 1 << 20  # pixels reduced at once


def fit(size: tuple[int, int], edge: int | None) -> tuple[int, int]:
    """Shrink `size` (width, height) so that its longest edge is at most `edge`, keeping the aspect; sides are at least 1."""
    longest = max(size)
    if edge is None or longest <= edge:
        return size
    width, height = (max(1, (2 * side * edge + longest) // (2 * longest)) for side in size)  # rounded half up
    return width, height


def resize(pixels: Array, size: tuple[int, int]) -> Array:
    """Scale uint8 `pixels` (grey [h, w], RGB [h, w, 3] or RGBA [h, w, 4]) to `size` (width, height).

    Uses bicubic interpolation if either side grows, linear for small reductions and area averaging for larger ones. RGBA
    is weighted by alpha, so that hidden colours never bleed into visible edges.
    """
    height, width = pixels.shape[:2]
    if size == (width, height):
        return pixels
    how = cv2.INTER_CUBIC if size[0] > width or size[1] > height else cv2.INTER_AREA
    if how == cv2.INTER_AREA and LITTLE * size[0] >= width and LITTLE * size[1] >= height:
        how = cv2.INTER_LINEAR
    if pixels.ndim < 3 or pixels.shape[2] != 4 or int(pixels[:, :, 3].min()) == 255:
        return cast(Array, cv2.resize(pixels, size, interpolation=how))
    # 16 bits hold colour times alpha exactly (255 * 255), so faint pixels keep their hue. Bicubic overshoots at edges and
    # needs floats: clipping the overshoot before dividing by alpha would shift colours.
    weighted: NDArray[Any] = pixels.astype(np.float32 if how == cv2.INTER_CUBIC else np.uint16)
    weighted[:, :, :3] *= weighted[:, :, 3:]
    weighted[:, :, 3] *= 255
    scaled = cv2.resize(weighted, size, interpolation=how).astype(np.float32, copy=False)
    alpha = scaled[:, :, 3:]
    scaled[:, :, :3] *= 255 / np.maximum(alpha, 1)
    alpha /= 255
    return np.asarray(np.clip(scaled + 0.5, 0, 255.5), np.uint8)


def reduced(pixels: Samples, halvings: int, each: Callable[[Samples], Samples] | None = None) -> Samples:
    """`pixels` (uint8 or float32, [h, w] or [h, w, c]) with sides halved this many times, rounded up: averages of squares.
    If a side is not a multiple of a square's, its last row or column is repeated. Halving is ten times as fast as any other
    averaging, but only of even sides. Works in strips of rows, which `each` may first turn into others of the same size.
    """
    square, (height, width) = 2**halvings, pixels.shape[:2]
    rows = square * max(1, _STRIP // (square * width))
    strips = []
    for top in range(0, height, rows):
        strip = cast(Samples, pixels[top : top + rows])
        strip = strip if each is None else each(strip)
        below, beside = -len(strip) % square, -width % square
        if below or beside:
            strip = cast(Samples, cv2.copyMakeBorder(strip, 0, below, 0, beside, cv2.BORDER_REPLICATE))
        for _ in range(halvings):
            half = strip.shape[1] // 2, strip.shape[0] // 2
            strip = cast(Samples, cv2.resize(strip, half, interpolation=cv2.INTER_AREA))
        strips.append(strip)
    return cast(Samples, np.concatenate(strips)) if len(strips) > 1 else strips[0]


def enlarged_part(small: Map, size: tuple[int, int], part: tuple[slice, slice]) -> Map:
    """The `part` (rows, columns) of `small` [h, w] enlarged linearly to `size` (width, height), without enlarging the rest."""
    rows, down = _shares(len(small), size[1], part[0])
    columns, across = _shares(small.shape[1], size[0], part[1])
    return np.asarray(down @ (small[rows, columns] @ across.T), np.float32)


def _shares(small: int, length: int, part: slice) -> tuple[slice, Map]:
    """The slice of `small` samples needed for `part` of `length`, and their weights [len(part), needed]."""
    at = np.clip((np.arange(part.start, part.stop) + 0.5) * small / length - 0.5, 0, small - 1)  # pixel centres aligned
    above = at.astype(int)
    first, last = int(above[0]), min(int(above[-1]) + 1, small - 1)
    result = np.zeros((len(at), last - first + 1), np.float32)
    each = np.arange(len(at))
    result[each, np.minimum(above + 1, small - 1) - first] = at - above
    result[each, above - first] += (1 - (at - above)).astype(np.float32)
    return slice(first, last + 1), result


_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # OpenCV's flip code of EXIF orientations, after a transpose from 5 up


def upright(pixels: Array, orientation: int) -> Array:
    """Rotate and flip `pixels` as the EXIF `orientation` (1 to 8) requires."""
    transposed = cv2.transpose(pixels) if orientation >= 5 else None
    if orientation in _FLIPS:
        return cast(Array, cv2.flip(pixels if transposed is None else transposed, _FLIPS[orientation], dst=transposed))
    return pixels if transposed is None else cast(Array, transposed)
