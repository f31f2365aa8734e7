"""Fetch images from http, https, s3 and file URLs, with limits, redirects and retries."""

from __future__ import annotations

import asyncio
import copy
import random
import re
import threading
import time
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from imagemill.shared import errors
from imagemill.shared.errors import ImageError
from imagemill.shared.s3 import split
from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.shared.urls import BUCKET, check_source_url, shown
from imagemill.worker.transfer.addresses import Target, wire
from imagemill.worker.transfer.byte_budget import ByteBudget, Claim, NoRoom
from imagemill.worker.transfer.download import Chain, Downloader, Transfer, check_status
from imagemill.worker.transfer.encoding import unpacked
from imagemill.worker.transfer.files import read_file
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.objects import ANYWHERE, Readable, read_object
from imagemill.worker.transfer.s3_requests import S3Requests

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0
GLANCE = 0.2
"""Seconds between checks whether a retry still makes sense."""
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|!--|html|head|body|title|script)", re.IGNORECASE)


@dataclass(frozen=True)
class Fetched:
    """An image file, the number of attempts it took, and the bytes reserved for it: give them back to `Fetcher.room`."""

    data: bytes
    tries: int
    room: int


class Fetcher:
    """Fetches images in the network's loop. Create one per process, after the fork.

    `room` is what the process may hold of downloaded files, `mask_room` what of masks: an image that waits for its mask holds
    its own file already, and must not wait for others that do the same.
    """

    def __init__(self, settings: FetchSettings, files: FileSettings, s3: S3Requests, network: Network) -> None:
        self.network = network
        self._settings, self._files, self._s3 = settings, files, s3
        self._downloader = Downloader(settings, network)
        self.room, self.mask_room = ByteBudget(settings.memory), ByteBudget(settings.memory)
        self._readable = ANYWHERE

    def within(self, readable: Readable) -> Fetcher:
        """The same fetcher, for lists that may name only these objects in S3."""
        limited = copy.copy(self)
        limited._readable = readable
        return limited

    async def fetch(
        self,
        url: str,
        *,
        attempts: int = 1,
        stop: threading.Event | None = None,
        wait_for_room: bool = True,
        mask: bool = False,
    ) -> Fetched:
        """Fetch a URL, retrying errors that may be temporary, with growing pauses, up to `attempts` tries in all.

        Once `stop` is set, the last error is raised without further tries. A caller that already holds room, and won't give
        it back before this file arrives, must not wait for more; a `mask` has its own room. Raises an ImageError (fetch
        branch) with the number of `tries` made.
        """
        tries = 0
        while True:
            tries += 1
            with Claim(self.mask_room if mask else self.room, self._settings.max_bytes, wait=wait_for_room) as claim:
                try:
                    data = await self._once(url, claim)
                    return Fetched(data, tries, claim.keep(len(data)))
                except ImageError as error:
                    error.tries = tries
                    if not error.retryable or tries >= attempts:
                        raise
                    failure = error
            if await stopped(stop, pause(tries, getattr(failure, "retry_after", 0.0))):
                raise failure

    async def _once(self, url: str, claim: Claim) -> bytes:
        try:
            check_source_url(url)
        except ValueError as error:
            raise errors.UnsupportedUrl(f"{shown(url)}: {error}") from error
        read = {"s3": self._object, "file": self._file}.get(urlsplit(url).scheme, self._web)
        while True:
            try:
                data = await read(url, claim)
                break
            except NoRoom:
                await claim.wait()
        if not data:
            raise errors.EmptyFile(f"{shown(url)} is empty")
        return data

    async def _web(self, url: str, claim: Claim) -> bytes:
        """Fetch over HTTP; follows redirects itself to check each target and apply one total timeout to all."""
        deadline = time.monotonic() + self._settings.total_timeout
        target, label, chain = wire(url), shown(url), Chain()
        for _ in range(self._settings.max_redirects + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                raise errors.Timeout(f"{label} timed out after {self._settings.total_timeout:g} s of redirects")
            response = await self._downloader.get(target, label, left, claim, chain)
            if response.location is None:
                check_status(response, label)
                body = await unpacked(response.body, response.encoding, label, self._settings.max_bytes, claim)
                return checked(body, response, label)
            target = redirected(target, response.location, label)
            label = f"{shown(url)} (redirected to {shown(target.url)})"
        raise errors.TooManyRedirects(f"{shown(url)} has more than {self._settings.max_redirects} redirects")

    async def _file(self, url: str, claim: Claim) -> bytes:
        return await asyncio.to_thread(read_file, url, self._files.read_roots, self._settings.max_bytes, claim.covers)

    async def _object(self, url: str, claim: Claim) -> bytes:
        bucket, key = split(url)
        if not BUCKET.fullmatch(bucket) or not key:
            raise errors.UnsupportedUrl(f"{shown(url)} is not a valid S3 URL: it needs a bucket and a key")
        if not self._readable.includes(bucket, key):
            raise errors.ForbiddenAddress(
                f"{shown(url)} is in a bucket that this job's list may not name; "
                "an operator can allow it with IMAGEMILL_S3__READ_BUCKETS"
            )
        return await read_object(self._s3, bucket, key, shown(url), self._settings, claim)


async def stopped(stop: threading.Event | None, seconds: float) -> bool:
    """Wait, at most until `stop` is set; returns whether it is."""
    end = time.monotonic() + seconds
    while stop is None or not stop.is_set():
        left = end - time.monotonic()
        if left <= 0:
            return False
        await asyncio.sleep(left if stop is None else min(left, GLANCE))
    return True


def redirected(base: Target, location: str, label: str) -> Target:
    """The target of a Location header; only http and https are allowed."""
    try:
        url = urljoin(base.url, location)
        scheme = urlsplit(url).scheme
        if scheme not in ("http", "https"):
            raise errors.ForbiddenAddress(f"{label} redirects to a {scheme}:// URL; only http and https are followed")
        check_source_url(url)
    except ValueError as error:
        raise errors.UnsupportedUrl(f"{label} redirects to an invalid URL") from error
    return wire(url)


def checked(body: bytes, response: Transfer, label: str) -> bytes:
    """The body of a response. Raises NotAnImage for a web page."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Some servers label images as HTML. Text has no zero bytes; images always have some near their start.
    labelled_html = kind in ("text/html", "application/xhtml+xml") and b"\0" not in body[:4096]
    if body and (labelled_html or HTML.match(body[:4096])):
        raise errors.NotAnImage(f"{label} is a web page (HTML), not an image")
    return body


def cut_short(error: ImageError, stop: threading.Event, attempts: int) -> bool:
    """Whether a failed download would have been retried if `stop` had not been set."""
    return stop.is_set() and error.retryable and error.tries < attempts


def pause(tries: int, asked: float = 0.0) -> float:
    """Seconds to wait after `tries` failures: 0.5, 1, 2, ... up to 8, or longer if the server `asked` for it, again up to 8.

    Shortened at random by up to half, so that many workers don't retry in step.
    """
    grown = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (tries - 1))
    spread = grown * random.uniform(0.5, 1.0)  # noqa: S311  # not for security
    return max(spread, min(asked, LONGEST_PAUSE))
