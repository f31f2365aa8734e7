"""The lama engine on a real worker, with a small network of LaMa's architecture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.messages import Job, Row
from tests.conftest import environment_for
from tests.generators import lama_file
from tests.integration.jobs import opened, result_path
from tests.services.images import ImageServer
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def environment(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    weights = tmp_path_factory.mktemp("weights")
    lama_file(weights / "lama" / "lama.safetensors")
    return environment_for(
        redis_server.url,
        tmp_path_factory.getbasetemp(),
        IMAGEMILL_WEIGHTS__FOLDER=str(weights),
        IMAGEMILL_WORKER__ENGINES='["lama"]',
        IMAGEMILL_WORKER__OPERATIONS='["inpaint"]',
    )


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PROFILE = SRGB.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
"""sRGB with red and green swapped, so any conversion of colours would show."""


def file(pixels: np.ndarray, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **more)
    return buffer.getvalue()


def stored(row: Row) -> bytes:
    return result_path(row).read_bytes()


def test_lama_fills_masks_and_leaves_all_other_pixels_unchanged(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    scene = np.random.default_rng(0).integers(0, 256, (600, 900, 4), np.uint8)
    scene[300:400, :, 3] = 0  # transparent pixels have colours too
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
        "/most.png": file(np.where(np.arange(900) < 400, 255, line).astype(np.uint8), "PNG"),
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
    assert stored(empty) == jpeg, "the source file is copied"
    with opened(stored(lined)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (900, 600))
        assert image.info["icc_profile"] == PROFILE
        result = np.asarray(image)
    near = np.zeros_like(line)
    for down in range(-3, 4):
        near |= np.roll(line, 3 * down, axis=0) | np.roll(line, down, axis=1)
    assert np.array_equal(result[near == 0], scene[near == 0]), "unchanged, even where transparent"
    assert np.array_equal(result[..., 3], scene[..., 3])
    assert (result[line == 255] != scene[line == 255]).mean() > 0.5
    with opened(stored(grey)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (900, 600))
        assert np.array_equal(np.asarray(image)[near == 0], scene[near == 0, 0])
    for row in (large, boxed):
        with opened(stored(row)) as image:
            assert (image.format, image.size) == ("JPEG", (900, 600))
