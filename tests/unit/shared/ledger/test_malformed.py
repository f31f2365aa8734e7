"""Malformed leases and alarms are set aside, and work goes on."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.shared.ledger.leasing import Request, Share
from imagemill.shared.messages import Item, ItemResult, Job, Output
from tests.ledgers import Ledger

pytestmark = pytest.mark.integration

LANE = "stylize.opencv"


@pytest.mark.parametrize("member", ["", "text", "job:", "job:x", b"\xff\x00", "begin", "1 2"])
def test_job_is_done_despite_malformed_leases_and_alarms(ledger: Ledger, raw: Any, member: str | bytes) -> None:
    raw.zadd("imagemill:leased", {member: 1})
    raw.zadd("imagemill:alarms", {member: 1})
    ledger.open_job("j", Job(operation="stylize", output=Output(url="s3://results/out")))
    ledger.add_packs("j", [(0, [Item(index=0, source="https://example.com/a.jpg")])])
    ledger.seal("j", size=1, total=1, duplicates={})
    ledger.bury("w/0/1")
    assert ledger.tend()[0] == []
    share = ledger.take(Request("w/0/1", [LANE], {LANE: 1}))
    assert isinstance(share, Share)
    assert ledger.renew("w/0/1", [LANE], [share]).verdicts == ["ok"]
    assert ledger.record("j", ItemResult(index=0, state="done"))
    assert ledger.status("j").state == "finishing"
    assert raw.llen("imagemill:dead") == 2
    assert raw.zscore("imagemill:alarms", member) is None
