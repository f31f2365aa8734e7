"""Run a real worker node as a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from imagemill.shared.connection import connect
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.fleet import NODE_SECONDS, Fleet
from imagemill.worker.node.parting import STARTER

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Return as soon as `condition()` is true; fail with `what` if it is still false after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {seconds:g} s: {what}")
        time.sleep(0.02)


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without variables for imagemill and AWS, plus `settings`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("IMAGEMILL_", "AWS_"))}
    return {**kept, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "AWS_EC2_METADATA_DISABLED": "true", **settings}


class WorkerProcess:
    """Starts on entry and is killed with its children on exit, which takes no time; writes its log to `log`.

    `fake` names a class of tests/fakes.py to use as the engine of stylize.
    """

    def __init__(
        self, environment: dict[str, str], folder: Path, *, concurrency: int = 1, name: str = "cpu", fake: str | None = None
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.environment = environment
        start = ["-m", "imagemill.producer.cli"] if fake is None else [str(ROOT / "tests" / "fake_worker.py"), fake]
        self.command: Sequence[str] = [
            *(sys.executable, *start),
            *("worker", "--cpu", "--concurrency", str(concurrency), "--name", name),
        ]
        self.fleet = Fleet(environment["IMAGEMILL_REDIS_URL"])

    def __enter__(self) -> WorkerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
            self._forget()
        self.fleet.close()

    def _forget(self) -> None:
        """Sign off for the process that was killed, so that other tests with this Redis don't count on it."""
        with suppress(BrokerUnavailable):
            for node in self.fleet.nodes():
                if node.pid == self.process.pid:
                    self.fleet.forget_node(node)

    def start(self) -> None:
        """Start the process; `wait_ready` waits until it takes tasks. It ends with this process, however that ends."""
        environment = {**self.environment, STARTER: str(os.getpid())}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, cwd=self.log.parent, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self, seconds: float = PATIENCE) -> WorkerProcess:
        """Return when this node has reported that it is ready."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the worker exited: {self.tail()}"
            return any(node.pid == self.process.pid and node.ready for node in self.fleet.nodes())

        wait_until(ready, f"{self.name} became ready; log: {self.log}", seconds)
        return self

    def children(self) -> list[int]:
        """Process ids of the pool's children."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def kill(self) -> None:
        """Send SIGKILL to the parent; its children die with it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def age(self, seconds: float = NODE_SECONDS) -> None:
        """Make its latest report older, as if it had been silent for this long."""
        (node,) = (node for node in self.fleet.nodes() if node.pid == self.process.pid)
        older = node.model_copy(update={"seen": node.seen - seconds})
        with connect(self.environment["IMAGEMILL_REDIS_URL"]) as raw:
            raw.hset("imagemill:nodes", node.node, older.model_dump_json())

    def stop(self) -> int:
        """Send SIGTERM, wait, and return the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise AssertionError(f"the worker did not stop: {self.tail()}") from None
        return int(self.process.returncode)

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-3000:]
