"""The demo's loopback server: real photos, URLs that must fail, and the lists of both."""

from __future__ import annotations

import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from imagemill.producer.demo_photos import Material

PRIVATE = "http://10.255.255.1/private.jpg"
"""In a private network, which workers refuse to contact."""


Answer = tuple[int, str, bytes]
"""Status, content type and body."""


def bad_answers(material: Material) -> dict[str, Answer]:
    """The server's URLs that must fail, by path."""
    stamped = next(retouch.path for retouch in material.retouches if retouch.boxes)
    jpeg = (material.folder / stamped).read_bytes()
    page = b"<!doctype html><title>Sign in</title><p>Please sign in to see this photo."
    return {
        "bad/missing.jpg": (404, "text/plain", b"there is no such photo"),
        "bad/broken-server.jpg": (500, "text/plain", b"the server is broken"),
        "bad/page.jpg": (200, "text/html", page),
        "bad/half.jpg": (200, "image/jpeg", jpeg[: len(jpeg) // 2]),
        "bad/empty.png": (200, "image/png", b""),
        "bad/bomb.png": (200, "image/png", bomb(30_000)),
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
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(material, answers))
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
        rows = {use: [{"source": self.url(path)} for path in paths] for use, paths in self.material.photos.items()}
        rows["inpaint"] = [
            {
                "source": self.url(retouch.path),
                **({"mask": self.url(retouch.mask)} if retouch.mask else {"boxes": retouch.boxes}),
            }
            for retouch in self.material.retouches
        ]
        (self.material.folder / "lists").mkdir()
        paths = {}
        for use, good in rows.items():
            duplicate = good[:1] if use in ("rembg", "opencv") else []
            boxes = {"boxes": "0.4,0.4,0.2,0.2"} if use == "inpaint" else {}
            listed = [*_repeated(good, count), *duplicate, *({"source": url, **boxes} for url in self.bad)]
            paths[use] = self.material.folder / "lists" / f"{use}.jsonl"
            paths[use].write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
        return paths


def _repeated(rows: list[dict[str, str]], count: int | None) -> list[dict[str, str]]:
    """At least `count` rows: if there are fewer, they are repeated with different URLs."""
    again = ((rows[i % len(rows)], i // len(rows) + 1) for i in range(len(rows), count or 0))
    return rows + [{**row, "source": f"{row['source']}?copy={number}"} for row, number in again]


def _handler(material: Material, bad: dict[str, Answer]) -> type[BaseHTTPRequestHandler]:
    """Serves the demo's photos and masks and these answers, and nothing else from its folder."""
    files = {path for paths in material.photos.values() for path in paths}
    files |= {path for retouch in material.retouches for path in (retouch.path, retouch.mask) if path}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            status, kind, body = bad.get(path, (404, "text/plain", b"not found"))
            if path in files:
                status, kind, body = 200, "application/octet-stream", (material.folder / path).read_bytes()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
            """Keep quiet: the worker logs every download."""

    return Handler
