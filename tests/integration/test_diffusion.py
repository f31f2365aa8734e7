"""A small Stable Diffusion pipeline on a real worker."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import cli, local_path, spec
from tests.pipelines import lora_file, pipeline_folder
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

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


def test_job_with_a_missing_lora_waits_for_the_node_that_has_it(
    worker: WorkerProcess, environment: dict[str, str], images: ImageServer, tmp_path: Path
) -> None:
    """One of two nodes has no LoRA at first, and then a damaged one. Another job goes on there, and no image fails."""
    images.routes |= {f"/{number}.png": photo(number) for number in range(4)}
    rows = [SourceRow(path, {"source": images.url(path)}) for path in images.routes]
    options = {"engine": "diffusion", "size": 64, "steps": 2}
    weights = Path(environment["IMAGEMILL_WEIGHTS__FOLDER"])
    lora = weights / "diffusion" / "loras" / "my-style.safetensors"
    whole = tmp_path / "weights"
    with client_for(environment["IMAGEMILL_REDIS_URL"]) as client:
        submission = client.submit(rows, spec("stylize", tmp_path, **options, loras={"my-style": 0.8}))
        assert str(submission.advice).startswith("no worker that offers the model has my-style, so the job waits; get it with")
        plain = client.submit(rows, spec("stylize", tmp_path, **options)).job
        assert client.wait(plain, timeout=60).done == 4

        def why() -> str:
            return str(client.explain([client.status(submission.job)])[0].why)

        (node,) = client.nodes()
        assert why() == f"{node.node} lacks my-style: run `imagemill models add my-style SOURCE`"
        lora.write_text("<html>not found</html>")
        wait_until(
            lambda: f"{node.node} can't use my-style: the LoRA my-style can't be used from {lora}" in why(), "it is damaged"
        )
        wait_until(lambda: "my-style" in client.nodes()[0].faults, "the fleet is told")
        shutil.copytree(weights, whole)
        lora_file(whole / "diffusion" / "loras" / "my-style.safetensors", whole)
        with WorkerProcess({**environment, "IMAGEMILL_WEIGHTS__FOLDER": str(whole)}, tmp_path) as other:
            other.wait_ready()
            status = client.wait(submission.job, timeout=60)
        assert (status.state, status.done, status.failed) == ("done", 4, 0)
        assert {row.attempts for row in client.results(submission.job)} == {1}


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
