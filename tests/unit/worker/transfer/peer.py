"""An HTTP server in the network's own loop, so that hundreds of requests at once need no thread each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from imagemill.worker.transfer.network import Network


@dataclass(frozen=True)
class Request:
    """What a client has sent; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What it gets."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Peer:
    """Answers as the test says, and keeps the `requests`. `running` counts those that wait for their answer."""

    def __init__(self, network: Network, answer: Callable[[Request], Awaitable[Answer]]) -> None:
        self.requests: list[Request] = []
        self.running = 0
        self._network, self._answer = network, answer

    def __enter__(self) -> Self:
        self._server = self._network.call(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._network.loop.call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().rstrip().split("\r\n")
                method, path, _ = first.split(" ")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                if "expect" in headers:  # boto3 asks before it sends a body
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request = Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))
                self.requests.append(request)
                self.running += 1
                try:
                    answer = await self._answer(request)
                finally:
                    self.running -= 1
                length = dict(answer.headers).get("Content-Length", str(len(answer.body)))
                more = [header for header in answer.headers if header[0] != "Content-Length"]
                text = "".join(f"{name}: {value}\r\n" for name, value in (("Content-Length", length), *more) if value)
                writer.write(f"HTTP/1.1 {answer.status} x\r\n{text}\r\n".encode() + answer.body)
                await writer.drain()
                if not length:  # the end of the connection is the end of the body
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
