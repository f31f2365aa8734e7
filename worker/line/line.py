"""Runs the stages: several threads before and after the device, batches of samples on it, all at the same time.

While batch k is on the device, batch k+1 is being fetched and prepared, and batch k-1 encoded and stored. How far the
front may run ahead is counted in decoded pixels, so memory stays flat whatever arrives. Every image ends in exactly
one record, or is left for another worker; a bad one fails alone. The stages themselves are in stages.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from imagemill.shared.errors import ImageError, WorkerLost
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import Item
from imagemill.shared.settings import Settings
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import Batcher, cap, run_parts
from imagemill.worker.line.image import Failed, ImageInFlight, NotBegun, Outcome, RunAgain
from imagemill.worker.line.records import Records
from imagemill.worker.line.stages import AFTER_DEVICE, BEFORE_DEVICE, DELIVERY, Context, advance, can_run_again
from imagemill.worker.transfer.fetch import cut_short

log = logging.getLogger(__name__)

Arrival = tuple[ImageInFlight, Outcome | None] | None
"""What reaches the device's thread: an image to run (no outcome), one that is over, or None for one that did not come back."""


class Line:
    """Takes the images of one chunk through the stages. Made per chunk; expensive parts are passed in.

    `context.stop` ends it early: images that have not reached the device stay unrecorded. `records` counts what is done.
    """

    def __init__(
        self, context: Context, *, ledger: WorkLedger, settings: Settings, node: str, sizes: BatchSizes | None = None
    ) -> None:
        self.context, self.ledger, self.settings = context, ledger, settings
        self.sizes = sizes or BatchSizes()
        self.records = Records(ledger, context.job, node)

    def run(self, items: Sequence[Item]) -> None:
        """Take `items` through the line.

        Raises when the ledger can't be reached, when the device is lost, and when the chunk's time is up or this process
        is told to exit; images without a record are then delivered again.
        """
        ready: SimpleQueue[Arrival] = SimpleQueue()
        context, most = self.context, cap(self.context.spec.policy, self.context.operation.spec)
        batcher: Batcher[ImageInFlight] = Batcher(context.operation, self.sizes, most, self.settings.worker.batch_wait)
        threads = min(self.settings.fetch.threads, len(items) or 1)
        with (
            ThreadPoolExecutor(self.settings.worker.store_threads, "store") as back,
            ThreadPoolExecutor(threads, "fetch") as front,
        ):
            for item in items:
                front.submit(self._before_device, ImageInFlight(item), ready)
            coming = len(items)
            try:
                while coming or batcher:
                    coming -= self._collect(ready, batcher, coming)
                    if context.stop.is_set():
                        for image in batcher.drain():
                            self._settle(image, NotBegun())
                    elif batcher:
                        for image in self._run_batch(batcher):
                            may_return = image.failure is None and can_run_again(image, context)
                            coming += may_return
                            back.submit(self._after_device, image, ready if may_return else None)
            except BaseException:
                context.stop.set()
                context.budget.close()
                raise
        if self.records.fatal is not None:
            raise self.records.fatal

    def run_alone(self, items: Sequence[Item], lost: int) -> None:
        """Take `items` through the line one at a time, after `lost` processes died while working on their chunk.

        Each image is counted before it starts, and those started most often come last. So whichever image kills the
        process again is found out, the others are finished first, and after the policy's number of attempts the culprit
        is recorded as `worker_lost`.
        """
        job, most = self.context.job, self.context.spec.policy.attempts
        attempts = self.ledger.attempts(job, [item.index for item in items])
        for item in sorted(items, key=lambda item: attempts[item.index]):
            if self.context.stop.is_set():
                return
            lives = self.records.earlier[item.index] = 1 + attempts[item.index]
            # Only an image that was tried alone can be blamed: in its batch, a neighbour may have killed the process.
            if attempts[item.index] and lives >= most:
                reason = f"the worker process died {lives} times while it worked on this image"
                self._settle(ImageInFlight(item), Failed(WorkerLost(reason)))
            else:
                self.ledger.count_attempt(job, item.index)
                before = self.records.over
                self.run([item])
                if self.records.over == before:  # stopped before it reached the device
                    self.ledger.forget_attempt(job, item.index)
        log.info("ran one by one", extra={"action": "isolate", "job": job, "images": len(items), "lost": lost})

    def _before_device(self, image: ImageInFlight, ready: SimpleQueue[Arrival]) -> None:
        """In a thread: the stages up to the device. Always passes the image on."""
        context = self.context
        outcome: Outcome | None = NotBegun()
        if not context.stop.is_set():
            outcome = advance(image, BEFORE_DEVICE, context)
            if isinstance(outcome, Failed) and cut_short(outcome.error, context.stop, context.spec.policy.attempts):
                outcome = NotBegun()  # another worker gives it all the attempts that the policy allows
        ready.put((image, outcome))

    def _collect(self, ready: SimpleQueue[Arrival], batcher: Batcher[ImageInFlight], coming: int) -> int:
        """Batch what has been prepared, for as long as the batcher waits; returns how many of the `coming` images arrived."""
        arrived = 0
        while True:
            try:
                arrival = ready.get(timeout=batcher.patience(coming=arrived < coming))
            except Empty:
                return arrived
            arrived += 1
            if arrival is None:
                continue
            image, outcome = arrival
            if outcome is None:
                outcome = advance(image, [lambda image, _: batcher.add(image, image.work.samples)], self.context)
                outcome = self._deliver(image) if outcome is not None and image.has_result else outcome
            if outcome is not None:
                self._settle(image, outcome)

    def _run_batch(self, batcher: Batcher[ImageInFlight]) -> Iterator[ImageInFlight]:
        """One batch on the device; yields the images that now have all of their outputs."""
        operation, batch = self.context.operation, batcher.take()
        start = time.perf_counter()
        parts = list(run_parts(operation, [slot.sample for slot in batch], self.sizes))
        share = (time.perf_counter() - start) / len(batch)
        together = operation.together(self.context.spec.options)
        outputs = [(output, len(part) if together else 1) for part in parts for output in part]
        for slot, (output, size) in zip(batch, outputs, strict=True):
            image = slot.owner
            image.batch = max(size, image.batch)
            image.seconds["run"] = round(image.seconds.get("run", 0.0) + share, 4)
            image.missing -= 1
            if isinstance(output, ImageError):
                image.failure = output
            else:
                image.outputs[slot.place] = output
            if image.missing == 0:
                yield image

    def _after_device(self, image: ImageInFlight, ready: SimpleQueue[Arrival] | None) -> None:
        """In a thread: the stages after the device, or with `ready` perhaps back to it."""
        arrival: Arrival = None
        try:
            outcome = Failed(image.failure) if image.failure is not None else advance(image, AFTER_DEVICE, self.context)
            if isinstance(outcome, RunAgain):
                arrival = image, None
            elif outcome is None or image.has_result:  # a failed second attempt leaves us the first one's result
                self._settle(image, self._deliver(image))
            else:
                self._settle(image, outcome)
        finally:
            if ready is not None:
                ready.put(arrival)

    def _deliver(self, image: ImageInFlight) -> Outcome:
        """Encode and store the best result."""
        return advance(image, DELIVERY, self.context) or NotBegun()

    def _settle(self, image: ImageInFlight, outcome: Outcome) -> None:
        """Record what became of an image, then free its pixels and their place in the budget."""
        try:
            self.records.record(image, outcome)
            if self.records.fatal is not None:
                self.context.stop.set()  # `run` raises it, and the chunk is delivered again
        finally:
            image.drop_pixels()
            self.context.budget.release(image.held_pixels)
            image.held_pixels = 0
