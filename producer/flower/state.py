"""What Flower knows of tasks and nodes: it counts images, notices lost shifts, and keeps its history as JSON.

Flower's own history is a pickle. What is in it comes from Redis, so this one is plain JSON.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from celery import states
from flower.events import Events, EventsState

log = logging.getLogger(__name__)

LOST_SECONDS = 30.0
"""A shift reports progress every two seconds. One that has been silent for this long is lost with its process or its host."""
VERSION = 1
FIELDS = (
    *("name", "state", "received", "sent", "started", "rejected", "succeeded", "failed", "retried", "revoked"),
    *("args", "kwargs", "eta", "expires", "retries", "result", "exception", "timestamp", "runtime", "traceback"),
    *("exchange", "routing_key", "clock", "images_done", "images_failed", "jobs"),
)
"""What is kept of a task."""


class Tasks(EventsState):  # type: ignore[misc]
    """Flower's state, with images where Flower counts tasks. `heard` is when it last heard of each unfinished shift."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.heard: dict[str, float] = {}
        self.latest = time.monotonic()

    def event(self, event: dict[str, Any]) -> None:
        """Take in an event. A shift in which an image failed, or that is lost, is shown as failed."""
        kind, node, uuid = event["type"], event["hostname"], event.get("uuid")
        if not kind.startswith("task-") or uuid is None:
            super().event(event)
            self.latest = time.monotonic()
            return
        before = self._images(uuid)
        if kind == "task-succeeded" and before[1]:
            kind = "task-failed"
            event = {**event, "type": kind}
        super().event(event)
        task = self.tasks[uuid]
        if kind == "task-progress":
            self._count(node, task, before)
        elif kind in ("task-received", "task-succeeded") or (kind == "task-failed" and before[1]):
            self.counter[node][kind] -= 1  # it counts images instead
        if task.ready:
            self.heard.pop(uuid, None)
        else:
            self.heard[uuid] = time.monotonic()
        self.latest = time.monotonic()

    def _images(self, uuid: str) -> tuple[int, int]:
        """Images done and failed in a shift, as last reported."""
        task = self.tasks.get(uuid)
        return _number(getattr(task, "images_done", 0)), _number(getattr(task, "images_failed", 0))

    def _count(self, node: str, task: Any, before: tuple[int, int]) -> None:
        """Count a node's images from two reports. If the figures start over, another process has taken over the task."""
        after = self._images(task.uuid)
        done, failed = (new - old if new >= old else new for new, old in zip(after, before, strict=True))
        if after < before:  # what has failed before is not forgotten
            task.images_done, task.images_failed = before[0] + done, before[1] + failed
        self.counter[node].update({"task-succeeded": done, "task-failed": failed, "task-received": done + failed})

    def listen(self) -> None:
        """Wait for every unfinished shift from scratch: Flower was cut off."""
        self.heard = dict.fromkeys(self.heard, time.monotonic())

    def bury(self) -> None:
        """End the shifts that have been silent for too long. If one of them continues after all, its end is shown."""
        silent = time.monotonic() - LOST_SECONDS
        for uuid in [uuid for uuid, heard in self.heard.items() if heard < silent]:
            task = self.tasks.get(uuid)
            if task is None or task.worker is None:  # too old to be kept
                del self.heard[uuid]
            elif task.state != states.RECEIVED or not task.worker.alive:  # else it waits for a child
                self.event(_lost(task))


def _number(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _lost(task: Any) -> dict[str, Any]:
    """The event that its node could not send. Without `local_received` it does not count as a sign of life."""
    said = f" Last heard: {task.result}" if task.result else ""
    return {
        "type": "task-failed",
        "uuid": task.uuid,
        "hostname": task.worker.hostname,
        "timestamp": time.time(),
        "local_received": None,
        "clock": task.clock,
        "result": f"lost with its process; other workers continue with its images.{said}",
    }


class History(Events):  # type: ignore[misc]
    """Flower's thread that receives events. Keeps `state` in the file `db`, if there is one."""

    def load_state(self) -> Tasks:
        """The state of the last run; a file that can't be read is renamed."""
        state = Tasks()
        if not self.db or not Path(self.db).exists():
            return state
        try:
            restore(state, json.loads(Path(self.db).read_bytes()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.error("Flower's history in %s can't be read; it was renamed to %s.damaged: %s", self.db, self.db, error)
            Path(self.db).replace(f"{self.db}.damaged")
            return Tasks()
        return state

    def save_state(self) -> None:
        """Write the state. A process that is killed meanwhile leaves the earlier file."""
        if not self.db:
            return
        path = Path(self.db)
        fresh = path.with_name(f"{path.name}.new")
        try:
            fresh.write_text(json.dumps(saved(self.state)), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            log.error("Flower's history can't be written: %s", error)


def saved(state: Tasks) -> dict[str, Any]:
    """The state as JSON, oldest task first."""
    tasks = []
    for uuid, task in state.itertasks():
        kept = {name: value for name in FIELDS if (value := getattr(task, name, None)) is not None}
        tasks.append({"uuid": uuid, "worker": task.worker.hostname if task.worker else None, **kept})
    counter = {node: dict(counts) for node, counts in state.counter.items() if node in state.workers}
    return {"version": VERSION, "counter": counter, "tasks": tasks}


def restore(state: Tasks, history: dict[str, Any]) -> None:
    """Put a saved state into an empty one. Raises ValueError, TypeError, KeyError or AttributeError if it is damaged."""
    if history["version"] != VERSION:
        raise ValueError(f"version {history['version']} instead of {VERSION}")
    for node, counts in history["counter"].items():
        state.get_or_create_worker(str(node))
        state.counter[node].update({str(kind): int(count) for kind, count in counts.items()})
    for row in history["tasks"]:
        uuid, node = str(row["uuid"]), row["worker"]
        kept = {name: value for name, value in row.items() if name in FIELDS}
        task = state.tasks[uuid] = state.Task(uuid=uuid, cluster_state=state, **kept)
        task.worker = state.get_or_create_worker(str(node))[0] if node else None
        if not task.ready:
            state.heard[uuid] = time.monotonic()
    state.search_engine.rebuild(state.tasks.items())
