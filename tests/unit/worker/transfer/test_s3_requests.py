"""S3 through libcurl: what succeeds goes there directly, and everything else ends as boto3 ends it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagemill.shared import errors
from imagemill.shared.errors import ConfigurationError, NotFound, StorageRefused, StorageUnavailable
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings
from imagemill.worker.transfer import s3_requests
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.objects import Readable
from imagemill.worker.transfer.s3_requests import S3Requests
from imagemill.worker.transfer.store import S3Store
from tests.stores import BlockingStore
from tests.unit.worker.transfer.peer import Answer, Peer, Request
from tests.unit.worker.transfer.samples import PNG, caught, got

MD5 = "0f" * 16
COPIED = f'<CopyObjectResult><ETag>"{MD5}"</ETag></CopyObjectResult>'.encode()


def refusal(code: str, status: int, *headers: tuple[str, str]) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code></Error>".encode(), headers)


class S3:
    """A server that gives `answers` one after the other, and the last one again and again."""

    def __init__(self, network: Network) -> None:
        self.answers = [Answer()]
        self.peer = Peer(network, self._answer)

    async def _answer(self, _: Request) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    @property
    def clients(self) -> list[str]:
        """Who has sent each request."""
        return [request.headers["user-agent"].partition("/")[0].lower() for request in self.peer.requests]


@pytest.fixture
def server(network: Network, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name in ("AWS_PROFILE", "AWS_CA_BUNDLE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "for an hour")
    server = S3(network)
    with server.peer:
        yield server


@pytest.fixture
def s3(server: S3, network: Network) -> S3Requests:
    return S3Requests(S3Settings(endpoint_url=server.peer.url), network)


@pytest.fixture
def store(s3: S3Requests, network: Network) -> BlockingStore:
    return BlockingStore(S3Store("s3://results/jobs", s3, S3Settings()), network.call)


@pytest.fixture
def fetcher(s3: S3Requests, network: Network) -> Fetcher:
    return Fetcher(FetchSettings(max_bytes=1000), FileSettings(), s3, network)


def test_plain_requests_need_no_boto3(server: S3, store: BlockingStore, fetcher: Fetcher) -> None:
    assert store.put("a.png", b"image", "image/png") == "s3://results/jobs/a.png"
    server.answers = [Answer(body=COPIED)]
    assert store.copy("s3://other/ü.png", "b.png", "image/png", md5=MD5) == "s3://results/jobs/b.png"
    server.answers = [Answer(body=PNG)]
    assert got(fetcher, "s3://photos/in/a b.png").data == PNG
    put, copy, get = server.peer.requests
    assert (put.method, put.path, put.body) == ("PUT", "/results/jobs/a.png", b"image")
    assert (put.headers["content-type"], put.headers["content-md5"]) == ("image/png", "eIBaIhqYjnnvP0LXxb/UGA==")
    assert (copy.path, copy.headers["x-amz-copy-source"]) == ("/results/jobs/b.png", "other/%C3%BC.png")
    assert (get.method, get.path) == ("GET", "/photos/in/a%20b.png")
    assert {request.headers["x-amz-security-token"] for request in server.peer.requests} == {"for an hour"}
    assert server.clients == ["imagemill"] * 3


def test_many_uploads_run_at_once(server: S3, s3: S3Requests, network: Network) -> None:
    all_here = asyncio.Event()

    async def together(_: Request) -> Answer:
        if peer.running == 100:
            all_here.set()
        await all_here.wait()
        return Answer()

    with Peer(network, together) as peer:
        s3 = S3Requests(S3Settings(endpoint_url=peer.url), network)
        store = S3Store("s3://results", s3, S3Settings())
        running = [network.start(store.put(f"{n}.png", b"image", "image/png")) for n in range(100)]
        assert [one.result(60) for one in running] == [f"s3://results/{n}.png" for n in range(100)]
    assert len(peer.requests) == 100


def test_refusal_ends_as_boto3_ends_it(server: S3, store: BlockingStore) -> None:
    for code, status, kind, message in (
        ("AccessDenied", 403, StorageRefused, r"the S3 server refuses access \(AccessDenied\)"),
        ("ExpiredToken", 400, StorageRefused, r"the S3 server refuses access \(ExpiredToken\)"),
        ("NoSuchBucket", 404, StorageRefused, "there is no such bucket"),
        ("BadDigest", 400, StorageUnavailable, "BadDigest"),
        ("NotImplemented", 501, StorageRefused, "NotImplemented"),
    ):
        server.answers = [refusal(code, status)]
        server.peer.requests.clear()
        with pytest.raises(kind, match=message):
            store.put("a.png", b"image", "image/png")
        assert server.clients[:2] == ["imagemill", "boto3"]


def test_busy_server_is_asked_again(server: S3, store: BlockingStore) -> None:
    server.answers = [refusal("SlowDown", 503), refusal("SlowDown", 503), Answer()]
    store.put("a.png", b"image", "image/png")
    assert server.clients == ["imagemill", "boto3", "boto3"]
    assert {request.body for request in server.peer.requests} == {b"image"}
    store.put("b.png", b"image", "image/png")
    assert server.clients[3:] == ["imagemill"]


def test_copy_that_fails_after_status_200_is_a_failure(server: S3, store: BlockingStore) -> None:
    server.answers = [Answer(200, b"<Error><Code>InternalError</Code></Error>"), Answer(body=COPIED)]
    store.copy("s3://other/a.png", "a.png", "image/png", md5=MD5)
    assert server.clients == ["imagemill", "boto3"]
    server.answers = [refusal("PreconditionFailed", 412)]
    with pytest.raises(NotFound, match="was deleted or has changed"):
        store.copy("s3://other/a.png", "a.png", "image/png", md5=MD5)


def test_bucket_in_another_region_is_found_once(server: S3, store: BlockingStore) -> None:
    server.answers = [refusal("PermanentRedirect", 301, ("x-amz-bucket-region", "eu-west-3"))] * 2 + [Answer()]
    for name in ("a.png", "b.png"):
        store.put(name, b"image", "image/png")
    assert server.clients == ["imagemill", "boto3", "boto3", "imagemill"]
    regions = [re.findall(r"/\d{8}/([\w-]+)/s3", request.headers["authorization"])[0] for request in server.peer.requests]
    assert regions == ["us-east-1", "us-east-1", "eu-west-3", "eu-west-3"]


def test_temporary_keys_are_replaced(
    server: S3, store: BlockingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Network
) -> None:
    """As of a role: boto3 gets new ones before they expire, and the next upload is signed with these."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    source, config = tmp_path / "keys", tmp_path / "config"
    source.write_text(
        '#!/bin/sh\necho >> "$0.count"\n'
        'echo "{\\"Version\\": 1, \\"AccessKeyId\\": \\"key-$(wc -l < "$0.count")\\", \\"SecretAccessKey\\": \\"x\\",'
        ' \\"SessionToken\\": \\"t\\", \\"Expiration\\": \\"$(date -u -d "+1 minute" +%FT%TZ)\\"}"\n'
    )
    source.chmod(0o755)
    config.write_text(f"[default]\ncredential_process = {source}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(s3_requests, "KEYS_SECONDS", 0.0)
    s3 = S3Requests(S3Settings(endpoint_url=server.peer.url), network)
    store = BlockingStore(S3Store("s3://results", s3, S3Settings()), network.call)
    for _ in range(2):
        store.put("a.png", b"image", "image/png")
    first, second = (re.findall(r"Credential=key-(\d+)", request.headers["authorization"]) for request in server.peer.requests)
    assert int(second[0]) > int(first[0])
    assert server.clients == ["imagemill"] * 2


def test_proxy_of_the_environment_is_used(server: S3, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.peer.url)
    s3 = S3Requests(S3Settings(endpoint_url="http://s3.invalid"), network)
    BlockingStore(S3Store("s3://results", s3, S3Settings()), network.call).put("a.png", b"image", "image/png")
    assert [request.path for request in server.peer.requests] == ["http://s3.invalid/results/a.png"]


def test_download_does_not_get_a_connection_to_the_s3_server(server: S3, store: BlockingStore, fetcher: Fetcher) -> None:
    store.put("a.png", b"image", "image/png")
    caught(fetcher, f"{server.peer.url}/results/jobs/a.png", errors.ForbiddenAddress)
    assert len(server.peer.requests) == 1


@pytest.mark.parametrize("headers", [(), (("Content-Length", ""),)], ids=["announced", "unannounced"])
def test_object_has_the_limits_of_downloads(server: S3, fetcher: Fetcher, headers: tuple[tuple[str, str], ...]) -> None:
    server.answers = [Answer(body=bytes(1000), headers=headers)]
    assert len(got(fetcher, "s3://photos/a.png").data) == 1000
    server.answers = [Answer(body=bytes(1001), headers=headers)]
    assert "1000" in caught(fetcher, "s3://photos/a.png", errors.TooLarge).message
    assert server.clients == ["imagemill"] * 2


def test_object_that_can_not_be_read_ends_as_boto3_ends_it(server: S3, fetcher: Fetcher) -> None:
    server.answers = [refusal("NoSuchKey", 404)]
    assert caught(fetcher, "s3://photos/a.png", errors.NotFound).message == "s3://photos/a.png does not exist"
    server.answers = [refusal("AccessDenied", 403)]
    caught(fetcher, "s3://photos/a.png", errors.AccessDenied)
    server.answers = [refusal("SlowDown", 503), Answer(body=PNG)]
    assert got(fetcher, "s3://photos/a.png").data == PNG
    server.answers = [refusal("SlowDown", 503), Answer(body=bytes(1001))]
    caught(fetcher, "s3://photos/a.png", errors.TooLarge)


def test_silent_server_of_an_object_times_out(server: S3, s3: S3Requests, network: Network) -> None:
    async def silent(_: Request) -> Answer:
        await asyncio.sleep(60)
        return Answer()

    with Peer(network, silent) as peer:
        s3 = S3Requests(S3Settings(endpoint_url=peer.url), network)
        fetcher = Fetcher(FetchSettings(total_timeout=0.2), FileSettings(), s3, network)
        caught(fetcher, "s3://photos/a.png", errors.Timeout)
        assert len(peer.requests) == 1


def test_client_is_made_when_it_is_needed_and_tried_again(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[S3Settings]()
    make: Callable[..., object] = s3_requests.make_client
    monkeypatch.setattr(s3_requests, "make_client", lambda settings: (made.append(settings), make(settings))[1])
    wrong = S3Settings(endpoint_url="minio")
    s3 = S3Requests(wrong, network)
    assert made == [], "a process that needs no S3 makes none"
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"^S3 at minio"):
            S3Store("s3://results", s3, wrong)
    right = S3Requests(S3Settings(endpoint_url="http://minio:9000"), network)
    assert right.client() is right.client()
    assert len(made) == 3


@pytest.mark.parametrize(
    ("allowed", "output", "url", "may"),
    [
        ((), "s3://results/out", "s3://results/in/a.png", True),
        ((), "s3://results/out", "s3://other/private.png", False),
        ((), "s3://results/out", "s3://results2/a.png", False),
        ((), "file:///srv/out", "s3://other/private.png", False),
        (("photos",), "s3://results/out", "s3://photos/a.png", True),
        (("photos",), "s3://results/out", "s3://results/a.png", False),
        (("photos/in", "s3://more/"), "s3://results/out", "s3://photos/in/a.png", True),
        (("photos/in", "s3://more/"), "s3://results/out", "s3://more/a.png", True),
        (("photos/in",), "s3://results/out", "s3://photos/internal/a.png", False),
        (("photos/in",), "s3://results/out", "s3://photos/in/../private.png", False),
        (("*",), "file:///srv/out", "s3://other/a.png", True),
    ],
)
def test_list_may_name_objects_of_certain_buckets_only(
    server: S3, fetcher: Fetcher, allowed: tuple[str, ...], output: str, url: str, may: bool
) -> None:
    server.answers = [Answer(body=PNG)]
    limited = fetcher.within(Readable.of(S3Settings(read_buckets=allowed), output))
    if may:
        assert got(limited, url).data == PNG
    else:
        assert "IMAGEMILL_S3__READ_BUCKETS" in caught(limited, url, errors.ForbiddenAddress).message
        assert server.peer.requests == []
