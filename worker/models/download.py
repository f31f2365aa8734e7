"""Download of a model's file: resumed where it was broken off, checked while it comes, in place only when it is right."""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from imagemill.shared.errors import ConfigurationError, ServiceUnavailable, sentence
from imagemill.shared.settings import WeightsSettings
from imagemill.shared.urls import shown
from imagemill.worker.models.catalogue import Weights
from imagemill.worker.models.checksums import BLOCK, Known, Sums, blocks, check, known, read_json, remember, write_json
from imagemill.worker.models.files import forget_variants, path_of

MAX_BYTES = 8 * 2**30
"""No model that imagemill knows of is nearly as large: a server that sends more sends something else."""
SPARE = 64 * 2**20
"""Bytes of the disk that a download leaves free."""
SILENCE = 60.0
"""Seconds that a server may say nothing."""
PAUSES = (1.0, 3.0, 10.0)
"""Seconds before each further try, when one has brought nothing new."""

Tell = Callable[[int, int | None], None]
"""Called with the bytes that are there, and how many there will be where that is known."""


class _Interrupted(Exception):
    """The connection broke off; `reason` is a sentence. The rest may come with another try."""


def address(weights: Weights, settings: WeightsSettings) -> str:
    """Where a file is fetched from: with a mirror, the mirror's scheme, host and path before the file's own path.

    Raises ConfigurationError for a mirror that is no http(s) address.
    """
    if settings.mirror is None:
        return weights.url
    mirror = urlsplit(settings.mirror)
    if mirror.scheme not in ("http", "https") or not mirror.netloc:
        raise ConfigurationError(f"IMAGEMILL_WEIGHTS__MIRROR is no http or https address: {shown(settings.mirror)}")
    return urlunsplit((mirror.scheme, mirror.netloc, mirror.path.rstrip("/") + urlsplit(weights.url).path, "", ""))


def pull(
    weights: Weights,
    settings: WeightsSettings,
    tell: Tell = lambda *_: None,
    *,
    waiting: Callable[[], None] = lambda: None,
    pauses: tuple[float, ...] = PAUSES,
) -> Literal["there", "pulled"]:
    """See to it that a model's file is there and is the pinned one; `there` means that it was.

    Several processes may do so at once: one downloads, `waiting` is called in the others. Environment proxies are used.
    Raises ServiceUnavailable where the server can't be reached or breaks off again and again (what has come is kept, and
    the next pull goes on from there), ConfigurationError where it has no such file, where the file is not the
    pinned one (which is removed), and where it can't be written.
    """
    path, url = path_of(weights, settings), address(weights, settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, waiting):
            if path.is_file() and _is_right(path, weights):
                return "there"
            _Download(weights, url, path, tell).run(pauses)
            forget_variants(path)
    except OSError as error:
        raise ConfigurationError(f"{path} can't be written: {sentence(error)}") from error
    return "pulled"


def _is_right(path: Path, weights: Weights) -> bool:
    found = known(path)
    if found is None or found.checksum != weights.checksum:
        found = check(path, weights.checksum)
    return found.checksum == weights.checksum


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Alone with this file among all processes. The kernel gives the lock back when its holder dies."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Download:
    """One file on its way; the caller holds its lock."""

    def __init__(self, weights: Weights, url: str, path: Path, tell: Tell) -> None:
        self.weights, self.url, self.path, self.tell = weights, url, path, tell
        self.part = path.with_name(f"{path.name}.part")
        self.notes = path.with_name(f"{path.name}.part.json")
        self.sums = Sums(weights.checksum)
        self.opener = _opener()

    def run(self, pauses: tuple[float, ...]) -> None:
        """Download, check, and put the file in its place."""
        left = list(pauses)
        most = size = self._resume()
        while self.sums.checksum != self.weights.checksum:  # it may be all there, and only its name missing
            try:
                self._try(size)
                break
            except _Interrupted as error:
                size = self._resume()
                if size > most:
                    most, left = size, list(pauses)
                if not left:
                    own = self.url == self.weights.url
                    kept = f"; {size / 1e6:.0f} MB are kept, the next pull goes on from there" if size else ""
                    other = "; IMAGEMILL_WEIGHTS__MIRROR may name another server that has it" if own else ""
                    raise ServiceUnavailable(f"{shown(self.url)}: {error}{kept}{other}") from error
                time.sleep(left.pop(0))
        self._finish()

    def _resume(self) -> int:
        """How many bytes are there to go on from; they are read again for the checksum."""
        self.sums = Sums(self.weights.checksum)
        if not self.part.is_file():
            return 0
        if not self._remembered():
            self._forget()
            return 0
        for block in blocks(self.part):
            self.sums.update(block)
        return self.part.stat().st_size

    def _remembered(self) -> str:
        """The version that the part is of, as If-Range wants it; empty where it can't be told."""
        found = read_json(self.notes)
        version = found.get("version")
        return version if found.get("url") == self.url and isinstance(version, str) else ""

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def _try(self, size: int) -> None:
        """Ask for the file, or for what is missing of it, and write what comes."""
        with self._answer(size) as answer:
            size, total = self._agree(answer, size)
            self._check_room(size, total)
            with self.part.open("ab") as file:
                self.tell(size, total)
                while block := self._read(answer):
                    size += len(block)
                    if size > (MAX_BYTES if total is None else total):
                        self._forget()
                        raise ConfigurationError(f"{shown(self.url)} sends more than it announced, or than any model has")
                    file.write(block)
                    self.sums.update(block)
                    self.tell(size, total)
                file.flush()
                os.fsync(file.fileno())
        if total is not None and size < total:
            raise _Interrupted(f"the connection broke off at {size} of {total} bytes")

    def _answer(self, size: int) -> Any:
        headers = {"User-Agent": "imagemill", "Accept-Encoding": "identity"}
        if size:
            headers |= {"Range": f"bytes={size}-", "If-Range": self._remembered()}
        request = urllib.request.Request(self.url, headers=headers)  # noqa: S310  # the opener knows http and https alone
        try:
            return self.opener.open(request, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # what we have is no beginning of what there is
                self._forget()
                raise _Interrupted("it refuses to go on from where we were") from error
            if error.code >= 500 or error.code == http.client.TOO_MANY_REQUESTS:
                raise _Interrupted(f"the server answers {error.code}") from error
            raise ConfigurationError(f"{shown(self.url)}: the server answers {error.code}: {error.reason}") from error
        except http.client.InvalidURL as error:
            raise ConfigurationError(f"{shown(self.url)} is no address: {sentence(error)}") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _Interrupted(sentence(getattr(error, "reason", None) or error)) from error

    def _agree(self, answer: Any, size: int) -> tuple[int, int | None]:
        """From where the server goes on, and how large the whole is; starts anew where it doesn't go on from `size`."""
        version = _version(answer.headers)
        if size and answer.status == http.client.PARTIAL_CONTENT:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if span and int(span[1]) == size and version in ("", self._remembered()):
                return size, int(span[2])
            self._forget()  # another version of the file, or another part than we asked for
            raise _Interrupted("the file has changed on the server")
        self._forget()
        self.sums = Sums(self.weights.checksum)
        write_json(self.notes, {"url": self.url, "version": version})
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None

    def _check_room(self, size: int, total: int | None) -> None:
        whole = total or self.weights.about_bytes or 0
        if whole > MAX_BYTES:
            raise ConfigurationError(f"{shown(self.url)} is {whole / 1e9:.0f} GB large: that is no model's file")
        free, needed = shutil.disk_usage(self.path.parent).free, whole - size + SPARE
        if free < needed:
            message = f"{self.path.parent} has {free / 1e6:.0f} MB free and {self.path.name} needs {needed / 1e6:.0f} MB"
            raise ConfigurationError(f"{message}: free some, or set IMAGEMILL_WEIGHTS__FOLDER to a larger disk")

    def _read(self, answer: Any) -> bytes:
        try:
            return bytes(answer.read(BLOCK))
        except (http.client.HTTPException, OSError) as error:
            raise _Interrupted(f"the connection broke off: {sentence(error)}") from error

    def _finish(self) -> None:
        """Only the right file gets its name."""
        if self.sums.checksum != self.weights.checksum:
            self._forget()
            raise ConfigurationError(
                f"{shown(self.url)} is not the file that was asked for and was removed: "
                f"its checksum is {self.sums.checksum}, not {self.weights.checksum}"
            )
        status = self.part.stat()
        self.part.replace(self.path)
        remember(self.path, Known(self.sums.sha256, status.st_size, status.st_mtime_ns, self.sums.checksum))
        self.notes.unlink(missing_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)  # the rename outlives a loss of power
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _version(headers: Any) -> str:
    """A strong ETag, or else the time of the last change: what If-Range takes."""
    tag = str(headers.get("ETag") or "")
    return tag if tag and not tag.startswith("W/") else str(headers.get("Last-Modified") or "")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Releases are redirected to a store of files; never from TLS to a connection that anybody can change."""
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise ConfigurationError(f"{shown(req.full_url)} redirects to {shown(newurl)}, which is not {allowed[0]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """http and https, redirects, the environment's proxies; no files and no FTP, which urllib would read too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
