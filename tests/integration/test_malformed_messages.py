"""Garbage in a node's queues: it is set aside with a reason, and the node goes on."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.dead import DEAD, DeadLetters
from imagemill.shared.queues import node_queue
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import run, spec
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

QUEUE = "imagemill.stylize.opencv"
BODY = base64.b64encode(json.dumps([[], {"version": 2, "lane": "stylize.opencv"}, {}]).encode()).decode()
GOOD: dict[str, Any] = {
    "body": BODY,
    "content-type": "application/json",
    "content-encoding": "utf-8",
    "headers": {"lang": "py", "task": "imagemill.stylize", "id": "a1"},
    "properties": {
        "delivery_tag": "t1",
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
        "body_encoding": "base64",
        "correlation_id": "a1",
    },
}
WRONG: tuple[Any, ...] = (None, 7, "text", [], {}, [[]], True)
PATHS = (
    *(("headers",), ("headers", "id"), ("headers", "task"), ("headers", "eta"), ("headers", "expires")),
    *(("headers", "timelimit"), ("headers", "retries"), ("headers", "compression"), ("headers", "stamps")),
    *(("properties",), ("properties", "delivery_tag"), ("properties", "delivery_info"), ("properties", "body_encoding")),
    *(("properties", "delivery_info", "routing_key"), ("body",), ("content-type",), ("content-encoding",)),
)
BODIES = (b"null", b'"text"', b"[]", b"[[], [], {}]", b"[[], {}]", b"[1, 2, 3]", b"{", b"\xff\xfe", b"[" * 5000)


def changed(path: tuple[str, ...], value: Any) -> bytes:
    message = copy.deepcopy(GOOD)
    part = message
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return json.dumps(message).encode()


def garbage() -> Iterator[bytes]:
    """Messages of every shape that isn't ours."""
    yield from (b"null", b'"text"', b"[]", b"[1]", b"7", b"{}", b"", b"not JSON", b"\xff\x00\xfe", b"[" * 50_000, b"9" * 10_000)
    yield b'{"body": NaN}'
    yield from (changed(path, value) for path in PATHS for value in WRONG)
    yield from (changed(("body",), base64.b64encode(body).decode()) for body in BODIES)
    yield changed(("body",), "x" * 200_000)
    yield changed(("headers", "task"), "celery.chord_unlock")
    yield changed(("headers", "task"), "imagemill.unknown")


def test_node_survives_messages_of_every_shape(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    images.routes["/a.png"] = photo(1)
    environment = environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__OPERATIONS='["stylize"]')
    letters = DeadLetters(own_redis.url)
    with (
        redis.Redis.from_url(own_redis.url) as raw,
        client_for(own_redis.url) as client,
        WorkerProcess(environment, tmp_path, name="cpu") as node,
    ):
        raw.lpush(QUEUE, *garbage())
        node.wait_ready()
        (name,) = (report.node for report in client.nodes())
        own = node_queue(name)
        raw.lpush(own, b"null", b"\xff", changed(("headers", "id"), []))
        wait_until(lambda: not raw.exists(QUEUE, own), "everything is taken out of the queues")
        raw.hset("unacked", mapping={"bad": b"null", "worse": b"\xff"})
        raw.zadd("unacked_index", {"bad": 1, "worse": 2})
        raw.publish("/0.celery.pidbox", b"null")
        raw.publish("/0.celery.pidbox", b"\xff")
        (row,) = run(client, [images.url("/a.png")], spec("stylize", tmp_path))
        wait_until(lambda: not raw.hexists("unacked", "bad") and not raw.hexists("unacked", "worse"), "unacked is cleaned up")
        assert node.process.poll() is None
        assert row.state == "done"
        found = letters.entries()
        assert {letter.where for letter in found} == {QUEUE, own, "unacked"}
        assert "headers.id" in " ".join(letter.reason for letter in found)
        assert 0 < raw.ttl(DEAD) <= 7 * 86_400
        assert node.stop() == 0
    letters.close()
