"""Links to results in S3, and their expiry."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from imagemill.producer.results import expire, picture_links
from imagemill.shared import s3
from imagemill.shared.errors import ConfigurationError, InvalidOption, ServiceUnavailable
from imagemill.shared.settings import S3Settings
from tests.services.s3 import S3Server, changed_environment, free_ports

KEYS = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


def settings(endpoint: str | None, **more: object) -> S3Settings:
    return S3Settings.model_validate({"endpoint_url": endpoint, **more})


# --- links ---


def test_link_opens_a_private_object(s3_server: S3Server) -> None:
    with changed_environment(s3_server.environment):
        client = s3.make_client(settings(s3_server.endpoint_url))
        client.create_bucket(Bucket="pictures")
        client.put_object(Bucket="pictures", Key="a b/ü.png", Body=b"pixels")
        link = picture_links(settings(s3_server.endpoint_url), [])("s3://pictures/a b/ü.png")
    assert link is not None
    with urllib.request.urlopen(link, timeout=10) as answer:
        assert answer.read() == b"pixels"
    assert s3_server.secret_key not in link


def test_links_use_the_public_url_and_last_seven_days() -> None:
    with changed_environment(KEYS):
        where = settings("http://minio:9000", public_url="https://pictures.example")
        link = picture_links(where, [])("s3://results/x/a.png")
    assert link is not None
    assert link.startswith("https://pictures.example/results/x/a.png?")
    assert parse_qs(urlsplit(link).query)["X-Amz-Expires"] == [str(7 * 24 * 3600)]


@pytest.mark.parametrize("address", ["https://example.com/a.png", "file:///srv/a.png", "a.png", "javascript:x"])
def test_other_urls_are_unchanged_and_need_no_keys(address: str) -> None:
    assert picture_links(settings("not an address"), [])(address) == address


def test_missing_keys_give_no_links_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    failures: list[str] = []
    link = picture_links(settings("http://127.0.0.1:1"), failures)
    assert [link(f"s3://results/{n}.png") for n in range(3)] == [None] * 3
    assert "AWS_ACCESS_KEY_ID" in failures[0]


def test_invalid_endpoint_gives_no_link_and_a_reason() -> None:
    failures: list[str] = []
    with changed_environment(KEYS):
        assert picture_links(settings("minio:9000"), failures)("s3://results/a.png") is None
    assert "minio:9000" in failures[0]


# --- expiry ---


class Lifecycle:
    """An S3 server with one bucket that records the lifecycle rules it receives."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(200)

            def do_GET(self) -> None:
                self.answer(404, b"<Error><Code>NoSuchLifecycleConfiguration</Code></Error>")

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.rules.append(f"{self.path} {body.decode()}")
                self.answer(200)

            def answer(self, status: int, body: bytes = b"") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def lifecycle() -> Iterator[Lifecycle]:
    lifecycle = Lifecycle()
    with changed_environment(KEYS):
        yield lifecycle
    lifecycle.server.shutdown()
    lifecycle.server.server_close()


def test_expiry_is_limited_to_the_prefix(lifecycle: Lifecycle) -> None:
    expire(settings(lifecycle.url), "s3://results/shop/today", 30)
    (rule,) = lifecycle.rules
    assert rule.startswith("/results?lifecycle")
    for part in ("<Prefix>shop/today/</Prefix>", "<Days>30</Days>", "<Status>Enabled</Status>"):
        assert part in rule
    assert rule.count("<Rule>") == 1


@pytest.mark.parametrize(
    ("url", "days"), [("file:///srv/out", 7), ("s3://results", 7), ("s3://results/", 7), ("s3://results/x", 0)]
)
def test_expiry_of_folders_and_whole_buckets_is_refused(url: str, days: int, lifecycle: Lifecycle) -> None:
    with pytest.raises(InvalidOption):
        expire(settings(lifecycle.url), url, days)
    assert lifecycle.rules == []


def test_refusal_by_s3_is_a_configuration_error(s3_server: S3Server) -> None:
    """This server does not support expiry, and buckets must not be created on it."""
    with changed_environment(s3_server.environment):
        where = settings(s3_server.endpoint_url)
        s3.make_client(where).create_bucket(Bucket="kept")
        with pytest.raises(ConfigurationError, match="bucket 'kept'"):
            expire(where, "s3://kept/x", 7)
        with pytest.raises(ConfigurationError, match="IMAGEMILL_S3__CREATE_BUCKET"):
            expire(where, "s3://no-such-bucket/x", 7)


def test_unreachable_s3_is_service_unavailable() -> None:
    with changed_environment(KEYS), pytest.raises(ServiceUnavailable):
        expire(settings(f"http://127.0.0.1:{free_ports(1)[0]}"), "s3://results/x", 7)
