"""Stores for tests without an event loop of their own, and S3 without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from imagemill.shared.s3 import S3Client
from imagemill.shared.settings import S3Settings
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.s3_requests import S3Requests
from imagemill.worker.transfer.store import Store


class BlockingStore:
    """A store whose calls return when they are done; thread-safe."""

    def __init__(self, store: Store, run: Callable[[Any], Any] = asyncio.run) -> None:
        self.store, self._run = store, run

    def check(self) -> None:
        self._run(self.store.check())

    def put(self, key: str, data: bytes, content_type: str) -> str:
        return str(self._run(self.store.put(key, data, content_type)))

    def put_stream(self, key: str, lines: Iterable[bytes], content_type: str) -> str:
        return self.store.put_stream(key, lines, content_type)

    def copy(self, source: str, key: str, content_type: str, *, md5: str) -> str:
        return str(self._run(self.store.copy(source, key, content_type, md5=md5)))


class NoS3(S3Requests):
    """For tests that must not use S3."""

    def __init__(self, network: Network) -> None:
        super().__init__(S3Settings(), network)

    def client(self) -> NoReturn:
        raise AssertionError("the S3 client was requested")


class ClientOnly(S3Requests):
    """Leaves all requests to a client that the test brings."""

    def __init__(self, client: S3Client, network: Network) -> None:
        super().__init__(S3Settings(), network)
        self._given = client

    def client(self) -> S3Client:
        return self._given
