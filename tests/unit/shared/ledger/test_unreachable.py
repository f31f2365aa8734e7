"""Every call reports an unreachable Redis, without its password."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.ledger.leasing import Lease
from tests.ledgers import Ledger
from tests.unit.shared.ledger.jobs import done, item, spec

LEASE = Lease("job-lost", 0, "t/1", 0, [])
CALLS: dict[str, Callable[[Ledger], Any]] = {
    "open_job": lambda ledger: ledger.open_job("job-lost", spec()),
    "add_chunks": lambda ledger: ledger.add_chunks("job-lost", [(0, [item(0)])]),
    "seal": lambda ledger: ledger.seal("job-lost", chunks=1, total=1, duplicates={0: 1}),
    "discard": lambda ledger: ledger.discard("job-lost"),
    "acquire": lambda ledger: ledger.acquire("job-lost", 0, task="t", token="t/1"),
    "renew": lambda ledger: ledger.renew(LEASE),
    "recorded": lambda ledger: ledger.recorded("job-lost", [0]),
    "record": lambda ledger: ledger.record("job-lost", done(0)),
    "complete": lambda ledger: ledger.complete(LEASE, manifest="s3://results/m"),
    "release": lambda ledger: ledger.release(LEASE),
    "count_attempt": lambda ledger: ledger.count_attempt("job-lost", 0),
    "forget_attempt": lambda ledger: ledger.forget_attempt("job-lost", 0),
    "attempts": lambda ledger: ledger.attempts("job-lost", [0]),
    "reap": lambda ledger: ledger.reap("cpu@a"),
    "spec": lambda ledger: ledger.spec("job-lost"),
    "status": lambda ledger: ledger.status("job-lost"),
    "jobs": lambda ledger: ledger.jobs(),
    "rows": lambda ledger: list(ledger.rows("job-lost")),
    "follow": lambda ledger: ledger.follow("job-lost"),
    "cancel": lambda ledger: ledger.cancel("job-lost"),
    "retry": lambda ledger: ledger.retry("job-lost"),
    "chunk": lambda ledger: ledger.chunk("job-lost", 0),
}


def test_every_public_method_is_covered() -> None:
    methods = {name for name, _ in inspect.getmembers(Ledger, inspect.isfunction) if not name.startswith("_")}
    assert set(CALLS) == methods - {"close"}


@pytest.mark.parametrize("name", CALLS)
def test_call_raises_broker_unavailable_without_redis(name: str) -> None:
    ledger = Ledger("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(BrokerUnavailable, match=r"^Redis: ") as caught:
        CALLS[name](ledger)
    assert "secret" not in caught.value.message
