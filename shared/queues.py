"""Names of queues and tasks."""

from __future__ import annotations

from imagemill.shared.engines import split_lane

CANARY_TASK = "imagemill.canary"


def queue_name(lane: str) -> str:
    """The queue of a lane's wake-ups: `imagemill.remove-background.rembg.u2net`."""
    return f"imagemill.{lane}"


def task_name(lane: str) -> str:
    """`imagemill.{operation}`, the name of a lane's shifts in Flower."""
    return f"imagemill.{split_lane(lane)[0]}"


def node_queue(node: str) -> str:
    """The queue that only this node reads, for its canary and for the next shift of its own children.

    It sorts before every lane's, and nodes read queues in that order: a canary must not wait for several shifts.
    """
    return f"imagemill-node.{node}"
