"""`imagemill submit --dry-run`: it shows what would be queued, and queues nothing."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imagemill.producer.dry_run import FIRST, OTHERS, Sample
from imagemill.shared.fleet import Fleet
from imagemill.shared.messages import Item
from tests.ledgers import Ledger
from tests.unit.producer.jobs import GOOD, LANE, STYLIZE, Invoke, node

TWINS = "https://a.example/x/1.jpg\nhttps://a.example/y/1.jpg\nnonsense\nhttps://a.example/x/1.jpg\n"


def png(size: tuple[int, int], colour: Any, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "png")
    return file.getvalue()


def tried(imagemill: Invoke, *args: str, stdin: str | None = None) -> dict[str, Any]:
    result = imagemill(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_nothing_is_queued(imagemill: Invoke, ledger: Ledger, fleet: Fleet) -> None:
    fleet.report_node(node(LANE))
    result = imagemill(*STYLIZE, "--dry-run", stdin=GOOD)
    assert result.stdout.splitlines() == [
        "dry run, nothing was queued: 3 images, including 1 duplicate",
        "  s3://results/out/{job}/000000-a.jpg",
        "  s3://results/out/{job}/000001-b.jpg",
        "time: unknown, no node has worked on stylize.opencv yet",
        "storage: reads an unknown amount, writes an unknown amount (--dry-run=fetch gives an estimate)",
    ]
    assert ledger.jobs() == []


def test_collisions_and_invalid_rows_are_counted(imagemill: Invoke) -> None:
    found = tried(imagemill, *STYLIZE, "--dry-run", "--layout", "flat", "--format", "webp", stdin=TWINS)
    assert (found["total"], found["duplicates"], found["invalid"], found["collisions"]) == (2, 1, 2, 1)
    assert found["outputs"] == ["s3://results/out/1.webp"]
    assert [row["place"] for row in found["invalid_rows"]] == ["stdin:2", "stdin:3"]
    assert "the same name as that of stdin:1, '1'" in found["invalid_rows"][0]["reason"]


@pytest.mark.parametrize(
    ("rows", "more", "accepted"), [(GOOD, [], True), (TWINS, [], False), (TWINS, ["--skip-invalid"], True), ("", [], False)]
)
def test_says_whether_submit_would_accept_the_list(imagemill: Invoke, rows: str, more: list[str], accepted: bool) -> None:
    assert tried(imagemill, *STYLIZE, "--dry-run", *more, "--layout", "flat", stdin=rows)["accepted"] is accepted
    shown = imagemill(*STYLIZE, "--dry-run", *more, "--layout", "flat", stdin=rows).stdout
    assert ("`submit` would refuse this list" in shown) is not accepted


def test_fetch_without_the_worker_s_packages_names_the_extra(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("imagemill.worker.node.look", "imagemill.worker.transfer.network", "imagemill.worker.transfer.fetch"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "pycurl", None)
    result = imagemill(*STYLIZE, "--dry-run=fetch", stdin=GOOD)
    reason = "--dry-run=fetch needs pycurl, which is not installed: pip install 'imagemill[worker]'"
    assert (result.exit_code, result.stderr) == (2, f"error (missing_extra): {reason}\n")


def test_time_comes_from_the_lane_s_speed(imagemill: Invoke, fleet: Fleet, raw: Any) -> None:
    fleet.report_node(node(LANE))
    raw.hset("imagemill:speed", LANE, 4)
    found = tried(imagemill, *STYLIZE, "--dry-run", stdin=GOOD)
    assert (found["nodes"], found["begins_in"], found["seconds"]) == (1, 0, 0.5)


def test_works_without_redis(imagemill: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", "redis://127.0.0.1:1/0")
    result = imagemill(*STYLIZE, "--dry-run", stdin=GOOD)
    assert result.exit_code == 0
    assert "time: unknown, Redis can't be reached" in result.stdout


def test_fetch_opens_images_and_masks(
    imagemill: Invoke, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMILL_FILES__READ_ROOTS", json.dumps([str(tmp_path / "in")]))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.png").write_bytes(png((20, 10), "red"))
    (tmp_path / "in/bad.png").write_bytes(b"no image")
    (tmp_path / "mask.png").write_bytes(png((1, 1), 255, "L"))
    (tmp_path / "in/mask.png").write_bytes(png((20, 10), 255, "L"))
    rows = [
        {"source": (tmp_path / "in" / name).as_uri(), "mask": (tmp_path / mask).as_uri()}
        for name, mask in (("good.png", "in/mask.png"), ("bad.png", "in/mask.png"), ("good.png", "mask.png"))
    ]
    Path("list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    inpaint = ("submit", "--dry-run=fetch", "list.jsonl", "--operation", "inpaint", "--output", "s3://results/out")
    found = tried(imagemill, *inpaint)
    good, bad, hidden = found["looked_at"]
    assert good == {
        "source": rows[0]["source"],
        "ok": True,
        "format": "png",
        "size": [20, 10],
        "bytes": len(png((20, 10), "red")),
        "mask": "fills 100.0% of 20×10 pixels",
    }
    assert (bad["ok"], bad["error"].partition(":")[0]) == (False, "not_an_image")
    assert (hidden["ok"], hidden["mask"].partition(":")[0]) == (False, "forbidden_address")
    assert found["output_bytes"] == 1080
    assert ledger.jobs() == []


def test_sample_holds_the_first_images_and_some_of_the_others() -> None:
    sample = Sample()
    for index in range(1000):
        sample.add(Item(index=index, source="s3://b/1.png"))
    indexes = [item.index for item in sample.items]
    assert indexes[:FIRST] == [*range(FIRST)]
    assert len({*indexes}) == FIRST + OTHERS
    assert indexes == sorted(indexes)
