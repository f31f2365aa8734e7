"""Names of queues and tasks."""

from __future__ import annotations

from imagemill.shared.engines import ENGINES
from imagemill.shared.queues import CANARY_TASK, node_queue, queue_name, task_name

LANES = [lane for engine in ENGINES for lane in engine.lanes]


def test_names_of_queues_and_tasks() -> None:
    assert queue_name("stylize.opencv") == "imagemill.stylize.opencv"
    assert queue_name("remove-background.rembg.u2net") == "imagemill.remove-background.rembg.u2net"
    assert task_name("remove-background.rembg.u2net") == "imagemill.remove-background"
    assert node_queue("gpu3@host") == "imagemill.node.gpu3@host"


def test_names_are_unique() -> None:
    queues = [*map(queue_name, LANES), node_queue("a")]
    assert len(set(queues)) == len(queues)
    assert not {CANARY_TASK, *map(task_name, LANES)} & set(queues)
    assert CANARY_TASK not in map(task_name, LANES)
