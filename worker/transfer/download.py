"""HTTP requests with libcurl: limits during the transfer, reused connections, and errors."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import certifi
import pycurl

from imagemill.shared import errors
from imagemill.shared.errors import ConfigurationError, ImageError, sentence
from imagemill.shared.settings import FetchSettings
from imagemill.worker.transfer.addresses import PORTS, Target, allowed
from imagemill.worker.transfer.byte_budget import Claim, NoRoom
from imagemill.worker.transfer.network import Network

OK = (200, 203)
REDIRECTS = (301, 302, 303, 307, 308)
ERROR_BODY = 65_536
"""Bytes of an error page to read so that its connection can be reused; for more, closing the connection is cheaper."""

NO_TLS = {getattr(pycurl, name) for name in dir(pycurl) if name.startswith("E_SSL_")}


class Downloader:
    """Makes HTTP requests in the network's loop."""

    def __init__(self, settings: FetchSettings, network: Network) -> None:
        self._settings, self._network = settings, network
        self._agent = settings.user_agent or user_agent()
        self._own_cas = _read_cas(settings.ca_file)

    async def get(self, target: Target, label: str, seconds: float, claim: Claim, chain: Chain) -> Transfer:
        """Request `target` once, as the next of a `chain`, without following redirects; `label` names it in errors.

        Raises Timeout, Unreachable, ForbiddenAddress, TooLarge, Truncated or UnsupportedUrl if no complete response arrives,
        and NoRoom if the claim can't cover it. Error statuses are returned, even if their body is incomplete.
        """
        transfer = Transfer(target, self._settings, claim)
        with self._network.handle() as handle:
            try:
                self._prepare(handle, transfer, seconds)
                handle.setopt(pycurl.HTTPHEADER, ["Accept-Encoding: identity", *chain.headers(target, self._settings)])
                handle.setopt(pycurl.SHARE, chain.cookies(target))
                await self._network.perform(handle)
            except pycurl.error as error:
                if claim.lacks:
                    raise NoRoom from error
                transfer.read_headers()
                if transfer.status in OK or transfer.status < 200:
                    raise transfer.explain(error, label) from error
            finally:
                handle.unsetopt(pycurl.SHARE)  # `reset` would leave it
            transfer.read_headers()
            transfer.retry_after = handle.getinfo(pycurl.RETRY_AFTER)
        return transfer

    def _prepare(self, handle: pycurl.Curl, transfer: Transfer, seconds: float) -> None:
        settings = self._settings
        for option, value in (
            (pycurl.URL, transfer.target.url),
            (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
            (pycurl.PROXY, ""),  # overrides http_proxy and the like: we couldn't check where a proxy connects
            (pycurl.NOSIGNAL, 1),  # signals and threads don't mix; curl resolves names in a thread of its own
            (pycurl.USERAGENT, self._agent),
            (pycurl.CAINFO, certifi.where()),
            (pycurl.CONNECTTIMEOUT_MS, max(1, int(min(settings.connect_timeout, seconds) * 1000))),
            (pycurl.TIMEOUT_MS, max(1, int(seconds * 1000))),
            (pycurl.MAXFILESIZE_LARGE, settings.max_bytes),  # checks Content-Length, before the body
            (pycurl.BUFFERSIZE, 262_144),
            (pycurl.COOKIEFILE, ""),  # no file, but cookies count
            (pycurl.OPENSOCKETFUNCTION, transfer.open_socket),
            (pycurl.HEADERFUNCTION, transfer.lines.append),
            (pycurl.WRITEFUNCTION, transfer.on_body),
        ):
            handle.setopt(option, value)
        if self._own_cas:
            handle.set_ca_certs(self._own_cas)  # in addition to CAINFO


def _read_cas(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        return file.read_text()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"IMAGEMILL_FETCH__CA_FILE={file} can't be used: {sentence(error)}") from error


@dataclass
class Chain:
    """What the requests in one chain of redirects share; none of it outlives them."""

    encrypted: bool = False
    jars: dict[tuple[str, int], pycurl.CurlShare] = field(default_factory=dict)

    def cookies(self, target: Target) -> pycurl.CurlShare:
        """The cookies that this host has set, for this host alone: even those for its whole domain are not sent to others."""
        place = target.host, 0 if target.port in PORTS.values() else target.port
        if place not in self.jars:
            self.jars[place] = pycurl.CurlShare()
            self.jars[place].setopt(pycurl.SH_SHARE, pycurl.LOCK_DATA_COOKIE)
        return self.jars[place]

    def headers(self, target: Target, settings: FetchSettings) -> list[str]:
        """The operator's headers for this host, as lines; none once a request without TLS follows one with TLS."""
        downgraded = self.encrypted and not target.url.startswith("https:")
        self.encrypted = self.encrypted or target.url.startswith("https:")
        if downgraded or not settings.headers:
            return []
        own = {**settings.headers.get(target.host, {}), **settings.headers.get(f"{target.host}:{target.port}", {})}
        return [f"{name}: {value.get_secret_value()}" for name, value in own.items()]


@dataclass
class Transfer:
    """One request: curl's callbacks and the response they collect.

    `lines` are the headers that `read_headers` has not read yet: one by one, as they arrive, would be slower. `headers` has
    lower-case names; `blocks` of the body are kept only if the status is 200 or 203; `retry_after` is in seconds. The callbacks
    must not raise: pycurl could only print the exception.
    """

    target: Target
    settings: FetchSettings
    claim: Claim
    status: int = 0
    retry_after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    size: int = 0
    refused: bool = False
    connected: bool = False

    def open_socket(self, _purpose: int, address: Any) -> socket.socket | int:
        """Decide whether curl may connect to `address`; the only place where this is decided.

        It sees the resolved address, so redirects, changing DNS answers and odd spellings of numeric addresses can't bypass
        it. Reused connections passed this check when they were opened.
        """
        try:
            if not allowed(address.addr[0], self.target.host, self.target.port, self.settings):
                self.refused = True
                return int(pycurl.SOCKET_BAD)
            new = socket.socket(address.family, address.socktype, address.protocol)
        except (OSError, ValueError):  # no IPv6, no descriptors left, or no IP address: curl tries the next address
            return int(pycurl.SOCKET_BAD)
        self.connected = True
        asyncio.get_running_loop().call_soon(new.close)  # pycurl hands curl a duplicate
        return new

    def on_body(self, block: bytes) -> int:
        """Take a block of the body; returning anything but its length aborts the transfer."""
        if not self.size and not self._begin_body():
            return -1
        self.size += len(block)
        if self.size > (self.settings.max_bytes if self.status in OK else ERROR_BODY):
            return -1
        if self.status in OK:
            if not self.claim.covers(self.size):
                return -1
            self.blocks.append(block)
        return len(block)

    def _begin_body(self) -> bool:
        """Whether there is room for the body that the headers announce."""
        self.read_headers()
        announced = self.headers.get("content-length", "")
        size = min(int(announced), self.settings.max_bytes) if announced.isascii() and announced.isdigit() else 0
        return self.status not in OK or self.claim.covers(size, announced=True)

    def read_headers(self) -> None:
        """Read the header lines that have arrived; a status line starts a new response, for example after 100 or 103."""
        for line in self.lines:
            if line.startswith(b"HTTP/"):
                code = line.split(maxsplit=2)[1:2]
                self.status = int(code[0]) if code and code[0].isdigit() else 0
                self.headers.clear()
                continue
            name, colon, value = line.decode("utf-8", "surrogateescape").partition(":")
            if colon:
                name, value = name.strip().lower(), value.strip()
                if name == "content-encoding" and name in self.headers:
                    value = f"{self.headers[name]}, {value}"
                self.headers[name] = value
        self.lines.clear()

    @property
    def body(self) -> bytes:
        """The body as it was sent."""
        return b"".join(self.blocks)

    @property
    def encoding(self) -> str:
        """What the server says it has done to the file; often wrong."""
        return self.headers.get("content-encoding", "")

    @property
    def location(self) -> str | None:
        """The redirect target exactly as sent, if this is a redirect."""
        return self.headers.get("location") if self.status in REDIRECTS else None

    def explain(self, error: pycurl.error, label: str) -> ImageError:
        """The ImageError for a failed transfer without an error status."""
        number, reason = error.args[0], str(error.args[1]).strip()
        limit = self.settings.max_bytes
        if number == pycurl.E_FILESIZE_EXCEEDED or self.size > limit:
            return errors.TooLarge(f"{label} exceeds the limit of {limit} bytes")
        if self.refused and not self.connected:
            return errors.ForbiddenAddress(
                f"{label} is in a private or reserved network; an operator can allow it "
                "with IMAGEMILL_FETCH__ALLOW_HOSTS or IMAGEMILL_FETCH__ALLOW_NETWORKS"
            )
        if number in NO_TLS:
            return errors.Unreachable(f"{label}: TLS connection failed ({reason})")
        host, phase = self.target.host, "incomplete response" if self.connected else "no connection"
        invalid = (errors.UnsupportedUrl, f" is not a valid URL ({reason})")
        kind, text = {
            pycurl.E_OPERATION_TIMEDOUT: (errors.Timeout, f" timed out: {phase}"),
            pycurl.E_COULDNT_RESOLVE_HOST: (errors.Unreachable, f": can't resolve host {host!r}"),
            pycurl.E_COULDNT_CONNECT: (errors.Unreachable, f": can't connect to {host}:{self.target.port}"),
            pycurl.E_URL_MALFORMAT: invalid,
            pycurl.E_UNSUPPORTED_PROTOCOL: invalid,
        }.get(number, (errors.Unreachable, f": the connection failed ({reason})"))
        return kind(f"{label}{text}")


def check_status(transfer: Transfer, label: str) -> None:
    """Raise the error for a response's status unless it is a success."""
    status = transfer.status
    if status in (401, 403):
        raise errors.AccessDenied(f"{label}: access denied (status {status})")
    if status in (404, 410):
        raise errors.NotFound(f"{label} was not found (status {status})")
    if status == 408:
        raise errors.Timeout(f"{label}: the server timed out (status 408)")
    if status == 429 or 500 <= status < 600:
        error = errors.ServerError(f"{label}: server error or overload (status {status})")
        error.retry_after = transfer.retry_after
        raise error
    if status not in OK:
        raise errors.HttpError(f"{label}: unexpected status {status}")


@functools.cache
def user_agent() -> str:
    """Who asks."""
    try:
        return f"imagemill/{version('imagemill')}"
    except PackageNotFoundError:  # running from a checkout that isn't installed
        return "imagemill"
