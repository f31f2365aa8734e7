"""What `submit` says of options and columns that have no effect: one table per kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.rows import FIELDS, SourceRow
from imagemill.producer.spec import job_spec
from imagemill.producer.submission import ListCheck
from imagemill.producer.without_effect import EVERY, USERS, resembled
from imagemill.shared.engines import ENGINES
from imagemill.shared.messages import Job
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.presets import Presets
from imagemill.shared.quality import LIMITS, RULES, UNMEASURED
from tests.unit.producer.lists import A, B, read

ENGINE = {"rembg": "remove-background", "lama": "inpaint", "diffusion": "stylize"}
SAM = "remove-background with engine=rembg and model=sam"


def job(engine: str, options: Mapping[str, Any] = {}, output: Mapping[str, Any] = {}, policy: Mapping[str, Any] = {}) -> Job:
    """A job for `engine`, or for `operation opencv`."""
    operation, _, name = engine.partition(" ")
    spec = {"operation": ENGINE.get(operation, operation), "options": {"engine": name or operation, **options}}
    return Job.model_validate({**spec, "output": {"url": "s3://results", **output}, "policy": policy})


def checked(path: Path, content: str, spec: Job) -> ListCheck:
    path.write_text(content)
    check = ListCheck()
    list(check.accepted(read(path), spec, skip_invalid=True))
    return check


def test_every_column_and_limit_is_accounted_for() -> None:
    assert {*USERS} == {*FIELDS} - EVERY
    used = {name for engine in ENGINES for name in engine.options().columns} | {"points"}  # of Segment Anything only
    assert used == {*USERS}
    assert {*UNMEASURED} == {*OPERATIONS}
    assert all(RULES.keys() > UNMEASURED[operation] for operation in OPERATIONS)
    assert not any(LIMITS[operation].keys() & UNMEASURED[operation] for operation in OPERATIONS)


@pytest.mark.parametrize(
    ("engine", "options", "columns", "useless"),
    [
        ("remove-background opencv", {}, "mask control_image boxes points", "boxes control_image mask points"),
        ("rembg", {}, "mask control_image boxes points", "boxes control_image mask points"),
        ("rembg", {"model": "u2net_cloth_seg"}, "boxes points", "boxes points"),
        ("rembg", {"model": "sam"}, "mask control_image boxes points", "control_image mask"),
        ("rembg", {"model": "sam-vit-h-quant"}, "boxes points", ""),
        ("inpaint opencv", {}, "mask control_image boxes points", "control_image points"),
        ("lama", {}, "mask control_image boxes points", "control_image points"),
        ("stylize opencv", {}, "mask control_image boxes points", "boxes control_image mask points"),
        ("diffusion", {}, "mask control_image boxes points", "boxes mask points"),
    ],
)
def test_columns_that_the_engine_can_t_use_are_told_and_left_out(
    engine: str, options: dict[str, Any], columns: str, useless: str, tmp_path: Path
) -> None:
    cells = {"mask": A, "control_image": A, "boxes": '"1,2,3,4"', "points": '"1,2"'}
    spec, names = job(engine, options), columns.split()
    rows = [f"source,{','.join(names)}", f"{A}{',' * len(names)}", *[f"{B},{','.join(cells[name] for name in names)}"] * 2]
    check = ListCheck()
    (path := tmp_path / "list.csv").write_text("\n".join(rows))
    items = list(check.accepted(read(path), spec, skip_invalid=True))
    what = ", ".join(filter(None, (spec.options.engine, getattr(spec.options, "model", None))))
    assert [warning for warning in check.warnings if "in the list" in warning] == [
        f"{name!r} in the list has no effect on {spec.operation} ({what}), only on {USERS[name]}: 2 rows, the first is {path}:3"
        for name in useless.split()
    ]
    filled = {name for name in names if getattr(items[-1], name)}
    assert filled == {*names} - {*useless.split()}


def test_what_the_engine_can_t_use_need_not_be_valid_and_makes_no_difference(tmp_path: Path) -> None:
    rows = f"source,points,boxes,mask\n{A},250 points,3,none\n{A},90 points,7,\n"
    check = checked(tmp_path / "list.csv", rows, job("rembg"))
    assert (check.bad, check.total, check.duplicates) == ([], 2, {0: 1})
    told = "'mask' in the list has no effect on remove-background (rembg, u2net), only on inpaint: 1 row, "
    assert check.warnings[1] == f"{told}{tmp_path}/list.csv:2"


@pytest.mark.parametrize(
    ("header", "engine", "options", "hint"),
    [
        ("masks", "lama", {}, "mask"),
        ("Mask", "lama", {}, None),  # it is one
        ("Mask URL", "lama", {}, "mask"),
        ("mask_image", "lama", {}, "mask"),
        ("maks", "inpaint opencv", {}, "mask"),
        ("box", "inpaint opencv", {}, "boxes"),
        ("bbox", "lama", {}, "boxes"),
        ("point", "rembg", {"model": "sam"}, "points"),
        ("bounding boxes", "rembg", {"model": "sam"}, "boxes"),
        ("control-image", "diffusion", {}, "control_image"),
        ("ControlImage", "diffusion", {}, "control_image"),
        ("control images", "diffusion", {}, "control_image"),
        ("masks", "rembg", {}, None),  # which has no use for a mask
        ("point", "rembg", {}, None),
        ("task", "lama", {}, None),
        ("title", "lama", {}, None),
        ("sku", "diffusion", {}, None),
    ],
)
def test_column_with_nearly_the_right_name_gets_a_hint(
    header: str, engine: str, options: dict[str, Any], hint: str | None, tmp_path: Path
) -> None:
    boxes = {"boxes": [[1, 2, 3, 4]]} if engine in ("lama", "inpaint opencv") else {}
    check = checked(tmp_path / "list.csv", f"source,{header}\n{A},{B}\n", job(engine, options | boxes))
    told = f"the column {header.lower()!r} of {tmp_path}/list.csv is not read; did you mean {hint!r}?"
    assert (told in check.warnings) if hint else not any("did you mean" in warning for warning in check.warnings)


def test_refused_list_tells_the_column_that_may_be_meant(tmp_path: Path) -> None:
    check = checked(path := tmp_path / "list.csv", f"source,masks\n{A},{B}\n", job("lama"))
    refused, told = check.error(), f"the column 'masks' of {path} is not read; did you mean 'mask'?"
    assert refused.warnings == check.warnings == (told,)
    assert refused.message.endswith(f"{path}:2: needs a mask or boxes, from the row or the job; {told}")


@pytest.mark.parametrize(
    ("header", "engine", "told"),
    [
        ("prompt", "diffusion", "prompt"),
        ("Negative Prompt,seed", "diffusion", "negative prompt, seed"),
        ("background-image", "rembg", "background-image"),
        ("control", "diffusion", "control"),
        ("prompt", "stylize opencv", None),
        ("sku", "diffusion", None),
    ],
)
def test_columns_named_like_options_are_told_not_to_be_read(header: str, engine: str, told: str | None, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    check = checked(path, f"source,{header}\n{A},1{',2' * header.count(',')}\n", job(engine))
    first = (told or "").split(",")[0].replace(" ", "_").replace("-", "_")
    reason = "because they are the same for all images of a job"
    line = f"{path} can't set options in columns ({told}), {reason}; use --set {first}=VALUE"
    assert check.warnings == ((line,) if told else ())


def test_columns_that_name_results_are_in_use(tmp_path: Path) -> None:
    rows = f"source,size\n{A},XL\n"
    used = job("diffusion", output={"key": "{stem}-{Size}"})
    assert checked(tmp_path / "list.csv", rows, used).warnings == ()
    assert len(checked(tmp_path / "list.csv", rows, job("diffusion")).warnings) == 1


@pytest.mark.parametrize("header", ["prompt", "mask url"])
def test_column_with_the_images_is_in_use_whatever_its_name(header: str, tmp_path: Path) -> None:
    (path := tmp_path / "list.csv").write_text(f'{header},sku\n"{A},{B}",7\n')
    for engine in ("diffusion", "lama"):
        check = ListCheck()
        list(check.accepted(read(path), job(engine), skip_invalid=True))
        assert check.warnings == ()


@pytest.mark.parametrize("name", ["", "1", "name", "source", "paint", "sprints", "x" * 5000])
def test_other_names_resemble_nothing(name: str) -> None:
    assert resembled(name) is None


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ('source,points\n{A},"1,2"\n{B},\n{B},\n', {}, "2 rows, the first is {list}:3"),
        ('source,boxes,points\n{A},"1,2,3,4",\n{B},,\n', {}, "1 row, {list}:3"),
        ('source,points\n{A},"1,2"\n', {}, None),
        ("source,points\n{A},\n", {"points": "3,4"}, None),
        ("source,points\n{A},\n", {"boxes": "1,2,3,4"}, None),
    ],
)
def test_segment_anything_without_prompts_is_told_with_its_line(
    rows: str, options: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    warnings = checked(path, rows.format(A=A, B=B), job("rembg", {"model": "sam", **options})).warnings
    line = "without points or boxes, whatever is at the centre is cut out: "
    assert warnings == ((line + told.format(list=path),) if told else ())


MATTING = "alpha_matting is false"
BEFORE = "with exact, mask_only shows the mask before matting"
CANNY = "no canny edges are drawn"
THRESHOLDS = {"alpha_matting_foreground_threshold": 240, "alpha_matting_background_threshold": 10}


@pytest.mark.parametrize(
    ("engine", "options", "ignored"),
    [
        ("remove-background opencv", {"long_edge": 800, "feather": 2, "background": "#ffffff"}, {}),
        ("rembg", {"margin": 0.1}, {"margin": "crop is false"}),
        ("rembg", {"margin": 0.1, "crop": True, "canvas": 800, "long_edge": 900, "shadow": True}, {}),
        ("rembg", {"post_process_mask": True, "mask_only": True, "alpha_matting": True}, {}),
        ("rembg", {"exact": True, "long_edge": 1600}, {"long_edge": "exact works at the source's size"}),
        ("rembg", {"exact": True}, {}),
        ("rembg", THRESHOLDS, dict.fromkeys(THRESHOLDS, MATTING)),
        ("rembg", {"alpha_matting_erode_size": None}, {"alpha_matting_erode_size": MATTING}),
        ("rembg", {"alpha_matting": True, **THRESHOLDS}, {}),
        ("rembg", {"alpha_matting": True, "exact": True, "mask_only": True}, {"alpha_matting": BEFORE}),
        ("inpaint opencv", {"boxes": "1,2,3,4", "mask_threshold": 9, "mask_from": "luma", "mask_dilate": 3, "radius": 4},
         dict.fromkeys(("mask_from", "mask_threshold"), "there is no mask")),
        ("inpaint opencv", {"mask": A, "mask_threshold": 9, "mask_feather": 2, "method": "telea"}, {}),
        ("lama", {"mask": A, "strategy": "whole", "tile": 1024}, {"tile": "strategy is whole"}),
        ("lama", {"mask": A, "strategy": "resize", "tile": 512}, {}),
        ("stylize opencv", {"colour": True}, {"colour": "style is stylization"}),
        ("stylize opencv", {"colour": True, "style": "pencil-sketch", "strength": 0.5}, {}),
        ("diffusion", {"cfg": 1, "negative_prompt": "x"}, {"negative_prompt": "cfg is 1"}),
        ("diffusion", {"model": "sdxl-turbo", "negative_prompt": "x"}, {"negative_prompt": "cfg is 1"}),
        ("diffusion", {"mode": "text-to-image", "strength": 0.5}, {"strength": "mode is text-to-image"}),
        ("diffusion", {"control_scale": 1}, {}),
        ("diffusion", {"control_scale": 1, "control": "canny:1"}, {"control_scale": "every control has its own weight"}),
        ("diffusion", {"control_scale": 1, "control": "none"}, {"control_scale": "control is none"}),
        ("diffusion", {"canny_low": 50, "canny_high": 90}, {}),
        ("diffusion", {"canny_low": 50, "control": "tile;canny"}, {}),
        ("diffusion", {"canny_low": 50, "control": "controlnet-canny"}, {}),
        ("diffusion", {"canny_low": 50, "control": "my-own"}, {}),  # it may be for canny
        ("diffusion", {"canny_low": 50, "control": "tile;controlnet-scribble"}, {"canny_low": CANNY}),
        ("diffusion", {"canny_high": 250, "control": "none"}, {"canny_high": CANNY}),
        ("diffusion", {"canny_high": 250, "control_image": A}, {"canny_high": CANNY}),
        ("diffusion", {"canny_high": 250, "control": "tile;canny", "control_image": A}, {}),
        ("diffusion", {"prompt": "x", "scheduler": "ddim", "seed": 1, "seed_policy": "url", "size": 512, "crop": "1x1",
                       "deterministic": True, "steps": 3, "long_edge": 99, "vae": "v", "loras": "a", "reference": A}, {}),
    ],
)  # fmt: skip
def test_given_options_without_effect_are_told(
    engine: str, options: dict[str, Any], ignored: dict[str, str], tmp_path: Path
) -> None:
    spec = job(engine, options)
    told = tuple(f"{name} has no effect, because {reason}" for name, reason in ignored.items())
    assert checked(tmp_path / "list.txt", f"{A}\n", spec).warnings == told


def test_options_about_masks_count_if_a_row_has_one(tmp_path: Path) -> None:
    spec = job("lama", {"boxes": "1,2,3,4", "mask_threshold": 9})
    assert checked(tmp_path / "list.csv", f"source,mask\n{A},\n{A},{B}\n", spec).warnings == ()


@pytest.mark.parametrize(
    ("engine", "options", "row", "replaced"),
    [
        ("lama", {"mask": B}, {"mask": A}, ["mask"]),
        ("lama", {"boxes": "1,2,3,4"}, {"boxes": "5,6,7,8"}, []),  # both are filled
        ("diffusion", {"control_image": B}, {"control_image": A}, ["control_image"]),
        ("rembg", {"model": "sam", "points": "1,2", "boxes": "1,2,3,4"}, {"points": "3,4"}, ["boxes", "points"]),
    ],
)
def test_option_for_rows_that_say_nothing_is_told_if_all_say_something(
    engine: str, options: dict[str, Any], row: dict[str, str], replaced: list[str]
) -> None:
    for other, told in (({}, []), (row, replaced)):
        check = ListCheck()
        rows = [SourceRow("l:1", {"source": A, **row}), SourceRow("l:2", {"source": A, **other})]
        list(check.accepted(rows, job(engine, options), skip_invalid=False))
        assert sorted(check.warnings) == [f"{name} has no effect, because each row has its own" for name in told]


def test_options_of_presets_and_of_stored_jobs_are_not_given(tmp_path: Path) -> None:
    turbo, output = Presets(None).get("turbo"), {"url": "s3://results"}  # it inherits a negative prompt, and its cfg is 1
    spec = job_spec(None, None, {}, output, {}, turbo)
    assert checked(tmp_path / "list.txt", A, spec).warnings == ()
    told = ("negative_prompt has no effect, because cfg is 1",)
    spec = job_spec(None, None, {"negative_prompt": "x"}, output, {}, turbo)
    assert checked(tmp_path / "list.txt", A, spec).warnings == told
    stored = Job.model_validate_json(job("diffusion", {"cfg": 1, "mode": "text-to-image"}).model_dump_json())
    assert checked(tmp_path / "list.txt", A, stored).warnings == ()


@pytest.mark.parametrize(
    ("engine", "output", "quality", "told"),
    [
        ("stylize opencv", {"format": "png", "quality": 80}, {}, "quality has no effect, because png is lossless"),
        ("stylize opencv", {"format": "jpeg", "quality": 80}, {}, None),
        ("stylize opencv", {"quality": 80}, {}, None),
        ("lama", {}, {"most_cast": 3}, "the limit most_cast has no effect on inpaint"),
        ("rembg", {}, {"most_step": 3}, "the limit most_step has no effect on remove-background"),
        ("stylize opencv", {}, {"most_faint": 0.5}, "the limit most_faint has no effect on stylize"),
        ("lama", {}, {"mode": "repair"}, "check=repair only flags, because inpaint must not change what is around the hole"),
        ("rembg", {}, {"mode": "repair", "most_cast": 3}, None),
    ],
)
def test_quality_and_limits_without_effect_are_told(
    engine: str, output: dict[str, Any], quality: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    options = {"mask": A} if engine == "lama" else {}
    spec = job(engine, options, output, {"quality": quality})
    assert checked(tmp_path / "list.txt", A, spec).warnings == ((told,) if told else ())
