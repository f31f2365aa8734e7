"""The connection to Redis: timeouts, and errors without passwords."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.connection import connect, longest_wait, now_ms, reachable
from imagemill.shared.errors import BrokerUnavailable


@pytest.mark.integration
def test_refused_commands_raise_broker_unavailable(own_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(own_redis.url) as admin:
        admin.config_set("requirepass", "correct")
    wrong: Any
    for url in (own_redis.url, own_redis.url.replace("redis://", "redis://:mistaken@")):
        with (
            connect(url) as wrong,
            pytest.raises(BrokerUnavailable, match=r"^Redis: .*(?i:auth|password)") as caught,
            reachable(),
        ):
            wrong.ping()
        assert "mistaken" not in str(caught.value)
    with connect(own_redis.url.replace("redis://", "redis://:correct@")) as client, reachable():
        client.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match="memory"), reachable():
            client.set("name", "value")


@pytest.mark.integration
def test_now_is_in_milliseconds_by_redis_clock(redis_server: EmbeddedRedis) -> None:
    with connect(redis_server.url) as client:
        before, _ = client.time()
        assert before * 1000 <= now_ms(client) <= (client.time()[0] + 1) * 1000


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("Error 111 connecting to 10.0.0.1:6379. Connection refused.", "can't connect to 10.0.0.1:6379: connection refused"),
        (
            "Error -2 connecting to redis.example.com:6379. Name or service not known.",
            "can't connect to redis.example.com:6379: name or service not known",
        ),
        ("Timeout reading from socket", "Timeout reading from socket"),
    ],
)
def test_error_of_the_connection_is_a_plain_sentence(said: str, plain: str) -> None:
    with pytest.raises(BrokerUnavailable) as caught, reachable():
        raise redis.ConnectionError(said)
    assert caught.value.message == f"Redis: {plain}"


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), reachable():
        raise KeyError("not from Redis")


def test_every_command_has_a_timeout() -> None:
    client = connect("redis://127.0.0.1:1/0")
    options = client.connection_pool.connection_kwargs
    assert 0 < options["socket_connect_timeout"] <= options["socket_timeout"] <= 30
    assert 0 < longest_wait(client) < options["socket_timeout"]
