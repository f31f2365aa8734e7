"""Fetch images from http, https, s3 and file URLs, with limits, redirects and retries."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from imagemill.shared import errors
from imagemill.shared.errors import ImageError
from imagemill.shared.s3 import S3Client, split, translate
from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.shared.urls import BUCKET, check_source_url, shown
from imagemill.worker.transfer.addresses import Target, wire
from imagemill.worker.transfer.download import Downloader, Transfer, check_status
from imagemill.worker.transfer.files import read_file

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0
BLOCK = 1 << 20
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|!--|html|head|body|title|script)", re.IGNORECASE)


@dataclass(frozen=True)
class Fetched:
    """An image file, and the number of attempts it took."""

    data: bytes
    tries: int


class Fetcher:
    """Fetches images; thread-safe. Create one per process, after the fork.

    `s3` returns the process's client and is called when the first s3:// URL is fetched.
    """

    def __init__(self, settings: FetchSettings, files: FileSettings, s3: Callable[[], S3Client]) -> None:
        self._settings = settings
        self._files = files
        self._s3 = s3
        self._downloader = Downloader(settings)

    def fetch(self, url: str, *, attempts: int = 1, stop: threading.Event | None = None) -> Fetched:
        """Fetch a URL, retrying errors that may be temporary, with growing pauses, up to `attempts` tries in all.

        Once `stop` is set, the last error is raised without further tries. Raises an ImageError (fetch branch) with the
        number of `tries` made.
        """
        stop = stop or threading.Event()
        tries = 0
        while True:
            tries += 1
            try:
                return Fetched(self._once(url), tries)
            except ImageError as error:
                error.tries = tries
                wait = pause(tries, getattr(error, "retry_after", 0.0))
                if not error.retryable or tries >= attempts or stop.wait(wait):
                    raise

    def _once(self, url: str) -> bytes:
        try:
            check_source_url(url)
        except ValueError as error:
            raise errors.UnsupportedUrl(f"{shown(url)}: {error}") from error
        scheme = urlsplit(url).scheme
        if scheme == "s3":
            data = self._object(url)
        elif scheme == "file":
            data = read_file(url, self._files.read_roots, self._settings.max_bytes)
        else:
            data = self._web(url)
        if not data:
            raise errors.EmptyFile(f"{shown(url)} is empty")
        return data

    def _web(self, url: str) -> bytes:
        """Fetch over HTTP; follows redirects itself to check each target and apply one total timeout to all."""
        deadline = time.monotonic() + self._settings.total_timeout
        target, label = wire(url), shown(url)
        for _ in range(self._settings.max_redirects + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                raise errors.Timeout(f"{label} timed out after {self._settings.total_timeout:g} s of redirects")
            response = self._downloader.get(target, label, left)
            if response.location is None:
                return image_body(response, label)
            target = redirected(target, response.location, label)
            label = f"{shown(url)} (redirected to {shown(target.url)})"
        raise errors.TooManyRedirects(f"{shown(url)} has more than {self._settings.max_redirects} redirects")

    def _object(self, url: str) -> bytes:
        bucket, key = split(url)
        if not BUCKET.fullmatch(bucket) or not key:
            raise errors.UnsupportedUrl(f"{shown(url)} is not a valid S3 URL: it needs a bucket and a key")
        limit = self._settings.max_bytes
        deadline = time.monotonic() + self._settings.total_timeout
        blocks, size = [], 0
        try:
            reply = self._s3().get_object(Bucket=bucket, Key=key)
            with closing(reply["Body"]) as body:
                announced = reply.get("ContentLength", 0)
                if announced > limit:
                    raise errors.TooLarge(f"{shown(url)} has {announced} bytes; the limit is {limit}")
                while block := body.read(BLOCK):
                    blocks.append(block)
                    size += len(block)
                    if size > limit:
                        raise errors.TooLarge(f"{shown(url)} exceeds the limit of {limit} bytes")
                    if time.monotonic() > deadline:
                        raise errors.Timeout(f"{shown(url)} timed out after {self._settings.total_timeout:g} s")
        except (BotoCoreError, ClientError) as error:
            raise translate(error, shown(url)) from error
        return b"".join(blocks)


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


def image_body(response: Transfer, label: str) -> bytes:
    """The body of a response. Raises an ImageError for an error status, and NotAnImage for a web page."""
    check_status(response, label)
    body = b"".join(response.blocks)
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
