from __future__ import annotations

import pickle
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from imagemill.shared import errors
from imagemill.shared.errors import ImageError
from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.worker.transfer import fetch
from imagemill.worker.transfer.fetch import Fetched, Fetcher, pause
from imagemill.worker.transfer.network import Network
from tests.services.images import Handler, ImageServer, answers, endless, failing, html, reply, start_reply, truncated
from tests.stores import NoS3
from tests.unit.worker.transfer.samples import LOOPBACK, PNG, MakeFetcher, caught, got


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before retries, which take no time."""
    seconds = list[float]()

    async def stopped(stop: threading.Event | None, pause: float) -> bool:
        seconds.append(pause)
        return stop is not None and stop.is_set()

    monkeypatch.setattr(fetch, "stopped", stopped)
    return seconds


def test_fetch_returns_bytes_unchanged(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = PNG
    assert got(fetcher, images.url("/a.png")) == Fetched(PNG, 1, len(PNG))


def test_content_type_of_image_is_ignored(fetcher: Fetcher, images: ImageServer) -> None:
    for kind in ("image/jpeg", "application/octet-stream", "text/plain", "text/html", ""):
        images.routes["/a.jpg"] = answers(200, PNG, kind)
        assert got(fetcher, images.url("/a.jpg")).data == PNG


def test_url_is_percent_encoded_for_server(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/b/%C3%BC%20%E7%94%BB.png"] = PNG
    assert got(fetcher, images.url("/a/../b/ü 画.png?k=ä b")).data == PNG
    assert images.last_path == "/b/%C3%BC%20%E7%94%BB.png?k=%C3%A4%20b"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, errors.AccessDenied),
        (403, errors.AccessDenied),
        (404, errors.NotFound),
        (410, errors.NotFound),
        (408, errors.Timeout),
        (429, errors.ServerError),
        (500, errors.ServerError),
        (503, errors.ServerError),
        (204, errors.HttpError),
        (206, errors.HttpError),
        (304, errors.HttpError),
        (302, errors.HttpError),  # without a Location header
        (400, errors.HttpError),
        (451, errors.HttpError),
    ],
)
def test_status_maps_to_error_without_secrets(
    fetcher: Fetcher, images: ImageServer, status: int, kind: type[ImageError]
) -> None:
    images.routes["/a.png"] = answers(status, b"" if status in (204, 304) else PNG)
    error = caught(fetcher, images.url("/a.png?token=secret"), kind)
    assert str(status) in error.message
    assert "secret" not in error.message
    assert error.tries == 1


@pytest.mark.parametrize(
    "route",
    [
        html(),
        html(kind="image/png"),
        html("\ufeff\n  <HTML>", kind="application/octet-stream"),
        html("Please log in"),
        html("<!-- x --> <html>", kind="image/jpeg"),
    ],
)
def test_web_page_is_not_an_image(fetcher: Fetcher, images: ImageServer, route: Any) -> None:
    images.routes["/a.png"] = route
    assert "web page" in caught(fetcher, images.url("/a.png"), errors.NotAnImage).message


def test_empty_body_is_empty_file(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = b""
    caught(fetcher, images.url("/a.png"), errors.EmptyFile)


@pytest.mark.usefixtures("pauses")
def test_incomplete_body_is_retried(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = truncated(PNG, 3)
    error = caught(fetcher, images.url("/a.png"), errors.Unreachable, attempts=2)
    assert error.tries == 2
    assert images.hits["/a.png"] == 2


def test_size_limit_applies_before_and_during_body(make: MakeFetcher, images: ImageServer) -> None:
    fetcher = make(**LOOPBACK, max_bytes=100_000)
    images.routes["/announced"] = endless(length=10_000_000_000)
    images.routes["/unannounced"] = endless()
    images.routes["/exact"] = bytes(100_000)
    images.routes["/over"] = bytes(100_001)
    for path in ("/announced", "/unannounced", "/over"):
        assert "100000" in caught(fetcher, images.url(path), errors.TooLarge).message
    assert len(got(fetcher, images.url("/exact")).data) == 100_000


def test_large_error_page_keeps_its_status_error(make: MakeFetcher, images: ImageServer) -> None:
    fetcher = make(**LOOPBACK, max_bytes=1000)

    def large(handler: Handler) -> None:
        handler.close_connection = True
        start_reply(handler, 404, {"Content-Length": "10000000"})
        handler.wfile.write(bytes(10_000_000))

    images.routes["/a.png"] = large
    caught(fetcher, images.url("/a.png"), errors.NotFound)


def test_stalled_or_trickling_response_times_out(make: MakeFetcher, images: ImageServer) -> None:
    fetcher = make(**LOOPBACK, total_timeout=0.3)
    images.routes["/stall"] = images.hang
    images.routes["/trickle"] = images.trickle(PNG * 100)
    for path in ("/stall", "/trickle"):
        assert "timed out" in caught(fetcher, images.url(path), errors.Timeout).message
    assert images.stalled.is_set()


def test_total_timeout_includes_redirects(make: MakeFetcher, images: ImageServer) -> None:
    fetcher = make(**LOOPBACK, total_timeout=0.4, max_redirects=1000)

    def slow(handler: Handler) -> None:
        images.released.wait(0.05)
        reply(handler, 302, b"", headers={"Location": "/slow"})

    images.routes["/slow"] = slow
    caught(fetcher, images.url("/slow"), errors.Timeout)
    assert images.hits["/slow"] < 20


def test_unanswered_connection_times_out(make: MakeFetcher) -> None:
    with socket.socket() as full:  # a full queue: the next connection stays unanswered
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        error = caught(make(**LOOPBACK, connect_timeout=0.2), f"http://127.0.0.1:{address[1]}/", errors.Timeout)
        for filler in fillers:
            filler.close()
    assert error.retryable


def test_closed_port_is_unreachable(fetcher: Fetcher) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        error = caught(fetcher, f"http://127.0.0.1:{closed.getsockname()[1]}/a.png", errors.Unreachable)
    assert "can't connect" in error.message


def test_unknown_host_is_unreachable(fetcher: Fetcher) -> None:
    assert "no-such-host.invalid" in caught(fetcher, "http://no-such-host.invalid/a.png", errors.Unreachable).message


def test_server_without_tls_is_unreachable(fetcher: Fetcher, images: ImageServer) -> None:
    url = images.url("/a.png").replace("http:", "https:")
    assert "TLS" in caught(fetcher, url, errors.Unreachable).message


# --- retries ---


def test_temporary_error_is_retried_after_growing_pauses(fetcher: Fetcher, images: ImageServer, pauses: list[float]) -> None:
    images.routes["/a.png"] = failing(2, 503, PNG)
    assert got(fetcher, images.url("/a.png"), attempts=3) == Fetched(PNG, 3, len(PNG))
    assert len(pauses) == 2
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0


@pytest.mark.usefixtures("pauses")
def test_error_keeps_number_of_tries_when_pickled(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = answers(500)
    error = caught(fetcher, images.url("/a.png"), errors.ServerError, attempts=4)
    assert error.tries == images.hits["/a.png"] == 4
    assert pickle.loads(pickle.dumps(error)).tries == 4  # noqa: S301


def test_permanent_error_is_not_retried(fetcher: Fetcher, images: ImageServer, pauses: list[float]) -> None:
    assert caught(fetcher, images.url("/missing"), errors.NotFound, attempts=5).tries == 1
    assert images.hits["/missing"] == 1
    assert pauses == []


def test_stop_prevents_retry(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = answers(503)
    stop = threading.Event()
    stop.set()
    assert caught(fetcher, images.url("/a.png"), errors.ServerError, attempts=5, stop=stop).tries == 1


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        *((asked, 3, 3) for asked in ("3", " 3 ")),
        *((asked, 8, 8) for asked in ("3600", "9" * 18, "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 99999 23:59:59 GMT")),
        *(
            (asked, 0.25, 0.5)
            for asked in (
                *("0", "", "-5", "-" + "9" * 30, "9" * 30, "9" * 5000, "soon", "nan", "inf", "0x10", "\xff\xfe"),
                *("Sun, 06 Nov 1994 08:49:37 GMT", "Thu, 01 Jan 0001 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 -9999"),
                *("Fri, 31 Feb 2030 25:61:61 GMT", "Fri, 31 Dec 9999999999999999 23:59:59 GMT", "Mon, 99 Foo 2999"),
            )
        ),
    ],
)
def test_retry_after_sets_pause_within_limits(
    fetcher: Fetcher, images: ImageServer, pauses: list[float], asked: str, least: float, most: float
) -> None:
    images.routes["/a.png"] = failing(1, 429, PNG, {"Retry-After": asked})
    got(fetcher, images.url("/a.png"), attempts=2)
    assert least <= pauses[0] <= most


def test_stop_cuts_pause_short(network: Network) -> None:
    stop = threading.Event()
    threading.Timer(0.01, stop.set).start()
    assert network.call(fetch.stopped(stop, 60))
    assert not network.call(fetch.stopped(threading.Event(), 0.01))


def test_pause_grows_to_eight_seconds() -> None:
    for tries, longest in ((1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 8), (60, 8)):
        assert longest / 2 <= pause(tries) <= longest


# --- other schemes ---


@pytest.mark.parametrize(
    "url", ["ftp://a/b", "a.png", "", "http://", "http://user:hunter2@example.org/", "http://a\nb/", "file://host/a"]
)
def test_unsupported_url_is_rejected_without_secrets(fetcher: Fetcher, url: str) -> None:
    assert "hunter2" not in caught(fetcher, url, errors.UnsupportedUrl).message


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://-/key", "s3://UPPER/key"])
def test_invalid_s3_url_is_rejected(fetcher: Fetcher, url: str) -> None:
    caught(fetcher, url, errors.UnsupportedUrl)


def test_file_url_is_read_below_roots_only(tmp_path: Path, network: Network) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    (tmp_path / "empty.png").touch()
    s3 = NoS3(network)
    fetcher = Fetcher(FetchSettings(max_bytes=1000), FileSettings(read_roots=(tmp_path,)), s3, network)
    url = (tmp_path / "a b.png").as_uri()
    assert got(fetcher, url) == Fetched(PNG, 1, len(PNG))
    caught(fetcher, (tmp_path / "empty.png").as_uri(), errors.EmptyFile)
    caught(fetcher, "file:///etc/passwd", errors.ForbiddenAddress)
    caught(Fetcher(FetchSettings(), FileSettings(), s3, network), url, errors.ForbiddenAddress)


def test_html_pattern_matches_pages_only() -> None:
    assert fetch.HTML.match(b"<!DocType html>")
    assert not fetch.HTML.match(b"<svg>")
    assert not fetch.HTML.match(PNG)
