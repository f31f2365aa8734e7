"""Messages are frozen, strict and versioned, and survive JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from imagemill.shared.engines import ENGINES, parse_options
from imagemill.shared.keys import check_key
from imagemill.shared.messages import (
    ENDED,
    LONGEST_KEY,
    LONGEST_OUTPUT,
    Item,
    ItemResult,
    Job,
    JobState,
    JobStatus,
    Output,
    Policy,
    WakeUp,
    compact,
    row,
)
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.options.inpaint import LamaInpaint, OpencvInpaint

A = "https://example.com/a.jpg"
OUT = Output(url="s3://results/x")
JOBS = [
    Job(operation="remove-background", output=OUT),
    Job(operation="inpaint", output=OUT),
    Job(operation="stylize", output=OUT),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.operation)
def test_job_survives_json(job: Any) -> None:
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert job.engine == "opencv"


def test_jobs_cover_every_operation() -> None:
    assert tuple(job.operation for job in JOBS) == OPERATIONS


@pytest.mark.parametrize(
    "options",
    [OpencvInpaint(), LamaInpaint(), LamaInpaint(strategy="resize", tile=512), LamaInpaint(strategy="whole")],
    ids=["opencv", "lama", "resize", "whole"],
)
def test_job_with_boxes_survives_json(options: OpencvInpaint | LamaInpaint) -> None:
    boxes = {"boxes": "1,2,3,4;0.1,0.1,0.5,0.5"}
    job = Job(operation="inpaint", output=OUT, options=type(options).model_validate(options.model_dump() | boxes))
    assert Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    "given",
    [{}, {"exact": True}, {"exact": True, "long_edge": "original"}, {"crop": True, "canvas": 800}, {"mask_only": True}],
    ids=str,
)
def test_rembg_job_survives_json(given: dict[str, Any]) -> None:
    job = Job(operation="remove-background", output=OUT, options=parse_options("remove-background", "rembg", given))
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_lane_names_engine_and_model() -> None:
    job = Job.model_validate({"operation": "inpaint", "output": OUT, "options": {"engine": "lama", "boxes": "1,2,3,4"}})
    assert (job.engine, job.lane) == ("lama", "inpaint.lama.lama")
    assert [job.lane for job in JOBS] == ["remove-background.opencv", "inpaint.opencv", "stylize.opencv"]


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"operation": "sharpen"}, {"surprise": 1}, {"options": {"engine": "opencv", "surprise": 1}}],
    ids=str,
)
def test_job_of_another_version_or_with_unknown_fields_is_refused(change: dict[str, Any]) -> None:
    fields = json.loads(JOBS[2].model_dump_json())
    with pytest.raises(ValidationError):
        Job.model_validate({**fields, **change})


@pytest.mark.parametrize("message", [JOBS[0], Item(index=0, source=A), WakeUp(lane="stylize.opencv"), OUT, Policy()])
def test_messages_are_frozen(message: Any) -> None:
    name = next(iter(type(message).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(message, name, None)


@pytest.mark.parametrize("version", [0, 1, 3])
def test_wake_up_of_another_version_is_refused(version: int) -> None:
    with pytest.raises(ValidationError):
        WakeUp.model_validate({"version": version, "lane": "stylize.opencv"})


@pytest.mark.parametrize("lane", [lane for engine in ENGINES for lane in engine.lanes])
def test_every_lane_can_be_woken_up(lane: str) -> None:
    assert WakeUp.model_validate_json(WakeUp(lane=lane).model_dump_json()).lane == lane


@pytest.mark.parametrize(
    "lane", ["", "stylize", "stylize.", "stylize.opencv.a.", "stylize.opencv..a", "stylize.*", "../etc.passwd", "stylize:a.b"]
)
def test_lanes_unfit_for_a_queue_are_refused(lane: str) -> None:
    with pytest.raises(ValidationError):
        WakeUp(lane=lane)


@pytest.mark.parametrize(
    "template", ["{job}/{index:06d}-{name}", "{index}", "{item}", "all/{name}/{index:04d}", "{path}/{name}", "{Image Src}"]
)
def test_valid_key_templates(template: str) -> None:
    assert check_key(template) == template


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{job}", "would overwrite each other"),
        ("", "would overwrite each other"),
        ("{index}/{a.b}", "may only use"),
        ("{index!r}", "may only use"),
        ("{index.__class__}", "may only use"),
        ("{index:9999999d}", "may only use"),
        ("{{index}}", "may only use"),
        ("/{index}", "no leading /"),
        ("../{index}", "no leading / and no .."),
        ("{name}\n", "may not contain control characters"),
        ("a/../../{index}", "no leading / and no .."),
    ],
)
def test_invalid_key_templates_are_refused(template: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Output(url="s3://results", key=template)


@pytest.mark.parametrize(("operation", "usual"), [("inpaint", "keep"), ("stylize", "srgb"), ("remove-background", "srgb")])
def test_default_profile_depends_on_the_operation(operation: str, usual: str) -> None:
    profiles = []
    for output in ({}, {"icc": "srgb"}, {"icc": "keep"}):
        job = Job.model_validate({"operation": operation, "output": {"url": "s3://results/x", **output}})
        profiles.append(Job.model_validate_json(job.model_dump_json()).icc)
    assert profiles == [usual, "srgb", "keep"]


def test_item_id_depends_on_source_and_position_only() -> None:
    ids = {Item(index=index, source=source).id for index in (0, 1) for source in (A, A + "x")}
    assert len(ids) == 4
    assert Item(index=12, source=A).id == Item(index=12, source=A).id == "000012-5fcd5048"


def test_digest_depends_on_what_determines_the_result() -> None:
    first = Item(index=0, source=A)
    assert first.digest == Item(index=7, source=A, duplicate_of=0).digest
    others = [
        Item(index=0, source=A + "?"),
        Item(index=0, source=A, mask=A),
        Item.model_validate({"index": 0, "source": A, "points": "1,2"}),
        Item.model_validate({"index": 0, "source": A, "points": "1,2,0"}),
        Item(index=0, source=A, part="upper"),
        Item(index=0, source=A, key="upper"),
        Item(index=0, source=A, name="n"),
        Item.model_validate({"index": 0, "source": A, "boxes": "1,2,3,4"}),
        Item.model_validate({"index": 0, "source": A, "boxes": "0.1,0.2,0.3,0.4"}),
    ]
    assert len({item.digest for item in [first, *others]}) == 10


def test_items_with_invalid_index_or_source_are_refused() -> None:
    for fields in ({"index": -1, "source": A}, {"index": 0, "source": A + "a" * 4096}, {"index": 0, "source": ""}):
        with pytest.raises(ValidationError):
            Item.model_validate(fields)


NAMES = st.none() | st.text(max_size=50)


@given(st.integers(0, 10**7), NAMES, st.lists(st.tuples(*[st.integers(1, 9999)] * 4), max_size=3))
def test_compact_item_survives_json(index: int, name: str | None, boxes: list[Any]) -> None:
    item = Item.model_validate({"index": index, "source": A, "name": name, "boxes": boxes})
    assert Item.model_validate_json(compact(item)) == item


def test_compact_omits_defaults() -> None:
    assert compact(Item(index=3, source=A)) == f'{{"index":3,"source":"{A}"}}'


def test_compact_result_survives_json() -> None:
    result = ItemResult(
        index=3,
        state="done",
        output="s3://results/x/000003-a.png",
        source_size=(4, 3),
        seconds={"fetch": 0.25},
        notes=("small",),
    )
    assert ItemResult.model_validate_json(compact(result)) == result


@pytest.mark.parametrize("state", ["pending", "cancelled"])
def test_row_without_a_result(state: Any) -> None:
    item = Item(index=1, source=A, mask=A, duplicate_of=0)
    line = row(item, None, state)
    assert (line.state, line.item, line.index, line.source, line.mask, line.duplicate_of) == (state, item.id, 1, A, A, 0)
    assert (line.code, line.attempts) == (None, 0)


def test_row_of_an_image_that_the_deadline_overtook() -> None:
    line = row(Item(index=1, source=A), None, "expired")
    assert (line.state, line.code, line.attempts) == ("failed", "expired", 0)
    assert "deadline" in (line.message or "")


def test_row_with_a_result() -> None:
    failed = ItemResult(index=0, state="failed", code="not_found", message="there is no such image", attempts=2)
    line = json.loads(row(Item(index=0, source=A), failed).model_dump_json())
    assert {name: line[name] for name in ("item", "source", "state", "output", "code", "message", "attempts")} == {
        "item": Item(index=0, source=A).id,
        "source": A,
        "state": "failed",
        "output": None,
        "code": "not_found",
        "message": "there is no such image",
        "attempts": 2,
    }
    assert "result" not in line


@pytest.mark.parametrize("state", get_args(JobState))
def test_over_is_true_in_the_final_states(state: Any) -> None:
    status = JobStatus(
        job="260730-1f0c9a3e", operation="stylize", engine="opencv", lane="opencv", state=state, total=1, done=0, failed=0,
        duplicates=0, priority="normal", output="s3://results", created=0.0, seconds=1.0,
    )  # fmt: skip
    assert status.over == (state in ENDED) == (state in ("done", "failed", "cancelled"))


@pytest.mark.parametrize(
    "fields",
    [
        {"attempts": 0},
        {"attempts": 11},
        {"priority": "urgent"},
        {"not_before": "2026-07-30T12:00"},  # in which time zone?
        {"until": "tomorrow"},
        *({"owner": owner} for owner in ("", "~job-1", "a b", "a:b", ".a", "a" * 65)),
    ],
    ids=str,
)
def test_invalid_policies_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate(fields)


@pytest.mark.parametrize("owner", [None, "ann", "ann@example.com", "Team_7.a-b", "a" * 64])
def test_policy_survives_json(owner: str | None) -> None:
    policy = Policy(owner=owner, not_before=datetime(2026, 7, 30, tzinfo=UTC), until=datetime(2026, 7, 31, tzinfo=UTC))
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


def test_no_result_is_large() -> None:
    """Strangers choose some of it: names, redirects, words of servers."""
    url = "s3://" + "b" * 63 + "/" + "k" * (LONGEST_OUTPUT + LONGEST_KEY)
    largest = ItemResult(
        index=10**9,
        state="failed",
        output=url,
        code="unsupported_reference_image",
        message="\x01" * 100_000,
        source_format="x" * 10,
        notes=("\x01" * 10_000,) * 1000,
        node="n" * 253,
        seconds={f"stage{n}": 1 / 3 for n in range(12)},
    )
    assert len(largest.message or "") == 1000
    assert [len(note) for note in largest.notes] == [60] * 20
    assert len(compact(largest).encode()) < 18_000


@pytest.mark.parametrize("field", [{"url": "s3://bucket/" + "a" * 2048}, {"key": "{index}" + "a" * 1024}])
def test_outputs_have_a_limited_length(field: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="at most"):
        Output(**{"url": "s3://bucket", **field})  # type: ignore[arg-type]
