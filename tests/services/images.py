"""A web server on loopback whose replies each test scripts."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Handler = BaseHTTPRequestHandler
Route = bytes | Callable[[Handler], None]


class ImageServer:
    """A threaded web server on 127.0.0.1 with keep-alive, whose replies each test scripts.

    `routes` maps paths, without query, to bytes (sent with status 200 as image/png) or to a function that handles the
    request; other paths get `fallback` or 404. `hits` counts requests per path and `connections` the TCP connections;
    `last_headers` and `last_path` describe the latest request. Setting `released` ends stalled requests; `stop` sets it.
    """

    def __init__(self, routes: Mapping[str, Route] | None = None) -> None:
        self.routes: dict[str, Route] = dict(routes or {})
        self.fallback: Route | None = None
        self.hits: Counter[str] = Counter()
        self.connections = 0
        self.last_headers: dict[str, str] = {}
        self.last_path = ""
        self.stalled = threading.Event()
        self.released = threading.Event()
        self._lock = threading.Lock()
        self.listener = self._make_server()
        self.port: int = self.listener.server_address[1]
        self._thread = threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The URL of a path on this server."""
        return f"http://{host}:{self.port}{path}"

    def start(self) -> ImageServer:
        """Serve until `stop`."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Release stalled requests and close."""
        self.released.set()
        self.listener.shutdown()
        self.listener.server_close()
        self._thread.join()

    def __enter__(self) -> ImageServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def hang(self, handler: Handler) -> None:
        """A route that accepts the request and sends nothing until released."""
        self.stalled.set()
        self.released.wait(60)
        handler.close_connection = True

    def trickle(self, data: bytes, pause: float = 0.05) -> Route:
        """A route that sends its headers at once, then one byte every `pause` seconds."""

        def send(handler: Handler) -> None:
            start_reply(handler, 200, {"Content-Length": str(len(data)), "Content-Type": "image/png"})
            for n in range(len(data)):
                if self.released.wait(pause):
                    break
                handler.wfile.write(data[n : n + 1])

        return send

    def _make_server(self) -> ThreadingHTTPServer:
        outer = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                """Ignore clients that hang up, as many tests do; report every other error."""
                if not isinstance(sys.exception(), ConnectionError):
                    super().handle_error(request, client_address)  # type: ignore[arg-type]

        class Request(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # Nagle delays the body by 40 ms on reused connections

            def setup(self) -> None:
                super().setup()
                with outer._lock:
                    outer.connections += 1

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                """Log nothing."""

        return Server(("127.0.0.1", 0), Request)

    def _answer(self, handler: Handler) -> None:
        path = handler.path.partition("?")[0]
        with self._lock:
            self.hits[path] += 1
            self.last_headers = dict(handler.headers.items())
            self.last_path = handler.path
        route = self.routes.get(path, self.fallback)
        if route is None:
            reply(handler, 404, b"not found", "text/plain")
        elif isinstance(route, bytes):
            reply(handler, 200, route)
        else:
            route(handler)


def start_reply(handler: Handler, status: int, headers: Mapping[str, str]) -> None:
    """Send the status line and headers."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()


def reply(
    handler: Handler, status: int, body: bytes, kind: str = "image/png", headers: Mapping[str, str] | None = None
) -> None:
    """Send a complete response."""
    start_reply(handler, status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
    handler.wfile.write(body)


def answers(status: int, body: bytes = b"", kind: str = "image/png", headers: Mapping[str, str] | None = None) -> Route:
    """A route that always sends this response."""
    return lambda handler: reply(handler, status, body, kind, headers)


def html(text: str = "<!DOCTYPE html><html><body>Please log in</body></html>", kind: str = "text/html; charset=utf-8") -> Route:
    """A route that sends a web page instead of an image."""
    return answers(200, text.encode(), kind)


def redirect(location: str, status: int = 302) -> Route:
    """A route that redirects; pointed at its own path, it loops."""
    raw = location.encode().decode("latin-1")  # http.server writes headers in latin-1; servers send UTF-8
    return answers(status, headers={"Location": raw})


def failing(times: int, status: int, then: bytes, headers: Mapping[str, str] | None = None) -> Route:
    """A route that fails the first `times` requests with `status`, then sends the bytes."""
    lock, left = threading.Lock(), [times]

    def send(handler: Handler) -> None:
        with lock:
            left[0] -= 1
            failed = left[0] >= 0
        if failed:
            reply(handler, status, b"try later", "text/plain", headers)
        else:
            reply(handler, 200, then)

    return send


def truncated(data: bytes, missing: int) -> Route:
    """A route that announces all of `data` but closes the connection `missing` bytes early."""

    def send(handler: Handler) -> None:
        start_reply(handler, 200, {"Content-Length": str(len(data)), "Content-Type": "image/png"})
        handler.wfile.write(data[: len(data) - missing])
        handler.close_connection = True

    return send


def endless(kind: str = "image/png", length: int | None = None) -> Route:
    """A route that sends until the client hangs up, with a Content-Length only if `length` is set."""

    def send(handler: Handler) -> None:
        handler.close_connection = True
        start_reply(handler, 200, {"Content-Type": kind, **({"Content-Length": str(length)} if length else {})})
        block = b"\x89PNG" + bytes(65_532)
        while True:
            handler.wfile.write(block)

    return send


def reset(data: bytes) -> Route:
    """A route that resets the connection after half of `data`."""

    def send(handler: Handler) -> None:
        start_reply(handler, 200, {"Content-Length": str(len(data)), "Content-Type": "image/png"})
        handler.wfile.write(data[: len(data) // 2])
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        handler.connection.close()

    return send


def stalled(data: bytes, released: threading.Event) -> Route:
    """A route that sends half of `data`, and then nothing until it is released."""

    def send(handler: Handler) -> None:
        handler.close_connection = True
        start_reply(handler, 200, {"Content-Length": str(len(data)), "Content-Type": "image/png"})
        handler.wfile.write(data[: len(data) // 2])
        released.wait(60)

    return send
