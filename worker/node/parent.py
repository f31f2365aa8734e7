"""The parent process of a node: waits for its children, reports the node, and reaps overdue chunks.

It imports neither torch, onnxruntime nor numpy: what it loaded, its children would inherit by fork.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from multiprocessing import Value
from multiprocessing.sharedctypes import RawArray
from typing import Any

from celery import bootsteps
from celery.worker import state as worker_state

from imagemill.shared.broker import Publisher
from imagemill.shared.errors import JobNotFound, ServiceUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.messages import Chunk, Node
from imagemill.shared.settings import WorkerSettings
from imagemill.worker.hardware.device import Device

log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0


class Children:
    """What parent and children know of each other, in shared memory made before the fork."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pids = RawArray("i", count)
        self._failures, self._status = Value("i", 0), Value("i", 1)
        self._stopping = Value("b", 0)

    def loaded(self, index: int) -> None:
        """Said by a child: my engines are loaded."""
        self._pids[index] = os.getpid()
        with self._failures.get_lock():
            self._failures.value = 0

    def failed(self, status: int) -> int:
        """Said by a child: loading failed, which is worth this exit status; how often in a row that makes it."""
        with self._failures.get_lock():
            self._status.value = status
            self._failures.value += 1
            return int(self._failures.value)

    @property
    def failures(self) -> int:
        return int(self._failures.value)

    @property
    def status(self) -> int:
        """The exit status of a node whose child failed."""
        return int(self._status.value)

    def ready(self) -> int:
        """How many children are alive with their engines loaded."""
        return sum(pid > 0 and _alive(pid) for pid in self._pids)

    def stop(self) -> None:
        """Said by the parent: finish the current images and give the rest back."""
        self._stopping.value = 1

    def stopping(self) -> bool:
        return bool(self._stopping.value)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Parent:
    """What the node's parent process does besides Celery's own work."""

    def __init__(
        self,
        name: str,
        device: Device,
        queues: list[str],
        children: Children,
        *,
        lacks: Sequence[str] = (),
        ledger: WorkLedger,
        fleet: Fleet,
        publisher: Publisher,
        settings: WorkerSettings,
    ) -> None:
        self.name, self.device, self.queues, self.children, self.lacks = name, device, queues, children, tuple(lacks)
        self.ledger, self.fleet, self.publisher, self.settings = ledger, fleet, publisher, settings

    def wait_for_children(self) -> None:
        """Return when every child has loaded its engines; exit the node when one can't."""
        timeout = self.settings.load_timeout
        start = time.monotonic()
        while self.children.ready() < self.children.count:
            worker_state.maybe_shutdown()
            if self.children.failures:
                log.error("a child could not load its engines; the node exits", extra={"action": "load", "node": self.name})
                raise SystemExit(self.children.status)
            if time.monotonic() - start > timeout:
                log.error(
                    "loading took too long; the node exits", extra={"action": "load", "node": self.name, "seconds": timeout}
                )
                raise SystemExit(1)
            time.sleep(0.05)
        log.info("node ready", extra={"action": "ready", "node": self.name, "children": self.children.count})

    def tick(self) -> None:
        """Report the node, and publish again what is overdue."""
        try:
            self.fleet.report_node(self._report())
            chunks = self.ledger.reap(self.name, patience=self.settings.missing_seconds, every=REPORT_SECONDS)
            for chunk in chunks:
                self._publish_again(chunk)
        except ServiceUnavailable as error:
            log.warning("node not reported", extra={"action": "report", "node": self.name, "reason": error.message})

    def leave(self) -> None:
        """The node stops: its children finish their images, and nobody counts on it any more."""
        self.children.stop()
        try:
            self.fleet.forget_node(self.name)
        except ServiceUnavailable as error:
            log.warning("node not signed off", extra={"action": "report", "node": self.name, "reason": error.message})

    def _publish_again(self, chunk: Chunk) -> None:
        try:
            spec = self.ledger.spec(chunk.job)
        except JobNotFound:
            return
        self.publisher.publish([(chunk, spec)])
        log.warning("chunk published again", extra={"action": "reap", "job": chunk.job, "chunk": chunk.number})

    def _report(self) -> Node:
        return Node(
            node=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=self.device.name,
            queues=tuple(self.queues),
            children=self.children.count,
            ready=self.children.ready() == self.children.count,
            lacks=self.lacks,
        )


class Loaded(bootsteps.StartStopStep):
    """Worker step between the pool and the consumer: no message is taken before every child is loaded."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        worker.app.imagemill_parent.wait_for_children()


class Housekeeping(bootsteps.StartStopStep):
    """Consumer step: `Parent.tick` every few seconds, in the loop that takes messages, so that it stands for its health."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        parent: Parent = consumer.app.imagemill_parent
        # The first one too from the loop: a node that says ready while Celery still starts, a dying child could take along.
        consumer.timer.call_after(0, parent.tick)
        self._timer = consumer.timer.call_repeatedly(REPORT_SECONDS, parent.tick)

    def stop(self, _consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
