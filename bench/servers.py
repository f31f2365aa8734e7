"""A photo server and an S3 endpoint on loopback, in one separate process that uses little CPU.

with Servers(photos(), put_delay=0.05) as servers:
    servers.photo(number, delay=0.1)   # a URL; each number has different bytes
    servers.s3                         # the endpoint, which accepts any PUT to any bucket and keeps nothing
    servers.load()                     # how many GETs and PUTs there were, and how many at the same time
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
from skimage import data

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 4000, 3000
TAIL_SECONDS = 3.0
"""How long the slowest GETs take, of those with a tail."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""


def photos(width: int = WIDTH, height: int = HEIGHT) -> list[bytes]:
    """JPEGs at quality 90, by default 12 megapixels and about 3 MB each: scikit-image's photos, mirrored or cropped."""
    files = []
    for source in (data.astronaut(), data.coffee(), data.rocket(), data.chelsea()):
        more = ((0, max(0, height - source.shape[0])), (0, max(0, width - source.shape[1])), (0, 0))
        pixels = np.pad(source, more, mode="symmetric")[:height, :width]
        done, file = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
        assert done
        files.append(file.tobytes())
    return files


@dataclass
class Load:
    """Requests that a server has had: all, those that wait for their response now, and the most that ever did."""

    all: int = 0
    now: int = 0
    most: int = 0

    def begin(self) -> None:
        """A request has arrived."""
        self.all, self.now = self.all + 1, self.now + 1
        self.most = max(self.most, self.now)


class Servers:
    """Runs both servers while entered; each PUT takes `put_delay` seconds. Photos come from so many `hosts` in turn."""

    def __init__(self, files: list[bytes], *, put_delay: float, hosts: int = 1) -> None:
        self._files, self._put_delay, self._hosts, self._next = files, put_delay, hosts, 0

    def __enter__(self) -> Servers:
        self._folder = tempfile.TemporaryDirectory()
        for number, file in enumerate(self._files):
            Path(self._folder.name, f"{number}.jpg").write_bytes(file)
        command = [sys.executable, "-m", "bench.servers", self._folder.name, str(self._put_delay), str(self._hosts)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ports = json.loads(self._process.stdout.readline())
        self.sources = [f"http://127.0.0.{1 + number}:{ports['source']}" for number in range(self._hosts)]
        self.s3, self.pid = f"http://127.0.0.1:{ports['s3']}", self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the process ends when its stdin is closed
        self._process.wait()
        self._folder.cleanup()

    def photo(self, number: int, *, delay: float) -> str:
        """URL of a photo whose response starts after `delay` seconds."""
        return f"{self.sources[number % self._hosts]}/{round(delay * 1000)}/{number % len(self._files)}/{number}.jpg"

    def fresh(self, count: int, *, delay: float, tail: float = 0.0) -> list[str]:
        """URLs that were not returned before, so that no result can come from the cache. A share of `tail` takes 3 s."""
        first, self._next = self._next, self._next + count
        slow = Random(first)
        delays = (TAIL_SECONDS if slow.random() < tail else delay for _ in range(count))
        return [self.photo(number, delay=delay) for number, delay in zip(range(first, first + count), delays, strict=True)]

    def load(self) -> dict[str, Load]:
        """The `GET`s of photos and the `PUT`s that the servers have had so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return {method: Load(**seen) for method, seen in json.loads(self._process.stdout.readline()).items()}


class _Http(asyncio.Protocol):
    """As much HTTP/1.1 as the clients here need: sequential requests on kept-alive connections."""

    load: Load
    counted = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._head, self._body_left, self._request, self._counts = b"", 0, ("", ""), False

    def connection_lost(self, exc: Exception | None) -> None:
        self._over()

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
        if method == self.counted:
            self._counts = True
            self.load.begin()
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
            asyncio.get_running_loop().call_later(seconds, self._write, parts)
        else:
            self._write(parts)

    def _write(self, parts: tuple[bytes, ...]) -> None:
        self._over()
        if not self._transport.is_closing():  # the client may have lost patience
            self._transport.writelines(parts)

    def _over(self) -> None:
        self.load.now -= self._counts
        self._counts = False

    def respond(self, method: str, path: str) -> None:
        """Respond to a complete request."""
        raise NotImplementedError


class _Source(_Http):
    files: tuple[bytes, ...] = ()
    load, counted = Load(), "GET"

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
    load, counted = Load(), "PUT"

    def respond(self, method: str, path: str) -> None:
        bucket_only = "/" not in path.partition("?")[0].strip("/")
        if method == "PUT":
            etag = "00000000000000000000000000000000"
            self.later(self.put_delay, f'HTTP/1.1 200 OK\r\nETag: "{etag}"\r\nContent-Length: 0\r\n\r\n'.encode())
        elif method == "HEAD" and bucket_only:
            self.later(0, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            self.later(0, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


async def _serve(folder: Path, put_delay: float, hosts: int) -> None:
    _Source.files = tuple(path.read_bytes() for path in sorted(folder.glob("*.jpg")))
    _S3.put_delay = put_delay
    loop, ports = asyncio.get_running_loop(), {"source": 0, "s3": 0}
    for name, protocol, number in (("source", _Source, hosts), ("s3", _S3, 1)):
        for host in range(1, number + 1):  # all on the same port
            server = await loop.create_server(protocol, f"127.0.0.{host}", ports[name], backlog=BACKLOG)
            ports[name] = server.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps({server.counted: asdict(server.load) for server in (_Source, _S3)}), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
