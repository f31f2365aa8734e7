"""What must be true after every fault."""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
from PIL import Image

from imagemill.shared.ledger.scripts import key
from imagemill.shared.messages import Row
from tests.fakes import digest

if TYPE_CHECKING:
    from bench.fault_run import FaultRun

FEW = 5
"""Examples of what is wrong."""
SETTLE_SECONDS = 15.0
WINDOW = 2.0
"""Seconds over which a rate is measured."""

LASTING = re.compile(
    r"imagemill:(clocks:\w+|latest|weights|lanes|nodes(:.+)?|node-children|rates:.+|children|speed|jobs|tended|sequence)"
)
"""Keys of ours without expiry once all jobs are over: those listed in shared/ledger/__init__.py and shared/fleet.py."""
KOMBU = re.compile(r"_kombu\.binding.+|unacked|unacked_index")
"""Those of Celery: which queues there are, and the messages that nodes hold."""


def check(run: FaultRun, jobs: Sequence[str], failed: int, again: int | None, may_be_late: bool) -> str:
    """See FaultRun.check."""
    wrong: list[str] = []
    rows = {job: list(run.client.results(job)) for job in jobs}
    for job in jobs:
        wrong += _wrong_counts(run, job, rows[job])
        wrong += _wrong_manifest(run, job, rows[job])
    in_all = [row for job in jobs for row in rows[job]]
    lost = [row for row in in_all if row.state == "failed"]
    if len(lost) != failed:
        wrong.append(f"{len(lost)} images failed instead of {failed}: {[(row.index, row.message) for row in lost[:FEW]]}")
    wrong += _wrong_objects(run, jobs, in_all)
    second, late = _computed(run, jobs, rows)
    if late and not may_be_late:
        wrong.append(f"{late} images were computed again after their result was recorded")
    if again is not None and second > again:
        wrong.append(f"{second} computations were begun again instead of at most {again}")
    wrong += _lasting_keys(run)
    assert not wrong, "; ".join(wrong)
    done = len(in_all) - len(lost)
    return f"{done} of {len(in_all)} images done, {len(lost)} failed, {second} begun again"


def _wrong_counts(run: FaultRun, job: str, rows: Sequence[Row]) -> Iterator[str]:
    status = run.client.status(job)
    if not status.over:
        yield f"{job} is not over: {status}"
    if status.total != status.done + status.failed:
        yield f"{status.total} images in, {status.done} done and {status.failed} failed"
    if [row.index for row in rows] != list(range(status.total)):
        yield f"{len(rows)} rows for {status.total} images"
    states = Counter(row.state for row in rows)
    if (states["done"], states["failed"]) != (status.done, status.failed):
        yield f"rows say {dict(states)}, the status {status.done} done and {status.failed} failed"


def _wrong_manifest(run: FaultRun, job: str, rows: Sequence[Row]) -> Iterator[str]:
    url = run.client.status(job).manifest
    if url is None:
        yield f"{job} has no manifest"
        return
    lines = [json.loads(line) for line in _read(run, url).decode().splitlines()]
    told = [(line["index"], line["state"], line.get("output")) for line in lines]
    if told != [(row.index, row.state, row.output) for row in rows]:
        yield f"the manifest of {job} with {len(lines)} lines differs from its {len(rows)} results"


def _wrong_objects(run: FaultRun, jobs: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    """Each result is stored once, and as it would be without the fault; there is nothing else."""
    outputs = [row.output for row in rows if row.output is not None]
    if len(outputs) != len(set(outputs)):
        yield "two images have the same output"
    manifests = {run.client.status(job).manifest for job in jobs}
    stored = {url for url in _objects(run) if any(f"/{job}/" in url for job in jobs)}
    if extra := sorted(stored - set(outputs) - manifests):
        yield f"{len(extra)} files are left over: {extra[:FEW]}"
    damaged = [row.index for row in rows if row.output is not None and not _is_right(run, row)]
    if damaged:
        yield f"{len(damaged)} results are missing, damaged or differ: images {damaged[:FEW]}"


def _is_right(run: FaultRun, row: Row) -> bool:
    assert row.output is not None
    try:
        made = pixels(_read(run, row.output))
    except Exception:  # noqa: BLE001  # whatever keeps it from being read
        return False
    return np.array_equal(made, 255 - pixels(run.picture(row.source)))


def pixels(file: bytes) -> np.ndarray:
    """A decoded image file."""
    return np.asarray(Image.open(io.BytesIO(file)))


def _objects(run: FaultRun) -> list[str]:
    """The URLs of everything that is stored."""
    if run.s3 is None:
        return [path.as_uri() for path in (run.folder / "out").rglob("*") if path.is_file()]
    bucket, prefix = _split(run.out)
    pages = run.s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", [])]


def _read(run: FaultRun, url: str) -> bytes:
    if url.startswith("file://"):
        return Path(unquote(url.removeprefix("file://"))).read_bytes()
    bucket, name = _split(url)
    return bytes(run.s3_client().get_object(Bucket=bucket, Key=name)["Body"].read())


def _split(url: str) -> tuple[str, str]:
    bucket, _, name = url.removeprefix("s3://").partition("/")
    return bucket, name


def _computed(run: FaultRun, jobs: Sequence[str], rows: dict[str, list[Row]]) -> tuple[int, int]:
    """How many computations were begun again, and how many images after their result had been recorded."""
    begun: dict[str, list[float]] = {}
    for line in run.runs.read_text().splitlines() if run.runs.exists() else ():
        image, nanoseconds = line.split()
        begun.setdefault(image, []).append(int(nanoseconds) / 1e9)
    second = late = 0
    for job in jobs:
        recorded = _recorded(run, job)
        for row in rows[job]:
            times = begun.get(digest(pixels(run.picture(row.source))), [])
            second += max(0, len(times) - 1)
            late += any(moment > recorded[row.index] + 0.001 for moment in times[1:])  # the ledger counts in milliseconds
    return second, late


def _recorded(run: FaultRun, job: str) -> dict[int, float]:
    """When the result of each image was recorded."""
    events = run.raw.xrange(key(job, "events"))
    return {int(fields["i"]): int(place.split("-")[0]) / 1000 for place, fields in events if "i" in fields}


def _lasting_keys(run: FaultRun) -> Iterator[str]:
    """Nothing in Redis lasts for ever but what is known to, and nothing is at work any more."""
    end = time.monotonic() + SETTLE_SECONDS  # until nodes have read the last wake-ups
    while unknown := _unknown_keys(run):
        if time.monotonic() > end:
            yield f"{len(unknown)} keys without expiry: {unknown[:FEW]}"
            return
        time.sleep(0.2)


def _unknown_keys(run: FaultRun) -> list[str]:
    names = sorted(run.raw.scan_iter(count=1000))
    with run.raw.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.ttl(name)
        lasting = [name for name, ttl in zip(names, pipe.execute(), strict=True) if ttl == -1]
    return [name for name in lasting if not (LASTING.fullmatch(name) or KOMBU.fullmatch(name))]


def seconds_to_normal(recorded: Sequence[float], begun: float, ended: float) -> float:
    """Seconds from the end of a fault until results come at 80 % of the rate before it, or there are no more."""
    before = [moment for moment in recorded if moment < begun]
    normal = len(before) / max(WINDOW, begun - before[0]) if before else 0.0
    after = sorted(moment for moment in recorded if moment >= ended)
    for place, moment in enumerate(after):
        within = sum(moment <= later < moment + WINDOW for later in after[place:])
        if within >= 0.8 * normal * WINDOW:
            return moment - ended
    return (after[-1] if after else ended) - ended
