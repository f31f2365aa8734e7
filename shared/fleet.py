"""What is known of the nodes: who is there, how fast they are, and whether a child answers.

Keys, all below `imagemill:`:

    nodes            hash  node -> its last report
    rates            hash  queue|node -> images per second
    memory           hash  node -> highest share of its GPU's memory that was in use, and how often it was above 90 %
    canary:{token}   list  one entry when the canary task has run
"""

from __future__ import annotations

import redis

from imagemill.shared.connection import connect, now_ms, reachable
from imagemill.shared.messages import Node
from imagemill.shared.settings import Settings

NODE_SECONDS = 20
"""A node that has not reported itself for this long is taken for dead."""
FORGET_SECONDS = 3600
RATE_SECONDS = 3600
CANARY_SECONDS = 600


class Fleet:
    """Thread-safe; make one per process, after the fork. Every method raises BrokerUnavailable when Redis can't be reached."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._redis = connect(url)

    @classmethod
    def of(cls, settings: Settings) -> Fleet:
        """The fleet that `settings` name."""
        return cls(settings.redis_url.get_secret_value())

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    @reachable()
    def report_node(self, node: Node) -> None:
        """A node says that it is there."""
        stamped = node.model_copy(update={"seen": now_ms(self._redis) / 1000})
        self._redis.hset("imagemill:nodes", node.node, stamped.model_dump_json())

    @reachable()
    def forget_node(self, node: str) -> None:
        """A node says that it stops."""
        self._redis.hdel("imagemill:nodes", node)

    @reachable()
    def nodes(self) -> list[Node]:
        """The nodes that are alive, by name; those that have been silent for an hour are forgotten."""
        now = now_ms(self._redis) / 1000
        known = [Node.model_validate_json(raw) for raw in self._redis.hvals("imagemill:nodes")]
        for node in known:
            if now - node.seen > FORGET_SECONDS:
                self._redis.hdel("imagemill:nodes", node.node)
        return sorted((node for node in known if now - node.seen < NODE_SECONDS), key=lambda node: node.node)

    @reachable()
    def report_rate(self, queue: str, node: str, images_per_second: float) -> None:
        """How fast a node works through a queue's images; remembered for an hour after the last report."""
        self._redis.hset("imagemill:rates", f"{queue}|{node}", f"{images_per_second:.4g}")
        self._redis.expire("imagemill:rates", RATE_SECONDS)

    @reachable()
    def rates(self, queue: str) -> list[float]:
        """Images per second of the nodes that have worked on a queue lately."""
        known = self._redis.hgetall("imagemill:rates")
        return [float(rate) for field, rate in known.items() if field.decode().split("|")[0] == queue]

    @reachable()
    def report_memory(self, node: str, share: float, flagged: int) -> None:
        """How full a node's GPU was at most, and how many batches took it above 90 %, since its engines were loaded."""
        self._redis.hset("imagemill:memory", node, f"{share:.3f} {flagged}")
        self._redis.expire("imagemill:memory", RATE_SECONDS)

    @reachable()
    def memory(self) -> dict[str, tuple[float, int]]:
        """Per node that has worked lately what it reported: share and count."""
        told = {node.decode(): raw.split() for node, raw in self._redis.hgetall("imagemill:memory").items()}
        return {node: (float(share), int(flagged)) for node, (share, flagged) in told.items()}

    @reachable()
    def answer_canary(self, token: str) -> None:
        """A child says that it has run the canary task with this token."""
        self._redis.lpush(f"imagemill:canary:{token}", 1)
        self._redis.expire(f"imagemill:canary:{token}", CANARY_SECONDS)

    @reachable()
    def await_canary(self, token: str, seconds: float) -> bool:
        """Whether that happens within `seconds`."""
        with redis.Redis.from_url(self._url, socket_timeout=seconds + 5) as waiting:
            return waiting.blpop([f"imagemill:canary:{token}"], timeout=seconds) is not None
