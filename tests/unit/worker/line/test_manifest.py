"""The manifest: what is known about each image after Redis has forgotten the job."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from imagemill.shared.errors import StorageRefused
from imagemill.shared.ledger.leasing import ManifestDue, Request
from imagemill.shared.messages import Item, ItemResult, Job, Output
from imagemill.shared.options.stylize import DiffusionStylize, OpencvStylize
from imagemill.shared.settings import FileSettings
from imagemill.worker.line.manifest import write_manifest
from imagemill.worker.transfer.store import FolderStore
from tests.ledgers import Ledger

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("raw")]

JOB = "260730-1f0c9a3e"
ITEMS = [
    Item(index=0, source="https://a.example/ü.jpg"),
    Item(index=1, source="https://a.example/none.jpg", mask="https://a.example/m.png"),
    Item(index=2, source="https://a.example/later.jpg"),
    Item(index=3, source="https://a.example/ü.jpg", duplicate_of=0),
]
DONE = ItemResult(
    index=0,
    state="done",
    output="s3://results/x/000000-ü.png",
    attempts=2,
    source_format="jpeg",
    source_bytes=1234,
    source_size=(640, 480),
    output_bytes=5678,
    output_size=(320, 240),
    seconds={"fetch": 0.25, "run": 0.5},
    notes=("the profile was damaged",),
    node="gpu0@a",
)
FAILED = ItemResult(
    index=1,
    state="failed",
    code="not_found",
    message="there is no such image",
    attempts=1,
    seconds={"fetch": 0.125},
    node="gpu1@a",
)


@pytest.fixture
def spec(tmp_path: Path) -> Job:
    return Job(operation="stylize", output=Output(url=tmp_path.as_uri()), options=OpencvStylize(style="pencil-sketch"))


def begin(ledger: Ledger, spec: Job, *results: ItemResult) -> None:
    """Submit the job and record these results."""
    ledger.open_job(JOB, spec)
    ledger.add_packs(JOB, [(0, ITEMS)])
    ledger.seal(JOB, size=len(ITEMS), total=len(ITEMS), duplicates={0: 1})
    for result in results:
        ledger.record(JOB, result)


def store_in(folder: Path) -> FolderStore:
    return FolderStore(folder.as_uri(), FileSettings(write_roots=(folder,)))


def written(ledger: Ledger, spec: Job, folder: Path) -> list[dict[str, Any]]:
    assert write_manifest(JOB, spec, ledger, store_in(folder)) == (folder / JOB / "manifest.jsonl").as_uri()
    assert [path.name for path in (folder / JOB).iterdir()] == ["manifest.jsonl"]
    text = (folder / JOB / "manifest.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_manifest_has_one_line_per_row_in_list_order(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    begin(ledger, spec, DONE, FAILED, ItemResult(index=2, state="done", output="s3://results/x/2.png"))
    lines = written(ledger, spec, tmp_path)
    assert [(line["index"], line["item"], line["source"]) for line in lines] == [
        (item.index, item.id, item.source) for item in ITEMS
    ]
    assert [line["state"] for line in lines] == ["done", "failed", "done", "done"]
    assert lines[1]["mask"] == "https://a.example/m.png"


def test_line_says_how_the_result_was_made(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    begin(ledger, spec, DONE, FAILED)
    line = written(ledger, spec, tmp_path)[0]
    known = {
        "output": "s3://results/x/000000-ü.png",
        "attempts": 2,
        "source_format": "jpeg",
        "source_bytes": 1234,
        "source_size": [640, 480],
        "output_bytes": 5678,
        "output_size": [320, 240],
        "seconds": {"fetch": 0.25, "run": 0.5},
        "notes": ["the profile was damaged"],
        "batch": 1,
        "node": "gpu0@a",
        "job": JOB,
        "operation": "stylize",
        "options": spec.options.model_dump(mode="json"),
        "metadata": "copyright",
    }
    assert {name: line.get(name) for name in known} == known
    assert line["options"]["style"] == "pencil-sketch"
    assert line["versions"]["python"] == platform.python_version()
    assert {name: line["versions"].get(name) for name in ("imagemill", "numpy", "opencv-python-headless")} == {
        name: version(name) for name in ("imagemill", "numpy", "opencv-python-headless")
    }
    assert "code" not in line


def test_line_has_seed_and_fingerprint(ledger: Ledger, tmp_path: Path) -> None:
    options = DiffusionStylize(seed=7, seed_policy="per-item")
    spec = Job(operation="stylize", output=Output(url=tmp_path.as_uri()), options=options)
    begin(ledger, spec, DONE, FAILED)
    write_manifest(JOB, spec, ledger, store_in(tmp_path), "sd15-canny 0123")
    lines = [json.loads(line) for line in (tmp_path / JOB / "manifest.jsonl").read_text().splitlines()]
    firsts = [ITEMS[0].index if item.duplicate_of is not None else item.index for item in ITEMS]
    assert [line["seed"] for line in lines] == [7 + index for index in firsts], "a duplicate has the seed of its original"
    assert {line["fingerprint"] for line in lines} == {"sd15-canny 0123"}
    assert {"torch", "diffusers"} <= lines[0]["versions"].keys()


def test_line_has_the_seed_of_the_attempt_that_was_kept(ledger: Ledger, tmp_path: Path) -> None:
    spec = Job(operation="stylize", output=Output(url=tmp_path.as_uri()), options=DiffusionStylize(seed=7))
    begin(ledger, spec, DONE.model_copy(update={"notes": ("repaired_seed",)}), FAILED)
    assert [written(ledger, spec, tmp_path)[index]["seed"] for index in (0, 1, 3)] == [8, 7, 8]


def test_line_has_the_batch_size_when_known(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    copied = ItemResult(index=2, state="done", output="s3://results/x/2.png", notes=("cached",))
    begin(ledger, spec, DONE.model_copy(update={"batch": 8}), FAILED, copied)
    assert [line.get("batch") for line in written(ledger, spec, tmp_path)] == [8, None, None, 8]


def test_failed_line_has_code_and_message(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    begin(ledger, spec, DONE, FAILED)
    line = written(ledger, spec, tmp_path)[1]
    assert (line["code"], line["message"], line["node"]) == ("not_found", "there is no such image", "gpu1@a")
    assert line["seconds"] == {"fetch": 0.125}
    assert "output" not in line


def test_duplicate_line_is_complete_and_names_its_original(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    begin(ledger, spec, DONE, FAILED)
    first, *_, duplicate = written(ledger, spec, tmp_path)
    assert duplicate.pop("duplicate_of") == 0
    own = {"item", "index"}
    assert {name: value for name, value in duplicate.items() if name not in own} == {
        name: value for name, value in first.items() if name not in own
    }


def test_unfinished_images_of_a_cancelled_job_are_cancelled(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    begin(ledger, spec, DONE)
    assert ledger.cancel(JOB)
    assert ledger.take(Request("child", [spec.lane], {spec.lane: 1})) == ManifestDue(JOB, 1)
    lines = written(ledger, spec, tmp_path)
    assert [line["state"] for line in lines] == ["done", "cancelled", "cancelled", "done"]


def test_manifest_that_cannot_be_stored_raises_and_leaves_nothing_behind(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    begin(ledger, spec, DONE)
    folder = tmp_path / "elsewhere"
    with pytest.raises(StorageRefused, match="WRITE_ROOTS"):
        write_manifest(JOB, spec, ledger, FolderStore(folder.as_uri(), FileSettings()))
    assert not folder.exists()


def test_manifest_is_replaced_when_written_again(ledger: Ledger, spec: Job, tmp_path: Path) -> None:
    begin(ledger, spec, DONE)
    assert [line["state"] for line in written(ledger, spec, tmp_path)][1] == "pending"
    ledger.record(JOB, FAILED)
    assert [line["state"] for line in written(ledger, spec, tmp_path)][1] == "failed"
