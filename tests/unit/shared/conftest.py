"""Both sides of the ledger and the fleet, on an emptied Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger


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
