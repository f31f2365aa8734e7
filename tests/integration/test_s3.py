"""S3 for real: buckets, links, listings, expiry, and results as the worker stores them."""

from __future__ import annotations

import hashlib
import itertools
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.s3_results import expire
from imagemill.shared.errors import ConfigurationError, InvalidSource, ServiceUnavailable, StorageRefused, StorageUnavailable
from imagemill.shared.s3 import ensure_bucket, expire_after, list_images, make_client, make_signer, presign
from imagemill.shared.settings import FileSettings, S3Settings
from imagemill.worker.transfer.store import Store, open_store
from tests.services import S3Server, changed_environment

pytestmark = pytest.mark.integration

NAMES = (f"bucket-{n}" for n in itertools.count())


@pytest.fixture
def settings(s3_server: S3Server) -> Iterator[S3Settings]:
    with changed_environment(s3_server.environment):
        yield S3Settings(endpoint_url=s3_server.endpoint_url)


@pytest.fixture
def client(settings: S3Settings) -> Any:
    return make_client(settings)


@pytest.fixture
def bucket(client: Any) -> str:
    name = next(NAMES)
    client.create_bucket(Bucket=name)
    return name


def store_at(url: str, settings: S3Settings) -> Store:
    return open_store(url, s3=lambda: make_client(settings), files=FileSettings(), s3_settings=settings)


def get(link: str) -> tuple[int, bytes]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(link, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


# --- results ----------------------------------------------------------------------------------


def test_a_result_has_its_type_and_arrived_undamaged(settings: S3Settings, client: Any, bucket: str) -> None:
    store = store_at(f"s3://{bucket}/jobs/a/", settings)
    store.check()
    assert store.put("x/ü ?#.webp", b"image", "image/webp") == f"s3://{bucket}/jobs/a/x/ü ?#.webp"
    head = client.head_object(Bucket=bucket, Key="jobs/a/x/ü ?#.webp")
    assert (head["ContentType"], head["ContentLength"]) == ("image/webp", 5)
    assert head["ETag"].strip('"') == hashlib.md5(b"image", usedforsecurity=False).hexdigest()
    store.put("x/ü ?#.webp", b"again", "image/webp")
    assert client.get_object(Bucket=bucket, Key="jobs/a/x/ü ?#.webp")["Body"].read() == b"again"


def test_the_server_checks_what_it_gets(settings: S3Settings, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagemill.worker.transfer.store.base64.b64encode", lambda _: b"1B2M2Y8AsgTpgAmY7PhCfg==")  # of nothing
    with pytest.raises(StorageUnavailable, match="BadDigest"):
        store_at(f"s3://{bucket}/jobs", settings).put("a.png", b"damaged on its way", "image/png")


def test_a_file_is_stored_like_bytes_also_without_a_prefix(
    settings: S3Settings, client: Any, bucket: str, tmp_path: Path
) -> None:
    source = tmp_path / "manifest"
    source.write_bytes(b'{"index": 0}\n' * 100_000)
    told = store_at(f"s3://{bucket}", settings).put_file("j/manifest.jsonl", source, "application/x-ndjson")
    assert told == f"s3://{bucket}/j/manifest.jsonl"
    found = client.get_object(Bucket=bucket, Key="j/manifest.jsonl")
    assert (found["ContentType"], found["Body"].read()) == ("application/x-ndjson", source.read_bytes())


def test_any_number_of_threads_may_store(settings: S3Settings, client: Any, bucket: str) -> None:
    store = store_at(f"s3://{bucket}/jobs", settings)
    threads = [threading.Thread(target=store.put, args=(f"{n}.png", bytes([n]) * 1000, "image/png")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [client.get_object(Bucket=bucket, Key=f"jobs/{n}.png")["Body"].read() for n in range(12)]
    assert found == [bytes([n]) * 1000 for n in range(12)]


def test_a_missing_bucket_is_refused_before_and_while_storing(settings: S3Settings) -> None:
    store = store_at("s3://never-made/jobs", settings)
    for _ in range(2):
        with pytest.raises(StorageRefused, match=r"there is no bucket 'never-made'.*IMAGEMILL_S3__CREATE_BUCKET"):
            store.check()
    with pytest.raises(StorageRefused, match="there is no such bucket"):
        store.put("a.png", b"image", "image/png")


def test_a_missing_bucket_is_made_where_that_is_allowed(settings: S3Settings) -> None:
    name = next(NAMES)
    allowed = settings.model_copy(update={"create_bucket": True})
    for _ in range(2):  # the second finds it
        store = store_at(f"s3://{name}/jobs", allowed)
        store.check()
        store.put("a.png", b"image", "image/png")
    assert list(list_images(make_client(settings), f"s3://{name}")) == [f"s3://{name}/jobs/a.png"]


def test_workers_that_make_a_bucket_at_once_all_go_on(settings: S3Settings) -> None:
    name, errors = next(NAMES), []

    def make() -> None:
        try:
            ensure_bucket(make_client(settings), name, create=True, region=settings.region)
        except Exception as error:  # noqa: BLE001  # told below
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_wrong_keys_are_refused_and_not_told(settings: S3Settings, bucket: str, s3_server: S3Server) -> None:
    with changed_environment({"AWS_SECRET_ACCESS_KEY": "mistaken"}):
        store = store_at(f"s3://{bucket}/jobs", settings)
        with pytest.raises(StorageRefused, match="refuses access") as caught:
            store.put("a.png", b"image", "image/png")
        with pytest.raises(InvalidSource, match="refuses access"):
            list(list_images(make_client(settings), f"s3://{bucket}/"))
    assert "mistaken" not in caught.value.message
    assert s3_server.access_key not in caught.value.message


@pytest.mark.timeout(60)
def test_a_server_that_is_not_there_may_come_back(settings: S3Settings) -> None:
    gone = settings.model_copy(update={"endpoint_url": "http://127.0.0.1:1"})
    store = store_at("s3://results/jobs", gone)
    store.check()  # says nothing: it may be back when the first result is ready
    with pytest.raises(StorageUnavailable, match="no connection"):
        store.put("a.png", b"image", "image/png")
    with pytest.raises(ServiceUnavailable):
        list(list_images(make_client(gone), "s3://results/jobs"))


# --- links ------------------------------------------------------------------------------------


def test_a_link_lets_anyone_read_its_object_and_nothing_else(settings: S3Settings, client: Any, bucket: str) -> None:
    for key in ("jobs/ü a+b?.png", "jobs/other.png"):
        client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    link = presign(make_signer(settings), f"s3://{bucket}/jobs/ü a+b?.png", 600)
    assert get(link) == (200, "jobs/ü a+b?.png".encode())
    for tampered in (
        link.replace("%C3%BC%20a%2Bb%3F.png", "other.png"),
        link.replace("X-Amz-Expires=600", "X-Amz-Expires=6000"),
        link[:-1] + ("0" if link[-1] != "0" else "1"),
        link.partition("?")[0],
    ):
        assert tampered != link
        assert get(tampered)[0] in (400, 403)


def test_a_link_to_what_is_missing_says_so(settings: S3Settings, bucket: str) -> None:
    assert get(presign(make_signer(settings), f"s3://{bucket}/none.png", 600))[0] == 404


# --- listing and expiry -----------------------------------------------------------------------


def test_listing_gives_the_images_below_a_prefix(client: Any, bucket: str) -> None:
    for key in ("in/b.png", "in/a.JPG", "in/deep/ü ?.webp", "in/notes.txt", "in/folder/", "other/c.png", "in.png"):
        client.put_object(Bucket=bucket, Key=key, Body=b"x")
    found = [url.removeprefix(f"s3://{bucket}/") for url in list_images(client, f"s3://{bucket}/in/")]
    assert found == ["in/a.JPG", "in/b.png", "in/deep/ü ?.webp"]
    assert list(list_images(client, f"s3://{bucket}/none")) == []
    with pytest.raises(InvalidSource, match="there is no such bucket"):
        list(list_images(client, "s3://never-made/in"))


def test_a_server_that_can_not_expire_says_so(settings: S3Settings, client: Any, bucket: str) -> None:
    with pytest.raises(StorageRefused, match="does not offer expiry"):
        expire_after(client, bucket, "jobs", 7)
    with pytest.raises(ConfigurationError, match="does not offer expiry"):
        expire(settings, f"s3://{bucket}/jobs", 7)
