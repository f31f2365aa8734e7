"""What a node counts for Prometheus. Its processes write into files that they share; `metrics_server` serves them.

`start_counting` must run in the parent before prometheus_client is imported anywhere in the node.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from imagemill.shared.engines import split_lane
from imagemill.shared.errors import ImageError, leaves
from imagemill.shared.messages import ItemResult
from imagemill.shared.settings import Settings
from imagemill.worker.hardware.device import visible_gpu
from imagemill.worker.line.meter import Meter
from imagemill.worker.line.waits import CAUSES, Cause

if TYPE_CHECKING:
    from imagemill.worker.line.batch_sizes import BatchSizes
    from imagemill.worker.line.batching import Recipe

log = logging.getLogger(__name__)

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable with which prometheus_client learns where a node's processes write."""
PREFIX = "imagemill-metrics-"
"""Folders are named after it, the process ID of their node, and a random suffix."""
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
SIZES = (1, 2, 4, 8, 16, 32, 64)
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)


def start_counting(settings: Settings, node: str) -> subprocess.Popen[bytes] | None:
    """Start the process that serves this node's metrics, if a port is set. It ends with this process, however that ends."""
    port = settings.worker.metrics_port
    if port is None:
        return None
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):  # by a server that was killed
        pid = left.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    os.environ[FOLDER] = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
    command = [sys.executable, "-m", "imagemill.worker.node.metrics_server", node, settings.worker.metrics_host, str(port)]
    if settings.worker.gpu is not None:
        command.append(visible_gpu(settings.worker.gpu, os.environ.get("CUDA_VISIBLE_DEVICES")))
    return subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603


class ParentMeter:
    """What the parent of a node counts; nothing unless `start_counting` has started a server."""

    def __init__(self) -> None:
        self._wakes = None
        if FOLDER in os.environ:
            from prometheus_client import Counter, Gauge

            self._wakes = Counter(
                "imagemill_wake_ups_republished",
                "Wake-ups sent again because a lane had work but none on its way.",
                registry=None,
            )
            self._models = Gauge(
                "imagemill_model_info",
                "1 for each engine and model that the node offers, 0 for one that it has offered.",
                ("operation", "engine", "model"),
                registry=None,
                multiprocess_mode="livemax",
            )
        self._offered: set[str] = set()

    def offers(self, lanes: Iterable[str]) -> None:
        """The node works in these lanes now."""
        if self._wakes is None:
            return
        offered = set(lanes)
        for lane in self._offered | offered:
            self._models.labels(*split_lane(lane)).set(lane in offered)
        self._offered |= offered

    def republished(self, count: int) -> None:
        """Wake-ups were sent again."""
        if self._wakes is not None:
            self._wakes.inc(count)

    def died(self, pid: int) -> None:
        """A child has died: its gauges mean nothing any more; its counters stay."""
        if self._wakes is not None:
            from prometheus_client.multiprocess import mark_process_dead

            mark_process_dead(pid)


def child_meter(operations: Sequence[str]) -> Meter:
    """The counters of a child that carries out these operations."""
    return PrometheusMeter(operations) if FOLDER in os.environ else Meter()


class PrometheusMeter(Meter):
    """Counts into the files of this node. Thread-safe."""

    def __init__(self, operations: Sequence[str]) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"imagemill_{name}", text, labels, registry=None)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"imagemill_{name}", text, labels, registry=None, multiprocess_mode="livemax")

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"imagemill_{name}", text, labels, registry=None, buckets=buckets)

        self._images = counter("images", "Images with a result: computed, reused, kept or failed.", "operation", "result")
        self._failed = counter("images_failed", "Failed images by code.", "operation", "code")
        self._retries = counter("image_retries", "Attempts beyond each image's first.", "operation")
        self._stages = histogram("stage_seconds", "Seconds of an image in a stage.", SECONDS, "operation", "stage")
        self._sizes = histogram("batch_size", "Images that ran on the device together.", SIZES, "operation")
        self._fill = histogram("batch_fill_ratio", "Size of a batch relative to the largest allowed.", RATIOS, "operation")
        self._busy = counter("device_busy_seconds", "Seconds the device was working.", "operation")
        self._waits = counter("device_wait_seconds", "Seconds the device waited, by what it waited for.", "cause")
        self._peak = gauge("device_memory_peak_ratio", "Highest share of the GPU's memory in use during a run.")
        self._oom = counter("out_of_memory", "Runs that did not fit into memory, and were repeated with fewer images.")
        self._relief = gauge("relief_level", "How much the engine had to economise on memory for a single image; 0 is normal.")
        self._received = counter("received_bytes", "Bytes of source images.")
        self._stored = counter("stored_bytes", "Bytes of results.")
        self._errors = counter("store_errors", "Failed requests to a store, including retried ones, by code.", "code")
        self._paused = gauge("store_paused", "1 while images wait for an unresponsive store.")
        self._seen: dict[int, BatchSizes] = {}
        self._latest = 0.0, 0.0, 0  # peak, relief and failures
        self._of = cache(lambda metric, *labels: metric.labels(*labels))  # `labels` takes longer than counting
        # Prometheus sees only that a counter rises, not that it appears: a first failure would go unnoticed.
        for operation, error in product(operations, leaves(ImageError)):
            self._failed.labels(operation, error.code)
        for error in leaves(ImageError):
            if error.code.startswith("storage_"):
                self._errors.labels(error.code)
        for cause in CAUSES:
            self._waits.labels(cause)
        for operation, how in product(operations, ("computed", "reused", "kept", "failed")):
            self._images.labels(operation, how)

    def recorded(self, operation: str, result: ItemResult, how: str) -> None:
        self._of(self._images, operation, how).inc()
        if result.code is not None:
            self._failed.labels(operation, result.code).inc()
        self._of(self._retries, operation).inc(max(0, result.attempts - 1))
        for stage, seconds in result.seconds.items():
            self._of(self._stages, operation, stage).observe(seconds)
        self._received.inc(result.source_bytes or 0)
        self._stored.inc(result.output_bytes or 0)

    def ran(self, recipe: Recipe, parts: Sequence[int], seconds: float) -> None:
        name = recipe.operation.spec.name
        self._busy.labels(name).inc(seconds)
        for size in parts:
            self._of(self._sizes, name).observe(size)
            self._of(self._fill, name).observe(size / recipe.most)
        self._watch(recipe.sizes)

    def waited(self, cause: Cause, seconds: float) -> None:
        self._waits.labels(cause).inc(seconds)

    def _watch(self, sizes: BatchSizes) -> None:
        """Sum up the engines that have run."""
        self._seen[id(sizes)] = sizes
        seen = self._seen.values()
        peak, relief, failures = max(one.top for one in seen), max(one.level for one in seen), sum(one.failures for one in seen)
        if (peak, relief, failures) != self._latest:
            self._peak.set(peak)
            self._relief.set(relief)
            self._oom.inc(failures - self._latest[2])
            self._latest = peak, relief, failures

    def store_failed(self, code: str) -> None:
        self._errors.labels(code).inc()

    def store_waits(self, waits: bool) -> None:
        self._paused.set(waits)
