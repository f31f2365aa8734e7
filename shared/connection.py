"""The connection to Redis of the ledger and the fleet."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from imagemill.shared.errors import BrokerUnavailable, sentence
from imagemill.shared.redis_url import RedisUrl

REASONS = {
    "hostname mismatch": "its certificate does not match the host name in the URL",
    "ip address mismatch": "its certificate does not match the address in the URL",
    "certificate has expired": "its certificate has expired, or this host's clock is wrong",
    "certificate is not yet valid": "its certificate is not valid yet, or this host's clock is wrong",
    "certificate verify failed": "its certificate is from a CA that this host doesn't know; set ssl_ca_certs in the URL",
    "alert certificate required": "it asks for a client certificate; name yours with ssl_certfile and ssl_keyfile in the URL",
    "alert handshake failure": "it asks for a client certificate; name yours with ssl_certfile and ssl_keyfile in the URL",
    "alert unknown ca": "it refuses the client certificate: it doesn't know the CA that signed it",
    "alert certificate": "it refuses the client certificate",
    "alert bad certificate": "it refuses the client certificate",
    "eof occurred in violation": "it closed the connection: it wants a client certificate, or refuses this one",
    "wrong version number": "it does not use TLS on this port; the URL should begin with redis, not rediss",
}
"""What OpenSSL's messages (in lower case) mean; the first match counts."""

CONNECTING = re.compile(r"^Error (?:-?\d+ )?connecting to (\S+)\. (.)(.*?)\.?$")
"""redis-py's message when it can't connect: host and port, and the reason of the operating system."""


def connect(url: str, **changes: Any) -> Any:
    """A thread-safe client with timeouts, which connects on the first command. Create one per process, after the fork.

    `changes` are options of redis-py that replace ours. With Sentinels, each connection is to the Redis that they name at
    that moment. Raises ConfigurationError if the URL names a file for TLS that can't be used.
    """
    where = RedisUrl.parse(url)
    ours = dict(decode_responses=False, socket_timeout=10, socket_connect_timeout=5, health_check_interval=25)
    options: dict[str, Any] = {**ours, **where.tls, **changes}
    if where.primary is None:
        return redis.Redis.from_url(where.plain, **options)
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
        where.hosts,
        sentinel_kwargs=sentinel_options(where),
        username=where.username or None,
        password=where.password or None,
        db=where.database,
        ssl=where.encrypted,
        **options,
    )
    return sentinel.master_for(where.primary)


def sentinel_options(where: RedisUrl) -> dict[str, Any]:
    """Options of connections to Sentinels. One that does not respond costs 2 s, then the next is asked."""
    tls = {"ssl": True, **where.tls} if where.encrypted else {}
    once = Retry(NoBackoff(), 0)  # by default redis-py asks a Sentinel that is down ten times more
    return {"socket_timeout": 2.0, "socket_connect_timeout": 2.0, "retry": once, **where.sentinel_login, **tls}


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
        raise BrokerUnavailable(f"Redis: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """What redis-py's error means, in plain words as far as we know them; without passwords."""
    text = str(error).lower()
    reason = next((reason for words, reason in REASONS.items() if words in text), None)
    if isinstance(error, MasterNotFoundError):
        name = str(error).partition(" : ")[0].removeprefix("No master found for ")
        return f"no Sentinel {'can be asked: ' + reason if reason else f'knows where the primary {name} is'}"
    said = CONNECTING.sub(lambda match: f"can't connect to {match[1]}: {match[2].lower()}{match[3]}", sentence(error))
    return f"{reason} ({said})" if reason else said


def now_ms(client: Any) -> int:
    """Milliseconds since the epoch by Redis' clock, which all hosts share."""
    seconds, micros = client.time()
    return int(seconds * 1000 + micros // 1000)
