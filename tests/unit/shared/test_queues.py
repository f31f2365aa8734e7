"""Names of queues and tasks."""

from __future__ import annotations

from kombu.utils.scheduling import cycle_by_name

from imagemill.shared.broker import make_app
from imagemill.shared.engines import ENGINES
from imagemill.shared.queues import CANARY_TASK, node_queue, queue_name, task_name
from imagemill.shared.settings import Settings

LANES = [lane for engine in ENGINES for lane in engine.lanes]


def test_names_of_queues_and_tasks() -> None:
    assert queue_name("stylize.opencv") == "imagemill.stylize.opencv"
    assert queue_name("remove-background.rembg.u2net") == "imagemill.remove-background.rembg.u2net"
    assert task_name("remove-background.rembg.u2net") == "imagemill.remove-background"
    assert node_queue("gpu3@host") == "imagemill-node.gpu3@host"


def test_names_are_unique() -> None:
    queues = [*map(queue_name, LANES), node_queue("a")]
    assert len(set(queues)) == len(queues)
    assert not {CANARY_TASK, *map(task_name, LANES)} & set(queues)
    assert CANARY_TASK not in map(task_name, LANES)


def test_node_reads_its_own_queue_first() -> None:
    """Nodes read their queues in sorted order; otherwise a busy node's canary waits for several shifts."""
    assert max(map(node_queue, ("~", "zz@zz"))) < min(map(queue_name, LANES))
    app = make_app(Settings(_env_file=None))  # type: ignore[call-arg]
    cycle = cycle_by_name(app.conf.broker_transport_options["queue_order_strategy"])()
    cycle.update([queue_name("stylize.opencv"), node_queue("zz"), queue_name("inpaint.opencv")])
    assert cycle.consume(3)[0] == node_queue("zz")
    cycle.rotate(node_queue("zz"))
    assert cycle.consume(3)[0] == node_queue("zz")
