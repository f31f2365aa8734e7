"""Job ids, and lists whose images have several results or prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.naming import shown_key
from imagemill.producer.submission import ListCheck, new_job_id
from imagemill.shared.keys import LAYOUTS
from imagemill.shared.messages import Item, Job
from imagemill.shared.options.base import Point
from imagemill.worker.transfer.store import render_key
from tests.unit.producer.lists import A, B, read


def test_job_ids_are_unique_and_start_with_the_date() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"\d{6}-[0-9a-f]{8}", job) for job in ids)


def checked(path: Path, key: str = LAYOUTS["indexed"], **options: Any) -> tuple[list[Item], ListCheck]:
    """The items of a list for rembg, and what was counted."""
    spec = {"operation": "remove-background", "options": {"engine": "rembg", **options}}
    job, check = Job.model_validate(spec | {"output": {"url": "s3://results", "key": key}}), ListCheck()
    return list(check.accepted(read(path), job, skip_invalid=True)), check


@pytest.mark.parametrize(
    ("key", "names"),
    [
        (LAYOUTS["indexed"], ["job/000000-a-upper", "job/000001-a-lower", "job/000004-2-upper", "job/000005-2-lower"]),
        (LAYOUTS["flat"], ["a-upper", "a-lower", "2-upper", "2-lower"]),
        (LAYOUTS["tree"], ["a-upper", "a-lower", "2-upper", "2-lower"]),
        ("{stem}.{ext}", ["a-upper", "a-lower", "b-upper", "b-lower"]),
        ("{sku}/photo", ["x1/photo-upper", "x1/photo-lower", "x2/photo-upper", "x2/photo-lower"]),
    ],
)
def test_each_image_has_a_separately_named_result_for_each_garment(tmp_path: Path, key: str, names: list[str]) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"source,name,sku\n{A},,x1\nftp://example.com/c.jpg,,x9\n{B},2,x2\n")
    items, check = checked(path, key, model="u2net_cloth_seg", garments=("upper", "lower"))
    assert [(item.index, item.part) for item in items] == [(0, "upper"), (1, "lower"), (4, "upper"), (5, "lower")]
    assert [shown_key(item, key.removesuffix(".{ext}")).replace("{job}", "job") for item in items] == names
    assert [render_key(key, job="job", item=item, extension="png") for item in items] == [f"{name}.png" for name in names]
    assert (check.total, check.bad_count, check.size, check.duplicates) == (4, 1, 6, {})


def test_garments_of_an_image_that_is_listed_twice_share_their_results(tmp_path: Path) -> None:
    (path := tmp_path / "list.txt").write_text(f"{A}\n{A}\n")
    items, check = checked(path, model="u2net_cloth_seg")
    assert [(item.part, item.duplicate_of) for item in items[3:]] == [("upper", 0), ("lower", 1), ("full", 2)]
    assert check.duplicates == {0: 1, 1: 1, 2: 1}


def test_points_are_read_for_models_that_take_them(tmp_path: Path) -> None:
    (path := tmp_path / "list.csv").write_text(f'source,points,boxes\n{A},"0.5,0.4;0.1,0.2,0","1,2,3,4"\n{B},250 points,\n')
    items, check = checked(path, model="sam")
    (item,) = items
    assert item.points == (Point(x=0.5, y=0.4, unit="fraction"), Point(x=0.1, y=0.2, label=0, unit="fraction"))
    assert len(item.boxes) == 1
    (bad,) = check.bad
    assert bad.place == f"{path}:3"
    assert "a point must be two numbers x,y" in bad.reason
    items, check = checked(path, model="u2net")
    assert (len(items), check.bad_count, items[0].points) == (2, 0, ())
