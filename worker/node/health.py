"""Whether the nodes of this host work, and whether it has its GPUs. The answer comes within seconds, however busy they are.

A node watches its own children and reports every 5 s what it sees:

- A child that shows no sign of life for `lease_seconds` does not run; its work goes to others anyway.
- A child that works is healthy as long as its device moves on. One batch may take `stall_limit` seconds, ten minutes by
  default: on a CPU a normal batch of Stable Diffusion takes several, and after `time_limit` its process is killed.
- A node that has an idle child proves with a canary task that messages arrive. One whose children are all busy doesn't have
to: the canary would wait for the end of a shift.

A node that still loads its engines is not healthy yet; container runtimes have a start period for that.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator

from imagemill.shared.broker import make_app, queues
from imagemill.shared.errors import ServiceUnavailable
from imagemill.shared.fleet import Fleet
from imagemill.shared.messages import Node
from imagemill.shared.queues import CANARY_TASK, node_queue
from imagemill.shared.settings import Settings
from imagemill.worker.hardware.gpus import visible
from imagemill.worker.node.checks.finding import START_REDIS, WAIT_SECONDS, Finding
from imagemill.worker.node.naming import is_running

LOOK_AT_GPUS = "look at `nvidia-smi -L` and the kernel's log, or correct IMAGEMILL_WORKER__EXPECT_GPUS"


def check_nodes(settings: Settings, wait: float = WAIT_SECONDS, only: str | None = None) -> Iterator[Finding]:
    """Does each node of this host work, or only the one of this name, such as `gpu0` or `gpu0@host`?"""
    fleet = Fleet.of(settings)
    try:
        nodes = [node for node in fleet.nodes() if _is_asked(node, only)]
        frozen = [node for node in fleet.silent() if _is_asked(node, only) and is_running(node.process)]
        if not nodes and not frozen:
            which = f"no node {only} is" if only else "no node is"
            yield Finding("worker", "failed", f"{which} running on this host", "look at the worker's log")
        for node in frozen:
            yield Finding("worker", "failed", f"{node.node} has stopped reporting", "restart the node")
        answered = _canaries(settings, fleet, [node.node for node in nodes if _is_idle(node)], wait)
        if only is None:
            yield from _missing_gpus(fleet)
        now = {node.node: node for node in fleet.nodes()}
        for node in nodes:
            yield _finding(now.get(node.node, node), ran=answered.get(node.node), wait=wait)
    except ServiceUnavailable as error:
        yield Finding("worker", "failed", error.message, START_REDIS)
    finally:
        fleet.close()


def _missing_gpus(fleet: Fleet) -> Iterator[Finding]:
    expected, present = fleet.gpus().get(socket.gethostname(), (None, 0))
    if expected is not None and present < expected:
        yield Finding("gpu", "failed", f"{present} of {expected} expected GPUs are present", LOOK_AT_GPUS)


def _is_asked(node: Node, only: str | None) -> bool:
    return node.host == socket.gethostname() and only in (None, node.node, node.node.partition("@")[0])


def _is_idle(node: Node) -> bool:
    return node.ready and not node.problem and node.busy < node.children


def _canaries(settings: Settings, fleet: Fleet, nodes: list[str], wait: float) -> dict[str, bool]:
    """Whether each of these nodes runs a task within `wait` seconds, all at once."""
    app, tokens = make_app(settings), {node: uuid.uuid4().hex for node in nodes}
    for node, token in tokens.items():
        (own,) = queues([node_queue(node)])
        app.send_task(CANARY_TASK, args=[token], queue=own, expires=wait)
    end = time.monotonic() + wait
    return {node: fleet.await_canary(token, max(0.05, end - time.monotonic())) for node, token in tokens.items()}


def _finding(node: Node, *, ran: bool | None, wait: float) -> Finding:
    if node.problem:
        return Finding("worker", "failed", f"{node.node}: {node.problem}", "look at the node's log, then restart the node")
    if not node.ready:
        return Finding("worker", "failed", f"{node.node} is still loading its engines", "wait, or look at the node's log")
    if ran:
        return Finding("worker", "ok", f"{node.node} ran a task")
    if node.busy == node.children:
        return Finding("worker", "ok", f"{node.node} is busy and making progress")
    return Finding("worker", "failed", f"{node.node} did not run a task within {wait:g} s", "restart the node")


def check_expected_gpus(settings: Settings) -> Iterator[Finding]:
    """Does this host have the GPUs that it must have?"""
    expected = settings.worker.expect_gpus
    if expected is None:
        return
    present = len(visible())
    if present < expected:
        found = f"{present} of {expected} expected GPUs are present"
        yield Finding("gpu", "failed", found, LOOK_AT_GPUS)
    else:
        yield Finding("gpu", "ok", f"{present} GPUs are present, {expected} expected")
