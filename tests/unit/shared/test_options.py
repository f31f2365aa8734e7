"""Options of each operation, and errors about invalid ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from imagemill.shared.engines import ENGINES, Engine, engines_of, lane_of, parse_options, split_lane
from imagemill.shared.errors import InvalidOption
from imagemill.shared.messages import LANE
from imagemill.shared.options.base import OPERATIONS, Box, Boxes, Point, nearest
from imagemill.shared.options.inpaint import LamaInpaint, OpencvInpaint
from imagemill.shared.options.remove_background import OpencvRemoveBackground
from imagemill.shared.options.stylize import DiffusionStylize, OpencvStylize

BOXES: TypeAdapter[tuple[Box, ...]] = TypeAdapter(Boxes)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_engine_has_valid_defaults(operation: str) -> None:
    engines = engines_of(operation)
    assert "opencv" in engines
    for name, engine in engines.items():
        options = parse_options(operation, name, {})
        assert type(options) is engine.options
        assert options.engine == name


def test_each_engine_s_default_model_is_in_the_catalogue() -> None:
    for engine in ENGINES:
        field = engine.options.model_fields.get("model")
        assert (field.default in engine.models) if field else not engine.models


MODELLED = [engine for engine in ENGINES if engine.models]


@pytest.mark.parametrize("engine", MODELLED, ids=lambda engine: engine.name)
@pytest.mark.parametrize("name", ["a", "7", "u2nett", "Shop_cutouts-v1.2", "x" * 64])
def test_own_model_may_have_any_plain_name(engine: Engine, name: str) -> None:
    options = parse_options(engine.operation, engine.name, {"model": name})
    assert options.model == name  # type: ignore[attr-defined]
    lane = lane_of(engine.operation, engine.name, name)
    assert split_lane(lane) == (engine.operation, engine.name, name)
    assert LANE.fullmatch(lane)


@pytest.mark.parametrize("engine", MODELLED, ids=lambda engine: engine.name)
@pytest.mark.parametrize(
    "name", ["", ".", "-a", "a.", "_a", "a-", "a/b", "../a", "a b", "ä", "a\n", "x" * 65, "a:b", "https://a"]
)
def test_a_model_s_name_fits_into_lanes_and_file_names(engine: Engine, name: str) -> None:
    with pytest.raises(InvalidOption, match=r"model: a name has 1 to 64 letters, digits and \._- and begins and ends"):
        parse_options(engine.operation, engine.name, {"model": name})


@pytest.mark.parametrize("model", [OpencvRemoveBackground, OpencvInpaint, LamaInpaint, OpencvStylize])
def test_every_option_has_a_description(model: type[Any]) -> None:
    undescribed = [
        name for name, field in model.model_fields.items() if name not in ("engine", "boxes") and not field.description
    ]
    assert undescribed == []


def test_text_values_are_parsed() -> None:
    options = parse_options("remove-background", "opencv", {"long_edge": "none", "feather": "0.5", "background": "#FFffFF"})
    assert options == OpencvRemoveBackground(long_edge=None, feather=0.5, background="#FFffFF")
    assert parse_options("stylize", "opencv", {"colour": "true", "style": "pencil-sketch"}) == OpencvStylize(
        colour=True, style="pencil-sketch"
    )


@pytest.mark.parametrize(
    ("operation", "engine", "options", "reason"),
    [
        ("remove-backgroud", "opencv", {}, "did you mean 'remove-background'?"),
        ("stylize", "opencvv", {}, "did you mean 'opencv'?"),
        ("stylize", "opencv", {"styl": 1}, "has no option 'styl'; did you mean 'style"),
        ("stylize", "opencv", {"engine": "opencv"}, "has no option 'engine'"),
        ("stylize", "opencv", {"prompt": "x"}, "(opencv) has no option 'prompt'; it is an option of stylize (diffusion)"),
        ("remove-background", "opencv", {"model": "u2net"}, "'model'; it is an option of remove-background (rembg)"),
        ("stylize", "diffusion", {"mask": "x"}, "it is an option of inpaint (opencv) and inpaint (lama)"),
        ("inpaint", "opencv", {"zzzzzz": 1}, "(valid: boxes, mask, mask_dilate"),
        ("inpaint", "opencv", {"radius": "51"}, "radius: input should be less than or equal to 50, not '51'"),
        ("inpaint", "opencv", {"method": "best"}, "method: input should be 'telea' or 'navier-stokes', not 'best'"),
        ("inpaint", "opencv", {"boxes": "1,2,3"}, "a box must have four numbers x,y,width,height, not 3"),
        ("inpaint", "opencv", {"boxes": "1,2,3,4;a,b,c,d"}, "a box must be four numbers x,y,width,height, not 'a,b,c,d'"),
        ("inpaint", "lama", {"tile": "520"}, "tile: input should be a multiple of 64, not '520'"),
        ("inpaint", "lama", {"tile": "2048"}, "tile: input should be less than or equal to 1024, not '2048'"),
        ("inpaint", "lama", {"strategy": "whole", "tile": 512}, "strategy=whole ignores tile"),
        ("inpaint", "lama", {"method": "telea"}, "has no option 'method'"),
        ("remove-background", "opencv", {"background": "red"}, "background: "),
        ("remove-background", "opencv", {"long_edge": "15"}, "greater than or equal to 16"),
        ("remove-background", "rembg", {"crop": "true", "canvas": "8001"}, "less than or equal to 8000"),
        ("remove-background", "rembg", {"canvas": "800"}, "canvas needs crop=true"),
        (
            "remove-background",
            "rembg",
            {"background": "#ffffff", "background_image": "https://a.example/b.png"},
            "can't be combined",
        ),
        ("remove-background", "rembg", {"mask_only": "true", "shadow": "true"}, "mask_only can't be combined"),
        ("remove-background", "rembg", {"exact": "true", "long_edge": "800"}, "can't be combined with long_edge or shadow"),
        ("remove-background", "rembg", {"garments": "upper"}, "garments needs model=u2net_cloth_seg"),
        ("remove-background", "rembg", {"garments": "upper,hat", "model": "u2net_cloth_seg"}, "'full' or 'attire', not 'hat'"),
        ("remove-background", "rembg", {"garments": "full,full", "model": "u2net_cloth_seg"}, "garments names one twice"),
        ("remove-background", "rembg", {"points": "1,2"}, "points and boxes need model=sam"),
        ("remove-background", "rembg", {"boxes": "1,2,3,4", "model": "own"}, "points and boxes need model=sam"),
        ("remove-background", "rembg", {"points": "1", "model": "sam"}, "two numbers x,y and perhaps a label, not 1 values"),
        ("remove-background", "rembg", {"points": "1,2,2", "model": "sam"}, "label: input should be 0 or 1"),
        ("remove-background", "rembg", {"points": "1,-2", "model": "sam"}, "perhaps a label, 0 or 1, not '1,-2'"),
        ("remove-background", "rembg", {"alpha_matting_erode_size": 5}, "alpha_matting_erode_size needs alpha_matting=true"),
        (
            *("remove-background", "rembg"),
            {"alpha_matting": "yes", "alpha_matting_foreground_threshold": 9},
            "alpha_matting_background_threshold must not be above alpha_matting_foreground_threshold",
        ),
        ("stylize", "opencv", {"style": "colour-transfer"}, "go together"),
        ("stylize", "opencv", {"reference": "https://example.com/r.jpg"}, "go together"),
        ("stylize", "diffusion", {"control": "canny;tile;scribble"}, "control: value should have at most 2 items"),
        ("stylize", "diffusion", {"control": "canny;canny:0.5"}, "control contains the same name twice"),
        ("stylize", "diffusion", {"control": "canny:3"}, "control.0.weight: input should be less than or equal to 2"),
        ("stylize", "diffusion", {"control": "../canny"}, "control.0.name: a name has 1 to 64 letters"),
        ("stylize", "diffusion", {"control": "controlnet-sdxl-tile"}, "is for SDXL, unlike the model sd15-canny"),
        ("stylize", "diffusion", {"control": "controlnet-canny", "model": "sdxl"}, "is for Stable Diffusion 1.5, unlike"),
        ("stylize", "diffusion", {"control": "none", "control_image": "https://example.com/c.png"}, "needs a control"),
    ],
)
def test_wrong_option_is_refused_with_the_reason(operation: str, engine: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_options(operation, engine, options)
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


def test_error_contains_the_value_once() -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_options("inpaint", "opencv", {"boxes": "a,b,c,d"})
    assert caught.value.message.count("not 'a,b,c,d'") == 1


def test_error_names_every_wrong_option() -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_options("inpaint", "opencv", {"radius": 0, "mask_dilate": 201})
    assert "radius: " in caught.value.message
    assert "mask_dilate: " in caught.value.message


def test_error_hides_secrets_of_urls() -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_options("stylize", "opencv", {"style": "https://me:pass@example.com/a?sig=hidden"})
    assert "example.com" in caught.value.message
    assert "hidden" not in caught.value.message
    assert "pass@" not in caught.value.message


@pytest.mark.parametrize(
    ("given", "box"),
    [
        ("1,2,3,4", (1, 2, 3, 4, "px")),
        (" 10 , 20 , 30.5 , 40 ", (10, 20, 30.5, 40, "px")),
        ([1, 2, 3, 4], (1, 2, 3, 4, "px")),
        ("0.1,0.2,0.3,0.4", (0.1, 0.2, 0.3, 0.4, "fraction")),
        ("0,0,1.0,1", (0, 0, 1, 1, "fraction")),
        ("0,0,1,1", (0, 0, 1, 1, "px")),
        ([0, 0, 0.5, 1], (0, 0, 0.5, 1, "fraction")),
        ({"x": 1, "y": 2, "width": 3, "height": 4}, (1, 2, 3, 4, "px")),
    ],
)
def test_box_formats(given: Any, box: tuple[float, float, float, float, str]) -> None:
    parsed = Box.model_validate(given)
    assert (parsed.x, parsed.y, parsed.width, parsed.height, parsed.unit) == box


@pytest.mark.parametrize(
    "given",
    ["", "1,2,3,4,5", "-1,2,3,4", "1,2,0,4", "1e3,2,3,4", "nan,1,1,1", "inf,1,1,1", "0.5,0.5,0.6,0.2",
     [1, 2, 3], ["a", 1, 1, 1], None, 7],
)  # fmt: skip
def test_invalid_boxes_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        Box.model_validate(given)


@pytest.mark.parametrize(
    ("given", "point"),
    [
        ("3,4", Point(x=3, y=4)),
        ("0.25, 1", Point(x=0.25, y=1, unit="fraction")),
        ("0.5,0.5,0", Point(x=0.5, y=0.5, label=0, unit="fraction")),
        ("1,1", Point(x=1, y=1)),
        ("0.5,200,1", Point(x=0.5, y=200)),
        ([30, 40, 0], Point(x=30, y=40, label=0)),
        ({"x": 3, "y": 4, "unit": "fraction"}, Point(x=3, y=4, unit="fraction")),
    ],
)
def test_point_is_in_pixels_or_fractions_and_on_or_off_the_subject(given: Any, point: Point) -> None:
    parsed = Point.model_validate(given)
    assert parsed == point
    assert Point.model_validate_json(parsed.model_dump_json()) == point


def test_garments_decide_about_the_results_of_an_image() -> None:
    def parts(**given: Any) -> tuple[str, ...]:
        return parse_options("remove-background", "rembg", given).parts

    assert parts() == parts(model="sam") == parts(model="own") == ()
    assert parts(model="u2net_cloth_seg") == parts(model="u2net_cloth_seg", garments="none") == ("upper", "lower", "full")
    assert parts(model="u2net_cloth_seg", garments="attire, lower") == ("attire", "lower")


@pytest.mark.parametrize("text", ["none", ""])
def test_none_and_empty_text_mean_no_boxes_and_no_loras(text: str) -> None:
    assert parse_options("inpaint", "opencv", {"boxes": text}) == parse_options("inpaint", "opencv", {})
    assert parse_options("stylize", "diffusion", {"loras": text}) == parse_options("stylize", "diffusion", {})


def test_boxes_as_text_or_list() -> None:
    assert BOXES.validate_python("1,2,3,4; 5,6,7,8;") == BOXES.validate_python([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert BOXES.validate_python("") == ()


@given(st.lists(st.tuples(*[st.integers(1, 10_000)] * 4), max_size=5))
def test_boxes_survive_json(given: list[tuple[int, int, int, int]]) -> None:
    boxes = BOXES.validate_python(given)
    assert BOXES.validate_json(BOXES.dump_json(boxes)) == boxes
    assert BOXES.validate_python(";".join(",".join(map(str, box)) for box in given)) == boxes


def test_nearest_lists_valid_words() -> None:
    assert nearest("xyz", ["mask", "boxes"]) == " (valid: boxes, mask)"
    assert nearest("maks", ["mask", "boxes"]) == "; did you mean 'mask'? (valid: boxes, mask)"


def test_every_inpainting_engine_takes_the_same_masks_and_boxes() -> None:
    given = {"mask": "https://a.example/mask.png", "boxes": "1,2,3,4", "mask_threshold": 9, "mask_dilate": 3, "mask_feather": 2}
    parsed = [parse_options("inpaint", engine, given) for engine in engines_of("inpaint")]
    assert len({str(options.model_dump(include=set(given))) for options in parsed}) == 1
    assert parse_options("inpaint", "lama", {"strategy": "resize", "tile": "512"}) == LamaInpaint(strategy="resize", tile=512)


@pytest.mark.parametrize(
    ("given", "names", "weights"),
    [
        ({}, ["canny"], [0.8]),
        ({"control_scale": 1.5}, ["canny"], [1.5]),
        ({"control": "tile:0.4"}, ["tile"], [0.4]),
        ({"control": " canny ; my-lines:1 ", "control_scale": 0.3}, ["canny", "my-lines"], [0.3, 1]),
        ({"control": {"scribble": 0.5, "tile": None}}, ["scribble", "tile"], [0.5, 0.8]),
        ({"control": "none"}, [], []),
        ({"control": None}, [], []),
        ({"control": ""}, [], []),
    ],
)
def test_controls_have_their_own_weight_or_the_common_one(
    given: dict[str, Any], names: list[str], weights: list[float]
) -> None:
    options = parse_options("stylize", "diffusion", given)
    assert isinstance(options, DiffusionStylize)
    assert ([control.name for control in options.control], options.weights) == (names, weights)
    assert DiffusionStylize.model_validate_json(options.model_dump_json()) == options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (25, 7.5, "unipc", None)),
        ({"model": "sdxl"}, (25, 7.5, "unipc", None)),
        ({"model": "my-own"}, (25, 7.5, "unipc", None)),
        ({"model": "sdxl-turbo"}, (4, 1, "euler-trailing", 512)),
        ({"model": "sdxl-turbo", "steps": 2, "size": 1024}, (2, 1, "euler-trailing", 1024)),
    ],
)
def test_base_model_sets_what_the_job_does_not(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    options = parse_options("stylize", "diffusion", given)
    assert isinstance(options, DiffusionStylize)
    assert (options.steps, options.cfg, options.scheduler, options.size) == expected


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, ["controlnet-canny"]),
        ({"model": "sdxl", "control": "lineart;mine", "loras": "red"}, ["controlnet-sdxl-scribble", "mine", "red"]),
        ({"model": "my-own", "control": "canny;mine", "vae": "bright"}, ["mine", "bright"]),
        ({"control": "none"}, []),
    ],
)
def test_options_name_the_parts_that_a_job_needs(given: dict[str, Any], parts: list[str]) -> None:
    assert parse_options("stylize", "diffusion", given).companions() == parts
