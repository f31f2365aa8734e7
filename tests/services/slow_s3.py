"""A stand-in for an S3 server that takes everything, and holds uploads back for as long as a test wants."""

from __future__ import annotations

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Self


class SlowS3:
    """`puts` are the keys that were uploaded, in order. An upload whose key ends with `held` waits for `released`."""

    def __init__(self, held: str) -> None:
        self.held, self.released, self.waiting = held, Event(), Event()
        self.puts: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path.endswith(site.held):
                    site.waiting.set()
                    site.released.wait(60)
                site.puts.append(self.path)
                self._answer(hashlib.md5(body, usedforsecurity=False).hexdigest())

            def do_HEAD(self) -> None:
                self._answer("")

            def _answer(self, tag: str) -> None:
                self.send_response(200)
                self.send_header("ETag", f'"{tag}"')
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
