"""A real Redis for the tests."""

from __future__ import annotations

import socket
import subprocess
import time
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


@contextmanager
def configured_redis(folder: Path, *lines: str, sentinel: bool = False) -> Iterator[int]:
    """A Redis with these lines of configuration, or a Sentinel; yields its port, which stands for PORT in the lines."""
    require_redis()
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    configuration = folder / "redis.conf"
    configuration.write_text("\n".join([f"dir {folder}", *lines, ""]).replace("PORT", str(port)))
    command = [find_server(), str(configuration), *(["--sentinel"] if sentinel else [])]
    with (folder / "redis.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_until_it_listens(process, folder / "redis.log")
        yield port
    finally:
        process.kill()
        process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < end:
        if any(line in log.read_text(errors="replace") for line in ("Ready to accept connections", "Sentinel ID is")):
            return
        time.sleep(0.02)
    raise unavailable(f"this Redis does not start: {log.read_text(errors='replace')[-300:]}")
