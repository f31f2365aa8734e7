"""Redis for the tests of this room, emptied before each, and both sides of its ledger and fleet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger


@pytest.fixture
def raw(redis_server: EmbeddedRedis) -> Iterator[Any]:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def producer(redis_server: EmbeddedRedis, raw: Any) -> Iterator[SubmitLedger]:
    with closing(SubmitLedger(redis_server.url)) as ledger:
        yield ledger


@pytest.fixture
def worker(redis_server: EmbeddedRedis, raw: Any) -> Iterator[WorkLedger]:
    with closing(WorkLedger(redis_server.url)) as ledger:
        yield ledger


@pytest.fixture
def fleet(redis_server: EmbeddedRedis, raw: Any) -> Iterator[Fleet]:
    with closing(Fleet(redis_server.url)) as fleet:
        yield fleet
