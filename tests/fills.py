"""For tests of inpaint: inputs, pictures, masks, and a fake LaMa network with predictable fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import OutOfMemory
from imagemill.shared.messages import Item
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.operations.base import Inputs

Size = tuple[int, int]


def inputs(engine: str, mask: Grey | None = None, item_boxes: Any = (), **options: Any) -> Inputs[Any]:
    item = Item(index=0, source="https://images.example/one.jpg", boxes=item_boxes)
    return Inputs(item, parse_options("inpaint", engine, options), mask)


def slope(height: int, width: int, channels: int = 3) -> Pixels:
    """A smooth gradient, different in each channel."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    planes = [40 + 150 * x / width, 200 - 120 * y / height, 60 + 60 * (x / width + y / height), 80 + 150 * y / height]
    return np.ascontiguousarray(np.rint(np.stack(planes[:channels], axis=2)), np.uint8)


def damaged(pixels: Pixels, mask: Grey) -> Pixels:
    """A copy that is magenta wherever the mask is above 0."""
    result = pixels.copy()
    result[mask > 0, :3] = (255, 0, 255)
    return result


def rectangle_mask(height: int, width: int, rows: slice, columns: slice) -> Grey:
    mask = np.zeros((height, width), np.uint8)
    mask[rows, columns] = 255
    return mask


def distances(hole: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distance of each pixel to the nearest one of the hole, by comparing all pairs."""
    y, x = np.mgrid[: hole.shape[0], : hole.shape[1]]
    return np.sqrt(((np.stack([y, x], axis=2)[:, :, None] - np.argwhere(hole)) ** 2).sum(axis=3).min(axis=2))


class Continues:
    """A LamaModel that continues gradients: it fits a plane to each channel of the known pixels.

    It checks its inputs and records the sizes in each batch. Batches larger than `most` run out of memory.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.batches: list[list[Size]] = []

    def run(self, pictures: Sequence[Pixels], holes: Sequence[Grey]) -> list[Pixels]:
        sizes = [(hole.shape[0], hole.shape[1]) for hole in holes]
        self.batches.append(sizes)
        assert len(set(sizes)) == 1, "all pictures of a batch have the same size"
        assert all(side % 8 == 0 and side >= 16 for side in sizes[0])
        assert [picture.shape for picture in pictures] == [(*size, 3) for size in sizes]
        assert all(array.dtype == np.uint8 for array in (*pictures, *holes))
        assert all(((hole == 0) | (hole == 255)).all() for hole in holes)
        if len(pictures) > self.most:
            raise OutOfMemory("too many")
        return [plane(picture, hole) for picture, hole in zip(pictures, holes, strict=True)]


def plane(picture: Pixels, hole: Grey) -> Pixels:
    """The least-squares plane through the known pixels of each channel; grey if none are known."""
    height, width = hole.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    terms = np.stack([np.ones_like(x), x / width, y / height], axis=2)
    known = hole == 0
    if not known.any():
        return np.full_like(picture, 128)
    fit, *_ = np.linalg.lstsq(terms[known], picture[known].astype(np.float64), rcond=None)
    return np.asarray(np.clip(np.rint(terms @ fit), 0, 255), np.uint8)
