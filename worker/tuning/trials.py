"""Runs batches on a device as a worker would, and measures them. Import it after pinning the process to its device."""

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
from imagemill.worker.operations.base import AnyOperation, Inputs, Sample, Untouched, Work

WARM_UP_RUNS = 2
"""Untimed first runs, which may load a model, compile or choose algorithms. Memory is measured in these."""
LEAST_TIMED_RUNS = 2


@dataclass(frozen=True)
class Trial:
    """The measurements of a batch of `batch` samples; None if it did not fit."""

    batch: int
    images_per_second: float | None = None
    peak_bytes: int | None = None

    @property
    def fits(self) -> bool:
        return self.images_per_second is not None


class BatchTrials:
    """Trials of growing batches of one loaded operation, with fixed options and image size (width, height)."""

    def __init__(self, operation: AnyOperation, options: EngineOptions, sizes: BatchSizes, size: tuple[int, int]) -> None:
        self.operation, self.sizes = operation, sizes
        self._timed_sizes = sizes if sizes.memory.grows else BatchSizes(sizes.memory)  # a node measures memory on GPUs only
        self._options, self._size = options, size
        self._samples: list[Sample[Any, Any]] = []
        self.kind = kind_of(operation, self._sample())

    def run(self, most: int, seconds: float) -> Iterator[Trial]:
        """Try batches of 1, 2, 4 and so on up to `most`, then sizes between the largest that fits and the smallest that fails.

        Each batch is timed for `seconds`. Raises an ImageError if the operation fails for another reason than memory.
        """
        tried: set[int] = set()
        batch = 1
        while batch not in tried:
            tried.add(batch)
            yield self._trial(batch, seconds)
            batch = self.sizes.limit(self.kind, min(most, 2 * batch))

    def _trial(self, batch: int, seconds: float) -> Trial:
        while len(self._samples) < batch:
            self._samples.append(self._sample())
        durations: list[float] = []
        start = time.perf_counter()
        while len(durations) < WARM_UP_RUNS + LEAST_TIMED_RUNS or time.perf_counter() - start < seconds:
            sizes = self.sizes if len(durations) < WARM_UP_RUNS else self._timed_sizes
            before = time.perf_counter()
            result = attempt(self.operation, self._samples[:batch], sizes, self.kind)
            durations.append(time.perf_counter() - before)
            if isinstance(result, OutOfMemory):
                give_up_caches()
                self.sizes.failed(self.kind, batch)
                return Trial(batch)
            if isinstance(result, ImageError):
                raise result
            del result  # frees its memory before the next run
        return Trial(batch, batch / median(durations[WARM_UP_RUNS:]), self.sizes.known(self.kind).peaks.get(batch))

    def _sample(self) -> Sample[Any, Any]:
        work = example_work(self.operation, self._options, self._size)
        if isinstance(work, Untouched):
            raise InternalError(f"{self.operation.spec.name} found nothing to do in the test image")
        return work.samples[0]


def example_work(operation: AnyOperation, options: EngineOptions, size: tuple[int, int]) -> Work[Any, Any, Any] | Untouched:
    """What an operation makes of a test image of this size (width, height): a coloured rectangle on grey, masked."""
    width, height = size
    pixels, mask = np.full((height, width, 3), 128, np.uint8), np.zeros((height, width), np.uint8)
    centre = slice(height // 4, -(height // 4) or None), slice(width // 4, -(width // 4) or None)
    pixels[centre], mask[centre] = (200, 60, 40), 255
    picture, item = Picture(pixels, full_size=size), Item(index=0, source="https://example.com/image.png")
    # As the reference image, it affects neither memory nor speed.
    return operation.prepare(picture, Inputs(item, options, mask if operation.spec.needs_mask else None, lambda _: picture))
