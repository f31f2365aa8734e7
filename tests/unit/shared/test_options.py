"""What each operation takes, and what it says to the rest."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from imagemill.shared.engines import ENGINES, engines_of, parse_options
from imagemill.shared.errors import InvalidOption
from imagemill.shared.options.base import OPERATIONS, Box, Boxes, nearest
from imagemill.shared.options.inpaint import LamaInpaint, OpencvInpaint
from imagemill.shared.options.remove_background import OpencvRemoveBackground
from imagemill.shared.options.stylize import OpencvStylize

BOXES: TypeAdapter[tuple[Box, ...]] = TypeAdapter(Boxes)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_an_engine_whose_defaults_are_valid(operation: str) -> None:
    engines = engines_of(operation)
    assert "opencv" in engines
    for name, engine in engines.items():
        options = parse_options(operation, name, {})
        assert type(options) is engine.options
        assert options.engine == name


def test_each_row_lists_the_models_that_its_options_can_select() -> None:
    for engine in ENGINES:
        field = engine.options.model_fields.get("model")
        assert tuple(engine.models) == (get_args(field.annotation) if field else ())


@pytest.mark.parametrize("model", [OpencvRemoveBackground, OpencvInpaint, LamaInpaint, OpencvStylize])
def test_every_option_is_described(model: type[Any]) -> None:
    undescribed = [
        name for name, field in model.model_fields.items() if name not in ("engine", "boxes") and not field.description
    ]
    assert undescribed == []


def test_text_values_are_read_as_the_command_line_gives_them() -> None:
    options = parse_options("remove-background", "opencv", {"long_edge": "none", "feather": "0.5", "background": "#FFffFF"})
    assert options == OpencvRemoveBackground(long_edge=None, feather=0.5, background="#FFffFF")
    assert parse_options("stylize", "opencv", {"colour": "true", "style": "pencil-sketch"}) == OpencvStylize(
        colour=True, style="pencil-sketch"
    )


@pytest.mark.parametrize(
    ("operation", "engine", "given", "said"),
    [
        ("remove-backgroud", "opencv", {}, "did you mean 'remove-background'?"),
        ("stylize", "opencvv", {}, "did you mean 'opencv'?"),
        ("stylize", "opencv", {"styl": 1}, "has no option 'styl'; did you mean 'style"),
        ("stylize", "opencv", {"engine": "opencv"}, "has no option 'engine'"),
        ("inpaint", "opencv", {"zzzzzz": 1}, "(valid: boxes, mask, mask_dilate"),
        ("inpaint", "opencv", {"radius": "51"}, "radius: input should be less than or equal to 50, not '51'"),
        ("inpaint", "opencv", {"method": "best"}, "method: input should be 'telea' or 'navier-stokes', not 'best'"),
        ("inpaint", "opencv", {"boxes": "1,2,3"}, "a box has four numbers, x, y, width and height, not 3"),
        ("inpaint", "opencv", {"boxes": "1,2,3,4;a,b,c,d"}, "a box is x,y,width,height in numbers, not 'a,b,c,d'"),
        ("inpaint", "lama", {"tile": "520"}, "tile: input should be a multiple of 64, not '520'"),
        ("inpaint", "lama", {"tile": "2048"}, "tile: input should be less than or equal to 1024, not '2048'"),
        ("inpaint", "lama", {"strategy": "whole", "tile": 512}, "strategy=whole ignores tile"),
        ("inpaint", "lama", {"method": "telea"}, "has no option 'method'"),
        ("inpaint", "lama", {"model": "mat"}, "model: input should be 'lama', not 'mat'"),
        ("remove-background", "opencv", {"background": "red"}, "background: "),
        ("remove-background", "opencv", {"long_edge": "15"}, "greater than or equal to 16"),
        ("remove-background", "rembg", {"model": "bria-rmbg"}, "model: input should be 'u2net'"),
        ("remove-background", "rembg", {"crop": "true", "canvas": "8001"}, "less than or equal to 8000"),
        ("remove-background", "rembg", {"canvas": "800"}, "canvas needs crop=true"),
        ("remove-background", "rembg", {"background": "#ffffff", "background_image": "https://a.example/b.png"}, "exclude"),
        ("remove-background", "rembg", {"mask_only": "true", "shadow": "true"}, "mask_only goes without"),
        ("remove-background", "rembg", {"exact": "true", "long_edge": "800"}, "without long_edge and shadow"),
        ("stylize", "opencv", {"style": "colour-transfer"}, "go together"),
        ("stylize", "opencv", {"reference": "https://example.com/r.jpg"}, "go together"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(operation: str, engine: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_options(operation, engine, given)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_what_was_given_is_said_once() -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_options("inpaint", "opencv", {"boxes": "a,b,c,d"})
    assert caught.value.message.count("not 'a,b,c,d'") == 1


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_options("inpaint", "opencv", {"radius": 0, "mask_dilate": 201})
    assert "radius: " in caught.value.message
    assert "mask_dilate: " in caught.value.message


def test_a_fault_shows_no_secret_of_an_address() -> None:
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
def test_boxes_in_pixels_and_in_fractions(given: Any, box: tuple[float, float, float, float, str]) -> None:
    read = Box.model_validate(given)
    assert (read.x, read.y, read.width, read.height, read.unit) == box


@pytest.mark.parametrize(
    "given",
    ["", "1,2,3,4,5", "-1,2,3,4", "1,2,0,4", "1e3,2,3,4", "nan,1,1,1", "inf,1,1,1", "0.5,0.5,0.6,0.2",
     [1, 2, 3], ["a", 1, 1, 1], None, 7],
)  # fmt: skip
def test_boxes_that_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        Box.model_validate(given)


@pytest.mark.parametrize("text", ["none", ""])
def test_no_boxes_and_no_loras_can_be_asked_for(text: str) -> None:
    assert parse_options("inpaint", "opencv", {"boxes": text}) == parse_options("inpaint", "opencv", {})
    assert parse_options("stylize", "diffusion", {"loras": text}) == parse_options("stylize", "diffusion", {})


def test_several_boxes_as_one_text_or_as_a_list() -> None:
    assert BOXES.validate_python("1,2,3,4; 5,6,7,8;") == BOXES.validate_python([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert BOXES.validate_python("") == ()


@given(st.lists(st.tuples(*[st.integers(1, 10_000)] * 4), max_size=5))
def test_boxes_survive_json(given: list[tuple[int, int, int, int]]) -> None:
    boxes = BOXES.validate_python(given)
    assert BOXES.validate_json(BOXES.dump_json(boxes)) == boxes
    assert BOXES.validate_python(";".join(",".join(map(str, box)) for box in given)) == boxes


def test_nearest_says_what_is_valid_where_nothing_is_near() -> None:
    assert nearest("xyz", ["mask", "boxes"]) == " (valid: boxes, mask)"
    assert nearest("maks", ["mask", "boxes"]) == "; did you mean 'mask'? (valid: boxes, mask)"


def test_what_is_to_be_filled_is_told_every_engine_alike() -> None:
    given = {"mask": "https://a.example/mask.png", "boxes": "1,2,3,4", "mask_threshold": 9, "mask_dilate": 3, "mask_feather": 2}
    told = [parse_options("inpaint", engine, given) for engine in engines_of("inpaint")]
    assert len({str(options.model_dump(include=set(given))) for options in told}) == 1
    assert parse_options("inpaint", "lama", {"strategy": "resize", "tile": "512"}) == LamaInpaint(strategy="resize", tile=512)
