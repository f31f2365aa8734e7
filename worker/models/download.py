"""Downloads a model file: resumed after an interruption, hashed on arrival, and published only if its checksum matches."""

from __future__ import annotations

import fcntl
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from imagemill.shared.errors import ConfigurationError, ServiceUnavailable, sentence
from imagemill.shared.settings import WeightsSettings
from imagemill.shared.urls import shown, shown_server
from imagemill.worker.models.catalogue import Weights
from imagemill.worker.models.checksums import BLOCK, Hasher, hash_file, read_blocks, remember, remembered_sums
from imagemill.worker.models.files import path_of, remove_variants
from imagemill.worker.transfer.files import publish

MAX_BYTES = 8 * 2**30
"""Far more than any model in the catalogue: a server that sends more is sending something else."""
LARGEST = 32 * 2**30
"""Far more bytes than any model has that nodes can run; SDXL in full precision has 14 GB."""
SPARE = 64 * 2**20
"""Bytes of disk space that a download leaves free."""
TIMEOUT = 60.0
"""Seconds without an answer or data after which a connection counts as broken."""
PAUSES = (1.0, 3.0, 10.0)
"""Seconds before each retry; the count starts again when a try has brought new data."""

Outcome = Literal["present", "pulled"]
Progress = Callable[[int, int | None], None]
"""Called with the number of bytes on disk and the total, if known."""


class _Interrupted(Exception):
    """A try failed with this message; the next may get the rest."""


def mirror_url(settings: WeightsSettings) -> str | None:
    """The configured mirror without a trailing slash, if any. Raises ConfigurationError if it isn't an http(s) URL."""
    if settings.mirror is None:
        return None
    mirror = urlsplit(settings.mirror)
    if mirror.scheme not in ("http", "https") or not mirror.netloc:
        raise ConfigurationError(f"IMAGEMILL_WEIGHTS__MIRROR is not an http or https URL: {shown_server(settings.mirror)}")
    return f"{mirror.scheme}://{mirror.netloc}{mirror.path.rstrip('/')}"


def url_of(weights: Weights, settings: WeightsSettings) -> str:
    """The URL to download from: a mirror serves each file under the path it has on its own host."""
    mirror = mirror_url(settings)
    return weights.url if mirror is None else mirror + urlsplit(weights.url).path


def check_space(folder: Path, name: str, size: int, *, present: int = 0, most: int = MAX_BYTES) -> None:
    """Raise ConfigurationError if `size` bytes are more than `most`, or don't fit on the disk; `present` are there."""
    if size > most:
        raise ConfigurationError(f"{name} has {size / 1e9:.0f} GB, more than any model that nodes can run")
    free, needed = shutil.disk_usage(folder).free, size - present + SPARE
    if free < needed:
        message = f"{folder} has {free / 1e6:.0f} MB free and {name} needs {needed / 1e6:.0f} MB"
        raise ConfigurationError(f"{message}: free some space, or set IMAGEMILL_WEIGHTS__FOLDER to a larger disk")


def pull(
    weights: Weights,
    settings: WeightsSettings,
    progress: Progress = lambda *_: None,
    *,
    waiting: Callable[[], None] = lambda: None,
    pauses: tuple[float, ...] = PAUSES,
) -> Outcome:
    """Make sure that a model's file is on disk and is the pinned one; `present` means that nothing had to be downloaded.

    If several processes do this at once, one downloads and `waiting` is called in the others. Proxies from the environment
    are used. Raises ServiceUnavailable if the server can't be reached or keeps breaking the connection (the next pull
    resumes from what has arrived), and ConfigurationError if it doesn't have the file, if the checksum is wrong (the file
    is deleted) or if the folder can't be written.
    """
    path, url = path_of(settings.folder.expanduser(), weights), url_of(weights, settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, waiting):
            if path.is_file() and _is_right(path, weights):
                return "present"
            _Download(weights, url, path, progress).run(pauses)
            remove_variants(path)
    except OSError as error:
        raise ConfigurationError(f"{path} can't be written: {sentence(error)}") from error
    return "pulled"


def _is_right(path: Path, weights: Weights) -> bool:
    sums = remembered_sums(path)
    if sums is None or sums.checksum != weights.checksum:
        sums = hash_file(path, weights.checksum)
    return sums.checksum == weights.checksum


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock between processes on this file; the kernel releases it if the process dies."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Download:
    """One download; the caller holds the file's lock. A part that an earlier one has left is continued."""

    def __init__(self, weights: Weights, url: str, path: Path, progress: Progress) -> None:
        self.weights, self.url, self.path, self.progress = weights, url, path, progress
        self.part = path.with_name(f"{path.name}.part")
        self.hasher, self.size = Hasher(weights.checksum), 0
        if self.part.is_file():
            for block in read_blocks(self.part):
                self.hasher.update(block)
                self.size += len(block)
        # Only _Redirects decides where to go, so urllib's handlers for ftp: and file: are out of reach.
        self.opener = urllib.request.build_opener(_Redirects)

    def run(self, pauses: tuple[float, ...]) -> None:
        """Download with retries, check, publish."""
        left, most = list(pauses), self.size
        while self.hasher.checksum != self.weights.checksum:  # an earlier pull may have got everything
            resumed = self.size > 0
            try:
                self._try()
            except _Interrupted as error:
                if self.size > most:
                    most, left = self.size, list(pauses)
                if not left:
                    kept = f"; the {self.size / 1e6:.0f} MB so far are kept, and the next pull resumes from there"
                    hint = "; IMAGEMILL_WEIGHTS__MIRROR can name a mirror" if self.url == self.weights.url else ""
                    raise ServiceUnavailable(f"{shown(self.url)}: {error}{kept if self.size else ''}{hint}") from error
                time.sleep(left.pop(0))
                continue
            checksum = self.hasher.checksum
            if checksum != self.weights.checksum:
                self._discard()
                if not resumed:  # otherwise the beginning may be from another version of the file
                    raise ConfigurationError(
                        f"{shown(self.url)} is not the published file and was deleted: "
                        f"its checksum is {checksum}, not {self.weights.checksum}"
                    )
        sums = self.hasher.sums(self.part.stat())
        publish(self.part, self.path)
        remember(self.path, sums)

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.hasher, self.size = Hasher(self.weights.checksum), 0

    def _try(self) -> None:
        """Request the file, or the rest of it, and append it to the part."""
        with self._request() as answer:
            total = self._total(answer)
            check_space(self.path.parent, self.path.name, total or self.weights.about_bytes, present=self.size)
            with self.part.open("ab") as file:
                self.progress(self.size, total)
                while block := _read(answer):
                    if self.size + len(block) > (MAX_BYTES if total is None else total):
                        self._discard()
                        raise ConfigurationError(
                            f"{shown(self.url)} sends more than it announced, or more than any model needs"
                        )
                    file.write(block)
                    self.hasher.update(block)
                    self.size += len(block)
                    self.progress(self.size, total)
        if total is not None and self.size < total:
            raise _Interrupted(f"the connection broke after {self.size} of {total} bytes")

    def _request(self) -> Any:
        headers = {"User-Agent": "imagemill", "Accept-Encoding": "identity"}
        if self.size:
            headers["Range"] = f"bytes={self.size}-"
        request = urllib.request.Request(self.url, headers=headers)  # noqa: S310  # url_of only returns http and https
        try:
            return self.opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # the part is not the beginning of this file
                self._discard()
            elif error.code < 500 and error.code != http.client.TOO_MANY_REQUESTS:
                raise ConfigurationError(f"{shown(self.url)}: the server answers {error.code}: {error.reason}") from error
            raise _Interrupted(f"the server answers {error.code}") from error
        except http.client.InvalidURL as error:
            raise ConfigurationError(f"{shown(self.url)} is not a valid URL: {sentence(error)}") from error
        except (http.client.HTTPException, OSError) as error:
            raise _Interrupted(sentence(getattr(error, "reason", None) or error)) from error

    def _total(self, answer: Any) -> int | None:
        """The size of the whole file if known; an answer that starts at the beginning discards the part."""
        if self.size and answer.status == http.client.PARTIAL_CONTENT:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if span and int(span[1]) == self.size:
                return int(span[2])
            self._discard()
            raise _Interrupted("the server sent a different range from the one requested")
        self._discard()
        length = answer.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None


def _read(answer: Any) -> bytes:
    try:
        return bytes(answer.read(BLOCK))
    except (http.client.HTTPException, OSError) as error:
        raise _Interrupted(f"the connection broke: {sentence(error)}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, because releases redirect to a file store, but never from https to http or to another scheme."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise ConfigurationError(f"{shown(req.full_url)} redirects to {shown(newurl)}, which is not {allowed[0]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
