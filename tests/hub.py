"""A fake Hugging Face Hub: one repository at one commit, with the hub's API and file URLs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".ckpt")
"""Suffixes of files in LFS, whose SHA-256 the hub gives."""


class Hub:
    """Runs while entered. All of this can be changed meanwhile: `files`, `commit`, to which the branch `main` points, and what
    goes wrong: `altered` content is served in place of a file's own, `broken` files give an error, `gated` ones are refused.
    """

    def __init__(self, source: str, files: Mapping[str, bytes]) -> None:
        self.source, self.files, self.altered = source, dict(files), dict[str, bytes]()
        self.commit, self.broken, self.gated = COMMIT, set[str](), False
        self.requests: list[str] = []

    def __enter__(self) -> Hub:
        hub = self

        class Request(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answer one request and log it in `requests`."""
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if self.source not in path:
            return self._send(request, b"{}", {"X-Error-Code": "RepoNotFound"}, body, status=401)
        revisions = ("main", self.commit)
        for revision in revisions:
            if path == f"/api/models/{self.source}/revision/{revision}":
                return self._send(request, json.dumps(self._info()).encode(), {"Content-Type": "application/json"}, body)
            if path == f"/api/models/{self.source}/tree/{revision}":
                return self._send(request, json.dumps(self._tree()).encode(), {"Content-Type": "application/json"}, body)
            name = path.removeprefix(f"/{self.source}/resolve/{revision}/")
            if name in self.files and self.gated:
                return self._send(request, b"{}", {"X-Error-Code": "GatedRepo"}, body, status=401)
            if name in self.broken and body:
                return self._send(request, b"{}", {}, body, status=500)
            if name in self.files:
                data = self.altered.get(name, self.files[name])
                headers = {
                    "ETag": f'"{self._etag(name)}"',
                    "X-Repo-Commit": self.commit,
                    "Content-Type": "application/octet-stream",
                }
                return self._send(request, data, headers, body)
        self._send(request, b"{}", {"X-Error-Code": "RevisionNotFound"}, body, status=404)
        return None

    def _send(
        self, request: BaseHTTPRequestHandler, data: bytes, headers: Mapping[str, str], body: bool, status: int = 200
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)

    def _etag(self, name: str) -> str:
        data = self.files[name]
        if name.endswith(LARGE):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": self._etag(name)}
            if name.endswith(LARGE):
                sibling["lfs"] = {"sha256": self._etag(name), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {
            "id": self.source,
            "modelId": self.source,
            "sha": self.commit,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }

    def _tree(self) -> list[dict[str, Any]]:
        tree = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": self._etag(name)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": self._etag(name), "size": len(data), "pointerSize": 130}
            tree.append(entry)
        return tree
