"""An HTTP proxy in front of an S3 server, which is slow or busy, or refuses, when objects are stored, or follows a policy."""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.services.s3_policy import Policy

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "date", "server"}
"""Headers that belong to one connection, or that the proxy writes itself."""


class S3Proxy:
    """Forwards requests to `endpoint`. Each PUT takes `put_seconds` more, and with `busy`, every second one gets a 503;
    with `read_only`, every one a 403. So does each request that a `policy` doesn't allow.

    `puts` counts the PUT requests, `refused` those that got a 503.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        put_seconds: float = 0.0,
        busy: bool = False,
        read_only: bool = False,
        policy: Policy | None = None,
    ) -> None:
        self.put_seconds, self.busy, self.read_only, self.policy = put_seconds, busy, read_only, policy
        self.puts = self.refused = 0
        self._endpoint = urlsplit(endpoint).netloc
        self._lock = threading.Lock()
        self._server = self._make_server()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _refuses(self) -> bool:
        with self._lock:
            self.puts += 1
            refused = self.busy and self.puts % 2 == 1
            self.refused += refused
            return refused

    def _make_server(self) -> ThreadingHTTPServer:
        outer = self

        class Request(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                forbidden = outer.policy is not None and not outer.policy.allows(self.command, self.path, self.headers)
                if forbidden or (self.command == "PUT" and outer.read_only):
                    self.answer(403, {"Content-Type": "application/xml"}, DENIED)
                    return
                if self.command == "PUT":
                    if outer._refuses():
                        self.answer(503, {"Content-Type": "application/xml"}, BUSY)
                        return
                    time.sleep(outer.put_seconds)
                connection = http.client.HTTPConnection(outer._endpoint, timeout=60)
                try:
                    headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
                    connection.request(self.command, self.path, body, headers)  # with the Host that the client has signed
                    response = connection.getresponse()
                    self.answer(response.status, dict(response.getheaders()), response.read())
                finally:
                    connection.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                kept = {name: value for name, value in headers.items() if name.lower() not in HOP}
                if self.command != "HEAD":
                    kept |= {"Content-Length": str(len(body))}
                for name, value in kept.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        server.daemon_threads = True
        return server
