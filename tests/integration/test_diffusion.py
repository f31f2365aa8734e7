"""A small Stable Diffusion pipeline on a real worker."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.conftest import environment_for, photo
from tests.integration.jobs import cli, local_path
from tests.pipelines import lora_file, pipeline_folder
from tests.services.images import ImageServer
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration

QUICK = ("--set", "size=64", "--set", "steps=2")


@pytest.fixture(scope="module")
def environment(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    weights = pipeline_folder(tmp_path_factory.mktemp("diffusion") / "weights")
    lora_file(weights / "diffusion" / "loras" / "lcm-lora-sdv1-5.safetensors", weights)
    return environment_for(
        redis_server.url,
        tmp_path_factory.getbasetemp(),
        IMAGEMILL_WEIGHTS__FOLDER=str(weights),
        IMAGEMILL_WORKER__ENGINES='["diffusion"]',
    )


def submitted(environment: dict[str, str], folder: Path, sources: list[str], *words: str) -> list[dict[str, Any]]:
    """Submit a job, wait for it, and return its results in the order of `sources`."""
    (folder / "list.txt").write_text("\n".join(sources))
    arguments = [str(folder / "list.txt"), *words, *QUICK, "--output", str(folder / "out"), "--wait", "--json"]
    submission = cli(environment, "submit", *arguments)
    assert submission.stdout, submission.stderr
    rows = cli(environment, "results", json.loads(submission.stdout)["job"]).stdout
    return [json.loads(row) for row in rows.splitlines()]


def manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of the newest manifest."""
    path = max((folder / "out").rglob("manifest.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line) for line in path.read_text().splitlines()]


def data(row: dict[str, Any]) -> bytes:
    assert row["state"] == "done", row
    return local_path(row["output"]).read_bytes()


def test_preset_gives_an_image_the_same_pixels_in_every_job(
    worker: WorkerProcess, environment: dict[str, str], images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {f"/{number}.png": photo(number) for number in range(5)}
    sources = [images.url(f"/{number}.png") for number in range(5)]
    together = submitted(environment, tmp_path, sources, "--preset", "turbo")
    backwards = submitted(environment, tmp_path, sources[::-1], "--preset", "turbo")
    alone = submitted(environment, tmp_path, sources[2:3], "--preset", "turbo")
    assert [data(row) for row in together] == [data(row) for row in backwards[::-1]]
    assert data(alone[0]) == data(together[2])
    assert len({data(row) for row in together}) == 5
    assert {Image.open(io.BytesIO(data(row))).size for row in together} == {(96, 72)}
    line = manifest(tmp_path)[0]
    assert (line["seed"], line["options"]["scheduler"]) == (42, "lcm")
    assert "lcm-lora-sdv1-5 " in line["fingerprint"]
    assert "sd15-canny " in line["fingerprint"]


def test_missing_style_fails_and_names_the_lora(
    worker: WorkerProcess, environment: dict[str, str], images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    source = [images.url("/a.png")]
    (row,) = submitted(environment, tmp_path, source, "--preset", "anime", "--set", "loras=my-style:0.8")
    assert row["code"] == "operation_failed"
    assert "the LoRA my-style is not on this node" in row["message"]
    (row,) = submitted(environment, tmp_path, source, "--preset", "anime")
    assert row["state"] == "done"


def test_flagged_result_is_repeated_with_the_next_seed_and_the_better_one_kept(
    worker: WorkerProcess, environment: dict[str, str], images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {f"/{number}.png": photo(number) for number in range(6)}
    sources = [images.url(f"/{number}.png") for number in range(6)]
    look = ["--operation", "stylize", "--engine", "diffusion", "--limit", "least_edges=1"]
    tries = []
    for seed in ("42", "43"):
        rows = submitted(environment, tmp_path, sources, *look, "--set", f"seed={seed}")
        tries.append([(line["quality"]["edges"], data(row)) for line, row in zip(manifest(tmp_path), rows, strict=True)])
    rows = submitted(environment, tmp_path, sources, *look, "--check", "repair")
    first_is_better = [first[0] >= second[0] for first, second in zip(*tries, strict=True)]
    assert set(first_is_better) == {True, False}, "both outcomes must occur for this test to mean anything"
    for place, (line, row) in enumerate(zip(manifest(tmp_path), rows, strict=True)):
        assert "flag:unlike" in line["notes"]
        assert {"edges", "look", "before"} <= line["quality"].keys(), "drift detection needs these"
        assert ("repaired_seed" in line["notes"]) != first_is_better[place]
        assert line["seed"] == (42 if first_is_better[place] else 43)
        assert data(row) == tries[not first_is_better[place]][place][1]
