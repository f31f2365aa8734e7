"""A job's record that outlives Redis: one JSON line per image, stored beside the results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from threading import Event
from typing import Any

from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.messages import Job, Row
from imagemill.shared.seeds import item_seed, next_seed
from imagemill.worker.checking.quality import REPAIRED_SEED
from imagemill.worker.line.image import CACHED
from imagemill.worker.line.stopped import Stopped
from imagemill.worker.line.versions import versions
from imagemill.worker.transfer.store import Store


def write_manifest(
    job: str, spec: Job, ledger: ReadLedger, store: Store, fingerprint: str | None = None, *, stop: Event | None = None
) -> str:
    """Write `{job}/manifest.jsonl` row by row and return its URL.

    Raises the store's ImageErrors, and Stopped once `stop` is set.

    `fingerprint` is that of this node's engine: its libraries and its weights' digests.
    """

    def lines() -> Iterator[bytes]:
        for row in ledger.rows(job):
            if stop is not None and stop.is_set():
                raise Stopped
            yield (
                json.dumps(manifest_line(job, spec, row, fingerprint), ensure_ascii=False).encode(errors="backslashreplace")
                + b"\n"
            )

    return store.put_stream(f"{job}/manifest.jsonl", lines(), "application/x-ndjson")


def manifest_line(job: str, spec: Job, row: Row, fingerprint: str | None = None) -> dict[str, Any]:
    """Everything known about one image's result and how it was made."""
    line = row.model_dump(exclude_none=True)
    if row.result is not None:
        measured = {
            "source_format",
            "source_bytes",
            "source_size",
            "output_bytes",
            "output_size",
            "seconds",
            "notes",
            "filled",
            "node",
        }
        line |= row.result.model_dump(include={*measured, "quality"}, exclude_none=True)
    line |= {"job": job, "operation": spec.operation, "options": spec.options.model_dump(mode="json")}
    line |= {"metadata": spec.output.metadata, "versions": versions()}
    # A duplicate shares the result, and so the seed, of the row that it repeats.
    seed = item_seed(spec.options, row.index if row.duplicate_of is None else row.duplicate_of, row.source)
    if seed is not None and row.result is not None and REPAIRED_SEED in row.result.notes:
        seed = next_seed(seed)
    line |= {name: value for name, value in (("seed", seed), ("fingerprint", fingerprint)) if value is not None}
    if row.result is not None and row.state == "done" and CACHED not in row.result.notes:  # unknown for a copy
        line["batch"] = row.result.batch
    return line
