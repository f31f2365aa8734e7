"""Makes the result from an image and its matte: cut-out, backdrop, crop, canvas, shadow or mask.

Full-size steps run in strips and write straight into the result, so that memory stays low.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.imaging.picture import Grey, Pixels, flatten, rgb_of
from imagemill.worker.imaging.scale import enlarged_part, resize
from imagemill.worker.operations.remove_background.matte import EMPTY, SEEN, Box, Map, foreground_colours, subject_box
from imagemill.worker.operations.remove_background.matting import matted
from imagemill.worker.operations.remove_background.shadow import find_shadow

NO_SHADOW = "no_shadow_found"
ENLARGED = "enlarged"
STRIP = 1 << 20  # pixels processed at once


@dataclass(frozen=True)
class Frame:
    """Which part of the image goes where: `box` (left, top, right, bottom), scaled to `size`, at `at` in a result of `whole`.

    `size` and `whole` are (width, height), `at` is (x, y); all in pixels.
    """

    box: Box
    size: tuple[int, int]
    at: tuple[int, int]
    whole: tuple[int, int]

    def part(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`box` of `pixels`, scaled to `size`."""
        left, top, right, bottom = self.box
        return resize(pixels[top:bottom, left:right], self.size)


def compose(
    pixels: Pixels,
    alpha: Grey,
    options: RembgRemoveBackground,
    background: Pixels | None,
    notes: list[str],
    *,
    clean_rim: bool = True,
) -> Pixels:
    """The result: RGB for a mask or on a background, otherwise RGBA. Changes neither `pixels` nor `alpha`.

    `pixels` is RGB or RGBA [h, w, 3 or 4]; any alpha of its own is multiplied in. `alpha` is the matte, uint8 [h, w].
    `background` is an image of any size: scaled to cover the result, centred, and composited over white.

    A crop is the bounding box of the subject (alpha above `SEEN`) and of its shadow if kept, plus `margin` on each side;
    outside the image it is filled with the background or left transparent. A canvas is a square that the box and its
    margin are scaled to fill, up or down. Where alpha is 0, colours are 0 too, so nothing of the old background is left.

    May add to `notes`: `empty_cutout` (then the image is not cropped), `no_shadow_found`, `enlarged` (the canvas needs
    more pixels than the image has), and the notes of `matting.matted`.
    """
    alpha = _visible(pixels, alpha)
    empty = int(alpha.max()) <= SEEN
    if empty:
        notes.append(EMPTY)
    elif options.alpha_matting:
        sure = (
            options.alpha_matting_foreground_threshold,
            options.alpha_matting_background_threshold,
            options.alpha_matting_erode_size,
        )
        alpha = _visible(pixels, matted(pixels, alpha, notes, sure))
    shade = find_shadow(pixels, alpha) if options.shadow and not empty else None
    if options.shadow and shade is None and not empty:
        notes.append(NO_SHADOW)
    frame = _frame(alpha, shade, options)
    if frame.size[0] > frame.box[2] - frame.box[0]:
        notes.append(ENLARGED)
    if options.mask_only:
        return _mask(alpha, frame)
    front, matte = frame.part(pixels), frame.part(alpha)
    result = np.zeros((*frame.whole[::-1], 4 if options.background is None and background is None else 3), np.uint8)
    (x, y), (width, height) = frame.at, frame.size
    inside = result[y : y + height, x : x + width]
    _cut(front, matte, inside)
    if clean_rim:
        foreground_colours(front, matte, out=inside)
    under = _backdrop(options.background, background, frame.whole)
    if under is not None:
        _lay_on(inside, matte, under[y : y + height, x : x + width], _strips_of(shade, alpha, frame))
        _fill_around(result, under, frame)
    elif shade is not None:
        _lay_on_shadow(inside, _strips_of(shade, alpha, frame))
    return result


def _visible(pixels: Pixels, alpha: Grey) -> Grey:
    """`alpha` multiplied by the alpha of `pixels`, if any."""
    if pixels.shape[2] == 3:
        return alpha
    return np.asarray(cv2.multiply(alpha, cv2.extractChannel(pixels, 3), scale=1 / 255), np.uint8)


def _rows(size: tuple[int, int]) -> Iterator[slice]:
    """The rows of an image of `size` (width, height), one strip per slice."""
    step = max(1, STRIP // max(1, size[0]))
    for top in range(0, size[1], step):
        yield slice(top, min(top + step, size[1]))


def _frame(alpha: Grey, shade: Map | None, options: RembgRemoveBackground) -> Frame:
    height, width = alpha.shape
    box = subject_box(alpha) if options.crop else None
    if box is None:
        return Frame((0, 0, width, height), (width, height), (0, 0), (width, height))
    box = _with_shadow(box, shade, (width, height))
    if options.canvas is None:
        return _cropped(box, (width, height), options.margin)
    return _on_canvas(box, (width, height), options.margin, options.canvas)


def _with_shadow(box: Box, shade: Map | None, size: tuple[int, int]) -> Box:
    """`box` extended to include the visible part of the shadow."""
    shadow = None if shade is None else subject_box(np.rint(shade * 255).astype(np.uint8))
    if shade is None or shadow is None:
        return box
    across, down = size[0] / shade.shape[1], size[1] / shade.shape[0]
    scaled = np.array(shadow) * (across, down, across, down)
    grown = scaled.round().astype(int)
    least, most = np.minimum(box, grown), np.maximum(box, grown)
    return int(least[0]), int(least[1]), int(most[2]), int(most[3])


def _cropped(box: Box, size: tuple[int, int], margin: float) -> Frame:
    """`box` with a margin on each side, which may reach outside the image."""
    left, top, right, bottom = box
    border = round(margin * max(right - left, bottom - top))
    inner = max(0, left - border), max(0, top - border), min(size[0], right + border), min(size[1], bottom + border)
    whole = right - left + 2 * border, bottom - top + 2 * border
    at = inner[0] - left + border, inner[1] - top + border
    return Frame(inner, (inner[2] - inner[0], inner[3] - inner[1]), at, whole)


def _on_canvas(box: Box, size: tuple[int, int], margin: float, canvas: int) -> Frame:
    """`box` with a margin on each side, centred in a square and scaled to `canvas` pixels."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top) * (1 + 2 * margin)
    scale = canvas / side
    x, y = (left + right - side) / 2, (top + bottom - side) / 2  # top left corner of the square, in image coordinates
    inner = max(0, int(x)), max(0, int(y)), min(size[0], int(x + side) + 1), min(size[1], int(y + side) + 1)
    start = [min(max(round((inner[i] - (x, y)[i]) * scale), 0), canvas - 1) for i in (0, 1)]
    end = [min(max(round((inner[i + 2] - (x, y)[i]) * scale), start[i] + 1), canvas) for i in (0, 1)]
    return Frame(inner, (end[0] - start[0], end[1] - start[1]), (start[0], start[1]), (canvas, canvas))


def _mask(alpha: Grey, frame: Frame) -> Pixels:
    result = np.zeros((*frame.whole[::-1], 3), np.uint8)
    (x, y), (width, height) = frame.at, frame.size
    result[y : y + height, x : x + width] = frame.part(alpha)[..., None]
    return result


def _cut(front: Pixels, matte: Grey, inside: Pixels) -> None:
    """Copy the colours of all visible pixels into `inside`, and their alpha if it has that channel; the rest stays 0."""
    for rows in _rows(matte.shape[::-1]):
        some = front[rows][..., :3]
        if inside.shape[2] == 4:
            some = np.asarray(cv2.merge([*cv2.split(some), matte[rows]]), np.uint8)  # numpy's dstack takes five times as long
        cv2.copyTo(some, matte[rows], inside[rows])


def _backdrop(colour: str | None, picture: Pixels | None, size: tuple[int, int]) -> Pixels | None:
    """RGB [h, w, 3] of `size`: the image scaled to cover it, or the colour (#rrggbb)."""
    if picture is not None:
        return _covering(picture, size)
    if colour is None:
        return None
    return np.broadcast_to(np.array(rgb_of(colour), np.uint8), (size[1], size[0], 3))


def _covering(picture: Pixels, size: tuple[int, int]) -> Pixels:
    """The centre of the image at `size`, flattened before it is scaled: alpha would be scaled as floats, 4 GB at 100 MP."""
    height, width = picture.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    across, down = (max(1, min(have, round(want / scale))) for have, want in zip((width, height), size, strict=True))
    left, top = (width - across) // 2, (height - down) // 2
    return resize(flatten(picture[top : top + down, left : left + across], 255), size)


def _fill_around(result: Pixels, under: Pixels, frame: Frame) -> None:
    """Copy the backdrop to the four sides around the frame's inside."""
    (x, y), (width, height) = frame.at, frame.size
    middle = slice(y, y + height)
    for rows, columns in (
        (slice(0, y), slice(None)),
        (slice(y + height, None), slice(None)),
        (middle, slice(0, x)),
        (middle, slice(x + width, None)),
    ):
        result[rows, columns] = under[rows, columns]


def _strips_of(shade: Map | None, alpha: Grey, frame: Frame) -> Iterator[tuple[slice, Map | None]]:
    """Strips of rows inside the frame, each with its part of the shadow (0..1), if any."""
    left, top, right, bottom = frame.box
    height, width = alpha.shape
    for rows in _rows(frame.size):
        if shade is None:
            yield rows, None
            continue
        across, down = frame.size[0] / (right - left), frame.size[1] / (bottom - top)
        first, shift = round(top * down), round(left * across)
        part = slice(first + rows.start, first + rows.stop), slice(shift, shift + frame.size[0])
        yield rows, enlarged_part(shade, (round(width * across), round(height * down)), part)


def _lay_on(inside: Pixels, matte: Grey, under: Pixels, strips: Iterator[tuple[slice, Map | None]]) -> None:
    """Composite `inside` (RGB) over the backdrop, which the shadow darkens."""
    for rows, shade in strips:
        below = np.ascontiguousarray(under[rows])
        if shade is not None:
            below = np.rint(below * (1 - shade[..., None])).astype(np.uint8)
        share = matte[rows].astype(np.float32) / np.float32(255)
        inside[rows] = cv2.blendLinear(np.ascontiguousarray(inside[rows]), below, share, 1 - share)


def _lay_on_shadow(inside: Pixels, strips: Iterator[tuple[slice, Map | None]]) -> None:
    """Composite `inside` (RGBA, straight alpha) over black with the shadow's density as alpha."""
    for rows, shade in strips:
        share = inside[rows][..., 3].astype(np.float32) / np.float32(255)
        both = share + (1 - share) * (0 if shade is None else shade)
        colours = inside[rows][..., :3] * (share / np.maximum(both, np.float32(1e-6)))[..., None]
        inside[rows][..., :3] = np.rint(colours)
        inside[rows][..., 3] = np.rint(both * 255)
