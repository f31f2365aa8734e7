"""Runs the stages: several threads before and after the device, batches of samples on it, all at the same time.

While batch k is on the device, batch k+1 is being fetched and prepared, and batch k-1 encoded and stored. How far the
front may run ahead is counted in decoded pixels, so memory stays flat whatever arrives. Every image ends in exactly
one record, or is left for another worker; a bad one fails alone. The stages themselves are in stages.py.

A line lives as long as its process and takes images of any job; who feeds it is in worker/node/feeder.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Lock

from imagemill.shared.errors import ImageError, ModelUnavailable, Truncated
from imagemill.shared.settings import Settings
from imagemill.worker.line.batching import Batcher, Recipe, Slot, run_parts
from imagemill.worker.line.context import Context
from imagemill.worker.line.front import Front
from imagemill.worker.line.image import Failed, ImageInFlight, NotBegun, Outcome, RunAgain, Stored
from imagemill.worker.line.outages import Outages, service_of, source_service
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.records import Records
from imagemill.worker.line.speed import Speed
from imagemill.worker.line.stages import AFTER_DEVICE, BEFORE_DEVICE, DELIVERY, advance, store
from imagemill.worker.transfer.fetch import cut_short

GLANCE = 0.5
"""Seconds after which an idle line asks whether there is still work."""


class Line:
    """Takes images through the stages. Any thread may `enter` images; one thread at a time may `run` the device.

    `changed` is called, in any thread, when an image has left the device or the line; `moved` between any two batches, and now
    and then while the device has nothing to do.
    """

    def __init__(
        self,
        settings: Settings,
        records: Records,
        changed: Callable[[], None] = lambda: None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.records, self.speed, self.outages = records, Speed(), Outages()
        self.budget = PixelBudget(settings.worker.look_ahead)
        self.starving_since: float | None = None
        """Since when, on the monotonic clock, the device has had nothing to run."""
        self.closed: dict[str, str] = {}
        """Lanes whose model can't be opened, and why: nothing more of them is begun."""
        self._changed, self._moved = changed, moved
        records.on_error = self.fail
        self._ready: SimpleQueue[ImageInFlight | None] = SimpleQueue()
        self._batcher: Batcher[ImageInFlight] = Batcher(settings.worker.batch_wait)
        self._front = Front(settings.fetch.threads)
        self.back = ThreadPoolExecutor(settings.worker.store_threads, "store")
        self._device, self._counting = Lock(), Lock()
        self._coming = 0  # images on their way to the device
        self._fault: BaseException | None = None
        self._abandoned = False

    def enter(self, images: Iterable[ImageInFlight]) -> None:
        """Send images down the line."""
        self.speed.resume()
        for image in images:
            self._count(1)
            self._submit(self._front, self._before_device, image)

    def run(self, until: float, busy: Callable[[], bool]) -> None:
        """Work while the line is `busy`, until this time on the monotonic clock. Images may remain in it.

        Raises when the device is lost, when the task's time is up or this process is told to exit, and whatever went wrong in a
        thread. The line must then be abandoned: what has no record is handed out again.
        """
        with self._device:
            while True:
                self._moved()
                self._collect()
                if self._fault is not None:
                    raise self._fault
                if self._batcher:
                    self._run_batch(*self._batcher.take())
                elif not busy():
                    return
                if time.monotonic() >= until:
                    return

    def slow_hosts(self) -> set[str]:
        """Hosts whose images hold up nothing else."""
        return self._front.slow_hosts()

    def wake(self) -> None:
        """Let `run` look around."""
        self._ready.put(None)

    def fail(self, error: BaseException) -> None:
        """End the run with this error."""
        self._fault = error
        self.wake()

    def retry(self) -> None:
        """Try again what waits for a store, if it is time for that. To be called several times per second."""
        for image in self.outages.due():
            self._retry(image)

    def clear(self, *, begun: bool = False) -> None:
        """Drop withdrawn images that wait for a device which nobody runs; with `begun`, also those that ran in part."""
        if not self._device.acquire(blocking=False):
            return
        try:
            while not self._ready.empty():
                image = self._ready.get()
                if image is not None:
                    self._count(-1)
                    self._take_in(image)
            for image in self._batcher.remove(lambda image: image.withdrawn or begun):
                self._free(image)
        finally:
            self._device.release()

    def abandon(self) -> None:
        """Drop everything; whatever has no record is handed out again. The line can't be used any more."""
        self._abandoned = True
        self.budget.close()
        self._front.close()
        self.back.shutdown(wait=False, cancel_futures=True)

    def _submit(self, threads: Front | ThreadPoolExecutor, step: Callable[[ImageInFlight], None], image: ImageInFlight) -> None:
        """Take a step in a thread. Whatever it raises ends the run instead of vanishing with the thread: see `run`."""

        def guarded(image: ImageInFlight) -> None:
            try:
                step(image)
            except BaseException as error:  # noqa: BLE001
                image.move("begun")  # it may be at fault
                self.fail(error)

        threads.submit(guarded, image)

    def _before_device(self, image: ImageInFlight) -> None:
        """In a thread: the stages up to the device. An image that needs no device does not wait for it either."""
        outcome: Outcome | None = NotBegun()
        if image.move("fetching") and not image.context.stop.is_set():
            outcome = advance(image, BEFORE_DEVICE)
            if self._is_cut(image, outcome):
                self.budget.release(image.held_pixels)
                image.held_pixels = 0
                outcome = advance(image, BEFORE_DEVICE)
            stop, attempts = image.context.stop, image.context.spec.policy.attempts
            if isinstance(outcome, Failed) and (self._abandoned or cut_short(outcome.error, stop, attempts)):
                outcome = NotBegun()  # another worker gives it all the attempts that the policy allows
            elif "header" in vars(image):
                self._answered(source_service(image.item.source))
        if outcome is None:
            self._ready.put(image)
        else:
            self._count(-1)
            self.settle(image, outcome)

    def _is_cut(self, image: ImageInFlight, outcome: Outcome | None) -> bool:
        """Whether to fetch a file again that ends early: servers cut files off, or announce less than they have."""
        cut = isinstance(outcome, Failed) and isinstance(outcome.error, Truncated)
        web = image.item.source.startswith(("http://", "https://"))
        return cut and web and not image.stopped and image.tries < image.context.spec.policy.attempts

    def _collect(self) -> None:
        """Batch what has been prepared, for as long as the batcher waits."""
        while True:
            coming = self._coming > 0
            if not self._batcher:
                self.starving_since = self.starving_since or time.monotonic()
                if not coming:
                    self.speed.pause()
            try:
                image = self._ready.get(timeout=self._batcher.patience(coming=coming) if self._batcher else GLANCE)
            except Empty:
                break
            if image is None:
                break
            self._count(-1)
            self._take_in(image)
        for image in self._batcher.remove(lambda image: image.withdrawn):
            self._free(image)

    def _take_in(self, image: ImageInFlight) -> None:
        outcome = advance(image, [self._add])
        if outcome is not None:
            self.settle(image, self._deliver(image) if image.has_result else outcome)

    def _add(self, image: ImageInFlight, context: Context) -> None:
        self._batcher.add(image, image.work.samples, context.recipe, first=image.first)

    def _run_batch(self, recipe: Recipe, batch: list[Slot[ImageInFlight]]) -> None:
        """One batch on the device. Images that now have all of their outputs go on."""
        batch = [slot for slot in batch if self._begin(slot.owner)]
        if not batch:
            self._changed()
            return
        self.starving_since = None
        start = time.perf_counter()
        parts = list(run_parts(recipe.operation, [slot.sample for slot in batch], recipe.sizes))
        share = (time.perf_counter() - start) / len(batch)
        self.records.meter.ran(recipe, [len(part) for part in parts])
        together = recipe.operation.together(batch[0].owner.context.spec.options)
        outputs = [(output, len(part) if together else 1) for part in parts for output in part]
        computed = 0
        for slot, (output, size) in zip(batch, outputs, strict=True):
            image = slot.owner
            image.batch = max(size, image.batch)
            image.spent("run", share)
            image.missing -= 1
            if isinstance(output, ImageError):
                image.failure = output
                if isinstance(output, ModelUnavailable):
                    self.closed[image.context.spec.lane] = output.message
            else:
                image.outputs[slot.place] = output
            if image.missing == 0:
                computed += image.failure is None and not image.has_result  # a second attempt is no second image
                self._submit(self.back, self._after_device, image)
        self.speed.ran(batch[0].owner.context.spec.lane, computed, len(batch))
        self._changed()

    def _begin(self, image: ImageInFlight) -> bool:
        """Whether the device should run this image; if not, its pixels are freed."""
        if image.context.stop.is_set() or image.context.spec.lane in self.closed:
            image.withdraw()
        begun = image.move("begun")
        if not begun:
            self._free(image)
        return begun

    def _after_device(self, image: ImageInFlight) -> None:
        """In a thread: the stages after the device, or back to it."""
        outcome = Failed(image.failure) if image.failure is not None else advance(image, AFTER_DEVICE)
        if isinstance(outcome, RunAgain):
            self._count(1)
            self._ready.put(image)
        elif outcome is None or image.has_result:  # a failed second attempt leaves us the first one's result
            self.settle(image, self._deliver(image))
        else:
            self.settle(image, outcome)

    def _deliver(self, image: ImageInFlight) -> Outcome:
        """Encode and store the best result."""
        return advance(image, DELIVERY) or NotBegun()

    def _retry(self, image: ImageInFlight) -> None:
        """Continue with an image that has waited for a service."""
        if self._abandoned:
            self._free(image)
        elif "encoded" in vars(image):
            self._submit(self.back, self._store, image)
        else:
            self.enter([image])

    def _store(self, image: ImageInFlight) -> None:
        """In a thread: store a result that waited for its store, unless its job is not wanted any more."""
        self.settle(image, NotBegun() if image.stopped else advance(image, [store]) or NotBegun())

    def _answered(self, service: str | None) -> None:
        waited = self.outages.answered(service)
        if waited:
            self.records.meter.store_waits(bool(self.outages.reasons()))
        for image in waited:
            self._retry(image)

    def settle(self, image: ImageInFlight, outcome: Outcome) -> None:
        """Record what became of an image, unless it has been withdrawn or has to wait for a store."""
        if isinstance(outcome, Failed) and service_of(image, outcome.error):
            if image.stopped or self._abandoned:
                outcome = NotBegun()
            elif self.outages.postpone(image, outcome.error):
                self.records.meter.store_failed(outcome.error.code)
                self.records.meter.store_waits(True)
                self._changed()
                return
        elif isinstance(outcome, Stored):
            self._answered(image.context.store.service)
        if image.move("begun"):
            self.records.record(image, outcome, self._leave)
        else:
            self._leave(image)

    def _leave(self, image: ImageInFlight) -> None:
        self._free(image)
        self._changed()

    def _free(self, image: ImageInFlight) -> None:
        """Free an image's pixels and their place in the budget."""
        image.drop_pixels()
        self.budget.release(image.held_pixels)
        image.held_pixels = 0
        image.place = "over"

    def _count(self, more: int) -> None:
        with self._counting:
            self._coming += more
