"""What has been prepared for the device, and the loop that runs it in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Protocol

from imagemill.shared.errors import ImageError, ModelUnavailable, OutOfMemory
from imagemill.worker.line.batch_sizes import kind_of
from imagemill.worker.line.batching import Batcher, Recipe, Slot, run_parts
from imagemill.worker.line.context import Context
from imagemill.worker.line.image import ImageInFlight, Outcome
from imagemill.worker.line.meter import Meter
from imagemill.worker.line.speed import Speed
from imagemill.worker.line.stages import advance
from imagemill.worker.line.waits import Cause, Waits

GLANCE = 0.5
"""Seconds after which an idle device asks whether there is still work."""


class Around(Protocol):
    """The line around the device."""

    def computed(self, image: ImageInFlight) -> None:
        """All samples of an image have run."""

    def refused(self, image: ImageInFlight, outcome: Outcome) -> None:
        """An image can't be run."""

    def free(self, image: ImageInFlight) -> None:
        """Nobody wants this image any more."""

    def missing(self) -> Cause:
        """What the device waits for if it has nothing to run."""

    def changed(self) -> None:
        """Images have left the device."""

    def moved(self) -> None:
        """The loop has come around."""

    blame: Callable[[str], ModelUnavailable | None]
    """Why the model of a lane is to blame if all images of a batch have failed; None if it isn't."""


@dataclass(frozen=True)
class _Run:
    """The outputs of a batch, in the parts in which it ran, when it began (monotonic), and how long it took."""

    parts: list[list[Any]]
    since: float
    seconds: float


class DeviceLoop:
    """Any thread may `put` images; one thread at a time may `run` the device."""

    def __init__(
        self, line: Around, speed: Speed, meter: Meter, batch_wait: float, turn: AbstractContextManager[Any] | None = None
    ) -> None:
        self._line, self._speed, self._meter, self._turn = line, speed, meter, turn or nullcontext()
        self.waits = Waits()
        self.starving_since: float | None = None
        """Since when, on the monotonic clock, the device has had nothing to run."""
        self.faults: dict[tuple[str, str], tuple[ModelUnavailable, float]] = {}
        """Models that could not be used, as (lane, part) with an empty part for the lane's own, why, and when the attempt began
        (monotonic). No image that needs one of them is begun."""
        self._ready: SimpleQueue[ImageInFlight | None] = SimpleQueue()
        self._batcher: Batcher[ImageInFlight] = Batcher(batch_wait)
        self._running, self._counting = Lock(), Lock()
        self._coming = 0
        self._fault: BaseException | None = None

    @property
    def coming(self) -> bool:
        """Whether images are on their way to the device."""
        return self._coming > 0

    @property
    def waiting(self) -> int:
        """How many samples wait for the device, counting each image once that isn't in the batcher yet."""
        return self._ready.qsize() + len(self._batcher)

    def expect(self, images: int) -> None:
        """This many more images, or fewer if negative, are on their way."""
        with self._counting:
            self._coming += images

    def put(self, image: ImageInFlight) -> None:
        """An expected image has been prepared."""
        self._ready.put(image)

    def wake(self) -> None:
        """Let `run` look around."""
        self._ready.put(None)

    def fail(self, error: BaseException) -> None:
        """End the run with this error."""
        self._fault = error
        self.wake()

    def run(self, until: float, busy: Callable[[], bool]) -> None:
        """Work while the line is `busy`, until this time on the monotonic clock. See Line.run."""
        with self._running:
            while True:
                self._line.moved()
                self._collect()
                if self._fault is not None:
                    raise self._fault
                if self._batcher:
                    self._run_next()
                elif not busy():
                    return
                if time.monotonic() >= until:
                    return

    def _run_next(self) -> None:
        """Run a batch of whatever has been prepared by the time the device is ours."""
        start = time.perf_counter()
        with self._turn:
            if not isinstance(self._turn, nullcontext):
                self._waited("turn", time.perf_counter() - start)
            self._take_in_ready()
            recipe, slots = self._batcher.take()
            batch = [slot for slot in slots if self._begin(slot.owner)]
            run = self._run_batch(recipe, batch) if batch else None
        if run is not None:
            self._go_on(recipe, batch, run)  # only now, so that a sibling's batch need not wait for it
        self._line.changed()

    def clear(self, *, begun: bool = False) -> None:
        """Drop withdrawn images that wait for a device that nobody is running; with `begun`, also those that ran in part."""
        if not self._running.acquire(blocking=False):
            return
        try:
            self._take_in_ready()
            for image in self._batcher.remove(lambda image: image.withdrawn or begun):
                self._line.free(image)
        finally:
            self._running.release()

    def _collect(self) -> None:
        """Batch what has been prepared, for as long as the batcher waits."""
        while True:
            coming = self.coming
            if not self._batcher:
                self.starving_since = self.starving_since or time.monotonic()
                if not coming:
                    self._speed.pause()
            try:
                image = self._next(self._batcher.patience(coming=coming) if self._batcher else GLANCE)
            except Empty:
                break
            if image is None:
                break
            self._take_in(image)
        for image in self._batcher.remove(lambda image: image.withdrawn):
            self._line.free(image)

    def _next(self, patience: float | None) -> ImageInFlight | None:
        """The next prepared image. Raises Empty if none comes within `patience` seconds."""
        with suppress(Empty):
            return self._ready.get_nowait()
        if patience == 0:
            raise Empty
        cause: Cause = "batch" if self._batcher else self._line.missing()
        start = time.perf_counter()
        try:
            return self._ready.get(timeout=patience)
        finally:
            self._waited(cause, time.perf_counter() - start)

    def _waited(self, cause: Cause, seconds: float) -> None:
        self.waits.add(cause, seconds)
        self._meter.waited(cause, seconds)

    def _take_in_ready(self) -> None:
        """Batch what has been prepared, without waiting for more."""
        while not self._ready.empty():
            image = self._ready.get()
            if image is not None:
                self._take_in(image)

    def _take_in(self, image: ImageInFlight) -> None:
        self.expect(-1)
        outcome = advance(image, [self._add])
        if outcome is not None:
            self._line.refused(image, outcome)

    def _add(self, image: ImageInFlight, context: Context) -> None:
        self._batcher.add(image, image.work.samples, context.recipe, first=image.first)

    def _run_batch(self, recipe: Recipe, batch: list[Slot[ImageInFlight]]) -> _Run:
        """Run one batch on the device."""
        self.starving_since = None
        start, since = time.perf_counter(), time.monotonic()
        parts = list(run_parts(recipe.operation, [slot.sample for slot in batch], recipe.sizes))
        return _Run(parts, since, time.perf_counter() - start)

    def _go_on(self, recipe: Recipe, batch: list[Slot[ImageInFlight]], run: _Run) -> None:
        """Images that now have all of their outputs go on."""
        lane = batch[0].owner.context.spec.lane
        self.waits.add("busy", run.seconds)
        self._meter.ran(recipe, [len(part) for part in run.parts], run.seconds)
        together = recipe.operation.together(batch[0].owner.context.spec.options)
        outputs = [(output, len(part) if together else 1) for part in run.parts for output in part]
        unavailable = self._unavailable(lane, [output for output, _ in outputs])
        if unavailable is not None:
            self.faults[lane, unavailable.part] = unavailable, run.since
            outputs = [(unavailable, 1)] * len(batch)
        computed = 0
        for slot, (output, size) in zip(batch, outputs, strict=True):
            image = slot.owner
            image.batch = max(size, image.batch)
            image.spent("run", run.seconds / len(batch))
            image.missing -= 1
            if isinstance(output, ImageError):
                image.failure = output
            else:
                image.outputs[slot.place] = output
            if image.missing == 0:
                computed += image.failure is None and not image.has_result  # a second attempt doesn't count
                self._line.computed(image)
        growth = recipe.sizes.growth(kind_of(recipe.operation, batch[0].sample), recipe.most)
        self._speed.ran(lane, computed, len(batch), run.seconds, growth)

    def _unavailable(self, lane: str, outputs: Sequence[object]) -> ModelUnavailable | None:
        """Why the lane's model is to blame, if all outputs of a batch are errors and it is."""
        if not all(isinstance(output, ImageError) and not isinstance(output, OutOfMemory) for output in outputs):
            return None
        return next((output for output in outputs if isinstance(output, ModelUnavailable)), None) or self._line.blame(lane)

    def _begin(self, image: ImageInFlight) -> bool:
        """Whether the device should run this image; if not, its pixels are freed."""
        if image.context.stop.is_set() or (self.faults and any(need in self.faults for need in image.context.needs)):
            image.withdraw()
        begun = image.move("begun")
        if not begun:
            self._line.free(image)
        return begun
