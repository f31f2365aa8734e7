"""A real Redis for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagemill.producer.embedded_redis import EmbeddedRedis, find_server
from imagemill.shared.errors import MissingExtra
from tests.services.unavailable import unavailable


def require_redis() -> None:
    """Skip the test, or fail it in CI, on a machine without a Redis server."""
    try:
        find_server()
    except MissingExtra as error:
        raise unavailable(error.message) from error


@contextmanager
def running_redis(folder: Path) -> Iterator[EmbeddedRedis]:
    """A Redis server with its data in `folder`, stopped on exit."""
    require_redis()
    server = EmbeddedRedis(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
