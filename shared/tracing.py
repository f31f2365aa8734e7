"""OpenTelemetry traces: one per job. Its id and that of its first span follow from the job's name, so all processes agree.

Off by default; then this module does not import OpenTelemetry. (redis-py does, if it is installed.)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from imagemill.shared.errors import MissingExtra
from imagemill.shared.log_fields import trace_id
from imagemill.shared.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

FLUSH_SECONDS = 2.0
"""How long the end of a process waits for the last spans to be sent."""


def span_id(*names: object) -> int:
    """The id of a span that others name as their parent before it has ended."""
    return int.from_bytes(hashlib.sha256(f"imagemill span {names}".encode()).digest()[:8]) or 1


class Traces:
    """Records spans that are over. Sends them from its own thread, so make one per process, after the fork."""

    def __init__(self, exporter: SpanExporter | None = None, *, images: int = 1) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()

        class Ids(RandomIdGenerator):
            trace = span = 0

            def generate_trace_id(self) -> int:
                return self.trace

            def generate_span_id(self) -> int:
                return self.span or super().generate_span_id()

        self.images = images
        self._ids, self._lock = Ids(), Lock()
        resource = Resource.create({"service.name": "imagemill"})  # OTEL_SERVICE_NAME takes precedence
        self._provider = TracerProvider(id_generator=self._ids, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("imagemill")

    def record(
        self,
        job: str,
        name: str,
        start: float,
        end: float | None = None,
        *,
        span: int = 0,
        parent: int | None = None,
        error: str | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> int:
        """Record a span from `start` to `end` (seconds since 1970; now) and return its id.

        Without a `parent` it belongs to the job's first span, whose own id is `span_id(job)`.
        """
        from opentelemetry.trace import Status, StatusCode

        trace, first = int(trace_id(job), 16), span_id(job)
        context = None if span == first else self._context(trace, parent or first)
        attributes = {"job": job, **{key: value for key, value in (fields or {}).items() if value is not None}}
        with self._lock:
            self._ids.trace, self._ids.span = trace, span
            made = self._tracer.start_span(name, context, attributes=attributes, start_time=_ns(start))
        if error:
            made.set_status(Status(StatusCode.ERROR, error))
        made.end(_ns(time.time() if end is None else end))
        return int(made.get_span_context().span_id)

    def _context(self, trace: int, parent: int) -> Any:
        from opentelemetry.context import Context
        from opentelemetry.sdk.trace.sampling import Decision
        from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

        # The sampler decides by the trace's id, so that all processes decide alike.
        decision = self._provider.sampler.should_sample(Context(), trace, "job").decision
        flags = TraceFlags(TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT)
        return set_span_in_context(NonRecordingSpan(SpanContext(trace, parent, is_remote=True, trace_flags=flags)), Context())

    def close(self) -> None:
        """Send what is left, unless that takes too long."""
        ending = Thread(target=self._provider.shutdown, daemon=True)  # `force_flush` would ignore its timeout
        ending.start()
        ending.join(FLUSH_SECONDS)


def open_traces(settings: Settings) -> Traces | None:
    """None unless tracing is on. Raises MissingExtra."""
    if not settings.tracing:
        return None
    try:
        return Traces(images=settings.trace_images)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"tracing needs {error.name}: pip install 'imagemill[tracing]'") from error


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
