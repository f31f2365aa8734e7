"""A photo server and an S3 endpoint on loopback, in one separate process that uses little CPU.

with Servers(photos, put_delay=0.05) as servers:
    servers.photo(number, delay=0.1)   # a URL; each number has different bytes
    servers.s3                         # the endpoint, which accepts any PUT to any bucket and keeps nothing
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from skimage import data

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 4000, 3000


def photos() -> list[bytes]:
    """12-megapixel JPEGs at quality 90, about 3 MB each: scikit-image's photos, tiled by mirroring."""
    files = []
    for source in (data.astronaut(), data.coffee(), data.rocket(), data.chelsea()):
        more = ((0, HEIGHT - source.shape[0]), (0, WIDTH - source.shape[1]), (0, 0))
        pixels = np.pad(source, more, mode="symmetric")
        done, file = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
        assert done
        files.append(file.tobytes())
    return files


class Servers:
    """Runs both servers while entered; each PUT takes `put_delay` seconds."""

    def __init__(self, files: list[bytes], *, put_delay: float) -> None:
        self._files, self._put_delay, self._next = files, put_delay, 0

    def __enter__(self) -> Servers:
        self._folder = tempfile.TemporaryDirectory()
        for number, file in enumerate(self._files):
            Path(self._folder.name, f"{number}.jpg").write_bytes(file)
        command = [sys.executable, "-m", "bench.servers", self._folder.name, str(self._put_delay)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ports = json.loads(self._process.stdout.readline())
        self.source, self.s3 = (f"http://127.0.0.1:{ports[name]}" for name in ("source", "s3"))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the process ends when its stdin is closed
        self._process.wait()
        self._folder.cleanup()

    def photo(self, number: int, *, delay: float) -> str:
        """URL of a photo whose response starts after `delay` seconds."""
        return f"{self.source}/{round(delay * 1000)}/{number % len(self._files)}/{number}.jpg"

    def fresh(self, count: int, *, delay: float) -> list[str]:
        """URLs that were not returned before, so that no result can come from the cache."""
        first, self._next = self._next, self._next + count
        return [self.photo(number, delay=delay) for number in range(first, first + count)]


class _Http(asyncio.Protocol):
    """As much HTTP/1.1 as the clients here need: sequential requests on kept-alive connections."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._head, self._body_left, self._request = b"", 0, ("", "")

    def data_received(self, data: bytes) -> None:
        if self._body_left:
            self._take_body(len(data))
            return
        self._head += data
        head, mark, rest = self._head.partition(b"\r\n\r\n")
        if not mark:
            return
        self._head = b""
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, path, _ = first.split(" ", 2)
        self._request, self._body_left = (method, path), int(headers.get("content-length", 0))
        if headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._take_body(len(rest))

    def _take_body(self, size: int) -> None:
        self._body_left -= size
        if self._body_left <= 0:
            self.respond(*self._request)

    def later(self, seconds: float, *parts: bytes) -> None:
        """Write a response after some seconds."""
        if seconds > 0:
            asyncio.get_running_loop().call_later(seconds, self._transport.writelines, parts)
        else:
            self._transport.writelines(parts)

    def respond(self, method: str, path: str) -> None:
        """Respond to a complete request."""
        raise NotImplementedError


class _Source(_Http):
    files: tuple[bytes, ...] = ()

    def respond(self, method: str, path: str) -> None:
        """Serve `/MILLISECONDS/PHOTO/NUMBER.jpg`, with the number in a comment inside the file."""
        _, delay, photo, number = path.split("/")
        assert method == "GET"
        file, mark = memoryview(self.files[int(photo)]), number.encode()
        comment = b"\xff\xfe" + (len(mark) + 2).to_bytes(2, "big") + mark
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(file) + len(comment)}\r\n\r\n".encode()
        self.later(int(delay) / 1000, head, bytes(file[:2]), comment, file[2:])


class _S3(_Http):
    put_delay = 0.0

    def respond(self, method: str, path: str) -> None:
        bucket_only = "/" not in path.partition("?")[0].strip("/")
        if method == "PUT":
            etag = "00000000000000000000000000000000"
            self.later(self.put_delay, f'HTTP/1.1 200 OK\r\nETag: "{etag}"\r\nContent-Length: 0\r\n\r\n'.encode())
        elif method == "HEAD" and bucket_only:
            self.later(0, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            self.later(0, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


async def _serve(folder: Path, put_delay: float) -> None:
    _Source.files = tuple(path.read_bytes() for path in sorted(folder.glob("*.jpg")))
    _S3.put_delay = put_delay
    loop = asyncio.get_running_loop()
    ports = {}
    for name, protocol in (("source", _Source), ("s3", _S3)):
        server = await loop.create_server(protocol, "127.0.0.1", 0)
        ports[name] = server.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2])))
