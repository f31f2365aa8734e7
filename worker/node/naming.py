"""The node's name: no two live nodes have the same, whatever their hosts are called."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import psutil

from imagemill.shared.errors import ServiceUnavailable
from imagemill.shared.fleet import NODE_SECONDS, Fleet, Holder
from imagemill.shared.messages import Node

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
LONGEST_WAIT = 10.0
"""Seconds between attempts to reach Redis."""

Pause = Callable[[float], None]


def take_name(fleet: Fleet, node: Node, pause: Pause = time.sleep) -> Node:
    """The node, under the first of `cpu@host`, `cpu-2@host` and so on that no live node has. Waits for Redis."""
    for name in _names(node.node):
        named = node.model_copy(update={"node": name})
        other = _live_holder(fleet, named, pause)
        if other is None:
            return named
        fields = {"action": "name", "node": name, "used_by_host": other.host, "used_by_pid": other.pid}
        log.warning("name in use; the node takes another", extra=fields)
    raise AssertionError("there is always another name")


def _names(name: str) -> Iterator[str]:
    yield name
    first, at, host = name.partition("@")
    yield from (f"{first}-{number}{at}{host}" for number in count(2))


def _live_holder(fleet: Fleet, node: Node, pause: Pause) -> Node | None:
    """The live node that has this name; None once it belongs to `node`.

    On this host we know whether a process lives. Elsewhere, its next report shows it, so a node restarted in another
    container gets its old name back a little later.
    """
    first = holder = _claim(fleet, node, None, pause)
    while first is not None and holder is not None:
        lives = is_running(holder.node.process)
        if lives or (lives is None and holder.node.seen > first.node.seen):
            return holder.node
        if lives is False or holder.silent >= NODE_SECONDS:
            holder = _claim(fleet, node, holder.node, pause)
            continue
        if holder == first:
            log.info("name in use elsewhere; is that node alive?", extra={"action": "name", "node": node.node})
        pause(LOOK_SECONDS)
        holder = _claim(fleet, node, None, pause)
    return None


def _claim(fleet: Fleet, node: Node, dead: Node | None, pause: Pause) -> Holder | None:
    wait = 1.0
    while True:
        try:
            return fleet.claim_name(node, dead)
        except ServiceUnavailable as error:
            fields = {"action": "name", "node": node.node, "reason": error.message, "again_in": wait}
            log.warning("the node waits for Redis", extra=fields)
        pause(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def this_process() -> str:
    """Identifies this process across all hosts: PLACE/PID/START. `is_running` understands it."""
    place, start = _place(), _start(os.getpid())
    return f"{place}/{os.getpid()}/{start}" if place and start else uuid.uuid4().hex


def is_running(process: str) -> bool | None:
    """Whether a process that `this_process` described still runs; None if that can't be known from here."""
    place, _, rest = process.partition("/")
    if not rest or place != _place():
        return None
    pid, _, start = rest.partition("/")
    found = _start(int(pid))
    if found is None:
        return None if psutil.pid_exists(int(pid)) else False  # /proc may hide other users' processes
    return found == start


def _place() -> str | None:
    """The boot of the host and the namespace that process IDs belong to; None where Linux does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot}{Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:16]
    except OSError:
        return None


def _start(pid: int) -> str | None:
    """When a process began, in ticks since the boot, which no change of the clock moves; 'ended' for a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if state in "ZX" else fields[18]
