"""Names of queues and tasks, and the order in which a worker reads its queues."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imagemill.shared.engines import engines_of
from imagemill.shared.messages import PRIORITIES, Priority
from imagemill.shared.options.base import Operation

MANIFEST_TASK = "imagemill.manifest"
CANARY_TASK = "imagemill.canary"


def queue_name(operation: Operation, lane: str, priority: Priority = "normal") -> str:
    """`imagemill.{operation}.{lane}`, followed by the priority unless it is normal.

    A lane is an engine, or an engine and a model: `opencv`, `rembg.u2net`.
    """
    base = f"imagemill.{operation}.{lane}"
    return base if priority == "normal" else f"{base}.{priority}"


def manifest_queue(operation: Operation, lane: str) -> str:
    """The queue of a job's manifest: high priority, so that finished jobs do not wait behind the chunks of others."""
    return queue_name(operation, lane, "high")


def task_name(operation: Operation) -> str:
    """`imagemill.{operation}`, the task name that Flower shows."""
    return f"imagemill.{operation}"


def engine_of(lane: str) -> str:
    """The engine of a lane: `rembg` for `rembg.u2net`."""
    return lane.partition(".")[0]


def offered(operations: Iterable[Operation], lanes: Sequence[str]) -> list[tuple[Operation, str]]:
    """The valid pairs of these operations and lanes."""
    return [(operation, lane) for operation in operations for lane in lanes if engine_of(lane) in engines_of(operation)]


def worker_queues(operations: Iterable[Operation], lanes: Sequence[str]) -> list[str]:
    """The queues of a node, highest priority first."""
    pairs = offered(operations, lanes)
    return [queue_name(operation, lane, priority) for priority in PRIORITIES for operation, lane in pairs]


def node_queue(node: str) -> str:
    """The queue that only this node reads, for its canary."""
    return f"imagemill.node.{node}"


def rank(queue: str) -> int:
    """0 for high, 1 for normal, 2 for low."""
    return {"high": 0, "low": 2}.get(queue.rsplit(".", 1)[-1], 1)


class PriorityRoundRobin:
    """The order in which kombu reads queues: high, normal, low; queues of equal priority take turns.

    kombu's own strategies either starve the second of two equal queues or ignore priority.
    The interface is that of `kombu.utils.scheduling.round_robin_cycle`.
    """

    def __init__(self, it: Iterable[str] | None = None) -> None:
        self.items: list[str] = []
        self.update(it or ())

    def update(self, it: Iterable[str]) -> None:
        self.items = sorted(it, key=rank)

    def consume(self, n: int) -> list[str]:
        return self.items[:n]

    def rotate(self, last_used: str) -> str:
        """Move the queue that delivered a message behind those of equal priority."""
        if last_used in self.items:
            self.items.remove(last_used)
            self.items.append(last_used)
            self.items.sort(key=rank)  # stable, so it only moves behind its equals
        return last_used
