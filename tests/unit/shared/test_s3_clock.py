"""Requests and links signed on a host whose clock is wrong."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from botocore import auth, compat

from imagemill.shared import errors
from imagemill.shared.s3 import ensure_bucket, make_client, presign, storing
from imagemill.shared.s3_clock import _look_at_clock, _Shifted
from imagemill.shared.settings import S3Settings
from tests.services.s3 import S3Server, changed_environment

BUCKET = "clocks"


@pytest.fixture(params=[timedelta(hours=1), timedelta(hours=-1), timedelta(days=400)], ids=str)
def client(request: pytest.FixtureRequest, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client on a host whose clock is fast by this much."""
    right = compat.get_current_datetime

    def wrong(*arguments: Any, **more: Any) -> datetime:
        return right(*arguments, **more) + request.param

    monkeypatch.setattr(_Shifted, "skew", timedelta())
    with changed_environment(s3_server.environment):
        ensure_bucket(make_client(S3Settings(endpoint_url=s3_server.endpoint_url)), BUCKET, True, "us-east-1")
        for module in (compat, auth):
            monkeypatch.setattr(module, "get_current_datetime", wrong)
        yield make_client(S3Settings(endpoint_url=s3_server.endpoint_url))


@pytest.mark.integration
@pytest.mark.parametrize("first", ["get_object", "head_object"])
def test_requests_and_links_are_accepted(client: Any, first: str) -> None:
    with pytest.raises(client.exceptions.ClientError, match=r"NoSuchKey|404"):
        getattr(client, first)(Bucket=BUCKET, Key="missing")
    client.put_object(Bucket=BUCKET, Key="image", Body=b"stored")
    with urllib.request.urlopen(presign(client, f"s3://{BUCKET}/image", 60)) as reply:
        assert reply.read() == b"stored"


@pytest.mark.integration
def test_refusals_for_another_reason_change_nothing(client: Any, s3_server: S3Server) -> None:
    client.list_buckets()
    before = _Shifted.skew
    with changed_environment({"AWS_SECRET_ACCESS_KEY": "wrong"}):
        stranger = make_client(S3Settings(endpoint_url=s3_server.endpoint_url))
    with pytest.raises(errors.StorageRefused, match="refuses access"), storing("buckets"):
        stranger.list_buckets()
    assert _Shifted.skew == before != timedelta()


@pytest.mark.parametrize(
    "date",
    [
        "yesterday",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Fri, 31 Dec 99999 23:59:59 GMT",
        f"Fri, 31 Dec {'9' * 30} 23:59:59 GMT",
        "Mon, 01 Jan 1601 00:00:00 GMT",
        "Sun, 29 Nov 2026 07:00:00 -0000",
    ],
)
def test_dates_that_do_not_come_from_a_clock_are_ignored(date: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Shifted, "skew", timedelta())
    refusal = SimpleNamespace(headers={"date": date}), {"Error": {"Code": "RequestTimeTooSkewed"}}
    assert _look_at_clock(refusal) is None
    assert _Shifted.skew == timedelta()
