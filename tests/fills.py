"""A fake LaMa network with predictable fills."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imagemill.shared.errors import OutOfMemory
from imagemill.worker.imaging.picture import Grey, Pixels

Size = tuple[int, int]


class Continues:
    """A Session that continues gradients: it fits a plane to each channel of the known pixels.

    It checks its inputs and records the sizes in each batch. Batches larger than `most` run out of memory.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.batches: list[list[Size]] = []

    def run(self, pictures: Sequence[Pixels], holes: Sequence[Grey]) -> list[Pixels]:
        sizes = [(hole.shape[0], hole.shape[1]) for hole in holes]
        self.batches.append(sizes)
        assert len(set(sizes)) == 1, "a batch must have one size"
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
