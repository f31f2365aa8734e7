"""Traces of a real node, as a collector receives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.log_fields import trace_id
from imagemill.shared.tracing import span_id
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import cli
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration
messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@contextmanager
def collector(spans: list[Any]) -> Iterator[str]:
    """The URL of a collector, which adds what it receives to `spans`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = messages.ExportTraceServiceRequest.FromString(body)
            spans.extend(span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_submission_wait_and_stages_form_one_trace(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    images.routes |= {f"/{number}.png": photo(number) for number in range(3)}
    spans: list[Any] = []
    with collector(spans) as url, client_for(own_redis.url) as client:
        settings = {"IMAGEMILL_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        environment = environment_for(own_redis.url, tmp_path, **settings)
        with WorkerProcess(environment, tmp_path) as node:
            node.wait_ready()
            sources = [images.url(f"/{number}.png") for number in range(3)]
            flags = ("--operation", "stylize", "--output", str(tmp_path), "--name", "traced")
            assert cli(environment, "submit", *sources, *flags).returncode == 0
            wait_until(lambda: client.status("traced").over, "the job is over")
        wait_until(lambda: {"submit", "wait", "share"} <= {span.name for span in spans}, "the spans have arrived")
    assert {span.trace_id.hex() for span in spans} == {trace_id("traced")}
    by_id = {span.span_id.hex(): span for span in spans}
    (submit,) = [span for span in spans if span.name == "submit"]
    assert (submit.span_id.hex(), submit.parent_span_id) == (f"{span_id('traced'):016x}", b"")
    image = next(span for span in spans if span.name == "image")
    assert by_id[image.parent_span_id.hex()].name == "share"
    stages = [span.name for span in spans if span.parent_span_id == image.span_id]
    assert [name for name in stages if name != "wait"] == [
        "fetch",
        "decode",
        "prepare",
        "run",
        "finish",
        "check",
        "encode",
        "store",
    ]
    assert sum(span.name == "image" for span in spans) == sum(span.name == "share" for span in spans)  # one of each share
