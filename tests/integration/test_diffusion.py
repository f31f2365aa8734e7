"""Stable Diffusion's small pipeline on a real worker: from a preset to results that are the same in every job."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.conftest import environment_for, photo
from tests.pipelines import lora_file, pipeline_folder
from tests.services.images import ImageServer
from tests.workers import ROOT, WorkerProcess

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


@pytest.fixture(scope="module")
def worker(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(environment, tmp_path_factory.mktemp("worker"), concurrency=2, name="diffusion") as node:
        yield node.wait_ready()


def submitted(environment: dict[str, str], folder: Path, sources: list[str], *words: str) -> list[dict[str, Any]]:
    """The results of a job that is waited for, in the list's order."""
    (folder / "list.txt").write_text("\n".join(sources))
    command = [sys.executable, "-m", "imagemill.producer.cli"]
    given = ["submit", str(folder / "list.txt"), *words, *QUICK, "--output", str(folder / "out"), "--wait", "--json"]
    done = subprocess.run([*command, *given], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    listed = [*command, "results", json.loads(done.stdout)["job"]]
    rows = subprocess.run(listed, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    return [json.loads(row) for row in rows.splitlines()]


def manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of the newest manifest."""
    path = max((folder / "out").rglob("manifest.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line) for line in path.read_text().splitlines()]


def data(row: dict[str, Any]) -> bytes:
    assert row["state"] == "done", row
    return Path(unquote(row["output"].removeprefix("file://"))).read_bytes()


def test_a_preset_gives_each_image_the_same_pixels_in_every_job(
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


def test_a_style_that_is_not_there_fails_with_what_to_do(
    worker: WorkerProcess, environment: dict[str, str], images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    source = [images.url("/a.png")]
    (row,) = submitted(environment, tmp_path, source, "--preset", "anime", "--set", "loras=my-style:0.8")
    assert row["code"] == "operation_failed"
    assert "the LoRA my-style is not on this node" in row["message"]
    (row,) = submitted(environment, tmp_path, source, "--preset", "anime")
    assert row["state"] == "done"


def test_a_result_that_is_flagged_is_made_again_with_the_next_seed_and_the_better_one_stays(
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
    first_is_better = [one[0] >= two[0] for one, two in zip(*tries, strict=True)]
    assert set(first_is_better) == {True, False}, "else nothing is shown"
    for place, (line, row) in enumerate(zip(manifest(tmp_path), rows, strict=True)):
        assert "flag:unlike" in line["notes"]
        assert {"edges", "look", "before"} <= line["quality"].keys(), "what the search for drift needs"
        assert ("repaired_seed" in line["notes"]) != first_is_better[place]
        assert line["seed"] == (42 if first_is_better[place] else 43)
        assert data(row) == tries[not first_is_better[place]][place][1]
