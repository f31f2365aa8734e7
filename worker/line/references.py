"""A job's downloads: its images, the mask and reference that they share, and each image's own mask or control picture.

What an image needs is downloaded along with it (`bring`, `bring_mask`), so that no thread has to wait for the network, and
decoded when it is needed.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event, Lock
from typing import TypeVar

from imagemill.shared.errors import BadMask, BadReference, ImageError
from imagemill.shared.messages import Item
from imagemill.shared.options.base import ADDRESSES, EngineOptions
from imagemill.shared.options.inpaint import MaskFrom
from imagemill.shared.urls import shown
from imagemill.worker.imaging import codec
from imagemill.worker.imaging.masks import ALPHA, Mask, read_mask
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.stopped import GLANCE, Stopped
from imagemill.worker.transfer.fetch import Fetched, Fetcher, cut_short

T = TypeVar("T", bound=Picture | Mask)


class References:
    """Thread-safe. A URL that fails is not fetched again: every image that needs it gets the same error.

    Once `stop` is set, a failed download is not tried again, and whoever waits for another's gets Stopped.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        *,
        max_pixels: int,
        attempts: int,
        stop: Event | None = None,
        budget: PixelBudget | None = None,
    ) -> None:
        self._fetcher, self._max_pixels, self._attempts, self._stop = fetcher, max_pixels, attempts, stop or Event()
        self._budget = budget
        self._lock = Lock()
        self._pictures: dict[str, Future[Picture]] = {}
        self._masks: dict[str, Future[Mask]] = {}
        self._coming: dict[str, asyncio.Future[Fetched]] = {}  # for the loop's thread
        self._brought: dict[str, asyncio.Task[bytes]] = {}  # for the loop's thread, and read by others when they are done

    def of(self, options: EngineOptions) -> set[str]:
        """The URLs of what all images of a job need."""
        given = vars(options)  # pydantic's own `getattr` takes long for what an engine does not have
        return {url for name in ADDRESSES if (url := given.get(name)) is not None}

    async def bring(self, options: EngineOptions) -> None:
        """Download what all images of a job need. Whoever uses it gets its error."""
        coming = []
        for url in self.of(options):
            with self._lock:
                if url in self._pictures or url in self._masks:  # already here, or being decoded
                    continue
                if url not in self._brought:
                    self._brought[url] = asyncio.create_task(self._download(url))
                    self._brought[url].add_done_callback(_look_at)
                coming.append(self._brought[url])
        if coming:
            await asyncio.wait(coming)

    async def bring_source(self, url: str, attempts: int) -> Fetched:
        """Download an image. Give its room back to the fetcher's `room`.

        Items of one image, such as its garments, are neighbours: those that ask while it is coming share the file. Each counts
        it in `room`, because none knows which of them drops it last. Raises an ImageError.
        """
        if (coming := self._coming.get(url)) is not None:
            fetched = await asyncio.shield(coming)
            self._fetcher.room.take(fetched.room)
            return fetched
        coming = self._coming[url] = asyncio.get_running_loop().create_future()
        try:
            fetched = await self._fetcher.fetch(url, attempts=attempts, stop=self._stop)
            coming.set_result(fetched)
            return fetched
        except Exception as error:  # whatever it is, it ends each of these images by itself
            coming.set_exception(error)
            coming.exception()  # asyncio logs those that nobody looks at
            raise
        finally:
            coming.cancel()  # unless it is done
            del self._coming[url]

    async def bring_mask(self, url: str) -> Fetched | ImageError:
        """Download an item's own mask or control image. Give its room back to the fetcher's `mask_room`."""
        try:
            return await self._fetcher.fetch(url, attempts=self._attempts, stop=self._stop, mask=True)
        except ImageError as error:
            return error

    def picture(self, url: str) -> Picture:
        """The image at `url` in sRGB. Raises the ImageError of fetching or decoding it."""
        return self._once(self._pictures, url, self._decode)

    def mask(self, url: str, mask_from: MaskFrom = "auto") -> Mask:
        """The mask at `url`. Raises the ImageError of fetching or reading it."""
        return self._once(self._masks, url, lambda data: self._read_mask(data, mask_from))

    def mask_of(
        self, item: Item, options: EngineOptions, own: bytes | ImageError | None = None, source: bytes = b""
    ) -> Mask | None:
        """The item's `own` mask as it was brought, or the job's, or None; `source` is the image's file.

        Raises BadMask for anything wrong with it, except for a download that `stop` cut short.
        """
        url = item.mask or getattr(options, "mask", None)
        mask_from: MaskFrom = getattr(options, "mask_from", "auto")
        if url is None:
            return None
        try:
            if isinstance(own, ImageError):
                raise own
            if item.mask is None:
                mask = self.mask(url, mask_from)
            elif own is not None:
                mask = self._read_mask(own, mask_from)
            else:
                mask = self._fetch(url, lambda data: self._read_mask(data, mask_from))
            if mask_from == "auto" and ALPHA not in mask.notes and (own == source or url == item.source):
                raise BadMask("it is the image itself")
            return mask
        except ImageError as error:
            if cut_short(error, self._stop, self._attempts):
                raise
            raise BadMask(f"the mask {shown(url)} can't be used: {error.message}") from error

    def control_of(self, item: Item, own: bytes | ImageError | None) -> Pixels | None:
        """The item's `own` control image as it was brought, or None. Raises BadReference, or a retryable error unchanged."""
        if item.control_image is None or own is None:
            return None
        try:
            if isinstance(own, ImageError):
                raise own
            return self._decode(own).pixels
        except ImageError as error:
            if error.retryable:
                raise
            raise BadReference(f"the control image {shown(item.control_image)} can't be used: {error.message}") from error

    async def _download(self, url: str) -> bytes:
        """It takes no lasting room: it must not wait for images that are waiting for it, and may never be used."""
        fetched = await self._fetcher.fetch(url, attempts=self._attempts, stop=self._stop, wait_for_room=False)
        self._fetcher.room.release(fetched.room)
        return fetched.data

    def _fetch(self, url: str, decode: Callable[[bytes], T]) -> T:
        """The decoded image at `url`."""
        brought = self._brought.pop(url, None)
        if brought is not None and brought.done():
            return decode(brought.result())
        return decode(self._fetcher.network.call(self._download(url)))

    def _read_mask(self, data: bytes, mask_from: MaskFrom) -> Mask:
        return read_mask(data, max_pixels=self._max_pixels, mask_from=mask_from)

    def _decode(self, data: bytes) -> Picture:
        return codec.decode(data, codec.probe(data, max_pixels=self._max_pixels))

    def _keep(self, known: dict[str, Future[T]], url: str, pixels: int) -> None:
        """Count a decoded picture in the budget of this process, until it or this object is forgotten."""
        if self._budget is None:
            return
        key = id(self), url, id(known)
        here = weakref.ref(self)

        def forget() -> None:
            if (references := here()) is not None:
                with references._lock:
                    known.pop(url, None)

        self._budget.keep(key, pixels, forget)
        weakref.finalize(self, self._budget.drop, key)

    def _once(self, known: dict[str, Future[T]], url: str, decode: Callable[[bytes], T]) -> T:
        """The decoded image at `url`, fetched by whoever asks first; the others wait for that."""
        with self._lock:
            future = known.get(url)
            mine = future is None
            if future is None:
                future = known[url] = Future()
        if mine:
            try:
                found = self._fetch(url, decode)
                future.set_result(found)
                self._keep(known, url, (found.levels if isinstance(found, Mask) else found.pixels[..., 0]).size)
            except BaseException as error:  # noqa: BLE001  # result() raises it for everyone
                future.set_exception(error)
        while not wait([future], GLANCE).done:
            if self._stop.is_set():
                raise Stopped
        return future.result()


def _look_at(task: asyncio.Task[bytes]) -> None:
    """Asyncio logs errors that nobody looks at; this one matters only to images that still need the file."""
    if not task.cancelled():
        task.exception()
