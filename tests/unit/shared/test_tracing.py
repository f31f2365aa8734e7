"""Traces: one per job, with ids that all processes derive alike."""

from __future__ import annotations

import socket
import time

import pytest

from imagemill.shared.log_fields import trace_id
from imagemill.shared.settings import Settings
from imagemill.shared.tracing import FLUSH_SECONDS, Traces, open_traces, span_id

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")


def test_spans_of_two_processes_form_one_trace() -> None:
    exporter = memory.InMemorySpanExporter()
    producer, worker = Traces(exporter), Traces(exporter)
    producer.record("job", "submit", 100.0, 101.0, span=span_id("job"), fields={"images": 3, "owner": None})
    share = span_id("job", "7")
    image = worker.record("job", "image", 102.0, 103.0, parent=share, error="not_found")
    worker.record("job", "fetch", 102.0, 102.5, parent=image)
    worker.record("job", "share", 101.5, 104.0, span=share)
    producer._provider.force_flush()
    worker._provider.force_flush()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {trace_id("job")}
    parents = {name: span.parent and span.parent.span_id for name, span in spans.items()}
    ids = {name: span.context.span_id for name, span in spans.items()}
    assert parents == {"submit": None, "share": ids["submit"], "image": ids["share"], "fetch": ids["image"]}
    assert dict(spans["submit"].attributes) == {"job": "job", "images": 3}
    assert (spans["image"].status.description, spans["fetch"].end_time - spans["fetch"].start_time) == (
        "not_found",
        500_000_000,
    )
    producer.close()
    worker.close()


@pytest.mark.parametrize("sampler", ["traceidratio", "parentbased_traceidratio"])
def test_sampler_of_the_standard_decides_for_whole_jobs(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    exporters = [memory.InMemorySpanExporter() for _ in range(2)]
    producer, worker = map(Traces, exporters)
    jobs = [f"job-{number}" for number in range(40)]
    for job in jobs:
        producer.record(job, "submit", 1.0, span=span_id(job))
        worker.record(job, "share", 2.0)
    producer.close()
    worker.close()
    seen = [span.attributes["job"] for exporter in exporters for span in exporter.get_finished_spans()]
    assert 0 < len(set(seen)) < len(jobs)
    assert sorted(seen) == sorted([*set(seen)] * 2)


def test_unresponsive_collector_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        traces = open_traces(Settings(_env_file=None, tracing=True))  # type: ignore[call-arg]
        assert traces is not None
        for _ in range(5000):  # more than fit
            traces.record("job", "image", 1.0)
        start = time.monotonic()
        traces.close()
        assert time.monotonic() - start < 3 * FLUSH_SECONDS


def test_tracing_is_off_by_default() -> None:
    assert open_traces(Settings(_env_file=None)) is None  # type: ignore[call-arg]
