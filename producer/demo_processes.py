"""The demo's own `imagemill` processes, the worker and the download of its model, and the signals that must stop them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from rich.console import Console

from imagemill.producer.client import Client
from imagemill.producer.terminal import say
from imagemill.shared.errors import ImagemillError
from imagemill.shared.settings import WeightsSettings

MODEL = "u2netp"
ANSWER_SECONDS = 5.0
"""Seconds without a new byte of the model after which its publisher counts as unreachable."""
LOAD_SECONDS = 5.0
"""Seconds in addition to that for `imagemill models` to load, on a busy machine."""
CHECK_SECONDS = 60.0
"""Seconds for checking a model that is already there."""
CHILDREN = 2
READY_SECONDS = 120.0
STOP_SECONDS = 20.0


Handler = Callable[[int, FrameType | None], None]


@contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def interruptible() -> Iterator[None]:
    """In this context, the first SIGINT raises KeyboardInterrupt, the first SIGTERM SystemExit; later ones are ignored."""

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    with _handling(interrupt):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals until the end of the block, so that no process is started without being registered."""
    arrived: list[int] = []
    with _handling(lambda number, _: arrived.append(number)):
        yield
    if arrived:
        signal.raise_signal(arrived[0])


def weights_variables(weights: WeightsSettings) -> dict[str, str]:
    """Variables that point another process to these weights."""
    variables = {"IMAGEMILL_WEIGHTS__FOLDER": str(weights.folder.expanduser().absolute())}
    return variables | ({"IMAGEMILL_WEIGHTS__MIRROR": weights.mirror} if weights.mirror else {})


class _Process:
    """An `imagemill` command in its own session, so that Ctrl-C reaches it only through us."""

    def __init__(self, folder: Path, log: str, arguments: Sequence[str], settings: Mapping[str, str]) -> None:
        self._log = folder / log
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("IMAGEMILL_")}
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(  # noqa: S603  # our own program, no shell
                [sys.executable, "-m", "imagemill.producer.cli", *arguments],
                cwd=folder,  # where the user has no .env file
                env={**kept, **settings},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Ask the process to stop, and kill it with its children after twenty seconds."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except BaseException as error:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise

    def _log_lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()


class ModelPull(_Process):
    """`imagemill models pull` of the demo's model; with `offline`, only `imagemill models verify`."""

    def __init__(self, folder: Path, weights: WeightsSettings, *, offline: bool) -> None:
        self._weights = weights.folder.expanduser().absolute()
        there = any(self._weights.glob(f"*/{MODEL}.onnx"))
        self._patience = CHECK_SECONDS if offline or there else ANSWER_SECONDS
        super().__init__(folder, "model.log", ["models", "verify" if offline else "pull", MODEL], weights_variables(weights))

    def wait(self) -> str | None:
        """Wait for the model; the reason if it can't be had, else None."""
        size, patience = -1, LOAD_SECONDS + self._patience
        while (now := self._size()) != size:
            size = now
            with suppress(subprocess.TimeoutExpired):
                status = self._process.wait(patience)
                reason = "" if status == 0 else (self._log_lines() or [f"`imagemill models` exited with status {status}"])[-1]
                return re.sub(r"^error \(\w+\): |: imagemill models pull \w+$", "", reason) or None
            patience = self._patience
        return "its publisher does not answer"

    def _size(self) -> int:
        """Bytes of the model's files so far, partial downloads included."""
        return sum(path.stat().st_size for path in self._weights.glob(f"*/{MODEL}.*"))


class WorkerProcess(_Process):
    """`imagemill worker` on the CPU, with two children."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        super().__init__(folder, "worker.log", ["worker", "--cpu", "--concurrency", str(CHILDREN)], settings)

    def wait_until_ready(self, client: Client, console: Console) -> None:
        """Wait until all children of the worker are ready. Raises ImagemillError if it exits or takes too long."""
        deadline = time.monotonic() + READY_SECONDS
        while not any(node.ready for node in client.nodes()):
            self.check(console, wait=0.1)
            if time.monotonic() > deadline:
                self._fail(console, f"was not ready after {READY_SECONDS:.0f} s")

    def check(self, console: Console, *, wait: float) -> None:
        """Return after `wait` seconds; raise ImagemillError at once if the process exits."""
        with suppress(subprocess.TimeoutExpired):
            self._fail(console, f"exited with status {self._process.wait(wait)}")

    def _fail(self, console: Console, reason: str) -> NoReturn:
        for line in self._log_lines()[-20:]:
            say(console, f"  {line}", "dim")
        raise ImagemillError(f"the worker {reason}; its log is {self._log}")
