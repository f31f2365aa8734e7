"""One HTTP request with libcurl: limits while it runs, kept connections, and what curl's failures mean."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import certifi
import pycurl

from imagemill.shared.errors import (
    AccessDenied,
    ForbiddenAddress,
    HttpError,
    ImageError,
    NotFound,
    ServerError,
    Timeout,
    TooLarge,
    Truncated,
    Unreachable,
    UnsupportedUrl,
)
from imagemill.shared.settings import FetchSettings
from imagemill.worker.transfer.addresses import Target, allowed

OK = (200, 203)
REDIRECTS = (301, 302, 303, 307, 308)
ERROR_BODY = 65_536
"""Bytes of an error's page that are read to keep its connection; beyond, the connection is cheaper to give up."""

NO_HOST = (pycurl.E_COULDNT_RESOLVE_HOST,)
NO_TLS = (
    pycurl.E_SSL_CONNECT_ERROR,
    pycurl.E_PEER_FAILED_VERIFICATION,
    pycurl.E_SSL_CERTPROBLEM,
    pycurl.E_SSL_CIPHER,
    pycurl.E_SSL_ISSUER_ERROR,
    pycurl.E_SSL_INVALIDCERTSTATUS,
)
BAD_URL = (pycurl.E_URL_MALFORMAT, pycurl.E_UNSUPPORTED_PROTOCOL)


@dataclass(frozen=True)
class Answer:
    """What a server said. `headers` has lower-case names; `body` is empty unless the status is 200 or 203."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def location(self) -> str | None:
        """Where it redirects to, as the server wrote it."""
        return self.headers.get("location") if self.status in REDIRECTS else None


class Downloader:
    """Curl handles with their open connections, lent to one request at a time; the latest used goes first.

    For one process, made after the fork; thread-safe.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._agent = _user_agent()
        self._idle: list[pycurl.Curl] = []
        self._lock = threading.Lock()
        self._closed = False

    def get(self, target: Target, label: str, seconds: float) -> Answer:
        """Request `target` once, without following redirects; `label` names it in errors.

        Raises Timeout, Unreachable, ForbiddenAddress, TooLarge, Truncated or UnsupportedUrl where there is
        no whole answer; an error status is an answer, and for it a body cut short does not matter.
        """
        transfer = _Transfer(target, self._settings)
        with self._lent() as handle:
            try:
                self._prepare(handle, transfer, seconds)
                handle.perform()
            except pycurl.error as error:
                if transfer.status in OK or transfer.status < 200:
                    raise transfer.meaning(error, label) from error
            finally:
                transfer.close()
        return Answer(transfer.status, transfer.headers, b"".join(transfer.blocks))

    def close(self) -> None:
        """Close all connections; a handle that is lent out closes when it comes back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for handle in idle:
            handle.close()

    @contextmanager
    def _lent(self) -> Iterator[pycurl.Curl]:
        with self._lock:
            handle = self._idle.pop() if self._idle else pycurl.Curl()
        try:
            yield handle
        finally:
            handle.reset()  # forgets options and callbacks, keeps connections
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(handle)
            if not keep:
                handle.close()

    def _prepare(self, handle: pycurl.Curl, transfer: _Transfer, seconds: float) -> None:
        settings = self._settings
        for option, value in (
            (pycurl.URL, transfer.target.url),
            (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
            (pycurl.FOLLOWLOCATION, 0),
            (pycurl.PROXY, ""),  # also ignores http_proxy and its like: a proxy would connect where we can't see
            (pycurl.NOPROXY, "*"),
            (pycurl.NOSIGNAL, 1),  # signals and threads don't mix; names are resolved in curl's own thread
            (pycurl.USERAGENT, self._agent),
            # Ask for the bytes as they are, but undo what a server compresses unasked; the limits count what comes out.
            (pycurl.HTTPHEADER, ["Accept-Encoding: identity"]),
            (pycurl.ACCEPT_ENCODING, "gzip, deflate"),
            (pycurl.CAINFO, certifi.where()),
            (pycurl.CONNECTTIMEOUT_MS, max(1, int(min(settings.connect_timeout, seconds) * 1000))),
            (pycurl.TIMEOUT_MS, max(1, int(seconds * 1000))),
            (pycurl.MAXFILESIZE_LARGE, settings.max_bytes),  # by Content-Length, before the body
            (pycurl.BUFFERSIZE, 262_144),
            (pycurl.OPENSOCKETFUNCTION, transfer.open_socket),
            (pycurl.HEADERFUNCTION, transfer.on_header),
            (pycurl.WRITEFUNCTION, transfer.on_body),
        ):
            handle.setopt(option, value)


@dataclass
class _Transfer:
    """What curl calls back during one request. Nothing here may raise: pycurl could only print it."""

    target: Target
    settings: FetchSettings
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    blocks: list[bytes] = field(default_factory=list)
    size: int = 0
    opened: int = 0
    refused: int = 0
    sockets: list[socket.socket] = field(default_factory=list)

    def open_socket(self, _purpose: int, address: Any) -> socket.socket | int:
        """Curl is about to connect to `address`: the one place that decides whether it may.

        It is the address itself and not a name, so neither a redirect, nor a DNS answer that
        changes, nor an odd spelling of a number gets past it. Kept connections came through here.
        """
        try:
            if address.family not in (socket.AF_INET, socket.AF_INET6) or not allowed(
                address.addr[0], self.target.host, self.target.port, self.settings
            ):
                self.refused += 1
                return int(pycurl.SOCKET_BAD)
            opened = socket.socket(address.family, address.socktype, address.protocol)
        except (OSError, ValueError):  # no IPv6 here, or no descriptor left: curl tries the next address
            return int(pycurl.SOCKET_BAD)
        self.opened += 1
        self.sockets.append(opened)  # curl works on a duplicate; ours is closed afterwards
        return opened

    def on_header(self, line: bytes) -> None:
        """A status line begins a new answer (after 100 or 103), else it is a field of the present one."""
        if line.startswith(b"HTTP/"):
            code = line.split(maxsplit=2)[1:2]
            self.status = int(code[0]) if code and code[0].isdigit() else 0
            self.headers.clear()
            return
        name, colon, value = line.decode("utf-8", "surrogateescape").partition(":")
        if colon:
            self.headers[name.strip().lower()] = value.strip()

    def on_body(self, block: bytes) -> int:
        """Bytes taken; another number than its length ends the transfer."""
        self.size += len(block)
        if self.status in OK:
            if self.size > self.settings.max_bytes:
                return -1
            self.blocks.append(block)
        elif self.size > ERROR_BODY:
            return -1
        return len(block)

    def close(self) -> None:
        """Close our duplicates of the sockets that curl was given."""
        for opened in self.sockets:
            opened.close()

    def meaning(self, error: pycurl.error, label: str) -> ImageError:
        """The error of ours for a request that curl gave up; called where no error status explains more."""
        number, reason = error.args[0], str(error.args[1]).strip()
        limit = self.settings.max_bytes
        if number == pycurl.E_FILESIZE_EXCEEDED or self.size > limit:
            return TooLarge(f"{label} has more than {limit} bytes, the limit")
        if self.refused and not self.opened:
            return ForbiddenAddress(
                f"{label} lies in a private or reserved network; an operator can allow it "
                "with IMAGEMILL_FETCH__ALLOW_HOSTS or IMAGEMILL_FETCH__ALLOW_NETWORKS"
            )
        if number == pycurl.E_OPERATION_TIMEDOUT:
            return Timeout(f"{label} was too slow: {'no whole answer' if self.opened else 'no connection'} in time")
        if number in NO_HOST:
            return Unreachable(f"{label}: there is no host {self.target.host!r}, or its name server does not answer")
        if number in NO_TLS:
            return Unreachable(f"{label}: no secure connection ({reason})")
        if number in BAD_URL:
            return UnsupportedUrl(f"{label} is no web address ({reason})")
        if number == pycurl.E_BAD_CONTENT_ENCODING:
            return Truncated(f"{label} was sent with damaged compression")
        if number == pycurl.E_COULDNT_CONNECT:
            return Unreachable(f"{label}: {self.target.host}:{self.target.port} refuses connections or can't be reached")
        return Unreachable(f"{label}: the connection broke off ({reason})")


def status_error(answer: Answer, label: str) -> ImageError | None:
    """The error that an answer's status stands for; None for success."""
    status = answer.status
    if status in OK:
        return None
    if status in (401, 403):
        return AccessDenied(f"{label}: the server refuses access (status {status})")
    if status in (404, 410):
        return NotFound(f"{label} does not exist (status {status})")
    if status == 408:
        return Timeout(f"{label}: the server gave up waiting (status 408)")
    if status == 429 or 500 <= status < 600:
        error = ServerError(f"{label}: the server is in trouble or busy (status {status})")
        error.retry_after = retry_after(answer.headers.get("retry-after", ""))
        return error
    return HttpError(f"{label}: the server answered with status {status} and no image")


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, from a number or a date; 0 where there is none or it makes no sense."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _user_agent() -> str:
    try:
        return f"imagemill/{version('imagemill')}"
    except PackageNotFoundError:  # run from a checkout that isn't installed
        return "imagemill"
