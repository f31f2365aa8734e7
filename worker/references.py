"""Pictures that a whole job uses (a mask, a colour reference): fetched and decoded once per chunk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import TypeVar

from worker import codec
from worker.fetch import Fetcher
from worker.operations.base import Grey, Picture

T = TypeVar("T")


class References:
    """Thread-safe. An address that fails fails for each caller of this chunk, without being fetched again."""

    def __init__(self, fetcher: Fetcher, *, max_pixels: int, attempts: int) -> None:
        self._fetcher, self._max_pixels, self._attempts = fetcher, max_pixels, attempts
        self._lock = Lock()
        self._pictures: dict[str, Future[Picture]] = {}
        self._masks: dict[str, Future[Grey]] = {}

    def picture(self, url: str) -> Picture:
        """The picture at `url` in sRGB. Raises the ImageError of fetching or decoding it."""
        return self._once(self._pictures, url, self._decode)

    def mask(self, url: str) -> Grey:
        """The mask at `url`, uint8 [height, width]. Raises the ImageError of fetching or decoding it."""
        return self._once(self._masks, url, lambda data: codec.decode_mask(data, max_pixels=self._max_pixels))

    def _decode(self, data: bytes) -> Picture:
        return codec.decode(data, codec.probe(data, max_pixels=self._max_pixels))

    def _once(self, known: dict[str, Future[T]], url: str, decode: Callable[[bytes], T]) -> T:
        with self._lock:
            future = known.get(url)
            mine = future is None
            if future is None:
                future = known[url] = Future()
        if mine:
            try:
                future.set_result(decode(self._fetcher.fetch(url, attempts=self._attempts).data))
            except BaseException as error:  # noqa: BLE001  # handed to every caller by result()
                future.set_exception(error)
        return future.result()
