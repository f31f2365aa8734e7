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
from imagemill.shared.options.base import ADDRESSES
from imagemill.worker.node.look import JOB_IMAGES
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


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may be read, with files of each kind, beside one that may not."""
    (folder := tmp_path / "in").mkdir()
    monkeypatch.setenv("IMAGEMILL_FILES__READ_ROOTS", json.dumps([str(folder)]))
    half = Image.new("L", (20, 10))
    half.paste(255, (0, 0, 10, 10))
    half.save(folder / "half.png")
    (folder / "good.png").write_bytes(png((20, 10), "red"))
    (folder / "tall.png").write_bytes(png((10, 20), 255, "L"))
    (folder / "bad.png").write_bytes(b"no image")
    (tmp_path / "hidden.png").write_bytes(png((20, 10), "red"))
    return folder


def opened(imagemill: Invoke, folder: Path, rows: list[dict[str, Any]], job: str, *options: str) -> list[dict[str, Any]]:
    """What `--dry-run=fetch` says of a list's rows; values and options that end with .png are files of the folder."""
    lines = [{name: address(folder, value) for name, value in row.items()} for row in rows]
    Path("list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    pairs = [option.split("=") for option in options]
    settings = [part for name, value in pairs for part in ("--set", f"{name}={address(folder, value)}")]
    where = ("--output", "s3://results/out", "--dry-run=fetch")
    looks: list[dict[str, Any]] = tried(imagemill, "submit", "list.jsonl", *job.split(), *settings, *where)["looked_at"]
    return looks


def address(folder: Path, value: str) -> str:
    return (folder / value).resolve().as_uri() if value.endswith(".png") else value


INPAINT = "--operation inpaint"
SAM = "--operation remove-background --engine rembg --set model=sam"
REMBG = "--operation remove-background --engine rembg"
DIFFUSION = "--operation stylize --engine diffusion"
COLOURS = "--operation stylize"


@pytest.mark.parametrize(
    ("row", "flags", "error"),
    [
        ({"source": "good.png"}, [COLOURS], None),
        ({"source": "bad.png"}, [COLOURS], "not_an_image: "),
        ({"source": "none.png"}, [COLOURS], "not_found: "),
        ({"source": "../hidden.png"}, [COLOURS], "forbidden_address: "),
        # masks and boxes
        ({"source": "good.png", "mask": "half.png"}, [INPAINT], None),
        ({"source": "good.png"}, [INPAINT, "mask=half.png"], None),
        ({"source": "good.png", "mask": "../hidden.png"}, [INPAINT], "bad_mask: the mask file:"),
        ({"source": "good.png", "mask": "none.png"}, [INPAINT], "bad_mask: the mask file:"),
        ({"source": "good.png", "mask": "bad.png"}, [INPAINT], "bad_mask: the mask file:"),
        ({"source": "good.png"}, [INPAINT, "mask=none.png"], "bad_mask: the mask file:"),
        ({"source": "good.png", "mask": "good.png"}, [INPAINT], "bad_mask: the mask file:"),
        ({"source": "good.png", "mask": "tall.png"}, [INPAINT], "bad_mask: the mask is 10x20 but the image is 20x10"),
        ({"source": "good.png", "boxes": "30,0,5,5"}, [INPAINT], "bad_mask: the box 30,0,5,5 lies outside the image"),
        ({"source": "good.png", "boxes": "0,0,20,10"}, [INPAINT], "bad_mask: the mask and boxes cover the whole image"),
        ({"source": "bad.png", "mask": "none.png"}, [INPAINT], "not_an_image: "),
        # points
        ({"source": "good.png", "points": "3,4", "boxes": "1,2,3,4"}, [SAM], None),
        ({"source": "good.png", "points": "3,40"}, [SAM], "bad_mask: the point 3,40 lies outside the image"),
        ({"source": "good.png"}, [SAM, "boxes=99,0,3,3"], "bad_mask: the box 99,0,3,3 lies outside the image"),
        # control images, references and backgrounds
        ({"source": "good.png", "control_image": "tall.png"}, [DIFFUSION], None),
        ({"source": "good.png", "control_image": "none.png"}, [DIFFUSION], "bad_reference: the control image file:"),
        ({"source": "good.png", "control_image": "bad.png"}, [DIFFUSION], "bad_reference: the control image file:"),
        ({"source": "good.png"}, [DIFFUSION, "control_image=none.png"], "bad_reference: the control image file:"),
        ({"source": "good.png", "control_image": "tall.png"}, [DIFFUSION, "control_image=none.png"], None),
        ({"source": "good.png"}, [DIFFUSION, "reference=bad.png"], "bad_reference: the reference file:"),
        ({"source": "good.png"}, [COLOURS, "style=colour-transfer", "reference=good.png"], None),
        (
            {"source": "good.png"},
            [COLOURS, "style=colour-transfer", "reference=none.png"],
            "bad_reference: the reference file:",
        ),
        ({"source": "good.png"}, [REMBG, "background_image=good.png"], None),
        ({"source": "good.png"}, [REMBG, "background_image=../hidden.png"], "bad_reference: the background file:"),
        # what the engine can't use is not fetched
        ({"source": "good.png", "mask": "none.png", "control_image": "none.png"}, [COLOURS], None),
    ],
)
def test_fetch_opens_all_that_a_job_fetches_and_fails_as_it_would(
    imagemill: Invoke, files: Path, row: dict[str, Any], flags: list[str], error: str | None
) -> None:
    (look,) = opened(imagemill, files, [row], *flags)
    assert (look["place"], look["ok"]) == ("list.jsonl:1", error is None)
    assert look.get("error", "").startswith(error or "")
    assert ("error" in look) is (error is not None)


def test_every_option_with_the_address_of_an_image_is_opened() -> None:
    assert {*JOB_IMAGES, "mask"} == {*ADDRESSES}


def test_fetch_tells_what_images_and_masks_are(imagemill: Invoke, ledger: Ledger, files: Path) -> None:
    rows = [{"source": "good.png", "mask": "half.png"}, {"source": "bad.png", "mask": "none.png"}]
    good, bad = opened(imagemill, files, rows, INPAINT)
    assert good == {
        "place": "list.jsonl:1",
        "source": (files / "good.png").as_uri(),
        "ok": True,
        "format": "png",
        "size": [20, 10],
        "bytes": len(png((20, 10), "red")),
        "mask": "fills 50.0% of 20×10 pixels",
    }
    assert [error.partition(":")[0] for error in bad["errors"]] == ["not_an_image", "bad_mask"]
    assert bad["error"] == bad["errors"][0]
    shown = imagemill("submit", "list.jsonl", *INPAINT.split(), "--output", "s3://results/out", "--dry-run=fetch")
    lines = shown.stdout.splitlines()
    assert lines[-3] == f"  list.jsonl:1: {good['source']}: png, 20×10, {good['bytes']} bytes; mask: {good['mask']}"
    assert lines[-2].startswith(f"  list.jsonl:2: {bad['source']}: not_an_image: ")
    assert lines[-1] == "1 of the 2 opened images would fail: 1 not_an_image"
    assert ledger.jobs() == []
    (own,) = opened(imagemill, files, [{"source": "good.png", "control_image": "tall.png"}], DIFFUSION)
    assert own["control_image"] == "10×20 pixels"


def test_fetch_opens_an_image_once_for_all_of_its_garments(imagemill: Invoke, files: Path) -> None:
    looks = opened(imagemill, files, [{"source": "good.png"}, {"source": "half.png"}], REMBG, "model=u2net_cloth_seg")
    assert [look["place"] for look in looks] == ["list.jsonl:1", "list.jsonl:2"]


def test_sample_holds_the_first_images_and_some_of_the_others() -> None:
    sample = Sample()
    for index in range(1000):
        sample.add(Item(index=index, source="s3://b/1.png"))
    indexes = [item.index for item in sample.items]
    assert indexes[:FIRST] == [*range(FIRST)]
    assert len({*indexes}) == FIRST + OTHERS
    assert indexes == sorted(indexes)
