"""Searches for an 8-bit copy of a model that is faster on this CPU and makes nearly the same masks.

Several copies are made, fastest first, and compared with the original on images that they weren't calibrated on; the first
that is good enough is kept. If none of the whole model is, the parts of it that suffer most stay in single precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import ModelUnavailable, UsageError, sentence
from imagemill.shared.options.remove_background import GARMENT_MODELS
from imagemill.worker.hardware.cpu import has_vnni
from imagemill.worker.models import eight_bits
from imagemill.worker.models.eight_bits import CLIPPED, opened
from imagemill.worker.models.typical_images import pixels
from imagemill.worker.operations.remove_background import garments
from imagemill.worker.operations.remove_background.model_families import Family, family_of

TIMED = 5
"""Most images on which the two models' times are compared."""
DYNAMIC = "dynamic"
BLOCKS = 16
"""Number of blocks into which a model is divided to find those that suffer."""
FLOATING = (1, 2, 4, 6)
"""How many of them are left in single precision, in turn."""
INSIDE = 0.5
"""Matte value from which a pixel belongs to the mask."""
SMALLEST = 0.005
"""Share of an image that a mask must cover, with one of the two models, to be compared: of less, edges are all there is."""

Masks = NDArray[np.float32]
"""The mattes of one image, [n, h, w], 0 to 1: that of the subject, or of each garment."""
Progress = Callable[[str, int, int], None]
"""Called with the current step, how many of its items are done, and how many it has."""


@dataclass(frozen=True)
class Try:
    """One 8-bit copy and how it compares with the original on the images held back.

    `iou` is the mean of the masks' intersection over union, `worst` the lowest of any mask. Times are medians in
    milliseconds per image on all cores, the two models taking turns. `error` is why the copy could not be made or run; then
    all figures are 0.
    """

    method: str
    iou: float = 0.0
    worst: float = 0.0
    fp32_ms: float = 0.0
    int8_ms: float = 0.0
    int8_bytes: int = 0
    error: str = ""

    @property
    def speed_up(self) -> float:
        return self.fp32_ms / self.int8_ms if self.int8_ms else 0.0


@dataclass(frozen=True)
class Wanted:
    """What a copy must reach."""

    iou: float
    worst: float
    speed_up: float

    def share(self, row: Try) -> float:
        """The smallest share of a goal that a copy reaches; 1 or more if it is accepted."""
        goals = ((row.iou, self.iou), (row.worst, self.worst), (row.speed_up, self.speed_up))
        return min((got / goal for got, goal in goals if goal > 0), default=1.0) if not row.error else -1.0


@dataclass(frozen=True)
class Reading:
    """How an image becomes a model's input, and what jobs read of its output for one image."""

    family: Family
    masks: Callable[[NDArray[np.float32]], Masks]

    @classmethod
    def of(cls, folder: Path, name: str) -> Reading:
        """That of a model in the catalogue or an added one. Raises UsageError for others."""
        if name in GARMENT_MODELS:
            return cls(garments.FAMILY, garments.masks)
        try:
            family = family_of(folder, name)
        except ModelUnavailable as error:
            raise UsageError(f"{name} can't be quantised: {error.message}") from error
        return cls(family, lambda output: family.matte(output)[None])

    def tensor(self, path: Path) -> NDArray[np.float32]:
        """An image as model input, [1, 3, size, size], prepared as the engine does."""
        return self.family.tensor(pixels(path))[None]


class Search:
    """Makes one copy after another in `copy`, and compares each with the original."""

    def __init__(
        self,
        source: Path,
        work: Path,
        reading: Reading,
        calibration: Sequence[Path],
        held_back: Sequence[Path],
        progress: Progress,
    ) -> None:
        self.copy = work / "copy.onnx"
        self._source, self._prepared, self._work = source, work / "prepared.onnx", work
        self._reading, self._calibration, self._held_back, self._progress = reading, calibration, held_back, progress
        self._bits = 8 if has_vnni() else 7
        self._masks: list[Masks] = []
        self.found = 0
        """How many masks the original finds in the images held back."""

    def run(self, wanted: Wanted) -> tuple[list[Try], Try]:
        """All rows until one is accepted, and that one or the closest. Raises UsageError if the model can't be handled."""
        family = self._reading.family
        try:
            self._original = opened(self._source)
            self._masks = [self._run(self._original, tensor) for tensor in self._shown("masks", self._held_back)]
            self.found = sum(_is_found(mask) for masks in self._masks for mask in masks)
            if self.found:
                self._progress("preparing the graph", 0, 1)
                eight_bits.prepare(self._source, self._prepared, family.output, family.size)
                ranges = eight_bits.measured(self._prepared, self._shown("calibrating", self._calibration), self._work)
        except Exception as error:  # onnx and onnxruntime raise anything on a graph that they can't handle
            raise UsageError(f"this model can't be quantised: {sentence(error)}") from error
        if not self.found:
            raise UsageError(
                f"the model finds nothing in the {len(self._held_back)} images held back, so there are no masks to compare: "
                "use photos like those that you will process"
            )
        rows: list[Try] = []
        for method, make in self._methods(ranges, rows, wanted):
            rows.append(self._tried(method, make))
            if wanted.share(rows[-1]) >= 1:
                break
        return rows, max(rows, key=wanted.share)

    def _methods(
        self, ranges: dict[str, eight_bits.Ranges], rows: list[Try], wanted: Wanted
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """The ways to make a copy, fastest first, each with a name for people."""
        static = partial(eight_bits.make_static, self._prepared, self.copy, bits=self._bits)
        for way in CLIPPED:
            yield f"static, {way}", partial(static, ranges[way])
            if not rows[-1].error and rows[-1].speed_up < wanted.speed_up:
                break  # other ranges make it no faster
        fixed = list(rows)
        yield DYNAMIC, partial(eight_bits.make_dynamic, self._prepared, self.copy)
        if all(row.speed_up < wanted.speed_up for row in fixed):
            return  # with parts in 32 bits they would be slower still
        way = max(fixed, key=wanted.share).method.removeprefix("static, ")
        suffering = self._suffering(ranges[way])
        for count in FLOATING:
            floating = [name for block in suffering[:count] for name in block]
            text = f"static, {way}, {count} of {len(suffering)} blocks in 32 bits"
            yield text, partial(static, ranges[way], floating=floating)

    def _suffering(self, ranges: eight_bits.Ranges) -> list[list[str]]:
        """The model's blocks, the one first that changes the masks of a calibration image most if it alone has 8 bits."""
        blocks, errors = eight_bits.blocks(self._prepared, BLOCKS), []
        tensor = self._reading.tensor(self._calibration[0])
        masks = self._run(self._original, tensor)
        for number, block in enumerate(blocks):
            self._progress("finding sensitive blocks", number, len(blocks))
            others = [name for other in blocks if other is not block for name in other]
            try:
                eight_bits.make_static(self._prepared, self.copy, ranges, bits=self._bits, floating=others)
                errors.append(float(np.abs(self._run(opened(self.copy), tensor) - masks).mean()))
            except Exception:  # noqa: BLE001  # a block that can't be quantised at all stays as it is
                errors.append(float("inf"))
        return [blocks[place] for place in np.argsort(errors, kind="stable")[::-1]]

    def _tried(self, method: str, make: Callable[[], None]) -> Try:
        try:
            self._progress(f"making a copy ({method})", 0, 1)
            make()
            return self._compared(method)
        except Exception as error:  # noqa: BLE001  # such as nodes that have no 8-bit version
            return Try(method, error=sentence(error))

    def _compared(self, method: str) -> Try:
        copy, overlaps = opened(self.copy), list[float]()
        seconds: tuple[list[float], list[float]] = [], []
        for number, tensor in enumerate(self._shown(f"comparing ({method})", self._held_back)):
            if not number:
                self._run(copy, tensor)  # the first run is slower
            start = time.perf_counter()
            masks = self._run(copy, tensor)
            middle = time.perf_counter()
            if number < TIMED:
                self._run(self._original, tensor)
                seconds[0].append(time.perf_counter() - middle)
                seconds[1].append(middle - start)
            pairs = zip(masks, self._masks[number], strict=True)
            overlaps += [share for pair in pairs if (share := overlap(*pair)) is not None]
        fp32_ms, int8_ms = (1000 * float(np.median(taken)) for taken in seconds)
        return Try(method, float(np.mean(overlaps)), min(overlaps), fp32_ms, int8_ms, self.copy.stat().st_size)

    def _run(self, session: Any, tensor: NDArray[np.float32]) -> Masks:
        names = [self._reading.family.output or session.get_outputs()[0].name]
        (output,) = session.run(names, {session.get_inputs()[0].name: tensor})
        return self._reading.masks(output[0])

    def _shown(self, step: str, paths: Sequence[Path]) -> Iterator[NDArray[np.float32]]:
        """Images as input, each prepared on request."""
        for done, path in enumerate(paths):
            self._progress(step, done, len(paths))
            yield self._reading.tensor(path)
        self._progress(step, len(paths), len(paths))


def overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    """Intersection over union of two mattes' masks; None if both are smaller than `SMALLEST`."""
    if not _is_found(one) and not _is_found(other):
        return None
    first, second = one >= INSIDE, other >= INSIDE
    return float(np.count_nonzero(first & second) / np.count_nonzero(first | second))


def _is_found(matte: NDArray[np.float32]) -> bool:
    return float((matte >= INSIDE).mean()) >= SMALLEST
