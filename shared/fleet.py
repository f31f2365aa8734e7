"""The worker nodes: which are alive, how fast they are, and whether their child processes respond.

Keys, all below `imagemill:`:

    nodes            hash  node -> its latest report; the first one claims the name
    nodes:{lane}     zset  node -> its latest report
    node-children    hash  node -> its number of children
    rates:{lane}     hash  child, as NODE/NUMBER -> images per second; the ledger forgets those of dead nodes
    memory           hash  node -> peak share of GPU memory in use, and number of batches above 90 %
    gpus             hash  host and process of a supervisor -> the GPUs that it sees
    node-queues      hash  node -> when it was last there, of each node that has a queue
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
from imagemill.shared.messages import HostGpus, Node
from imagemill.shared.settings import Settings

NODE_SECONDS = 20
"""A node counts as dead when its latest report is older."""
GONE_SECONDS = 150
"""How long to show a node that a problem has ended: longer than the pause before its restart and the restart itself."""
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
  if process ~= ARGV[2] and not other.gone and silent < tonumber(ARGV[4]) and not replace then
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
SWEEP = """
-- ARGV: seconds after which the queues of a node that is gone are deleted: of its own, and its place in Celery's tables
local BINDINGS, PERMANENT, REMOTE = '_kombu.binding.imagemill.default', '_kombu.binding_permanent.imagemill.default',
  '_kombu.binding.celery.pidbox'
for _, name in ipairs({BINDINGS, PERMANENT, REMOTE}) do
  local kind = redis.call('TYPE', name).ok
  if kind ~= 'set' and kind ~= 'none' then return 0 end
end
local now, swept = tonumber(redis.call('TIME')[1]), 0
for _, member in ipairs(redis.call('SMEMBERS', BINDINGS)) do
  local queue = string.match(member, '[^\\6\\22]*$')
  local node = string.match(queue, '^imagemill%-node%.(.+)$')
  if node then
    local there = redis.call('HEXISTS', 'imagemill:nodes', node) == 1
    if there then redis.call('HSET', 'imagemill:node-queues', node, now) end
    local seen = tonumber(redis.call('HGET', 'imagemill:node-queues', node) or nil)
    if not seen then redis.call('HSET', 'imagemill:node-queues', node, now) end
    if seen and now - seen > tonumber(ARGV[1]) then
      redis.call('DEL', queue)
      redis.call('SREM', BINDINGS, member)
      redis.call('SREM', PERMANENT, member)
      redis.call('SREM', REMOTE, '\\6\\22\\6\\22' .. node .. '.celery.pidbox')
      redis.call('HDEL', 'imagemill:node-queues', node)
      swept = swept + 1
    end
  end
end
redis.call('EXPIRE', 'imagemill:node-queues', 2 * ARGV[1]) -- each minute, while there are nodes
return swept
"""


@dataclass(frozen=True)
class Holder:
    """The latest report under a name, and the seconds since then."""

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

    def sweep(self) -> int:
        """Delete the queues of nodes that have been gone for an hour; returns their number. They hold only wake-ups."""
        self.nodes()  # forgets those that have been silent for long
        return int(self._redis.eval(SWEEP, 0, FORGET_SECONDS))

    def nodes(self) -> list[Node]:
        """The live nodes, sorted by name; forgets nodes that have been silent for an hour."""
        now = now_ms(self._redis) / 1000
        found = self._readable("imagemill:nodes", Node.model_validate_json)
        known = [node for name, node in found.items() if node.node == name]
        for node in known:
            if now - node.seen > FORGET_SECONDS:
                self.forget_node(node)
        live = (node for node in known if now - node.seen < (GONE_SECONDS if node.gone else NODE_SECONDS))
        return sorted(live, key=lambda node: node.node)

    def silent(self) -> list[Node]:
        """Nodes without a report for a while; most of them have ended."""
        now = now_ms(self._redis) / 1000
        found = self._readable("imagemill:nodes", Node.model_validate_json).values()
        return [node for node in found if now - node.seen >= NODE_SECONDS and not node.gone]

    def report_gpus(self, report: HostGpus, process: str) -> None:
        """Report the GPUs that a supervisor sees; `process` distinguishes it from others on its host."""
        report = report.model_copy(update={"seen": now_ms(self._redis) / 1000})
        self._redis.hset("imagemill:gpus", f"{report.host}/{process}", report.model_dump_json())
        self._redis.expire("imagemill:gpus", FORGET_SECONDS)

    def forget_gpus(self, host: str, process: str) -> None:
        """Remove the report of a supervisor that is stopping."""
        self._redis.hdel("imagemill:gpus", f"{host}/{process}")

    def gpus(self) -> dict[str, tuple[int | None, int]]:
        """By host, the number of GPUs expected (None: not set) and present, as nodes and supervisors report.

        If each of a host's containers sees one GPU, UUIDs tell the GPUs apart.
        """
        now = now_ms(self._redis) / 1000
        nodes, supervisors = self.nodes(), self._readable("imagemill:gpus", HostGpus.model_validate_json)
        seen: list[tuple[str, int | None, tuple[str, ...]]]
        seen = [(n.host, n.expected_gpus, () if n.gone else (n.gpu,)) for n in nodes if n.gpu]
        for field, report in supervisors.items():
            if now - report.seen < NODE_SECONDS:
                seen.append((report.host, report.expected, report.present))
            elif now - report.seen < FORGET_SECONDS:  # killed: what it expected still counts
                seen.append((report.host, report.expected, ()))
            else:
                self._redis.hdel("imagemill:gpus", field)
        found: dict[str, tuple[int | None, set[str]]] = {}
        for host, expected, present in seen:
            most, gpus = found.get(host, (None, set()))
            known = [number for number in (most, expected) if number is not None]
            found[host] = max(known, default=None), gpus.union(present)
        return {host: (expected, len(gpus)) for host, (expected, gpus) in sorted(found.items())}

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
        with connect(self._url, socket_timeout=seconds + 1) as waiting:
            return waiting.blpop([f"imagemill:canary:{token}"], timeout=seconds) is not None
