"""From an image's address to its bytes: http, https, s3 and file, with limits, redirects and retries."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from urllib.parse import urljoin, urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from imagemill.shared.errors import (
    EmptyFile,
    ForbiddenAddress,
    ImageError,
    NotAnImage,
    Timeout,
    TooLarge,
    TooManyRedirects,
    UnsupportedUrl,
)
from imagemill.shared.s3 import S3Client, split, translate
from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.shared.urls import BUCKET, check_source_url, shown
from imagemill.worker.transfer.addresses import wire
from imagemill.worker.transfer.download import Answer, Downloader, status_error
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
    """One per process, made after the fork; any number of threads may fetch at a time.

    `s3` gives the process's client; it is asked for at the first s3:// address.
    """

    def __init__(self, settings: FetchSettings, files: FileSettings, s3: Callable[[], S3Client]) -> None:
        self._settings = settings
        self._files = files
        self._s3 = s3
        self._downloader = Downloader(settings)

    def fetch(self, url: str, *, attempts: int = 1, stop: threading.Event | None = None) -> Fetched:
        """The bytes behind an address, after up to `attempts` tries where trying again can help.

        Between tries it waits with growing pauses; when `stop` is set meanwhile, the last error is raised
        at once. Raises an ImageError (fetch branch) whose `tries` says how many were made.
        """
        stop = stop or threading.Event()
        for tries in count(1):
            try:
                return Fetched(self._once(url), tries)
            except ImageError as error:
                error.tries = tries
                wait = pause(tries, getattr(error, "retry_after", 0.0))
                if not error.retryable or tries >= attempts or stop.wait(wait):
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connections."""
        self._downloader.close()

    def _once(self, url: str) -> bytes:
        try:
            check_source_url(url)
        except ValueError as error:
            raise UnsupportedUrl(f"{shown(url)}: {error}") from error
        scheme = urlsplit(url).scheme
        if scheme == "s3":
            data = self._object(url)
        elif scheme == "file":
            data = read_file(url, self._files.read_roots, self._settings.max_bytes)
        else:
            data = self._web(url)
        if not data:
            raise EmptyFile(f"{shown(url)} is empty")
        return data

    def _web(self, url: str) -> bytes:
        """Follow redirects ourselves: each target is checked, and all share one total time."""
        deadline = time.monotonic() + self._settings.total_timeout
        current, label = url, shown(url)
        for _ in range(self._settings.max_redirects + 1):
            target = wire(current)
            left = deadline - time.monotonic()
            if left <= 0:
                raise Timeout(f"{label}: its redirects took longer than {self._settings.total_timeout:g} s")
            answer = self._downloader.get(target, label, left)
            if answer.location is None:
                return image_body(answer, label)
            current = redirected(target.url, answer.location, label)
            label = f"{shown(url)} (redirected to {shown(current)})"
        raise TooManyRedirects(f"{shown(url)} redirects more than {self._settings.max_redirects} times")

    def _object(self, url: str) -> bytes:
        bucket, key = split(url)
        if not BUCKET.fullmatch(bucket) or not key:
            raise UnsupportedUrl(f"{shown(url)} names no bucket and object that S3 could have")
        limit = self._settings.max_bytes
        deadline = time.monotonic() + self._settings.total_timeout
        blocks, size = [], 0
        try:
            reply = self._s3().get_object(Bucket=bucket, Key=key)
            with closing(reply["Body"]) as body:
                announced = reply.get("ContentLength", 0)
                if announced > limit:
                    raise TooLarge(f"{shown(url)} has {announced} bytes; the limit is {limit}")
                while block := body.read(BLOCK):
                    blocks.append(block)
                    size += len(block)
                    if size > limit:
                        raise TooLarge(f"{shown(url)} has more than {limit} bytes, the limit")
                    if time.monotonic() > deadline:
                        raise Timeout(f"{shown(url)} was too slow: no whole object in {self._settings.total_timeout:g} s")
        except (BotoCoreError, ClientError) as error:
            raise translate(error, shown(url)) from error
        return b"".join(blocks)


def redirected(base: str, location: str, label: str) -> str:
    """The absolute, encoded address that a Location header means; only http and https are followed."""
    try:
        target = urljoin(base, location)
        scheme = urlsplit(target).scheme
        if scheme not in ("http", "https"):
            raise ForbiddenAddress(f"{label} redirects to a {scheme}:// address; only http and https are followed")
        check_source_url(target)
    except ValueError as error:
        raise UnsupportedUrl(f"{label} redirects to what is no address") from error
    return wire(target).url


def image_body(answer: Answer, label: str) -> bytes:
    """The body of a successful answer that isn't a web page; a wrong image type in the header is no error."""
    error = status_error(answer, label)
    if error is not None:
        raise error
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Mislabelled images exist; a page of text has no zero byte, and an image always has some at its start.
    said_html = kind in ("text/html", "application/xhtml+xml") and b"\0" not in answer.body[:4096]
    if answer.body and (said_html or HTML.match(answer.body[:4096])):
        raise NotAnImage(f"{label} is a web page (HTML), not an image")
    return answer.body


def cut_short(error: ImageError, stop: threading.Event, attempts: int) -> bool:
    """Whether a download failed only because `stop` kept it from being tried again."""
    return stop.is_set() and error.retryable and error.tries < attempts


def pause(tries: int, asked: float = 0.0) -> float:
    """Seconds to wait after the `tries`-th failure: 0.5, 1, 2 ... at most 8, shortened at random by up to half
    so that many workers don't return together; at least what the server `asked` for, also at most 8."""
    grown = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (tries - 1))
    spread = grown * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
    return max(spread, min(asked, LONGEST_PAUSE))
