"""Signatures are those of botocore."""

from __future__ import annotations

from datetime import datetime
from urllib.parse import quote, urlsplit

import pytest
from botocore import auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from imagemill.worker.transfer.s3_requests import PLAIN
from imagemill.worker.transfer.s3_signature import Signer

URLS = (
    "http://127.0.0.1:9000/results/",
    "https://results.s3.eu-north-1.amazonaws.com/",
    "https://S3.example.com:443/results/",
    "http://s3.example.com:80/results/",
    "https://[2001:db8::1]:9000/results/",
)
HEADERS: tuple[dict[str, str], ...] = (
    {},
    {"Content-Type": "image/png", "Content-MD5": "eIBaIhqYjnnvP0LXxb/UGA=="},
    {"Content-Type": "image/png", "x-amz-copy-source": "other/%C3%BC.png", "x-amz-copy-source-if-match": '"0f"'},
)


def by_botocore(method: str, url: str, headers: dict[str, str], body: bytes, keys: ReadOnlyCredentials, now: datetime) -> str:
    request = AWSRequest(method, url, headers, body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "get_current_datetime", lambda: now)
        auth.S3SigV4Auth(keys, "s3", "eu-north-1").add_auth(request)
    return str(request.headers["Authorization"])


@given(
    url=st.sampled_from(URLS),
    key=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    headers=st.sampled_from(HEADERS),
    body=st.binary(max_size=20),
    token=st.sampled_from([None, "for an hour"]),
    days=st.lists(st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1)), min_size=1, max_size=3),
)
def test_signatures_are_those_of_botocore(
    url: str, key: str, headers: dict[str, str], body: bytes, token: str | None, days: list[datetime]
) -> None:
    keys = ReadOnlyCredentials("AKIDEXAMPLE", "hush", token)
    signer, full = Signer(url, keys, region="eu-north-1", service="s3"), url + quote(key, PLAIN)
    for now in days:  # the key of a day is not that of the next
        method = "PUT" if body else "GET"
        signed = signer.headers(method, urlsplit(full).path, headers, body, now)
        assert signed["Authorization"] == by_botocore(method, full, dict(headers), body, keys, now)
