from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pycurl
import pytest

from imagemill.shared.errors import ImageError, Timeout, UnsupportedUrl
from imagemill.shared.settings import FetchSettings
from imagemill.worker.transfer.addresses import wire
from imagemill.worker.transfer.byte_budget import ByteBudget, Claim
from imagemill.worker.transfer.download import Chain, Downloader, Transfer
from imagemill.worker.transfer.network import Network
from tests.services.images import Handler, ImageServer, answers, reply

LOOPBACK = FetchSettings.model_validate({"allow_networks": ["127.0.0.0/8"], "connect_timeout": 5, "total_timeout": 20})


GetUrl = Callable[[str], Transfer]


def claim() -> Claim:
    return Claim(ByteBudget(1 << 30), 1 << 20)


@pytest.fixture
def get(network: Network) -> GetUrl:
    downloader = Downloader(LOOPBACK, network)
    return lambda url: network.call(downloader.get(wire(url), "x", 20, claim(), Chain()))


def test_downloader_reuses_connection(get: GetUrl, images: ImageServer) -> None:
    images.routes["/a"] = b"one"
    images.routes["/b"] = answers(404, b"no")
    for path in ("/a", "/b", "/a", "/b", "/a"):
        get(images.url(path))
    assert images.connections == 1


def test_downloader_serves_threads_concurrently(get: GetUrl, images: ImageServer) -> None:
    together = threading.Barrier(8)

    def meet(handler: Handler) -> None:
        together.wait(20)  # passes only once eight requests are running
        reply(handler, 200, handler.path.encode())

    images.routes["/meet"] = meet
    urls = [images.url(f"/meet?{n}") for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(get, urls))
    assert [b"".join(response.blocks) for response in responses] == [f"/meet?{n}".encode() for n in range(8)]


def test_request_has_expected_headers_and_ignores_proxies(
    get: GetUrl, images: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    images.routes["/a"] = answers(200, b"x", headers={"Set-Cookie": "id=1"})
    for _ in range(2):
        get(images.url("/a"))
    assert images.last_headers["User-Agent"].startswith("imagemill")
    assert images.last_headers["Accept-Encoding"] == "identity"
    assert images.last_headers["Host"] == f"127.0.0.1:{images.port}"
    assert not {"Cookie", "Authorization", "Referer", "Proxy-Connection"} & set(images.last_headers)


def test_request_does_not_inherit_previous_response(get: GetUrl, images: ImageServer) -> None:
    images.routes["/a"] = answers(200, b"long body", headers={"X-Only-Here": "1"})
    images.routes["/b"] = answers(404, b"not found")
    assert get(images.url("/a")).headers["x-only-here"] == "1"
    second = get(images.url("/b"))
    assert (second.status, second.blocks) == (404, [])
    assert "x-only-here" not in second.headers


def test_headers_of_interim_response_are_dropped() -> None:
    transfer = Transfer(wire("http://example.org/"), LOOPBACK, claim())
    early, late = [b"HTTP/1.1 103 Early Hints\r\n", b"Location: /wrong\r\n", b"\r\n"], [b"HTTP/2 200 \r\n", b"X-Odd: \xff\r\n"]
    for transfer.lines in (early, late):
        transfer.read_headers()
    assert transfer.status == 200
    assert set(transfer.headers) == {"x-odd"}


def test_every_curl_error_is_explained() -> None:
    transfer = Transfer(wire("http://example.org/"), LOOPBACK, claim())
    for name in dir(pycurl):
        if name.startswith("E_"):
            explained = transfer.explain(pycurl.error(getattr(pycurl, name), "reason"), "LABEL")
            assert type(explained) is not ImageError
            assert "LABEL" in explained.message
    assert isinstance(transfer.explain(pycurl.error(pycurl.E_OPERATION_TIMEDOUT, ""), "x"), Timeout)
    assert isinstance(transfer.explain(pycurl.error(pycurl.E_URL_MALFORMAT, ""), "x"), UnsupportedUrl)


def test_retry_after_accepts_number_or_date(get: GetUrl, images: ImageServer) -> None:
    now = datetime.now(UTC)
    past, future = (format_datetime(now + timedelta(hours=hours), usegmt=True) for hours in (-1, 1))
    for value, least, most in (("3", 3, 3), ("", 0, 0), ("soon", 0, 0), ("-5", 0, 0), (past, 0, 0), (future, 3000, 3600)):
        images.routes["/a"] = answers(503, headers={"Retry-After": value})
        assert least <= get(images.url("/a")).retry_after <= most
