"""Jobs for a real worker: build, run and inspect them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from imagemill.shared.messages import Job, Row
from tests.workers import ROOT


def cli(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`imagemill ARGUMENT...` as its own process."""
    command = [sys.executable, "-m", "imagemill.producer.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def spec(operation: str, output: Path | str, *, attempts: int = 3, **options: Any) -> Job:
    """A job that writes its results to a folder or an S3 URL."""
    fields = {
        "operation": operation,
        "output": {"url": str(output) if str(output).startswith("s3://") else f"file://{output}"},
        "options": options,
        "policy": {"attempts": attempts},
    }
    return Job.model_validate(fields)


def run(client: Client, sources: list[str | dict[str, Any]], job: Job) -> list[Row]:
    """Submit a job, wait for it, and return its rows in the order of `sources`."""
    rows = [SourceRow(f"row {n}", s if isinstance(s, dict) else {"source": s}) for n, s in enumerate(sources)]
    submission = client.submit(rows, job)
    assert submission.served
    status = client.wait(submission.job, timeout=120)
    results = list(client.results(submission.job))
    assert status.state == ("done" if status.done else "failed")
    assert status.total == len(sources) == len(results)
    assert status.done == sum(row.state == "done" for row in results)
    assert status.failed == sum(row.state == "failed" for row in results)
    return results


def result_path(row: Row) -> Path:
    """Where the result of a row that is done was written."""
    assert row.output is not None, row
    return local_path(row.output)


def local_path(url: str) -> Path:
    return Path(unquote(url.removeprefix("file://")))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
