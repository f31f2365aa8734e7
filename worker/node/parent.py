"""A node's parent process: waits for its children, reports the node, and tends the ledger.

It never imports torch, onnxruntime or numpy, because its children would inherit them through the fork.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import Value
from multiprocessing.sharedctypes import RawArray
from typing import Any

import psutil
from celery import bootsteps
from celery.worker import state as worker_state

from imagemill.shared.broker import Publisher, queues
from imagemill.shared.errors import ServiceUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.repair import is_damage
from imagemill.shared.messages import Node
from imagemill.shared.queues import queue_name
from imagemill.shared.settings import WorkerSettings
from imagemill.worker.node.lookout import Lookout
from imagemill.worker.node.metrics import ParentMeter
from imagemill.worker.node.offered import Offered

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
REPORT_SECONDS = 5.0
PIDS = 8
"""Processes of one child that may die between two looks."""
REPAIR_SECONDS = 10.0
"""Interval between looks for damage that no script runs into."""
REASON_BYTES = 500
SWEEP_SECONDS = 60.0
"""Interval between looks for queues of nodes that are gone."""
MOST_JOBS = 20
"""Named in one log line."""
MOST_WAKE_UPS = 64
"""Messages for one lane at a time."""


class Children:
    """Shared memory of the parent and its `count` children; created before the fork."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Of each child, the processes that have loaded their engines: how many, and the latest of them in turn. Only the
        # child writes here, and without a lock, which it might die holding.
        self._loads, self._pids = RawArray("i", count), RawArray("i", count * PIDS)
        self._buried = [0] * count
        # When each child last showed that it runs, and when its device last moved on, or 0 outside a shift, by the
        # monotonic clock, which all processes of a host share.
        self._beats, self._moves = RawArray("d", count), RawArray("d", count)
        self._failures, self._status, self._reason = Value("i", 0), Value("i", 1), RawArray("c", REASON_BYTES)
        self._stopping = Value("b", 0)

    def loaded(self, index: int) -> None:
        """Called by child `index` after loading its engines."""
        self._beats[index], self._moves[index] = time.monotonic(), 0.0
        self._pids[index * PIDS + self._loads[index] % PIDS] = os.getpid()
        self._loads[index] += 1
        with self._failures.get_lock():
            self._failures.value = 0

    def beat(self, index: int) -> None:
        """Called every second by a thread of child `index`."""
        self._beats[index] = time.monotonic()

    def moved(self, index: int, *, working: bool = True) -> None:
        """Called by child `index` whenever its device is about to run, or has nothing to run; and at the end of a shift."""
        self._moves[index] = time.monotonic() if working else 0.0

    def busy(self) -> int:
        """The number of children in a shift."""
        return sum(moved > 0 for moved in self._moves)

    def hung(self, stopped: float, stuck: float) -> str:
        """Which child is stopped for longer than `stopped` seconds, or has worked on one batch for `stuck`; empty if none."""
        now = time.monotonic()
        for index, loads in enumerate(self._loads):
            pid, silent, still = self._pid(index, loads - 1), now - self._beats[index], now - self._moves[index]
            if not loads or not _alive(pid):
                continue
            if silent > stopped:
                return f"child {index} (process {pid}) does not run: no sign of life for {silent:.0f} s"
            if self._moves[index] and still > stuck:
                return f"child {index} (process {pid}) hangs: one batch has taken {still:.0f} s"
        return ""

    def failed(self, status: int, reason: str = "") -> int:
        """Called by a child that could not load its engines; returns the number of failures in a row.

        `status` is the exit status that the failure calls for.
        """
        self._reason.value = reason.encode()[: REASON_BYTES - 1]
        with self._failures.get_lock():
            self._status.value = status
            self._failures.value += 1
            return int(self._failures.value)

    def failure(self) -> int | None:
        """The exit status for the node after a failure to load; None if the last child succeeded."""
        return int(self._status.value) if self._failures.value else None

    def reason(self) -> str:
        """Why the latest child failed to load its engines; empty if it succeeded."""
        return str(self._reason.value.decode(errors="ignore")) if self._failures.value else ""

    def ready(self) -> int:
        """The number of running children that have loaded their engines."""
        return sum(_alive(self._pid(index, loads - 1)) for index, loads in enumerate(self._loads) if loads)

    def died(self) -> list[tuple[int, int]]:
        """Index and process ID of each child that has died since the last call."""
        dead = []
        for index, loads in enumerate(self._loads):
            for load in range(max(self._buried[index], loads - PIDS), loads):
                pid = self._pid(index, load)
                if load < loads - 1 or not _alive(pid):
                    dead.append((index, pid))
                    self._buried[index] = load + 1
        return dead

    def _pid(self, index: int, load: int) -> int:
        return int(self._pids[index * PIDS + load % PIDS])

    def stop(self) -> None:
        """Called by the parent: children finish their current images and give back the rest."""
        self._stopping.value = 1

    def stopping(self) -> bool:
        """Whether the parent has called `stop`."""
        return bool(self._stopping.value)


def _lost(shares: list[str]) -> dict[str, object]:
    """What a log line says of lost shares, given the job of each."""
    return {"shares": len(shares), "jobs": sorted(set(shares))[:MOST_JOBS]}


def _alive(pid: int) -> bool:
    """A process that has ended counts as dead even before Celery has noticed, which may take it 5 s."""
    try:
        return pid > 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child_name(node: str, index: int, parent: int, pid: int) -> str:
    """The name of a child process in leases; `parent` is the process ID of its node."""
    return f"{node}/{index}/{parent}.{pid}"


@dataclass
class Parent:
    """The parent's work, in addition to Celery's; `node` describes the node in the fleet."""

    node: Node
    children: Children
    lookout: Lookout
    ledger: WorkLedger
    fleet: Fleet
    publisher: Publisher
    settings: WorkerSettings
    weights: Mapping[str, float]
    meter: ParentMeter = field(default_factory=ParentMeter)
    report_at: float = 0.0
    repair_at: float = 0.0
    sweep_at: float = 0.0

    @property
    def lanes(self) -> Offered:
        return self.lookout.lanes

    def wait_for_children(self) -> None:
        """Return when every child has loaded its engines; exit the node if one of them fails or takes too long."""
        fields = {"action": "load", "node": self.node.node}
        timeout = self.settings.load_timeout
        start = time.monotonic()
        while self.children.ready() < self.children.count:
            worker_state.maybe_shutdown()
            status = self.children.failure()
            if status is not None:
                log.error("a child failed to load its engines; the node exits", extra=fields)
                self.fail(self.children.reason() or "a child failed to load its engines")
                raise SystemExit(status)
            if time.monotonic() - start > timeout:
                log.error("loading took too long; the node exits", extra={**fields, "seconds": timeout})
                self.fail(f"loading the engines took longer than {timeout:g} s")
                raise SystemExit(1)
            self._keep_name()
            time.sleep(0.05)
        self.report_at = 0.0  # now it is ready
        log.info("node ready", extra={"action": "ready", "node": self.node.node, "children": self.children.count})

    def tick(self) -> None:
        """Report the node to Redis, hand out the work of children that died, and wake up workers for work without any."""
        try:
            self._tick()
        except ServiceUnavailable as error:
            fields = {"action": "report", "node": self.node.node, "reason": error.message}
            log.warning("node not reported", extra=fields)
            if is_damage(error.__cause__):
                self._repair()
        except Exception:  # a bug; Celery would end the node
            log.exception("tick failed", extra={"action": "report", "node": self.node.node})
            self._repair()

    def _repair(self) -> None:
        """Repair the ledger, and look again in a while."""
        self.repair_at = time.monotonic() + REPAIR_SECONDS
        try:
            found = self.ledger.repair()
        except Exception:  # the next tick tries again
            log.exception("ledger not repaired", extra={"action": "repair", "node": self.node.node})
            return
        if found:
            log.warning("ledger repaired", extra={"action": "repair", "node": self.node.node, "entries": found})

    def _tick(self) -> None:
        name = self.node.node
        for index, pid in self.children.died():
            lost = self.ledger.bury(child_name(name, index, os.getpid(), pid))
            self.meter.died(pid)
            level = logging.INFO if self.children.stopping() and not lost else logging.WARNING
            log.log(level, "child died", extra={"action": "bury", "child": index, "died": pid, **_lost(lost)})
        self.lookout.tick()
        if self.lookout.changed():
            self.report_at = 0.0
        if self._report_due():
            self.ledger.set_weights(self.weights)
            self._report(ready=self.children.ready() == self.children.count)
        if self.ledger.lead(name, 0.9 * TICK_SECONDS):
            lost, lanes = self.ledger.tend()
            if lost:
                log.warning("shares of dead workers reassigned", extra={"action": "tend", **_lost(lost)})
            for lane, children in lanes.items():
                count = min(max(1, children), MOST_WAKE_UPS)
                self.publisher.wake(lane, count)
                self.meter.republished(count)
            if time.monotonic() >= self.repair_at:
                self._repair()
            if time.monotonic() >= self.sweep_at:
                self.sweep_at = time.monotonic() + SWEEP_SECONDS
                self.fleet.sweep()

    def _keep_name(self) -> None:
        """Report a node that is still loading."""
        try:
            if self._report_due():
                self._report(ready=False)
        except ServiceUnavailable as error:
            log.warning("node not reported", extra={"action": "report", "node": self.node.node, "reason": error.message})

    def _report_due(self) -> bool:
        if time.monotonic() < self.report_at or self.children.stopping():  # a node that has left does not come back
            return False
        self.report_at = time.monotonic() + REPORT_SECONDS
        return True

    def _report(self, *, ready: bool) -> None:
        """Report the node. It exits if another has taken its name while this one was silent; restarted, it takes another."""
        lanes, parts = self.lanes.open(), self.lookout.parts.open()
        closed = {**self.lanes.closed(), **self.lookout.parts.closed()}
        faults = {name: fault.reason for name, fault in closed.items()}
        problem = self.children.reason() or self.children.hung(self.settings.lease_seconds, self.settings.stall_limit)
        changes: dict[str, Any] = {"ready": ready, "lanes": tuple(lanes), "lacks": self.lookout.lacks, "faults": faults}
        changes |= {"parts": tuple(parts), "busy": self.children.busy(), "problem": problem}
        self.meter.offers(lanes)
        if not self.fleet.report_node(self.node.model_copy(update=changes)):
            fields = {"action": "name", "node": self.node.node}
            log.error("another node has taken this node's name; the node exits", extra=fields)
            self.leave()
            worker_state.should_stop = 1

    def fail(self, problem: str) -> None:
        """Stop the children; the node stays visible in the fleet, with the reason, until it is started again."""
        self.children.stop()
        gone = {"ready": False, "gone": True, "lanes": (), "problem": problem}
        try:
            self.fleet.report_node(self.node.model_copy(update=gone))
        except ServiceUnavailable as error:
            log.warning("node not reported", extra={"action": "report", "node": self.node.node, "reason": error.message})

    def leave(self) -> None:
        """Stop the children after their current images, and remove the node from the fleet."""
        self.children.stop()
        try:
            self.fleet.forget_node(self.node.model_copy(update={"lanes": tuple(self.lanes.known())}))
        except ServiceUnavailable as error:
            fields = {"action": "report", "node": self.node.node, "reason": error.message}
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

        def tick() -> None:
            parent.tick()
            _listen(consumer, parent.lanes)

        # The first report as ready also comes from the loop: while Celery starts, a dying child can take the node down.
        consumer.timer.call_after(0, tick)
        self._timer = consumer.timer.call_repeatedly(TICK_SECONDS, tick)

    def stop(self, _consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _listen(consumer: Any, lanes: Offered) -> None:
    """Take the wake-ups of the lanes in service; those of others are for other nodes."""
    served = lanes.open()
    for lane in lanes.known():
        name = queue_name(lane)
        listens = consumer.task_consumer.consuming_from(name)
        if lane in served and not listens:
            for queue in queues([name]):
                consumer.app.amqp.queues.select_add(queue)  # also after a new connection
            consumer.add_task_queue(name)
        elif lane not in served and listens:
            consumer.cancel_task_queue(name)
