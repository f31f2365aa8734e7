"""Every call reports an unreachable Redis, without its password."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.ledger.leasing import Record, Request, Share
from tests.ledgers import Ledger
from tests.unit.shared.ledger.jobs import CHILD, LANE, done, item, spec

SHARE = Share("job-lost", 1, frozenset({0}), [item(0)])
CALLS: dict[str, Callable[[Ledger], Any]] = {
    "open_job": lambda ledger: ledger.open_job("job-lost", spec()),
    "add_packs": lambda ledger: ledger.add_packs("job-lost", [(0, [item(0)])]),
    "seal": lambda ledger: ledger.seal("job-lost", size=1, total=1, duplicates={0: 1}),
    "discard": lambda ledger: ledger.discard("job-lost"),
    "take": lambda ledger: ledger.take(Request(CHILD, [LANE], {LANE: 1})),
    "renew": lambda ledger: ledger.renew(CHILD, [LANE], [SHARE]),
    "give_back": lambda ledger: ledger.give_back(SHARE, CHILD, returned=[0]),
    "record_all": lambda ledger: ledger.record_all([Record.of("job-lost", done(0))]),
    "record": lambda ledger: ledger.record("job-lost", done(0)),
    "end_job": lambda ledger: ledger.end_job("job-lost", "s3://results/m"),
    "report_rate": lambda ledger: ledger.report_rate(LANE, CHILD, 1.0),
    "set_weights": lambda ledger: ledger.set_weights({"ann": 2.0}),
    "tend": lambda ledger: ledger.tend(),
    "bury": lambda ledger: ledger.bury(CHILD),
    "lead": lambda ledger: ledger.lead("cpu@a", 5.0),
    "repair": lambda ledger: ledger.repair(),
    "relink": lambda ledger: ledger.relink(),
    "condemn": lambda ledger: ledger.condemn("job-lost", "damaged"),
    "end_wait": lambda ledger: ledger.end_wait("job-lost"),
    "report_wait": lambda ledger: ledger.report_wait("job-lost", "no connection"),
    "spec": lambda ledger: ledger.spec("job-lost"),
    "status": lambda ledger: ledger.status("job-lost"),
    "lineup": lambda ledger: ledger.lineup(LANE),
    "jobs": lambda ledger: ledger.jobs(),
    "load": lambda ledger: ledger.load(),
    "memory": lambda ledger: ledger.memory(),
    "rows": lambda ledger: list(ledger.rows("job-lost")),
    "follow": lambda ledger: ledger.follow("job-lost"),
    "cancel": lambda ledger: ledger.cancel("job-lost"),
    "pause": lambda ledger: ledger.pause("job-lost"),
    "resume": lambda ledger: ledger.resume("job-lost"),
    "prioritize": lambda ledger: ledger.prioritize("job-lost", "high"),
    "retry": lambda ledger: ledger.retry("job-lost"),
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
