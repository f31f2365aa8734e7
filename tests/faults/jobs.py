"""Jobs whose images must all be done, once and correctly, whatever happens meanwhile."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imagemill.producer.client import Client
from imagemill.producer.sources import SourceRow
from tests.conftest import photo
from tests.integration.jobs import spec
from tests.services.images import ImageServer
from tests.workers import wait_until


def submit(client: Client, images: ImageServer, output: Path | str, count: int) -> str:
    """Submit a job of photos, with results in `out` below a folder or at an S3 URL."""
    for n in range(count):
        images.routes[f"/{n}.png"] = photo(n)
    return submit_urls(client, [images.url(f"/{n}.png") for n in range(count)], output)


def submit_urls(client: Client, urls: Sequence[str], output: Path | str) -> str:
    """Submit a job of images, each of which is the photo of its place in the list."""
    rows = [SourceRow(f"row {n}", {"source": url}) for n, url in enumerate(urls)]
    job = spec("stylize", output / "out" if isinstance(output, Path) else output)
    return client.submit(rows, job).job


def check_complete(client: Client, job: str, count: int, tmp_path: Path) -> None:
    """Every image was processed once, correctly."""
    check_done(client, job, count, lambda url: Path(url.removeprefix("file://")).read_bytes())
    (manifest,) = tmp_path.glob("out/*/manifest.jsonl")
    assert len(manifest.read_text().splitlines()) == count
    assert len(list(tmp_path.glob("out/*/*.png"))) == count


def check_done(client: Client, job: str, count: int, read: Callable[[str], bytes]) -> None:
    """Every image is done, and its result, which `read` gets, is right."""
    status = client.wait(job, timeout=120)
    assert (status.state, status.total, status.done, status.failed) == ("done", count, count, 0)
    rows = list(client.results(job))
    assert [row.index for row in rows] == list(range(count))
    for row in rows:
        assert row.output is not None
        result = np.asarray(Image.open(io.BytesIO(read(row.output))))
        source = np.asarray(Image.open(io.BytesIO(photo(row.index))))
        assert np.array_equal(result, 255 - source)


def wait_for_gate(gate: Path, count: int) -> None:
    """Return once `count` images have been started."""
    wait_until(lambda: len(list(gate.glob("at-*"))) >= count, f"{count} images started")
