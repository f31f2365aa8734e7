"""The parent process of a node: waits for its children, reports the node, and republishes overdue chunks.

It never imports torch, onnxruntime or numpy, because its children would inherit them through the fork.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Value
from multiprocessing.sharedctypes import RawArray
from typing import Any

import psutil
from celery import bootsteps
from celery.worker import state as worker_state

from imagemill.shared.broker import Publisher
from imagemill.shared.errors import JobNotFound, ServiceUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import Node
from imagemill.shared.settings import WorkerSettings
from imagemill.worker.hardware.device import Device

log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0


class Children:
    """Shared memory of the parent and its `count` children; created before the fork."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pids = RawArray("i", count)
        self._failures, self._status = Value("i", 0), Value("i", 1)
        self._stopping = Value("b", 0)

    def loaded(self, index: int) -> None:
        """Called by child `index` after loading its engines."""
        self._pids[index] = os.getpid()
        with self._failures.get_lock():
            self._failures.value = 0

    def failed(self, status: int) -> int:
        """Called by a child that could not load its engines; returns the number of failures in a row.

        `status` is the exit status that the failure calls for.
        """
        with self._failures.get_lock():
            self._status.value = status
            self._failures.value += 1
            return int(self._failures.value)

    def failure(self) -> int | None:
        """The exit status for the node after a failure to load; None if the last child succeeded."""
        return int(self._status.value) if self._failures.value else None

    def ready(self) -> int:
        """The number of running children that have loaded their engines."""
        return sum(pid > 0 and psutil.pid_exists(pid) for pid in self._pids)

    def stop(self) -> None:
        """Called by the parent: children finish their current images and release the rest of their chunks."""
        self._stopping.value = 1

    def stopping(self) -> bool:
        """Whether the parent has called `stop`."""
        return bool(self._stopping.value)


@dataclass(frozen=True)
class Parent:
    """The parent's own work, beside that of Celery; `lacks` names the engines that the node can't offer, and why."""

    name: str
    device: Device
    queues: list[str]
    children: Children
    lacks: list[str]
    ledger: WorkLedger
    fleet: Fleet
    publisher: Publisher
    settings: WorkerSettings

    def wait_for_children(self) -> None:
        """Return when every child has loaded its engines; exit the node if one of them fails or takes too long."""
        fields = {"action": "load", "node": self.name}
        timeout = self.settings.load_timeout
        start = time.monotonic()
        while self.children.ready() < self.children.count:
            worker_state.maybe_shutdown()
            status = self.children.failure()
            if status is not None:
                log.error("a child failed to load its engines; the node exits", extra=fields)
                raise SystemExit(status)
            if time.monotonic() - start > timeout:
                log.error("loading took too long; the node exits", extra={**fields, "seconds": timeout})
                raise SystemExit(1)
            time.sleep(0.05)
        log.info("node ready", extra={"action": "ready", "node": self.name, "children": self.children.count})

    def tick(self) -> None:
        """Report the node to Redis, and republish overdue chunks."""
        node = Node(
            node=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=self.device.name,
            queues=tuple(self.queues),
            children=self.children.count,
            ready=self.children.ready() == self.children.count,
            lacks=tuple(self.lacks),
        )
        try:
            self.fleet.report_node(node)
            for chunk in self.ledger.reap(self.name, patience=self.settings.missing_seconds, every=REPORT_SECONDS):
                with suppress(JobNotFound):
                    self.publisher.publish([(chunk, self.ledger.spec(chunk.job))])
                    log.warning("chunk republished", extra={"action": "reap", "job": chunk.job, "chunk": chunk.number})
        except ServiceUnavailable as error:
            log.warning("node not reported", extra={"action": "report", "node": self.name, "reason": error.message})

    def leave(self) -> None:
        """Stop the children after their current images, and remove the node from the fleet."""
        self.children.stop()
        try:
            self.fleet.forget_node(self.name)
        except ServiceUnavailable as error:
            fields = {"action": "report", "node": self.name, "reason": error.message}
            log.warning("node not removed from the fleet", extra=fields)


class Loaded(bootsteps.StartStopStep):
    """Worker step between the pool and the consumer: no message is consumed before every child is ready."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        worker.app.imagemill_parent.wait_for_children()


class Housekeeping(bootsteps.StartStopStep):
    """Consumer step: calls `Parent.tick` from the loop that consumes messages, so that reports prove its health."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    _timer: Any = None

    def start(self, consumer: Any) -> None:
        parent: Parent = consumer.app.imagemill_parent
        # The first report also comes from the loop: while Celery is still starting, a dying child can take the node down.
        consumer.timer.call_after(0, parent.tick)
        self._timer = consumer.timer.call_repeatedly(REPORT_SECONDS, parent.tick)

    def stop(self, _consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
