"""Runs one node process per GPU, and restarts those that die."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imagemill.worker.hardware.device import visible_gpus
from imagemill.worker.hardware.gpus import listed
from imagemill.worker.node.parting import STARTER

log = logging.getLogger(__name__)

QUICK_SECONDS = 60.0
"""A node that died within this time failed to start; the wait before its next start doubles each time."""
LONGEST_WAIT = 60.0


def find_gpus() -> list[int]:
    """Indices of the GPUs that nodes may use: those in CUDA_VISIBLE_DEVICES if set, otherwise all GPUs of the host."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(range(len(visible_gpus(mask) if mask is not None else listed() or [])))


@dataclass
class _Node:
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    failures: int = 0


class Supervisor:
    """Keeps one node per GPU running. `command` gives the arguments of `imagemill` for a GPU's node, such as `worker --gpu 0`;
    `count` the number of GPUs, which may grow.
    """

    def __init__(self, command: Callable[[int], list[str]], count: Callable[[], int]) -> None:
        self._command, self._count = command, count
        self._nodes: dict[str, _Node] = {}
        self._stopping = False

    def run(self) -> int:
        """Keep all nodes running until SIGTERM or SIGINT, then stop them and return 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self._stopping:
            for gpu in range(len(self._nodes), self._count()):
                self._nodes[f"gpu{gpu}"] = _Node(self._command(gpu))
            for name, node in self._nodes.items():
                self._start_or_check(name, node)
            time.sleep(0.2)
        running = [node.process for node in self._nodes.values() if node.process is not None]
        for process in running:
            process.terminate()  # does nothing if it has ended
        for process in running:
            process.wait()
        return 0

    def _start_or_check(self, name: str, node: _Node) -> None:
        now = time.monotonic()
        if node.process is None:
            if now >= node.restart_at:
                # In a new session, so that Ctrl-C reaches the node only once, through this process.
                command = [sys.executable, "-m", "imagemill.producer.cli", *node.arguments]
                environment = {
                    **os.environ,
                    STARTER: str(os.getpid()),
                }  # by this thread: a node ends with the one that forked it
                node.process = subprocess.Popen(command, start_new_session=True, env=environment)  # noqa: S603
                node.started = now
        elif (status := node.process.poll()) is not None:
            node.failures = node.failures + 1 if now - node.started < QUICK_SECONDS else 0
            wait = min(LONGEST_WAIT, 2.0 ** (node.failures - 1)) if node.failures else 0.0
            node.process, node.restart_at = None, now + wait
            log.warning("node died", extra={"action": "supervise", "node": name, "status": status, "again_in": wait})

    def _stop(self, *_: object) -> None:
        self._stopping = True
