"""The connection to Redis of the ledger and the fleet."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from imagemill.shared.errors import BrokerUnavailable, sentence


def connect(url: str) -> Any:
    """A thread-safe client with timeouts, which connects on the first command. Create one per process, after the fork."""
    return redis.Redis.from_url(
        url, decode_responses=False, socket_timeout=10, socket_connect_timeout=5, health_check_interval=25
    )


class Connected:
    """A connection to Redis. Thread-safe; create one per process, after the fork.

    Every public method of a subclass raises BrokerUnavailable when Redis is unreachable or refuses a command.
    """

    def __init_subclass__(cls) -> None:
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and not name.startswith("_"):
                setattr(cls, name, reachable()(method))

    def __init__(self, url: str) -> None:
        self._url, self._redis = url, connect(url)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


def longest_wait(client: Any) -> float:
    """Seconds that a command may block; the client drops a connection that stays silent for twice as long."""
    return float(client.connection_pool.connection_kwargs["socket_timeout"]) / 2


@contextmanager
def reachable() -> Iterator[None]:
    """Turns redis-py's errors into BrokerUnavailable."""
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnavailable(f"Redis: {sentence(error)}") from error


def now_ms(client: Any) -> int:
    """Milliseconds since the epoch by Redis' clock, which all hosts share."""
    seconds, micros = client.time()
    return int(seconds * 1000 + micros // 1000)
