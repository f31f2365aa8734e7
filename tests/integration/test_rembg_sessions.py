"""Garments and Segment Anything on a real worker, with small networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import read_sources
from imagemill.shared.messages import Job, Row
from tests.conftest import environment_for
from tests.integration.jobs import result_path
from tests.services.images import ImageServer
from tests.special_models import special_folder
from tests.unit.worker.operations.remove_background.test_sessions import picture
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def environment(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.getbasetemp()
    weights = str(special_folder(base / "weights"))
    return environment_for(redis_server.url, base, IMAGEMILL_WEIGHTS__FOLDER=weights, IMAGEMILL_WORKER__ENGINES='["rembg"]')


def finished(client: Client, rows: Path, folder: Path, **options: Any) -> list[Row]:
    """The results of a list, once its job is over."""
    output = {"url": folder.as_uri(), "format": "png", "key": "{name}"}
    spec = {"operation": "remove-background", "options": {"engine": "rembg", **options}, "output": output}
    job = client.submit(read_sources([str(rows)], s3=client.s3), Job.model_validate(spec)).job
    assert client.wait(job, timeout=60).state == "done"
    return list(client.results(job))


def alpha_of(row: Row) -> Any:
    return cv2.imread(str(result_path(row)), cv2.IMREAD_UNCHANGED)[..., 3]


def test_each_garment_and_each_prompt_has_a_result(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    photo = picture(120, 200)
    plain = np.full_like(photo, 160)  # shows no garment but one
    for name, pixels in (("shirt", photo), ("wall", plain)):
        images.routes[f"/{name}.png"] = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    photos = tmp_path / "photos.txt"
    photos.write_text("".join(images.url(f"/{name}.png") + "\n" for name in ("shirt", "wall")))
    rows = finished(client, photos, tmp_path / "garments", model="u2net_cloth_seg")
    names = [f"{name}-{part}.png" for name in ("shirt", "wall") for part in ("upper", "lower", "full")]
    assert [(row.output or "").rpartition("/")[2] for row in rows] == names
    assert [row.part for row in rows] == ["upper", "lower", "full"] * 2
    notes = [row.result.notes for row in rows if row.result is not None]
    shown = [alpha_of(row).any() for row in rows]
    assert shown[:3] == [True] * 3
    assert notes == [() if seen else ("empty_cutout",) for seen in shown]
    assert "empty_cutout" in notes[3] + notes[4] + notes[5]
    (manifest,) = (tmp_path / "garments").glob("*/manifest.jsonl")
    assert [json.loads(line)["part"] for line in manifest.read_text().splitlines()] == ["upper", "lower", "full"] * 2

    table, address = tmp_path / "things.csv", images.url("/shirt.png")
    cells = ('"0.2,0.5",,lamp', '"160,60;180,90,0",,mug', ',"5,5,60,60",box')
    table.write_text("\n".join(["source,points,boxes,name", *(f"{address},{row}" for row in cells)]))
    rows = finished(client, table, tmp_path / "things", model="sam")
    masks = [alpha_of(row) > 127 for row in rows]
    centres = [round(float(np.argwhere(mask)[:, 1].mean())) for mask in masks]
    assert centres[0] < 80 < 120 < centres[1]
    assert len({mask.tobytes() for mask in masks}) == 3
