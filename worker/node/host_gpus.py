"""What a supervisor reports to Redis: the GPUs that it sees, and those that its host must have."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from threading import Event, Thread

from imagemill.shared.errors import ServiceUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.messages import HostGpus
from imagemill.shared.settings import Settings
from imagemill.worker.hardware.gpus import visible
from imagemill.worker.node.naming import this_process
from imagemill.worker.node.supervisor import find_gpus

log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
LOOK_SECONDS = 15.0
"""Interval between calls of `nvidia-smi`, which takes seconds where the driver has to wake up."""


class HostReport:
    """Looks for GPUs and reports them, in its own thread, because a broken driver may hang. Enter it before nodes start."""

    def __init__(self, settings: Settings) -> None:
        self._expected = settings.worker.expect_gpus
        self._host, self._process = socket.gethostname(), this_process()
        self._fleet = Fleet.of(settings)
        self._count, self._missing, self._look_at = len(find_gpus()), 0, 0.0
        self._present: tuple[str, ...] = ()
        self._over = Event()
        self._thread = Thread(target=self._run, name="gpus", daemon=True)

    def __enter__(self) -> HostReport:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(REPORT_SECONDS)
        with suppress(ServiceUnavailable):
            self._fleet.forget_gpus(self._host, self._process)

    def count(self) -> int:
        """The most GPUs seen so far. A GPU that has gone keeps its node, whose failure says why."""
        return self._count

    def _run(self) -> None:
        while True:
            try:
                self._look()
                report = HostGpus(host=self._host, expected=self._expected, present=self._present)
                self._fleet.report_gpus(report, self._process)
            except ServiceUnavailable as error:
                log.info("GPUs not reported", extra={"action": "supervise", "reason": error.message})
            except Exception:  # a bug, for which the nodes must not pay
                log.exception("GPUs not reported", extra={"action": "supervise"})
            if self._over.wait(REPORT_SECONDS):
                return

    def _look(self) -> None:
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._present = tuple(visible())
        self._count = max(self._count, len(find_gpus()))
        missing = max(0, (self._expected or 0) - len(self._present))
        if missing != self._missing:
            fields = {"action": "supervise", "expected": self._expected, "present": len(self._present)}
            log.log(logging.ERROR if missing else logging.INFO, "GPUs missing" if missing else "all GPUs present", extra=fields)
        self._missing = missing
