"""Tries batches on a device as a worker would, and measures them. Imported after the process is pinned to its device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from imagemill.shared.errors import ImageError, InternalError, OutOfMemory
from imagemill.shared.messages import Item
from imagemill.shared.options.base import EngineOptions
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes, kind_of
from imagemill.worker.line.batching import attempt
from imagemill.worker.operations.base import AnyOperation, Inputs, Sample, Untouched

UNTIMED = 2
"""Runs that come first: they may load a model, compile, or choose algorithms. Memory is measured in both."""
TIMED = 2
"""Runs that are timed at the least."""


@dataclass(frozen=True)
class Try:
    """A batch of `batch` samples; without figures where it did not fit."""

    batch: int
    images_per_second: float | None = None
    peak_bytes: int | None = None

    @property
    def fits(self) -> bool:
        return self.images_per_second is not None


class Tuning:
    """Of one operation, loaded, with the options and the size (width, height) of the images to come."""

    def __init__(self, operation: AnyOperation, options: EngineOptions, sizes: BatchSizes, size: tuple[int, int]) -> None:
        self.operation, self.sizes = operation, sizes
        self._plain = sizes if sizes.memory.grows else BatchSizes(sizes.memory)  # a node measures on GPUs only
        self._options, self._size = options, size
        self._samples: list[Sample[Any, Any]] = []
        self.kind = kind_of(operation, self._sample())

    def tries(self, most: int, seconds: float) -> Iterator[Try]:
        """Batches of 1, 2, 4 and so on, up to `most`, then what lies between those that fit and those that don't.

        Each is timed for `seconds`. Raises an ImageError where the operation fails for another reason.
        """
        tried: set[int] = set()
        batch = 1
        while batch not in tried:
            tried.add(batch)
            yield self._try(batch, seconds)
            batch = self.sizes.limit(self.kind, min(most, 2 * batch))

    def _try(self, batch: int, seconds: float) -> Try:
        while len(self._samples) < batch:
            self._samples.append(self._sample())
        spent: list[float] = []
        start = time.perf_counter()
        while len(spent) < UNTIMED + TIMED or time.perf_counter() - start < seconds:
            sizes = self.sizes if len(spent) < UNTIMED else self._plain
            before = time.perf_counter()
            made = attempt(self.operation, self._samples[:batch], sizes, self.kind)
            spent.append(time.perf_counter() - before)
            if isinstance(made, OutOfMemory):
                give_up_caches()
                self.sizes.failed(self.kind, batch)
                return Try(batch)
            if isinstance(made, ImageError):
                raise made
            del made
        return Try(batch, batch / median(spent[UNTIMED:]), self.sizes.known(self.kind).peaks.get(batch))

    def _sample(self) -> Sample[Any, Any]:
        width, height = self._size
        pixels = np.full((height, width, 3), 128, np.uint8)
        inside = slice(height // 4, -(height // 4) or None), slice(width // 4, -(width // 4) or None)
        pixels[inside] = (200, 60, 40)
        mask = None
        if self.operation.spec.needs_mask:
            mask = np.zeros((height, width), np.uint8)
            mask[inside] = 255
        item = Item(index=0, source="https://tune/image.png")
        picture = Picture(pixels, full_size=self._size)
        inputs = Inputs(item, self._options, mask, lambda _: picture)  # another reference takes no more memory
        work = self.operation.prepare(picture, inputs)
        if isinstance(work, Untouched):
            raise InternalError(f"{self.operation.spec.name} found nothing to do on the made-up image")
        return work.samples[0]
