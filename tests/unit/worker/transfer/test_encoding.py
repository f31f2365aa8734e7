"""Content-Encoding over http and s3: a file is read for what its bytes are, whatever the server says about them."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property

import brotli
import pytest
import zstandard

from imagemill.shared import errors
from imagemill.shared.errors import ImageError
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings
from imagemill.worker.transfer.byte_budget import ByteBudget, Claim, NoRoom
from imagemill.worker.transfer.encoding import unpacked
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.s3_requests import S3Requests
from tests.unit.worker.transfer.peer import Answer, Peer, Request
from tests.unit.worker.transfer.samples import LOOPBACK, PNG, caught, got

BIG = 100_000


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


zstd = zstandard.ZstdCompressor().compress
# name: (Content-Encoding headers, body) of servers that all mean PNG
FORMS: dict[str, tuple[tuple[str, ...], bytes]] = {
    "gzip": (("gzip",), gzip.compress(PNG)),
    "x-gzip": (("X-GZIP",), gzip.compress(PNG)),
    "deflate": (("deflate",), zlib.compress(PNG)),
    "deflate without its header": (("deflate",), bare_deflate(PNG)),
    "brotli": (("br",), brotli.compress(PNG)),
    "zstd": (("zstd",), zstd(PNG)),
    "gzip twice": (("gzip, gzip",), gzip.compress(gzip.compress(PNG))),
    "gzip twice, said once": (("gzip",), gzip.compress(gzip.compress(PNG))),
    "gzip once, said twice": (("gzip, gzip",), gzip.compress(PNG)),
    "brotli in gzip": (("br, gzip",), gzip.compress(brotli.compress(PNG))),
    "in two headers": (("br", "gzip"), gzip.compress(brotli.compress(PNG))),
    "among others": (("aws-chunked,br, utf-8",), brotli.compress(PNG)),
    "gzip in two parts": (("gzip",), gzip.compress(PNG[:9]) + gzip.compress(PNG[9:])),
    "zstd in two parts": (("zstd",), zstd(PNG[:9]) + zstd(PNG[9:])),
    "padded": (("gzip",), gzip.compress(PNG) + bytes(9)),
    "gzip that calls itself deflate": (("deflate",), gzip.compress(PNG)),
    "gzip that calls itself utf-8": (("utf-8",), gzip.compress(PNG)),
    "gzip that says nothing": ((), gzip.compress(PNG)),
    **{
        f"plain, said to be {name}": ((name,), PNG)
        for name in (
            *("gzip", "x-gzip", "deflate", "br", "zstd", "compress", "gzip, br", "identity", "utf-8", "UTF-8, gzip"),
            *("aws-chunked", "binary", "image/jpeg", "none", "base64", "\xff", ",", "x" * 10_000),
        )
    },
}


class Server:
    """Serves one object, over http and as an S3 server."""

    def __init__(self, network: Network) -> None:
        self.headers: tuple[tuple[str, str], ...] = ()
        self.body, self.refuses = b"", False
        self.peer = Peer(network, self._answer)
        self.network = network

    async def _answer(self, request: Request) -> Answer:
        ours = request.headers["user-agent"].startswith("imagemill")
        if self.refuses and ours:  # leaves it to boto3
            return Answer(503, b"<Error><Code>SlowDown</Code></Error>")
        return Answer(200, self.body, self.headers)

    def read(self, where: str, stated: tuple[str, ...], body: bytes) -> bytes:
        return got(self.fetcher, self._url(where, stated, body)).data

    def refuse(self, where: str, stated: tuple[str, ...], body: bytes, kind: type[ImageError]) -> ImageError:
        return caught(self.fetcher, self._url(where, stated, body), kind)

    def _url(self, where: str, stated: tuple[str, ...], body: bytes) -> str:
        self.headers, self.body, self.refuses = tuple(("Content-Encoding", name) for name in stated), body, where == "boto3"
        return f"{self.peer.url}/b/a.png" if where == "http" else "s3://bucket/a.png"

    @cached_property
    def fetcher(self) -> Fetcher:
        s3 = S3Requests(S3Settings(endpoint_url=self.peer.url), self.network)
        return Fetcher(FetchSettings.model_validate({**LOOPBACK, "max_bytes": BIG}), FileSettings(), s3, self.network)


@pytest.fixture
def server(network: Network, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("AWS_PROFILE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    server = Server(network)
    with server.peer:
        yield server


@pytest.mark.parametrize("form", FORMS)
def test_file_is_read_for_what_its_bytes_are(server: Server, form: str) -> None:
    assert server.read("http", *FORMS[form]) == PNG


def test_objects_in_s3_are_read_the_same(server: Server) -> None:
    for form, (stated, body) in FORMS.items():
        assert server.read("s3", stated, body) == PNG, form
    for form in ("gzip", "brotli", "plain, said to be gzip"):
        assert server.read("boto3", *FORMS[form]) == PNG


@pytest.mark.parametrize(
    ("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress), ("zstd", zstd)]
)
def test_compressed_files_have_the_limits_of_others(server: Server, name: str, pack: Callable[[bytes], bytes]) -> None:
    assert server.read("http", (name,), pack(bytes(BIG))) == bytes(BIG)
    message = server.refuse("http", (name,), pack(bytes(9 * BIG)), errors.TooLarge).message
    assert message.endswith("exceeds the limit of 100000 bytes once it is decompressed")


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_compressed_file_that_ends_early_is_truncated(server: Server, name: str) -> None:
    body = FORMS[name][1]
    for end in (len(body) - 1, len(body) // 2, 4):
        assert "compressed response is damaged" in server.refuse("http", (name,), body[:end], errors.Truncated).message


def test_what_is_compressed_many_times_stays_as_it_is(server: Server) -> None:
    body = PNG
    for _ in range(9):
        body = gzip.compress(body)
    assert server.read("http", ("gzip",), body).startswith(b"\x1f\x8b")


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_file_of_endless_parts_is_damaged(server: Server, pack: Callable[[bytes], bytes]) -> None:
    server.refuse("http", ("gzip",), pack(b"x") * 1001, errors.Truncated)


def test_zstd_may_not_ask_for_more_memory_than_the_web_allows(server: Server) -> None:
    packer = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=24)).compressobj()
    assert "memory" in server.refuse("http", ("zstd",), packer.compress(PNG) + packer.flush(), errors.Truncated).message


def test_decompressed_file_counts_as_held_memory() -> None:
    budget = ByteBudget(50_000)
    budget.take(10)  # something else is held
    with pytest.raises(NoRoom), Claim(budget, BIG) as claim:
        asyncio.run(unpacked(gzip.compress(bytes(80_000)), "gzip", "x", BIG, claim))
    assert budget.used == 10
