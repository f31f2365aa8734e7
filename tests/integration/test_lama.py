"""The lama engine on a real worker, with a small network of LaMa's architecture: tiles, a mask, and what stays as it was."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image, ImageCms

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.messages import Job, Row
from tests.conftest import client_for, environment_for
from tests.generators import lama_file
from tests.services import ImageServer
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def worker(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("lama")
    lama_file(folder / "weights" / "lama" / "lama.safetensors")
    environment = environment_for(
        redis_server.url,
        tmp_path_factory.getbasetemp(),
        IMAGEMILL_WEIGHTS__FOLDER=str(folder / "weights"),
        IMAGEMILL_WORKER__ENGINES='["lama"]',
        IMAGEMILL_WORKER__OPERATIONS='["inpaint"]',
    )
    with WorkerProcess(environment, folder, name="lama") as node:
        yield node.wait_ready()


@pytest.fixture
def client(redis_server: EmbeddedRedis) -> Iterator[Client]:
    with client_for(redis_server.url) as made:
        yield made


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PROFILE = SRGB.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
"""Its red is green: where colours are converted, it shows."""


def file(pixels: np.ndarray, kind: str, **more: Any) -> bytes:
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, kind, **more)
    return made.getvalue()


def stored(row: Row) -> bytes:
    assert row.output is not None, row
    return Path(unquote(urlsplit(row.output).path)).read_bytes()


def test_masks_in_holes_filled_all_else_as_it_was(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    scene = np.random.default_rng(0).integers(0, 256, (600, 900, 4), np.uint8)
    scene[300:400, :, 3] = 0  # has colours all the same
    line = np.zeros((600, 900), np.uint8)
    for x in range(900):
        line[20 + x // 2 : 28 + x // 2, x] = 255
    jpeg = file(scene[..., :3], "JPEG")
    images.routes |= {
        "/a.png": file(scene, "PNG", icc_profile=PROFILE),
        "/a.jpg": jpeg,
        "/grey.png": file(scene[..., 0], "PNG"),
        "/line.png": file(line, "PNG"),
        "/none.png": file(np.zeros_like(line), "PNG"),
        "/most.png": file(np.where(np.arange(900) < 800, 255, line).astype(np.uint8), "PNG"),
        "/wide.png": file(line[:300], "PNG"),
    }
    rows = [
        {"source": "/a.png", "mask": "/line.png"},
        {"source": "/a.jpg", "mask": "/none.png"},
        {"source": "/a.jpg", "mask": "/most.png"},
        {"source": "/a.jpg", "mask": "/wide.png"},
        {"source": "/a.jpg", "boxes": "0.5,0.5,0.1,0.1"},
        {"source": "/grey.png", "mask": "/line.png"},
    ]
    sources = [
        SourceRow(f"row {n}", {name: images.url(value) if value.startswith("/") else value for name, value in row.items()})
        for n, row in enumerate(rows)
    ]
    fields = {
        "operation": "inpaint",
        "options": {"engine": "lama", "tile": 512, "mask_feather": 2},
        "output": {"url": f"file://{tmp_path}"},
    }
    submission = client.submit(sources, Job.model_validate(fields))
    assert submission.served
    assert client.wait(submission.job, timeout=120).state == "done"
    lined, empty, large, wide, boxed, grey = client.results(submission.job)
    assert [row.code for row in (lined, empty, large, wide, boxed, grey)] == [None, None, None, "bad_mask", None, None]
    assert [row.result.notes for row in (lined, empty, large, boxed) if row.result] == [
        (),
        ("empty_mask",),
        ("large_mask",),
        (),
    ]
    assert stored(empty) == jpeg, "the very bytes"
    with Image.open(io.BytesIO(stored(lined))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (900, 600))
        assert image.info["icc_profile"] == PROFILE
        made = np.asarray(image)
    near = np.zeros_like(line)
    for down in range(-3, 4):
        near |= np.roll(line, 3 * down, axis=0) | np.roll(line, down, axis=1)
    assert np.array_equal(made[near == 0], scene[near == 0]), "bit for bit, under alpha 0 too"
    assert np.array_equal(made[..., 3], scene[..., 3])
    assert (made[line == 255] != scene[line == 255]).mean() > 0.5
    with Image.open(io.BytesIO(stored(grey))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (900, 600))
        assert np.array_equal(np.asarray(image)[near == 0], scene[near == 0, 0])
    for row in (large, boxed):
        with Image.open(io.BytesIO(stored(row))) as image:
            assert (image.format, image.size) == ("JPEG", (900, 600))
