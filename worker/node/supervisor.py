"""Runs one node per GPU as processes of their own, and restarts what dies."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from imagemill.worker.hardware.device import visible_gpus

log = logging.getLogger(__name__)

QUICK_SECONDS = 60.0
"""A node that lived shorter than this failed to start; its restarts are spaced further and further apart."""
LONGEST_WAIT = 60.0


def find_gpus() -> list[int]:
    """Indexes of the GPUs that nodes may use: those of CUDA_VISIBLE_DEVICES where that is set, else all of the host's.

    Asks `nvidia-smi`, so that no CUDA context is made in this process.
    """
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None:
        return list(range(len(visible_gpus(mask))))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return []
    return list(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


@dataclass
class _Node:
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    failures: int = 0


class Supervisor:
    """`nodes` maps a name to the arguments of an `imagemill` command, e.g. `worker --gpu 0`."""

    def __init__(self, nodes: dict[str, list[str]]) -> None:
        self._nodes = {name: _Node(arguments) for name, arguments in nodes.items()}
        self._stopping = False

    def run(self) -> int:
        """Keep all nodes running until SIGTERM or SIGINT, then stop them and return 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self._stopping:
            for name, node in self._nodes.items():
                self._look_after(name, node)
            time.sleep(0.2)
        for node in self._nodes.values():
            if node.process is not None and node.process.poll() is None:
                node.process.terminate()
        for node in self._nodes.values():
            if node.process is not None:
                node.process.wait()
        return 0

    def _look_after(self, name: str, node: _Node) -> None:
        now = time.monotonic()
        if node.process is None:
            if now >= node.restart_at:
                # A session of its own: Ctrl-C reaches the node through us, once.
                command = [sys.executable, "-m", "imagemill.producer.cli", *node.arguments]
                node.process = subprocess.Popen(command, start_new_session=True)  # noqa: S603
                node.started = now
            return
        status = node.process.poll()
        if status is None:
            return
        node.failures = node.failures + 1 if now - node.started < QUICK_SECONDS else 0
        wait = min(LONGEST_WAIT, 2.0 ** (node.failures - 1)) if node.failures else 0.0
        node.process, node.restart_at = None, now + wait
        log.warning("node died", extra={"action": "supervise", "node": name, "status": status, "again_in": wait})

    def _stop(self, *_: object) -> None:
        self._stopping = True
