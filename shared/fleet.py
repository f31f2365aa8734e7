"""The worker nodes: which are alive, how fast they are, and whether their child processes respond.

Keys, all below `imagemill:`:

    nodes            hash  node -> its latest report
    rates            hash  queue|node -> images per second
    memory           hash  node -> peak share of GPU memory in use, and number of batches above 90 %
    canary:{token}   list  one entry once the canary task has run
"""

from __future__ import annotations

import redis

from imagemill.shared.connection import Connected, now_ms
from imagemill.shared.messages import Node
from imagemill.shared.settings import Settings

NODE_SECONDS = 20
"""A node counts as dead when its latest report is older."""
FORGET_SECONDS = 3600
RATE_SECONDS = 3600
CANARY_SECONDS = 600


class Fleet(Connected):
    """Reads and writes the state of nodes."""

    @classmethod
    def of(cls, settings: Settings) -> Fleet:
        """The fleet at the settings' Redis."""
        return cls(settings.redis_url.get_secret_value())

    def report_node(self, node: Node) -> None:
        """Report that a node is alive, and its state."""
        stamped = node.model_copy(update={"seen": now_ms(self._redis) / 1000})
        self._redis.hset("imagemill:nodes", node.node, stamped.model_dump_json())

    def forget_node(self, node: str) -> None:
        """Remove a node that is stopping."""
        self._redis.hdel("imagemill:nodes", node)

    def nodes(self) -> list[Node]:
        """The live nodes, sorted by name; forgets nodes that have been silent for an hour."""
        now = now_ms(self._redis) / 1000
        known = [Node.model_validate_json(raw) for raw in self._redis.hvals("imagemill:nodes")]
        for node in known:
            if now - node.seen > FORGET_SECONDS:
                self._redis.hdel("imagemill:nodes", node.node)
        return sorted((node for node in known if now - node.seen < NODE_SECONDS), key=lambda node: node.node)

    def report_rate(self, queue: str, node: str, images_per_second: float) -> None:
        """Report a node's speed on a queue; kept for an hour after the latest report."""
        self._redis.hset("imagemill:rates", f"{queue}|{node}", f"{images_per_second:.4g}")
        self._redis.expire("imagemill:rates", RATE_SECONDS)

    def rates(self, queue: str) -> list[float]:
        """Images per second of each node that has recently worked on a queue."""
        known = self._redis.hgetall("imagemill:rates")
        return [float(rate) for field, rate in known.items() if field.decode().split("|")[0] == queue]

    def report_memory(self, node: str, share: float, flagged: int) -> None:
        """Report a node's peak share of GPU memory and its number of batches above 90 %, since it loaded its engines."""
        self._redis.hset("imagemill:memory", node, f"{share:.3f} {flagged}")
        self._redis.expire("imagemill:memory", RATE_SECONDS)

    def memory(self) -> dict[str, tuple[float, int]]:
        """The latest (peak share, batches above 90 %) by node; kept for an hour after the latest report."""
        reports = {node.decode(): raw.split() for node, raw in self._redis.hgetall("imagemill:memory").items()}
        return {node: (float(share), int(flagged)) for node, (share, flagged) in reports.items()}

    def answer_canary(self, token: str) -> None:
        """Report that a child process has run the canary task with this token."""
        self._redis.lpush(f"imagemill:canary:{token}", 1)
        self._redis.expire(f"imagemill:canary:{token}", CANARY_SECONDS)

    def await_canary(self, token: str, seconds: float) -> bool:
        """Whether the canary task with this token runs within `seconds`."""
        with redis.Redis.from_url(self._url, socket_timeout=seconds + 5) as waiting:
            return waiting.blpop([f"imagemill:canary:{token}"], timeout=seconds) is not None
