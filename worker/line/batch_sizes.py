"""How many samples fit into device memory, learned for each kind of sample from measured peaks and from failures.

A sample's kind is whatever decides how much memory it takes: its model and `footprint`, or else its group key. Everything
here is about one engine of one operation on one device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter

from imagemill.worker.hardware.board import Board
from imagemill.worker.hardware.memory import HostMemory, Memory
from imagemill.worker.operations.base import AnyOperation, Sample

log = logging.getLogger(__name__)

SHARE = 0.8
"""Share of the free memory that a batch should take at most."""
STEPS = (2, 4, 16)
"""How many times the largest size that fits may be tried next, by the number of measured peaks: none, one (all of its memory
counts as the samples', which is cautious), or a line through two or more."""
HIGH = 0.9
"""Share of all memory above which a run is flagged."""
PATIENCE = 32
"""Full batches of the largest size that fits, before a larger one is tried again; doubles each time that fails."""
KINDS = 1000
"""Kinds remembered; beyond that, the oldest is forgotten."""


def kind_of(operation: AnyOperation, sample: Sample[Any, Any]) -> str:
    """What decides how much memory a sample takes, as text that is the same in every process: its model, too."""
    if not sample.footprint:
        return repr(operation.group_key(sample))
    model = getattr(sample.options, "model", None)
    return f"{model} {sample.footprint}" if model else sample.footprint


@dataclass
class Known:
    """What is known about one kind: the lowest peak in bytes per batch size, the largest size that fits, the smallest that
    failed.

    `free` is how much memory was free at that failure; `relief` is the level (Operation.relieve) at which one sample fits.
    """

    peaks: dict[PositiveInt, NonNegativeInt] = field(default_factory=dict)
    fits: NonNegativeInt = 0
    fails: PositiveInt | None = None
    free: int = 0
    relief: int = 0
    patience: int = PATIENCE
    waited: int = 0

    def expected(self, free: int) -> int | None:
        """How many samples stay within their share of `free`, by a line through the smallest and largest measured sizes.

        None if no run was seen to take memory.
        """
        (low, least), (high, most) = min(self.peaks.items()), max(self.peaks.items())
        slope = (most - least) / (high - low) if high > low else most / high
        if slope <= 0:
            slope = most / high
        base = max(0.0, most - slope * high)
        return int((SHARE * free - base) / slope + 1e-6) if slope > 0 else None

    def ceiling(self, free: int) -> int | None:
        """The largest size to try after a failure; None if nothing failed.

        That is halfway to the size that failed, then the size that fits, and once in a while, or when memory has been
        freed, the failed size again.
        """
        if self.fails is None:
            return None
        if self.fails - self.fits > 1:
            return (self.fits + self.fails) // 2
        each = max(self.peaks.values()) // max(self.peaks) if self.peaks else 0
        freed = free - self.free >= max(each, self.free // 20, 1)
        return self.fails if freed or self.waited >= self.patience else self.fits

    def learned(self) -> tuple[int, int, int | None]:
        """A number that changes whenever a run has taught us something new."""
        return len(self.peaks), self.fits, self.fails


ALL_KINDS: TypeAdapter[dict[str, Known]] = TypeAdapter(dict[str, Known])
OWN = {"relief", "patience", "waited"}
"""Fields of `Known` that only make sense within one process."""


class BatchSizes:
    """The batch sizes of one engine on one device. A child keeps them for life; for one thread.

    It starts from `known`. Children that share the device learn from each other through `board`, where the note `name` holds
    what they know; only the one that runs a batch writes it. `measures` says whether runs are measured; by default only where
    the memory `grows`, that is where larger batches are faster.

    `flagged` counts runs that took more than 90 % of the device's memory; `top` is the largest share so far.
    `failures` counts runs that did not fit, and `level` is the relief level of the latest run.
    """

    def __init__(
        self,
        memory: Memory | None = None,
        known: dict[str, Known] | None = None,
        *,
        measures: bool | None = None,
        board: Board | None = None,
        name: str = "",
    ) -> None:
        self.memory = memory or HostMemory()
        self.flagged, self.top = 0, 0.0
        self.failures = self.level = 0
        self._measures = self.memory.grows if measures is None else measures
        self._kinds = dict(known or {})
        self._board, self._name, self._heard = board, name, 0

    def limit(self, kind: str, most: int) -> int:
        """How many samples of a kind to run at once, from 1 to `most`."""
        self._hear()
        known = self._kinds.get(kind)
        if most == 1 or (known is None and not self.memory.grows):
            return most
        if known is None:
            return 1
        free = self.memory.free()
        size, ceiling = most, known.ceiling(free)
        if ceiling is not None:
            size = min(size, ceiling)
        expected = known.expected(free) if known.peaks else None
        if expected is not None:
            size = min(size, expected)
        if known.fits and (self.memory.grows or ceiling is not None):
            peaks = len(known.peaks) if expected is not None else 0
            size = min(size, STEPS[min(peaks, 2)] * known.fits)
        return max(1, size)

    def growth(self, kind: str, most: int) -> float:
        """How much larger than any so far the next batch may be, as a factor; 1 if nothing was measured, or size is no help."""
        fits = self._kinds[kind].fits if kind in self._kinds and self.memory.grows else 0
        return max(1.0, self.limit(kind, most) / fits) if fits else 1.0

    def relief(self, kind: str) -> int:
        """The relief level at which to run one sample of a kind; 0 if it fits without, or if that should be tried again."""
        known = self._kinds.get(kind)
        return known.relief if known and known.relief and known.ceiling(self.memory.free()) == 0 else 0

    @contextmanager
    def running(self, kind: str, size: int) -> Iterator[None]:
        """Wraps a run of `size` samples and learns from it, unless it raises."""
        self.level = 0
        if not self._measures:
            yield
            if kind in self._kinds:
                self._fitted(self._kinds[kind], size)
            return
        with self.memory.peak() as peak:
            yield
        known = self.known(kind)
        before = known.learned()
        known.peaks[size] = min(peak.bytes, known.peaks.get(size, peak.bytes))
        self._fitted(known, size)
        if known.learned() != before:
            self._tell()
        self._watch(kind, size, peak.share)

    def failed(self, kind: str, size: int) -> None:
        """Learn that `size` samples of a kind did not fit, even after caches were freed."""
        self.failures += 1
        known = self.known(kind)
        if size <= known.fits:
            known.fits = 0  # it did fit when more memory was free
        elif known.fails == size:
            known.patience *= 2
        known.fails, known.waited, known.free = size, 0, self.memory.free()
        self._tell()
        fields = dict(action="memory", kind=kind, samples=size, free=known.free)
        log.warning("batch did not fit into memory", extra=fields)

    def relieved(self, kind: str, level: int) -> None:
        """Learn that one sample of a kind fits at this level."""
        self.level = level
        known = self.known(kind)
        known.relief = level
        known.waited += 1

    def known(self, kind: str) -> Known:
        """What is known about a kind; the caller may add to it."""
        if kind not in self._kinds and len(self._kinds) >= KINDS:
            del self._kinds[next(iter(self._kinds))]
        return self._kinds.setdefault(kind, Known())

    def _hear(self) -> None:
        """Take over what another child has learned since."""
        if self._board is None or self._board.version == self._heard:
            return
        self._heard = self._board.version
        for kind, told in ALL_KINDS.validate_python(self._board.read(self._name) or {}).items():
            known = self.known(kind)
            known.peaks, known.fits, known.fails, known.free = told.peaks, told.fits, told.fails, told.free

    def _tell(self) -> None:
        if self._board is not None:
            self._board.write(self._name, ALL_KINDS.dump_python(self._kinds, mode="json", exclude={"__all__": OWN}))

    def _fitted(self, known: Known, size: int) -> None:
        known.fits = max(known.fits, size)
        if known.fails is not None and size >= known.fails:
            known.fails, known.relief, known.patience = None, 0, PATIENCE
        known.waited += size == known.fits

    def _watch(self, kind: str, size: int, share: float) -> None:
        """Flag a run that came close to the device's limit, and log every new high."""
        self.flagged += share > HIGH
        if share > max(HIGH, self.top + 0.01):
            fields = dict(action="memory", kind=kind, samples=size, share=round(share, 3))
            log.warning("more than 90 % of device memory in use", extra=fields)
        self.top = max(self.top, share)
