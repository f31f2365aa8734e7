"""The worker nodes: which are alive, how fast they are, and whether their child processes respond.

Keys, all below `imagemill:`:

    nodes            hash  node -> its latest report; the first one claims the name
    nodes:{lane}     zset  node -> its latest report
    node-children    hash  node -> its number of children
    rates:{lane}     hash  child, as NODE/NUMBER -> images per second; the ledger forgets those of dead nodes
    memory           hash  node -> peak share of GPU memory in use, and number of batches above 90 %
    canary:{token}   list  one entry once the canary task has run
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import redis

from imagemill.shared.connection import Connected, connect, now_ms
from imagemill.shared.dead import VERSION, reason_of, take_out, version_of
from imagemill.shared.messages import Node
from imagemill.shared.settings import Settings

NODE_SECONDS = 20
"""A node counts as dead when its latest report is older."""
FORGET_SECONDS = 3600
MEMORY_SECONDS = 3600
CANARY_SECONDS = 600

REPORT = """
-- ARGV: node, process, report, seconds of silence after which another process loses the name
-- and optionally process and time of a report that may be replaced
local raw = redis.call('HGET', 'imagemill:nodes', ARGV[1])
if raw then
  local other = cjson.decode(raw)
  local process, time = other.process or '', redis.call('TIME')
  local silent = time[1] + time[2] / 1e6 - other.seen
  local replace = ARGV[5] and process == ARGV[5] and other.seen == tonumber(ARGV[6])
  if process ~= ARGV[2] and silent < tonumber(ARGV[4]) and not replace then
    return {raw, tostring(silent)}
  end
end
redis.call('HSET', 'imagemill:nodes', ARGV[1], ARGV[3])
return false
"""
FORGET = """
-- ARGV: node, process, lanes ...
local raw = redis.call('HGET', 'imagemill:nodes', ARGV[1])
if raw and (cjson.decode(raw).process or '') == ARGV[2] then
  redis.call('HDEL', 'imagemill:nodes', ARGV[1])
  redis.call('HDEL', 'imagemill:node-children', ARGV[1])
  for i = 3, #ARGV do
    redis.call('ZREM', 'imagemill:nodes:' .. ARGV[i], ARGV[1])
  end
end
"""


@dataclass(frozen=True)
class Holder:
    """The latest report under a name, and for how many seconds nothing came after it."""

    node: Node
    silent: float


T = TypeVar("T")
log = logging.getLogger(__name__)


def _figure(raw: bytes) -> float:
    figure = float(raw)
    if not 0 <= figure < math.inf:
        raise ValueError(f"not a rate: {figure}")
    return figure


def _memory(raw: bytes) -> tuple[float, int]:
    share, flagged = raw.split()
    return _figure(share), int(flagged)


class Fleet(Connected):
    """Reads and writes the state of nodes."""

    @classmethod
    def of(cls, settings: Settings) -> Fleet:
        """The fleet at the settings' Redis."""
        return cls(settings.redis_url.get_secret_value())

    def claim_name(self, node: Node, dead: Node | None = None) -> Holder | None:
        """Report a node for the first time, unless another process has reported under its name: then return who did.

        `dead` is a report that may be replaced, because its process has ended.
        """
        replace = (dead.process, repr(dead.seen)) if dead else ()
        return self._report(node, now_ms(self._redis), FORGET_SECONDS, *replace)

    def report_node(self, node: Node) -> bool:
        """Report that a node is alive, and its state; False, and no change, if its name has passed to another live node."""
        now = now_ms(self._redis)
        if self._report(node, now, NODE_SECONDS):
            return False
        if node.ready:
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.hset("imagemill:node-children", node.node, node.children)
                for lane in node.lanes:
                    pipe.zadd(f"imagemill:nodes:{lane}", {node.node: now})
                pipe.execute()
        return True

    def _report(self, node: Node, now: int, *more: object) -> Holder | None:
        report = node.model_copy(update={"seen": now / 1000}).model_dump_json()
        held = self._redis.eval(REPORT, 0, node.node, node.process, report, *more)
        return Holder(Node.model_validate_json(held[0]), float(held[1])) if held else None

    def forget_node(self, node: Node) -> None:
        """Remove a node that is stopping; not another that has its name."""
        self._redis.eval(FORGET, 0, node.node, node.process, *node.lanes)

    def nodes(self) -> list[Node]:
        """The live nodes, sorted by name; forgets nodes that have been silent for an hour."""
        now = now_ms(self._redis) / 1000
        found = self._readable("imagemill:nodes", Node.model_validate_json)
        known = [node for name, node in found.items() if node.node == name]
        for node in known:
            if now - node.seen > FORGET_SECONDS:
                self.forget_node(node)
        return sorted((node for node in known if now - node.seen < NODE_SECONDS), key=lambda node: node.node)

    def rates(self, lane: str) -> dict[str, float]:
        """Images per second of each child that has computed images in this lane, by NODE/NUMBER."""
        return self._readable(f"imagemill:rates:{lane}", _figure)

    def report_memory(self, node: str, share: float, flagged: int) -> None:
        """Report a node's peak share of GPU memory and its number of batches above 90 %, since it loaded its engines."""
        self._redis.hset("imagemill:memory", node, f"{share:.3f} {flagged}")
        self._redis.expire("imagemill:memory", MEMORY_SECONDS)

    def memory(self) -> dict[str, tuple[float, int]]:
        """The latest (peak share, batches above 90 %) by node; kept for an hour after the latest report."""
        return self._readable("imagemill:memory", _memory)

    def _readable(self, name: str, parse: Callable[[bytes], T]) -> dict[str, T]:
        """The fields of a hash, parsed. What can't be is set aside, unless a newer version has written it."""
        found: dict[str, T] = {}
        for field, raw in self._fields(name).items():
            try:
                found[field.decode()] = parse(raw)
            except ValueError as error:
                if version_of(raw) > VERSION:
                    fields = {"action": "read", "where": name, "version": version_of(raw)}
                    log.warning("entry of a newer version left alone", extra=fields)
                    continue
                take_out(self._redis, name, field, raw, reason_of(error))
        return found

    def _fields(self, name: str) -> dict[bytes, bytes]:
        """The fields of a hash; none if the key is of another type, which a node will set aside."""
        try:
            return dict(self._redis.hgetall(name))
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            log.warning("key of another type", extra={"action": "read", "where": name})
            return {}

    def answer_canary(self, token: str) -> None:
        """Report that a child process has run the canary task with this token."""
        self._redis.lpush(f"imagemill:canary:{token}", 1)
        self._redis.expire(f"imagemill:canary:{token}", CANARY_SECONDS)

    def await_canary(self, token: str, seconds: float) -> bool:
        """Whether the canary task with this token runs within `seconds`."""
        with connect(self._url, socket_timeout=seconds + 5) as waiting:
            return waiting.blpop([f"imagemill:canary:{token}"], timeout=seconds) is not None
