"""Requests and links signed on a host whose clock is wrong."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from botocore import auth, compat

from imagemill.shared import errors
from imagemill.shared.s3 import ensure_bucket, make_client, presign, storing
from imagemill.shared.s3_clock import _Shifted
from imagemill.shared.settings import S3Settings
from tests.services.s3 import S3Server, changed_environment

pytestmark = pytest.mark.integration

BUCKET = "clocks"


@pytest.fixture(params=[timedelta(hours=1), timedelta(hours=-1), timedelta(days=400)], ids=str)
def client(request: pytest.FixtureRequest, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client on a host whose clock is so much fast."""
    right = compat.get_current_datetime

    def wrong(*arguments: Any, **more: Any) -> datetime:
        return right(*arguments, **more) + request.param

    monkeypatch.setattr(_Shifted, "skew", timedelta())
    with changed_environment(s3_server.environment):
        ensure_bucket(make_client(S3Settings(endpoint_url=s3_server.endpoint_url)), BUCKET, True, "us-east-1")
        for module in (compat, auth):
            monkeypatch.setattr(module, "get_current_datetime", wrong)
        yield make_client(S3Settings(endpoint_url=s3_server.endpoint_url))


@pytest.mark.parametrize("first", ["get_object", "head_object"])
def test_requests_and_links_are_accepted(client: Any, first: str) -> None:
    with pytest.raises(client.exceptions.ClientError, match=r"NoSuchKey|404"):
        getattr(client, first)(Bucket=BUCKET, Key="missing")
    client.put_object(Bucket=BUCKET, Key="image", Body=b"stored")
    with urllib.request.urlopen(presign(client, f"s3://{BUCKET}/image", 60)) as reply:
        assert reply.read() == b"stored"


def test_refusals_for_another_reason_change_nothing(client: Any, s3_server: S3Server) -> None:
    client.list_buckets()
    before = _Shifted.skew
    with changed_environment({"AWS_SECRET_ACCESS_KEY": "wrong"}):
        stranger = make_client(S3Settings(endpoint_url=s3_server.endpoint_url))
    with pytest.raises(errors.StorageRefused, match="refuses access"), storing("buckets"):
        stranger.list_buckets()
    assert _Shifted.skew == before != timedelta()
