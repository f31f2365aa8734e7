"""Jobs whose images must all be done, once and correctly, whatever happens meanwhile."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from tests.conftest import photo
from tests.integration.jobs import spec
from tests.services.images import ImageServer
from tests.workers import wait_until


def submit(client: Client, images: ImageServer, tmp_path: Path, count: int) -> str:
    for n in range(count):
        images.routes[f"/{n}.png"] = photo(n)
    rows = [SourceRow(f"row {n}", {"source": images.url(f"/{n}.png")}) for n in range(count)]
    return client.submit(rows, spec("stylize", tmp_path / "out")).job


def check_complete(client: Client, job: str, count: int, tmp_path: Path) -> None:
    """Every image was processed once, correctly."""
    status = client.wait(job, timeout=120)
    assert (status.state, status.total, status.done, status.failed) == ("done", count, count, 0)
    rows = list(client.results(job))
    assert [row.index for row in rows] == list(range(count))
    for row in rows:
        assert row.output is not None
        result = np.asarray(Image.open(Path(row.output.removeprefix("file://"))))
        source = np.asarray(Image.open(io.BytesIO(photo(row.index))))
        assert np.array_equal(result, 255 - source)
    (manifest,) = tmp_path.glob("out/*/manifest.jsonl")
    assert len(manifest.read_text().splitlines()) == count
    assert len(list(tmp_path.glob("out/*/*.png"))) == count


def wait_for_gate(gate: Path, count: int) -> None:
    """Return once `count` images have been started."""
    wait_until(lambda: len(list(gate.glob("at-*"))) >= count, f"{count} images started")
