"""The S3 code against a real server: storing results, buckets, links, listings and expiry."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from imagemill.producer.folders import read_prefix
from imagemill.producer.results import expire
from imagemill.producer.rows import Skipped
from imagemill.shared.errors import ConfigurationError, InvalidSource, ServiceUnavailable, StorageRefused, StorageUnavailable
from imagemill.shared.s3 import ensure_bucket, expire_after, list_objects, make_client, make_signer, presign
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.multipart import PART
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.s3_requests import S3Requests
from imagemill.worker.transfer.store import S3Store
from tests.services.s3 import S3Server, changed_environment
from tests.stores import BlockingStore

pytestmark = pytest.mark.integration

MD5_OF_NOTHING = b"1B2M2Y8AsgTpgAmY7PhCfg=="
NAMES = (f"bucket-{n}" for n in itertools.count())


@pytest.fixture
def settings(s3_server: S3Server) -> Iterator[S3Settings]:
    with changed_environment(s3_server.environment):
        yield S3Settings(endpoint_url=s3_server.endpoint_url)


StoreAt = Callable[[str, S3Settings], BlockingStore]


@pytest.fixture
def store_at(network: Network) -> StoreAt:
    return lambda url, settings: BlockingStore(S3Store(url, S3Requests(settings, network), settings), network.call)


@pytest.fixture
def client(settings: S3Settings) -> Any:
    return make_client(settings)


@pytest.fixture
def bucket(client: Any) -> str:
    name = next(NAMES)
    client.create_bucket(Bucket=name)
    return name


def get(link: str) -> tuple[int, bytes]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(link, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


# --- results ----------------------------------------------------------------------------------


def test_stored_result_has_its_content_type_and_checksum(
    store_at: StoreAt, settings: S3Settings, client: Any, bucket: str
) -> None:
    store = store_at(f"s3://{bucket}/jobs/a/", settings)
    store.check()
    assert store.put("x/ü ?#.webp", b"image", "image/webp") == f"s3://{bucket}/jobs/a/x/ü ?#.webp"
    head = client.head_object(Bucket=bucket, Key="jobs/a/x/ü ?#.webp")
    assert (head["ContentType"], head["ContentLength"]) == ("image/webp", 5)
    assert head["ETag"].strip('"') == hashlib.md5(b"image", usedforsecurity=False).hexdigest()
    store.put("x/ü ?#.webp", b"again", "image/webp")
    assert client.get_object(Bucket=bucket, Key="jobs/a/x/ü ?#.webp")["Body"].read() == b"again"


ODD = ("ü ?#.png", "a+b%20c~.png", "100%.png", "画 &=;:@,$!'()*.png", "a//b.png", "a/../b/./c.png", "[x]{y}|^`<>.png", "-._~")


def test_key_is_the_one_that_boto3_would_use(
    store_at: StoreAt, settings: S3Settings, client: Any, bucket: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fallback in ("_put", "_copy"):
        monkeypatch.delattr(S3Store, fallback)
    store = store_at(f"s3://{bucket}/ours", settings)
    fetcher = Fetcher(FetchSettings(), FileSettings(), S3Requests(settings, network), network)
    for key in ODD:
        store.put(key, key.encode(), "image/png")
        client.put_object(Bucket=bucket, Key=f"theirs/{key}", Body=key.encode())
        fetched = network.call(fetcher.fetch(f"s3://{bucket}/theirs/{key}"))
        assert fetched.data == key.encode()
        store.copy(f"s3://{bucket}/theirs/{key}", f"copy/{key}", "image/png", md5=hashlib.md5(key.encode()).hexdigest())  # noqa: S324
    stored = {entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]}
    assert stored == {f"{prefix}/{key}" for prefix in ("ours", "theirs", "ours/copy") for key in ODD}


def test_upload_damaged_in_transit_is_rejected(
    store_at: StoreAt, settings: S3Settings, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagemill.worker.transfer.multipart.base64.b64encode", lambda _: MD5_OF_NOTHING)
    with pytest.raises(StorageUnavailable, match="BadDigest"):
        store_at(f"s3://{bucket}/jobs", settings).put("a.png", b"damaged in transit", "image/png")


@pytest.mark.parametrize(("size", "parts"), [(0, 1), (1_300_000, 1), (PART, 1), (2 * PART + 1000, 3)])
def test_stream_is_stored_in_parts(
    store_at: StoreAt, settings: S3Settings, client: Any, bucket: str, size: int, parts: int
) -> None:
    content = os.urandom(size)
    lines = (content[place : place + 1000] for place in range(0, size, 1000))
    url = store_at(f"s3://{bucket}", settings).put_stream("j/manifest.jsonl", lines, "application/x-ndjson")
    assert url == f"s3://{bucket}/j/manifest.jsonl"
    stored = client.get_object(Bucket=bucket, Key="j/manifest.jsonl")
    assert (stored["ContentType"], stored["Body"].read()) == ("application/x-ndjson", content)
    assert stored["ETag"].strip('"').partition("-")[2] == (f"{parts}" if size >= PART else "")


def test_stream_that_breaks_off_leaves_nothing_behind(
    store_at: StoreAt, settings: S3Settings, client: Any, bucket: str
) -> None:
    store = store_at(f"s3://{bucket}/out", settings)
    store.put("m.jsonl", b"before", "application/x-ndjson")

    def broken() -> Iterator[bytes]:
        yield from [bytes(PART)] * 2
        assert client.list_multipart_uploads(Bucket=bucket)["Uploads"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_stream("m.jsonl", broken(), "application/x-ndjson")
    assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    assert client.get_object(Bucket=bucket, Key="out/m.jsonl")["Body"].read() == b"before"


def test_next_stream_aborts_what_a_killed_process_has_begun(
    store_at: StoreAt, settings: S3Settings, client: Any, bucket: str
) -> None:
    store = store_at(f"s3://{bucket}/out", settings)
    uploads = [client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"] for key in ("out/m.jsonl", "out/m.jsonl.2")]

    def lines() -> Iterator[bytes]:
        yield bytes(PART)
        left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
        assert uploads[0] not in {upload["UploadId"] for upload in left}

    store.put_stream("m.jsonl", lines(), "application/x-ndjson")
    assert [upload["UploadId"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == uploads[1:]


def test_stream_whose_upload_was_aborted_may_be_tried_again(
    store_at: StoreAt, settings: S3Settings, client: Any, bucket: str
) -> None:
    def lines() -> Iterator[bytes]:
        yield from [bytes(PART)] * 2
        for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]:
            client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    with pytest.raises(StorageUnavailable, match="aborted meanwhile"):
        store_at(f"s3://{bucket}", settings).put_stream("m.jsonl", lines(), "application/x-ndjson")


def test_many_threads_can_store_at_once(store_at: StoreAt, settings: S3Settings, client: Any, bucket: str) -> None:
    store = store_at(f"s3://{bucket}/jobs", settings)
    threads = [threading.Thread(target=store.put, args=(f"{n}.png", bytes([n]) * 1000, "image/png")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = [client.get_object(Bucket=bucket, Key=f"jobs/{n}.png")["Body"].read() for n in range(12)]
    assert stored == [bytes([n]) * 1000 for n in range(12)]


def test_missing_bucket_is_refused_by_check_and_put(store_at: StoreAt, settings: S3Settings) -> None:
    store = store_at("s3://never-made/jobs", settings)
    for _ in range(2):
        with pytest.raises(StorageRefused, match=r"'never-made'.*IMAGEMILL_S3__CREATE_BUCKET"):
            store.check()
    with pytest.raises(StorageRefused, match="bucket"):
        store.put("a.png", b"image", "image/png")


def test_missing_bucket_is_created_when_allowed(store_at: StoreAt, settings: S3Settings) -> None:
    name = next(NAMES)
    allowed = settings.model_copy(update={"create_bucket": True})
    for _ in range(2):  # the second time it exists
        store = store_at(f"s3://{name}/jobs", allowed)
        store.check()
        store.put("a.png", b"image", "image/png")
    assert list(list_objects(make_client(settings), f"s3://{name}")) == [(name, "jobs/a.png", 5)]


def test_bucket_can_be_created_by_several_workers_at_once(settings: S3Settings) -> None:
    name, errors = next(NAMES), []

    def create() -> None:
        try:
            ensure_bucket(make_client(settings), name, create=True, region=settings.region)
        except Exception as error:  # noqa: BLE001  # asserted below
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_wrong_keys_are_refused_and_not_shown_in_the_message(
    store_at: StoreAt, settings: S3Settings, bucket: str, s3_server: S3Server
) -> None:
    with changed_environment({"AWS_SECRET_ACCESS_KEY": "mistaken"}):
        store = store_at(f"s3://{bucket}/jobs", settings)
        with pytest.raises(StorageRefused, match="refuses access") as caught:
            store.put("a.png", b"image", "image/png")
        with pytest.raises(InvalidSource, match="refuses access"):
            list(list_objects(make_client(settings), f"s3://{bucket}/"))
    assert "mistaken" not in caught.value.message
    assert s3_server.access_key not in caught.value.message


@pytest.mark.timeout(60)
def test_unreachable_server_fails_put_but_not_check(store_at: StoreAt, settings: S3Settings) -> None:
    unreachable = settings.model_copy(update={"endpoint_url": "http://127.0.0.1:1"})
    store = store_at("s3://results/jobs", unreachable)
    store.check()  # passes: the server may be back when the first result is ready
    with pytest.raises(StorageUnavailable, match="no connection"):
        store.put("a.png", b"image", "image/png")
    with pytest.raises(ServiceUnavailable):
        list(list_objects(make_client(unreachable), "s3://results/jobs"))


# --- links ------------------------------------------------------------------------------------


def test_link_gives_access_to_its_object_only(settings: S3Settings, client: Any, bucket: str) -> None:
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


def test_link_to_a_missing_object_is_not_found(settings: S3Settings, bucket: str) -> None:
    assert get(presign(make_signer(settings), f"s3://{bucket}/none.png", 600))[0] == 404


# --- listing and expiry -----------------------------------------------------------------------


def test_images_below_a_prefix_are_found_by_name_or_content(client: Any, bucket: str) -> None:
    gif = b"GIF89a" + bytes(40)
    for key in ("in/b.png", "in/a.JPG", "in/deep/ü ?.webp", "in/notes.txt", "in/folder/", "other/c.png", "in.png", "in/empty"):
        client.put_object(Bucket=bucket, Key=key, Body=b"" if key.endswith("y") else b"x")
    client.put_object(Bucket=bucket, Key="in/no-extension", Body=gif)
    skipped = Skipped()
    keys = [row.fields["source"].removeprefix(f"s3://{bucket}/") for row in read_prefix(client, f"s3://{bucket}/in/", skipped)]
    assert keys == ["in/a.JPG", "in/b.png", "in/deep/ü ?.webp", "in/no-extension"]
    assert (skipped.count, skipped.names) == (2, [f"s3://{bucket}/in/empty", f"s3://{bucket}/in/notes.txt"])
    with pytest.raises(InvalidSource, match="no images under this prefix"):
        list(read_prefix(client, f"s3://{bucket}/none", skipped))
    with pytest.raises(InvalidSource, match="bucket"):
        list(read_prefix(client, "s3://never-made/in", skipped))


def test_server_without_expiry_is_reported(settings: S3Settings, client: Any, bucket: str) -> None:
    with pytest.raises(StorageRefused, match="expiry"):
        expire_after(client, bucket, "jobs", 7)
    with pytest.raises(ConfigurationError, match="expiry"):
        expire(settings, f"s3://{bucket}/jobs", 7)
