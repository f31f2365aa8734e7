"""The demo's loopback server: real photos, URLs that must fail, and the lists of both."""

from __future__ import annotations

import json
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from imagemill.producer.demo_photos import Material, Retouch

PRIVATE = "http://10.255.255.1/private.jpg"
"""In a private network, which workers refuse to contact."""


@dataclass(frozen=True)
class Answer:
    """What the server sends."""

    status: int
    kind: str
    body: bytes


def bad_answers(material: Material) -> dict[str, Answer]:
    """The server's URLs that must fail, by path."""
    stamped = next(retouch.path for retouch in material.retouches if retouch.box)
    jpeg = (material.folder / stamped).read_bytes()
    page = b"<!doctype html><title>Sign in</title><p>Please sign in to see this photo."
    return {
        "bad/missing.jpg": Answer(404, "text/plain", b"there is no such photo"),
        "bad/broken-server.jpg": Answer(500, "text/plain", b"the server is broken"),
        "bad/page.jpg": Answer(200, "text/html", page),
        "bad/half.jpg": Answer(200, "image/jpeg", jpeg[: len(jpeg) // 2]),
        "bad/empty.png": Answer(200, "image/png", b""),
        "bad/bomb.png": Answer(200, "image/png", bomb(30_000)),
    }


def bomb(side: int) -> bytes:
    """A black 1-bit PNG of `side` x `side` pixels: at 30,000, about 110 kB that decode to 900 million pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)  # filter 0, then zeros
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


class Site:
    """The loopback server: `base` is its URL, `bad` all URLs that must fail."""

    def __init__(self, material: Material) -> None:
        self.material = material
        answers = bad_answers(material)
        files = {path for photos in material.photos.values() for path in photos}
        for retouch in material.retouches:
            files.update(path for path in (retouch.path, retouch.mask) if path)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(material.folder, files, answers))
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.base = f"http://{self.host}/"
        self.bad = [*(self.base + path for path in answers), PRIVATE]

    def __enter__(self) -> Site:
        threading.Thread(target=self._server.serve_forever, name="photos", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str) -> str:
        """The URL of a file in the demo's folder."""
        return self.base + quote(path)

    def lists(self, count: int | None) -> dict[str, Path]:
        """Write a JSONL list for each use into `lists/`: photos, the bad URLs and, for cut-outs, one duplicate."""
        photos = {use: [{"source": self.url(path)} for path in paths] for use, paths in self.material.photos.items()}
        removals = [self._removal(retouch) for retouch in self.material.retouches]
        bad = [{"source": url} for url in self.bad]
        rows = {
            "rembg": [*_repeated(photos["rembg"], count), photos["rembg"][0], *bad],
            "opencv": [*_repeated(photos["opencv"], count), photos["opencv"][0], *bad],
            "inpaint": [*_repeated(removals, count), *({**row, "boxes": "0.4,0.4,0.2,0.2"} for row in bad)],
            "stylize": [*_repeated(photos["stylize"], count), *bad],
        }
        (self.material.folder / "lists").mkdir()
        paths = {use: self.material.folder / "lists" / f"{use}.jsonl" for use in rows}
        for use, path in paths.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[use]), encoding="utf-8")
        return paths

    def _removal(self, retouch: Retouch) -> dict[str, str]:
        row = {"source": self.url(retouch.path)}
        return row | ({"mask": self.url(retouch.mask)} if retouch.mask else {"boxes": _text(retouch.box)})


def _text(box: Sequence[float] | None) -> str:
    return ",".join(f"{number:.4f}" for number in box or ())


def _repeated(rows: list[dict[str, str]], count: int | None) -> list[dict[str, str]]:
    """At least `count` rows: if there are fewer, they are repeated with different URLs."""
    again = ((rows[i % len(rows)], i // len(rows) + 1) for i in range(len(rows), count or 0))
    return rows + [{**row, "source": f"{row['source']}?copy={number}"} for row, number in again]


def _handler(folder: Path, files: set[str], bad: dict[str, Answer]) -> type[BaseHTTPRequestHandler]:
    """Serves these files and answers, and nothing else from the folder."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            if path in files:
                self._answer(Answer(200, "application/octet-stream", (folder / path).read_bytes()))
            else:
                self._answer(bad.get(path, Answer(404, "text/plain", b"not found")))

        def _answer(self, answer: Answer) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
            """Keep quiet: the worker logs every download."""

    return Handler
