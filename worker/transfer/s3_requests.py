"""Requests to S3 servers: libcurl for what succeeds at once, boto3 for everything else.

boto3 takes 1 ms of CPU time per request, and a thread for each that is in flight. So it only says where the requests for a
bucket go; libcurl sends them there, with boto3's own signature. Whatever the server does not simply accept is left to boto3,
with its retries, redirects, clock and errors.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock, local
from typing import Any, TypeVar
from urllib.parse import quote

import pycurl

from imagemill.shared.s3 import S3Client, make_client
from imagemill.shared.settings import S3Settings
from imagemill.worker.transfer.download import user_agent
from imagemill.worker.transfer.network import Network

T = TypeVar("T")

THREADS = 8
"""Requests of boto3 at the same time."""
KEYS_SECONDS = 60.0
"""Seconds to sign with the same keys; temporary ones are replaced ten minutes before they expire."""
CONNECT_SECONDS, SILENCE_SECONDS = 5, 10
"""Then boto3 is asked, which waits for 30 s of silence before it tries again (shared/s3.py)."""
LARGE = 262_144
"""From this many bytes on, hashing runs in another thread, so that the loop goes on."""
PLAIN = "/-._~"
"""Characters of keys that boto3 does not encode, besides letters and digits."""


class _Asked(Exception):
    """Ends a request that was only made to see where it would go."""


@dataclass
class Place:
    """Where boto3 sends the requests for a bucket, and how it signs them."""

    url: str
    sign: Callable[[], Any]
    cas: str
    auth: Any = None
    fresh_until: float = 0.0


class S3Requests:
    """Create one per process, after the fork. Coroutines run in the network's loop."""

    def __init__(self, settings: S3Settings, network: Network) -> None:
        self._settings, self._network = settings, network
        self._client: S3Client = None
        self._cas = ""
        self._lock = Lock()
        self._places: dict[str, Place | None] = {}
        self._asking = local()
        self._threads = ThreadPoolExecutor(THREADS, "s3")

    def client(self) -> S3Client:
        """The boto3 client, in any thread. The first call makes it, within a second, while other threads wait for it."""
        with self._lock:
            if self._client is None:
                self._client, self._cas = make_client(self._settings), _cas()
                self._client.meta.events.register("before-sign.s3", self._learn)
            return self._client

    def warm_up(self) -> None:
        """Make the boto3 client now, in a thread: importing boto3 takes long. Errors come when it is used."""
        self._threads.submit(self.client)

    async def in_thread(self, call: Callable[[S3Client], T]) -> T:
        """Call with the boto3 client, in one of the few threads."""

        def work() -> T:
            return call(self.client())

        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(context.run, work))

    async def put(self, bucket: str, key: str, data: bytes, headers: dict[str, str]) -> bytes | None:
        """The body of the answer (empty for an upload), or None if boto3 should try it."""
        answer: list[bytes] = []

        def prepare(handle: pycurl.Curl) -> None:
            handle.setopt(pycurl.CUSTOMREQUEST, "PUT")
            handle.setopt(pycurl.POSTFIELDS, data)
            handle.setopt(pycurl.WRITEFUNCTION, answer.append)

        try:
            status = await self._send("PUT", bucket, key, headers, data, prepare)
        except pycurl.error:
            return None
        return b"".join(answer) if status == 200 else None

    async def get(self, bucket: str, key: str, prepare: Callable[[pycurl.Curl], None]) -> int:
        """Read an object through the callbacks that `prepare` sets; the status. Raises pycurl.error.

        If it isn't 200, boto3 should try it.
        """
        return await self._send("GET", bucket, key, {}, b"", prepare)

    async def _send(
        self,
        method: str,
        bucket: str,
        key: str,
        headers: dict[str, str],
        body: bytes,
        prepare: Callable[[pycurl.Curl], None],
    ) -> int:
        from botocore.exceptions import BotoCoreError

        place = await self._place(bucket)
        if place is None:
            return 0
        url = place.url + quote(key, PLAIN)
        try:
            lines = await self._signed(place, method, url, headers, body)
        except BotoCoreError:  # no keys
            return 0
        with self._network.handle() as handle:
            for option, value in (
                (pycurl.URL, url),
                (pycurl.PATH_AS_IS, 1),  # keys may contain `..`
                (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
                (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1),
                (pycurl.PROXY, ""),
                (pycurl.NOSIGNAL, 1),
                (pycurl.USERAGENT, user_agent()),
                (pycurl.CAINFO, place.cas),
                (pycurl.CONNECTTIMEOUT, CONNECT_SECONDS),
                (pycurl.LOW_SPEED_LIMIT, 1),
                (pycurl.LOW_SPEED_TIME, SILENCE_SECONDS),
                (pycurl.HTTPHEADER, lines),
            ):
                handle.setopt(option, value)
            prepare(handle)
            await self._network.perform(handle, s3=True)
            return int(handle.getinfo(pycurl.RESPONSE_CODE))

    async def _place(self, bucket: str) -> Place | None:
        """Where to send the requests for a bucket; None if only boto3 can."""
        if bucket not in self._places:
            await self.in_thread(functools.partial(self._ask, bucket))
        return self._places.get(bucket)

    def _ask(self, bucket: str, client: S3Client) -> None:
        from botocore.exceptions import BotoCoreError

        self._asking.on = True
        try:
            with suppress(_Asked, BotoCoreError):  # the real request will show what is wrong
                client.head_bucket(Bucket=bucket)
        finally:
            self._asking.on = False

    async def _signed(self, place: Place, method: str, url: str, headers: dict[str, str], body: bytes) -> list[str]:
        """The header lines of a request, with its signature."""
        from botocore.awsrequest import AWSRequest

        if time.monotonic() > place.fresh_until:
            place.auth = await self.in_thread(lambda _: place.sign())  # may ask a server for new keys
            place.fresh_until = time.monotonic() + KEYS_SECONDS
        request = AWSRequest(method, url, headers, body)
        if len(body) < LARGE:
            place.auth.add_auth(request)
        else:
            await asyncio.to_thread(place.auth.add_auth, request)
        return ["Expect:", *(f"{name}: {value}" for name, value in request.headers.items())]

    def _learn(
        self, request: Any, request_signer: Any, signature_version: Any, region_name: str, signing_name: str, **_: Any
    ) -> None:
        """Called by boto3 before it signs a request: also one that it has sent to the wrong region before."""
        from botocore.utils import get_environ_proxies

        given, signing = request.context.get("s3_redirect", {}).get("params", {}), request.context.get("signing", {})
        if "Bucket" in given and "UploadId" not in given:
            url = request.url.partition("?")[0].removesuffix(quote(given.get("Key", ""), PLAIN)).rstrip("/") + "/"
            place = None
            if signature_version == "s3v4" and "identity_cache" not in signing and not get_environ_proxies(url):
                name, region = signing.get("signing_name", signing_name), signing.get("region", region_name)
                sign = functools.partial(request_signer.get_auth_instance, name, region, signature_version)
                place = Place(url, sign, self._cas)
            self._places[given["Bucket"]] = place
        if getattr(self._asking, "on", False):
            raise _Asked


def _cas() -> str:
    """The file with the CAs that boto3 trusts."""
    import botocore.httpsession
    import botocore.session

    own = botocore.session.Session().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    return str(own or botocore.httpsession.get_cert_path(True))
