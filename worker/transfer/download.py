"""HTTP requests with libcurl: limits during the transfer, reused connections, and errors."""

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
"""Bytes of an error page to read so that its connection can be reused; for more, closing the connection is cheaper."""

NO_TLS = (
    pycurl.E_SSL_CONNECT_ERROR,
    pycurl.E_PEER_FAILED_VERIFICATION,
    pycurl.E_SSL_CERTPROBLEM,
    pycurl.E_SSL_CIPHER,
    pycurl.E_SSL_ISSUER_ERROR,
    pycurl.E_SSL_INVALIDCERTSTATUS,
)


@dataclass(frozen=True)
class Response:
    """A server's response. `headers` has lower-case names; `body` is empty unless the status is 200 or 203."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def location(self) -> str | None:
        """The redirect target exactly as sent, if this is a redirect."""
        return self.headers.get("location") if self.status in REDIRECTS else None


class Downloader:
    """A thread-safe pool of curl handles with their open connections, most recently used first.

    Belongs to one process; create it after the fork.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._agent = _user_agent()
        self._idle: list[pycurl.Curl] = []
        self._lock = threading.Lock()
        self._closed = False

    def get(self, target: Target, label: str, seconds: float) -> Response:
        """Request `target` once, without following redirects; `label` names it in errors.

        Raises Timeout, Unreachable, ForbiddenAddress, TooLarge, Truncated or UnsupportedUrl if no complete response arrives.
        Error statuses are returned, even if their body is incomplete.
        """
        transfer = _Transfer(target, self._settings)
        with self._handle() as handle:
            try:
                self._prepare(handle, transfer, seconds)
                handle.perform()
            except pycurl.error as error:
                if transfer.status in OK or transfer.status < 200:
                    raise transfer.explain(error, label) from error
            finally:
                transfer.close()
        return Response(transfer.status, transfer.headers, b"".join(transfer.blocks))

    def close(self) -> None:
        """Close all connections; handles in use are closed when their request ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for handle in idle:
            handle.close()

    @contextmanager
    def _handle(self) -> Iterator[pycurl.Curl]:
        with self._lock:
            handle = self._idle.pop() if self._idle else pycurl.Curl()
        try:
            yield handle
        finally:
            handle.reset()  # clears options and callbacks, keeps connections
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
            (pycurl.PROXY, ""),  # overrides http_proxy and the like: we couldn't check where a proxy connects
            (pycurl.NOPROXY, "*"),
            (pycurl.NOSIGNAL, 1),  # signals and threads don't mix; curl resolves names in a thread of its own
            (pycurl.USERAGENT, self._agent),
            # Ask for uncompressed bytes, but decode what a server compresses anyway; size limits count decoded bytes.
            (pycurl.HTTPHEADER, ["Accept-Encoding: identity"]),
            (pycurl.ACCEPT_ENCODING, "gzip, deflate"),
            (pycurl.CAINFO, certifi.where()),
            (pycurl.CONNECTTIMEOUT_MS, max(1, int(min(settings.connect_timeout, seconds) * 1000))),
            (pycurl.TIMEOUT_MS, max(1, int(seconds * 1000))),
            (pycurl.MAXFILESIZE_LARGE, settings.max_bytes),  # checks Content-Length, before the body
            (pycurl.BUFFERSIZE, 262_144),
            (pycurl.OPENSOCKETFUNCTION, transfer.open_socket),
            (pycurl.HEADERFUNCTION, transfer.on_header),
            (pycurl.WRITEFUNCTION, transfer.on_body),
        ):
            handle.setopt(option, value)


@dataclass
class _Transfer:
    """Curl's callbacks for one request. They must not raise: pycurl could only print the exception."""

    target: Target
    settings: FetchSettings
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    blocks: list[bytes] = field(default_factory=list)
    size: int = 0
    refused: bool = False
    sockets: list[socket.socket] = field(default_factory=list)

    def open_socket(self, _purpose: int, address: Any) -> socket.socket | int:
        """Decide whether curl may connect to `address`; the only place where this is decided.

        It sees the resolved address, so redirects, changing DNS answers and odd spellings of numeric addresses can't bypass
        it. Reused connections passed this check when they were opened.
        """
        try:
            if address.family not in (socket.AF_INET, socket.AF_INET6) or not allowed(
                address.addr[0], self.target.host, self.target.port, self.settings
            ):
                self.refused = True
                return int(pycurl.SOCKET_BAD)
            new = socket.socket(address.family, address.socktype, address.protocol)
        except (OSError, ValueError):  # no IPv6 or no descriptors left: curl tries the next address
            return int(pycurl.SOCKET_BAD)
        self.sockets.append(new)  # curl works on a duplicate; ours is closed afterwards
        return new

    def on_header(self, line: bytes) -> None:
        """Handle a header line; a status line starts a new response, for example after 100 or 103."""
        if line.startswith(b"HTTP/"):
            code = line.split(maxsplit=2)[1:2]
            self.status = int(code[0]) if code and code[0].isdigit() else 0
            self.headers.clear()
            return
        name, colon, value = line.decode("utf-8", "surrogateescape").partition(":")
        if colon:
            self.headers[name.strip().lower()] = value.strip()

    def on_body(self, block: bytes) -> int:
        """Take a block of the body; returning anything but its length aborts the transfer."""
        self.size += len(block)
        if self.status in OK:
            if self.size > self.settings.max_bytes:
                return -1
            self.blocks.append(block)
        elif self.size > ERROR_BODY:
            return -1
        return len(block)

    def close(self) -> None:
        """Close our copies of the sockets passed to curl."""
        for each in self.sockets:
            each.close()

    def explain(self, error: pycurl.error, label: str) -> ImageError:
        """The ImageError for a failed transfer without an error status."""
        number, reason = error.args[0], str(error.args[1]).strip()
        limit = self.settings.max_bytes
        if number == pycurl.E_FILESIZE_EXCEEDED or self.size > limit:
            return TooLarge(f"{label} exceeds the limit of {limit} bytes")
        if self.refused and not self.sockets:
            return ForbiddenAddress(
                f"{label} is in a private or reserved network; an operator can allow it "
                "with IMAGEMILL_FETCH__ALLOW_HOSTS or IMAGEMILL_FETCH__ALLOW_NETWORKS"
            )
        if number == pycurl.E_OPERATION_TIMEDOUT:
            return Timeout(f"{label} timed out: {'incomplete response' if self.sockets else 'no connection'}")
        if number == pycurl.E_COULDNT_RESOLVE_HOST:
            return Unreachable(f"{label}: can't resolve host {self.target.host!r}")
        if number in NO_TLS:
            return Unreachable(f"{label}: TLS connection failed ({reason})")
        if number in (pycurl.E_URL_MALFORMAT, pycurl.E_UNSUPPORTED_PROTOCOL):
            return UnsupportedUrl(f"{label} is not a valid URL ({reason})")
        if number == pycurl.E_BAD_CONTENT_ENCODING:
            return Truncated(f"{label}: the compressed response is damaged")
        if number == pycurl.E_COULDNT_CONNECT:
            return Unreachable(f"{label}: can't connect to {self.target.host}:{self.target.port}")
        return Unreachable(f"{label}: the connection failed ({reason})")


def status_error(response: Response, label: str) -> ImageError | None:
    """The error for a response's status; None for success."""
    status = response.status
    if status in OK:
        return None
    if status in (401, 403):
        return AccessDenied(f"{label}: access denied (status {status})")
    if status in (404, 410):
        return NotFound(f"{label} was not found (status {status})")
    if status == 408:
        return Timeout(f"{label}: the server timed out (status 408)")
    if status == 429 or 500 <= status < 600:
        error = ServerError(f"{label}: server error or overload (status {status})")
        error.retry_after = retry_after(response.headers.get("retry-after", ""))
        return error
    return HttpError(f"{label}: unexpected status {status}")


def retry_after(value: str) -> float:
    """Seconds to wait according to a Retry-After header, a number or a date; 0 if it is empty or invalid."""
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
    except PackageNotFoundError:  # running from a checkout that isn't installed
        return "imagemill"
