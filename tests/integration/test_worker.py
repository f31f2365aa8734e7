"""Results of a real worker between a real Redis and a web server of images."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagemill.producer.client import Client
from tests.conftest import photo
from tests.integration.jobs import cli, local_path, opened, result_path, run, spec
from tests.services.images import ImageServer, answers, failing, html, redirect
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("operation", ["remove-background", "inpaint", "stylize"])
def test_results_keep_format_and_size(
    operation: str, worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    options = {"boxes": ["10,10,20,20"]} if operation == "inpaint" else {}
    images.routes |= {"/a.png": photo(1), "/b.jpg": photo(2, kind="JPEG"), "/c.webp": photo(3, kind="WEBP")}
    rows = run(
        client,
        [images.url("/a.png"), images.url("/b.jpg"), images.url("/c.webp")],
        spec(operation, tmp_path, **options),
    )
    assert [row.state for row in rows] == ["done"] * 3
    cutout = operation == "remove-background"
    results = [opened(result_path(row).read_bytes()) for row in rows]
    assert [image.format for image in results] == ["PNG", "PNG" if cutout else "JPEG", "WEBP"]
    assert [image.size for image in results] == [(96, 72)] * 3
    assert [image.mode for image in results] == ["RGBA" if cutout else "RGB"] * 3


def test_each_bad_input_fails_with_its_own_code_and_the_rest_succeed(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    good = photo(1)
    jpeg = photo(2, 400, 300, "JPEG")
    images.routes |= {
        "/good.png": good,
        "/404.png": answers(404),
        "/403.png": answers(403),
        "/500.png": answers(500),
        "/flaky.png": failing(1, 503, good),
        "/stall.png": images.hang,
        "/page.png": html(),
        "/empty.png": b"",
        "/cut.jpg": jpeg[: len(jpeg) // 2],
        "/bomb.png": black_png(30_000),
        "/really-a.jpg": good,
        "/to-private.png": redirect("http://10.255.255.1/secret.png"),
    }
    expected = {
        images.url("/good.png"): None,
        images.url("/404.png"): "not_found",
        images.url("/403.png"): "access_denied",
        images.url("/500.png"): "server_error",
        images.url("/flaky.png"): None,
        images.url("/stall.png"): "timeout",
        images.url("/page.png"): "not_an_image",
        images.url("/empty.png"): "empty_file",
        images.url("/cut.jpg"): "truncated",
        images.url("/bomb.png"): "too_many_pixels",
        images.url("/really-a.jpg"): None,
        "http://10.255.255.1/private.png": "forbidden_address",
        images.url("/to-private.png"): "forbidden_address",
        "http://no-such-host.invalid/a.png": "unreachable",
    }
    rows = run(client, list(expected), spec("stylize", tmp_path, attempts=2))
    assert {row.source: row.code for row in rows} == expected
    attempts = {row.source: row.attempts for row in rows}
    assert attempts[images.url("/500.png")] == attempts[images.url("/flaky.png")] == 2
    assert attempts[images.url("/404.png")] == 1
    for row in rows:
        assert (row.message is None) == (row.code is None)


def black_png(edge: int) -> bytes:
    """A square 1-bit PNG: a few kB on disk, gigabytes once decoded."""
    file = io.BytesIO()
    Image.new("1", (edge, edge)).save(file, "PNG", optimize=True)
    return file.getvalue()


def test_inpaint_changes_only_pixels_under_the_mask(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    """One source has a good mask, one a mask of the wrong size, one a mask that cannot be fetched."""
    mask = np.zeros((72, 96), np.uint8)
    mask[20:40, 30:50] = 255
    images.routes |= {"/a.png": photo(1), "/mask.png": png(mask), "/wide.png": png(np.zeros((10, 96), np.uint8))}
    a = images.url("/a.png")
    rows = run(
        client,
        [
            {"source": a, "mask": images.url("/mask.png")},
            {"source": a, "mask": images.url("/wide.png")},
            {"source": a, "mask": images.url("/none.png")},
        ],
        spec("inpaint", tmp_path),
    )
    assert [row.code for row in rows] == [None, "bad_mask", "bad_mask"]
    before, after = np.asarray(opened(photo(1))), np.asarray(opened(result_path(rows[0]).read_bytes()))
    assert np.array_equal(before[mask == 0], after[mask == 0])
    assert not np.array_equal(before[mask == 255], after[mask == 255])


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_duplicates_are_processed_once_but_each_has_a_row(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes |= {"/a.png": photo(1), "/b.png": photo(2)}
    a, b = images.url("/a.png"), images.url("/b.png")
    rows = run(client, [a, b, a, a], spec("stylize", tmp_path))
    assert [row.duplicate_of for row in rows] == [None, None, 0, 0]
    assert rows[0].output == rows[2].output == rows[3].output != rows[1].output
    assert images.hits["/a.png"] == 1
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_unusual_source_names_get_distinct_files_inside_the_output_folder(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    paths = ["/with space.png", "/%2e%2e/%2e%2e/up.png", "/日本-ünï.png", "/same.png?v=1", "/same.png?v=2"]
    images.fallback = photo(1)
    rows = run(client, [images.url(path) for path in paths], spec("stylize", tmp_path))
    assert [row.state for row in rows] == ["done"] * len(paths), rows
    files = [result_path(row) for row in rows]
    assert len(set(files)) == len(paths)
    assert all(file.is_file() and tmp_path in file.parents for file in files)


def test_files_whose_names_are_not_text_are_processed(
    worker: WorkerProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    folder, listed = tmp_path / "in", tmp_path / "list.txt"
    for place in (folder / os.fsdecode(b"caf\xe9.png"), folder / os.fsdecode(b"\xfc") / "a.png"):
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_bytes(photo(1))
    listed.write_bytes(b"file://%s/caf\xe9.png\nfile://%s/none\xe9.png\n" % (os.fsencode(folder), os.fsencode(folder)))
    found: dict[str, str | None] = {}
    for source in (folder, listed):
        out = tmp_path / f"{source.stem}-out"
        more = ["--output", str(out), "--set", "style=detail", "--wait", "--json"]
        job = json.loads(cli(environment, "submit", str(source), "--operation", "stylize", *more).stdout)["job"]
        rows = [json.loads(line) for line in cli(environment, "results", job).stdout.splitlines()]
        manifest = (out / job / "manifest.jsonl").read_text("utf-8")
        assert [json.loads(line)["source"] for line in manifest.splitlines()] == [row["source"] for row in rows]
        for row in rows:
            found[row["source"].removeprefix(f"file://{folder}/")] = row["code"]
            assert row["output"] is None or local_path(row["output"]).is_file()
    assert found == {"caf%E9.png": None, "%FC/a.png": None, "none%E9.png": "not_found"}


def test_forbidden_output_folder_fails_each_image_and_names_the_setting(
    worker: WorkerProcess, client: Client, images: ImageServer
) -> None:
    images.routes["/a.png"] = photo(1)
    (row,) = run(client, [images.url("/a.png")], spec("stylize", "/etc/imagemill-test"))
    assert row.code == "storage_refused"
    assert "IMAGEMILL_FILES__WRITE_ROOTS" in (row.message or "")


def test_manifest_records_sizes_timings_options_versions_and_errors(
    worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/a.png"] = photo(1)
    rows = run(client, [images.url("/a.png"), images.url("/none.png")], spec("stylize", tmp_path, style="detail"))
    (manifest,) = tmp_path.rglob("manifest.jsonl")
    first, second = (json.loads(line) for line in manifest.read_text().splitlines())
    assert first["output"] == rows[0].output
    assert first["source_bytes"] == len(photo(1))
    assert first["source_size"] == first["output_size"] == [96, 72]
    assert first["output_bytes"] == result_path(rows[0]).stat().st_size
    assert {"fetch", "decode", "prepare", "run", "finish", "encode", "store"} <= first["seconds"].keys()
    assert first["options"]["style"] == "detail"
    assert first["versions"]["imagemill"]
    assert second["code"] == "not_found"
    assert second["message"]


def test_retry_repeats_only_failed_images(worker: WorkerProcess, client: Client, images: ImageServer, tmp_path: Path) -> None:
    images.routes["/a.png"] = photo(1)
    rows = run(client, [images.url("/a.png"), images.url("/late.png")], spec("stylize", tmp_path))
    assert [row.code for row in rows] == [None, "not_found"]
    images.routes["/late.png"] = photo(2)
    job = rows[0].output.split("/")[-2] if rows[0].output else ""
    assert client.retry(job) == 1
    status = client.wait(job, timeout=60)
    assert (status.done, status.failed) == (2, 0)
    assert [row.state for row in client.results(job)] == ["done", "done"]
    assert images.hits["/a.png"] == 1
    (manifest,) = tmp_path.rglob("manifest.jsonl")
    assert [json.loads(line)["state"] for line in manifest.read_text().splitlines()] == ["done", "done"]


def test_results_are_measured_flagged_and_repaired(
    worker: WorkerProcess, environment: dict[str, str], images: ImageServer, tmp_path: Path
) -> None:
    images.routes["/flagged.png"] = photo(1)
    arguments = [images.url("/flagged.png"), "--operation", "stylize", "--output", str(tmp_path), "--wait", "--json"]
    flags_per_run = []
    for flags in ([], ["--limit", "least_sharpness=9"], ["--check", "repair", "--limit", "least_sharpness=9"]):
        job = json.loads(cli(environment, "submit", *arguments, *flags).stdout)["job"]
        flagged = cli(environment, "results", job, "--flagged").stdout.splitlines()
        flags_per_run.append([json.loads(line)["flags"] for line in flagged])
        (line,) = map(json.loads, (tmp_path / job / "manifest.jsonl").read_text().splitlines())
        assert {"sharpness", "kept", "entropy", "look", "before"} <= line["quality"].keys()
        assert ("flag:blurred" in line["notes"]) == bool(flagged)
    assert flags_per_run == [[], [["blurred"]], [["blurred"]]]
    assert "repaired_sharpness" in line["notes"], "the repaired result is closer to the limit"
