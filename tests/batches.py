"""The device step on a batch, as the line runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import run_parts
from imagemill.worker.operations.base import AnyOperation, Sample


def run_batch(operation: AnyOperation, samples: Sequence[Sample[Any, Any]], sizes: BatchSizes) -> list[Any]:
    """For each sample its output, or the error of that sample alone."""
    return [output for part in run_parts(operation, samples, sizes) for output in part]
