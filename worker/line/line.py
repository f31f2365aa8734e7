"""Takes images through the stages: downloads, CPU work, batches on the device, and uploads, all at the same time.

While batch k is on the device, batch k+1 is being fetched and prepared, and batch k-1 encoded and stored. Hundreds of images
may wait for the network, in one thread (worker/transfer/network.py); CPU work runs in as many threads as there are cores.
How far the front may run ahead is counted in bytes of files and in decoded pixels, so memory stays flat whatever arrives.
Every image ends in exactly one record, or is left for another worker; a bad one fails alone. The stages themselves are in
stages.py.

A line lives as long as its process and takes images of any job; who feeds it is in worker/node/feeder.py.
"""

from __future__ import annotations

import time
from asyncio import Semaphore
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from imagemill.shared.errors import ModelUnavailable, Truncated
from imagemill.shared.settings import Settings
from imagemill.worker.line import stages
from imagemill.worker.line.device_loop import DeviceLoop
from imagemill.worker.line.front import Front
from imagemill.worker.line.image import Failed, ImageInFlight, Kept, NotBegun, Outcome, RunAgain, Stored
from imagemill.worker.line.outages import Outages, service_of, source_service
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.records import Records
from imagemill.worker.line.speed import Speed
from imagemill.worker.line.stages import advance, advance_on_network
from imagemill.worker.line.waits import Cause
from imagemill.worker.transfer.fetch import cut_short
from imagemill.worker.transfer.network import Network

MOST_TOGETHER = 16
"""Images that are identified one after the other, in one thread, before any of them is prepared."""


class Line:
    """Takes images through the stages. Any thread may `enter` images; one thread at a time may run the `device`.

    `threads` is the number of CPU cores to use before the device, and again after it. If `siblings` share the device, each
    batch runs within `turn`. `changed` is called, in any thread, when an image has left the device or the line; `moved`
    between batches, and now and then while the device is idle. `blame` is called when all images of a batch have failed, and
    returns why the model of their lane is to blame, if it is.
    """

    def __init__(
        self,
        settings: Settings,
        records: Records,
        network: Network,
        changed: Callable[[], None] = lambda: None,
        moved: Callable[[], None] = lambda: None,
        *,
        threads: int = 2,
        turn: AbstractContextManager[Any] | None = None,
        siblings: int = 1,
        blame: Callable[[str], ModelUnavailable | None] = lambda _: None,
    ) -> None:
        self.records, self.speed, self.outages = records, Speed(siblings=siblings), Outages()
        self.changed, self.moved, self.blame = changed, moved, blame
        self.budget = PixelBudget(settings.worker.look_ahead)
        self.device = DeviceLoop(self, self.speed, records.meter, settings.worker.batch_wait, turn)
        records.on_error = self.device.fail
        fetch = settings.fetch
        self.front = Front(self._begin, lambda: self.speed.pace(), most=fetch.threads, per_host=fetch.per_host)
        self._network = network
        self._uploads = Semaphore(settings.worker.store_threads)
        self._arrived: deque[tuple[ImageInFlight, Outcome | None]] = deque()
        self._before = ThreadPoolExecutor(threads, "prepare")
        self.after = ThreadPoolExecutor(threads, "finish")
        self._abandoned = False

    def enter(self, images: Iterable[ImageInFlight]) -> None:
        """Send images down the line."""
        images = list(images)
        self.speed.resume()
        self.device.expect(len(images))
        self.front.submit(images)

    # --- before the device: fetch, identify, reuse, wait for room, decode, prepare --------------

    def _begin(self, image: ImageInFlight) -> None:
        with self._guarded(image):
            self._begin_fetch(image)

    def _begin_fetch(self, image: ImageInFlight) -> None:
        if image.move("fetching") and not image.stopped:
            self._on_network(self._fetch, image)
        else:
            self.front.dropped(image)
            self._leave(image, NotBegun())

    async def _fetch(self, image: ImageInFlight) -> None:
        outcome = await advance_on_network(image, stages.fetch)
        self.front.over(image)
        self._arrived.append((image, outcome))
        if len(self._arrived) == 1:  # otherwise `_identify` still has to take the first one, and this one with it
            self._on_cpu(self._before, self._identify)

    def _identify(self) -> None:
        """Identify all images that have arrived, and look for earlier results of all at once: a question to Redis takes longer
        than the rest."""
        arrived: list[tuple[ImageInFlight, Outcome | None]] = []
        with suppress(IndexError):  # another thread takes some, too
            while len(arrived) < MOST_TOGETHER:
                arrived.append(self._arrived.popleft())
        if self._arrived:
            self._on_cpu(self._before, self._identify)
        with self._guarded(*(image for image, _ in arrived)):
            identified = [(image, outcome or advance(image, stages.BEFORE_ROOM)) for image, outcome in arrived]
            stages.look_up([image for image, outcome in identified if outcome is None])
            for image, outcome in identified:
                self._on_cpu(self._before, self._identified, image, outcome)

    def _identified(self, image: ImageInFlight, outcome: Outcome | None) -> None:
        if "header" in vars(image):
            self._answered(source_service(image.item.source))
        if outcome is not None:
            self._prepared(image, outcome)
        elif image.earlier_result is not None:
            self._on_network(self._reuse, image)
        elif self.budget.enter_now(image.needed_pixels):
            image.held_pixels = image.needed_pixels
            image.spent("wait", 0.0)
            self._prepare(image)
        else:
            self._wait_for_room(image)

    async def _reuse(self, image: ImageInFlight) -> None:
        outcome = await advance_on_network(image, stages.reuse)
        if outcome is None:
            self._wait_for_room(image)
        else:
            self._on_cpu(self._before, self._prepared, image, outcome)

    def _wait_for_room(self, image: ImageInFlight) -> None:
        start = time.perf_counter()

        def go(granted: int) -> None:
            image.held_pixels = granted
            image.spent("wait", time.perf_counter() - start)
            self._on_cpu(self._before, self._prepare, image)

        self.budget.enter(image.needed_pixels, go, lambda: image.stopped)

    def _prepare(self, image: ImageInFlight) -> None:
        since, outcome = time.monotonic(), advance(image, stages.BEFORE_DEVICE)
        if isinstance(outcome, Failed) and isinstance(outcome.error, ModelUnavailable):
            self.device.faults[image.context.spec.lane, outcome.error.part] = outcome.error, since
        self._prepared(image, outcome)

    def _prepared(self, image: ImageInFlight, outcome: Outcome | None) -> None:
        """On to the device; but an image that needs none does not wait for it either."""
        self.front.prepared()
        if isinstance(outcome, Failed) and (self._abandoned or _cut_short(image, outcome)):
            outcome = NotBegun()  # another worker gives it all the attempts that the policy allows
        if outcome is None:
            self.device.put(image)
        elif _is_cut(image, outcome):
            image.fetched_again = True
            image.drop_file()
            self._free_pixels(image)
            self.front.submit([image])
        else:
            self._leave(image, outcome)

    def _leave(self, image: ImageInFlight, outcome: Outcome) -> None:
        self.device.expect(-1)
        if isinstance(outcome, Kept):
            self._on_network(self._store, image)
        else:
            self.settle(image, outcome)

    # --- after the device: finish, check, encode, store, record --------------------------------

    def _after_device(self, image: ImageInFlight) -> None:
        """The stages after the device, or back to it."""
        outcome = Failed(image.failure) if image.failure is not None else advance(image, stages.AFTER_DEVICE)
        if isinstance(outcome, RunAgain):
            self.device.expect(1)
            self.device.put(image)
        elif outcome is None or image.has_result:  # a failed second attempt leaves us the first one's result
            self._deliver(image)
        else:
            self.settle(image, outcome)

    def _deliver(self, image: ImageInFlight) -> None:
        """Encode and store the best result."""
        outcome = advance(image, stages.DELIVERY)
        if outcome is None:
            self._on_network(self._store, image)
        else:
            self.settle(image, outcome)

    async def _store(self, image: ImageInFlight) -> None:
        async with self._uploads:
            outcome = await advance_on_network(image, stages.store)
        self.settle(image, outcome or NotBegun())

    def settle(self, image: ImageInFlight, outcome: Outcome) -> None:
        """Record an image's outcome, unless it has been withdrawn, has to wait for a store, or has no model here."""
        if isinstance(outcome, Failed) and isinstance(outcome.error, ModelUnavailable):
            outcome = NotBegun()  # it is for another node, or for later
        elif isinstance(outcome, Failed) and service_of(image, outcome.error):
            if image.stopped or self._abandoned:
                outcome = NotBegun()
            elif self.outages.postpone(image, outcome.error):
                self.records.meter.store_failed(outcome.error.code)
                self.records.meter.store_waits(True)
                self.changed()
                return
        elif isinstance(outcome, Stored):
            self._answered(image.context.store.service)
        self.records.record(image, outcome if image.move("begun") else NotBegun(), self._over)

    def _over(self, image: ImageInFlight) -> None:
        """An image has been recorded, or won't be recorded here."""
        self.free(image)
        self.changed()

    # --- the device ---------------------------------------------------------------------------

    def computed(self, image: ImageInFlight) -> None:
        """The device has run all samples of an image."""
        self._on_cpu(self.after, self._after_device, image)

    def refused(self, image: ImageInFlight, outcome: Outcome) -> None:
        """An image can't be run on the device, or not again."""
        if image.has_result:
            self._on_cpu(self.after, self._deliver, image)
        else:
            self.settle(image, outcome)

    def missing(self) -> Cause:
        """What the device waits for if it has nothing to run."""
        if self.budget.waiting or self.outages.reasons():
            return "store"
        if not self.device.coming:
            return "work"
        return "decode" if self.front.fetched else "fetch"

    # --- for whoever feeds the line -------------------------------------------------------------

    def retry(self) -> None:
        """Let images go on that no longer have to wait. Call this several times per second."""
        for image in self.outages.due():
            self._retry(image)
        self.front.look()
        self.budget.look()

    def abandon(self) -> None:
        """Drop everything; whatever has no record is handed out again. The line can't be used any more."""
        self._abandoned = True
        self.budget.close()
        self.front.close()
        for threads in (self._before, self.after):
            threads.shutdown(wait=False, cancel_futures=True)

    # --- what the parts above share -------------------------------------------------------------

    def _on_cpu(self, threads: ThreadPoolExecutor, step: Callable[..., None], *image: Any) -> None:
        """Take a step, with an image, in a thread. Whatever it raises ends the run instead of vanishing with the thread."""

        def guarded() -> None:
            with self._guarded(*image[:1]):
                step(*image)

        with suppress(RuntimeError):  # the line has been abandoned
            threads.submit(guarded)

    def _on_network(self, step: Callable[[ImageInFlight], Coroutine[Any, Any, None]], image: ImageInFlight) -> None:
        """Take a step with an image in the network's thread."""

        async def guarded() -> None:
            with self._guarded(image):
                await step(image)

        self._network.post(guarded())

    @contextmanager
    def _guarded(self, *images: ImageInFlight) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # noqa: BLE001
            for image in images:
                image.move("begun")  # it may be at fault
            self.device.fail(error)

    def _retry(self, image: ImageInFlight) -> None:
        """Continue with an image that has waited for a service."""
        if self._abandoned:
            self.free(image)
        elif "encoded" not in vars(image):
            self.enter([image])
        elif image.stopped:
            self.settle(image, NotBegun())
        else:
            self._on_network(self._store, image)

    def _answered(self, service: str | None) -> None:
        waited = self.outages.answered(service)
        if waited:
            self.records.meter.store_waits(bool(self.outages.reasons()))
        for image in waited:
            self._retry(image)

    def free(self, image: ImageInFlight) -> None:
        """Free an image's pixels and their place in the budget."""
        image.drop_pixels()
        self._free_pixels(image)
        image.place = "over"

    def _free_pixels(self, image: ImageInFlight) -> None:
        self.budget.release(image.held_pixels)
        image.held_pixels = 0


def _cut_short(image: ImageInFlight, outcome: Failed) -> bool:
    """Whether a download would have been tried again if its job had not been stopped."""
    return cut_short(outcome.error, image.context.stop, image.context.spec.policy.attempts)


def _is_cut(image: ImageInFlight, outcome: Outcome) -> bool:
    """Whether to fetch a file once more that ends early: servers cut files off, or announce less than they have."""
    cut = isinstance(outcome, Failed) and isinstance(outcome.error, Truncated)
    web = image.item.source.startswith(("http://", "https://"))
    return cut and web and not image.fetched_again and not image.stopped and image.tries < image.context.spec.policy.attempts
