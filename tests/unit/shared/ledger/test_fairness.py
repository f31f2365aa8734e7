"""Start-time fair queueing: how far apart two waiting owners can get."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.ledger.leasing import Share
from tests.ledgers import Ledger
from tests.unit.shared.ledger.jobs import ask, make_job

pytestmark = pytest.mark.integration

OWNERS = ("ann", "bob", "eve")
LEAST = 1e-9


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 5.0])] * 3),
    arrivals=st.tuples(*[st.integers(0, 12)] * 3),
    rooms=st.lists(st.integers(1, 32), min_size=15, max_size=40),
    jobs=st.integers(1, 2),
)
def test_waiting_owners_are_served_by_weight(
    redis_server: EmbeddedRedis, weights: tuple[float, ...], arrivals: tuple[int, ...], rooms: list[int], jobs: int
) -> None:
    """In any period in which two owners wait, what they get per weight differs by their largest shares at most."""
    raw: Any = redis.Redis.from_url(redis_server.url)
    raw.flushall()
    raw.close()
    ledger = Ledger(redis_server.url)
    weight = dict(zip(OWNERS, weights, strict=True))
    ledger.set_weights(weight)
    make_job(ledger, 32, owner="first")  # somebody is always there
    served: list[tuple[str | None, int]] = []
    for step, room in enumerate(rooms):
        for owner, arrival in zip(OWNERS, arrivals, strict=True):
            if arrival == step:
                for _ in range(jobs):
                    make_job(ledger, 32 * len(rooms), owner=owner)
        share = ask(ledger, room=room)
        if isinstance(share, Share):
            served.append((ledger.spec(share.job).policy.owner, len(share.items)))
        else:
            assert share == "none"
            assert step < min(arrivals)
            served.append((None, 0))
    ledger.close()
    largest = {owner: max((size for name, size in served if name == owner), default=0) / weight[owner] for owner in OWNERS}
    for one, other in (("ann", "bob"), ("ann", "eve"), ("bob", "eve")):
        begin = max(arrivals[OWNERS.index(one)], arrivals[OWNERS.index(other)])
        for first in range(begin, len(served)):
            ahead = 0.0
            for name, size in served[first:]:
                ahead += size / weight[one] if name == one else -size / weight[other] if name == other else 0.0
                assert abs(ahead) <= largest[one] + largest[other] + LEAST
