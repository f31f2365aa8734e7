"""What is said about a job that no running node can work on."""

from __future__ import annotations

import pytest

from imagemill.producer.advice import advice
from tests.unit.producer.jobs import node

REMBG = "remove-background.rembg"
START = "`IMAGEMILL_WORKER__ENGINES='[\"rembg\"]' imagemill worker`"
UNKNOWN = ", and the catalogue has no such model"


@pytest.mark.parametrize(
    ("model", "offered", "text"),
    [
        ("silueta", (), f"; start one with `imagemill models pull silueta` and {START}"),
        ("silueta", ("u2net",), "; make one offer it with `imagemill models pull silueta`"),
        ("shop-v2", (), f"{UNKNOWN}; start one with `imagemill models add shop-v2 FILE` and {START}"),
        ("shop-v2", ("u2net",), f"{UNKNOWN}; make one offer it with `imagemill models add shop-v2 FILE`"),
        ("silueto", (), f"{UNKNOWN}; did you mean 'silueta'?; start one with `imagemill models add silueto FILE` and {START}"),
        (
            "shop-v2",
            ("shop-v1",),
            f"{UNKNOWN}; did you mean 'shop-v1'?; make one offer it with `imagemill models add shop-v2 FILE`",
        ),
    ],
)
def test_advice_names_the_command_and_the_nearest_model(model: str, offered: tuple[str, ...], text: str) -> None:
    nodes = [node(*(f"{REMBG}.{name}" for name in offered))] if offered else []
    assert advice(f"{REMBG}.{model}", nodes) == f"no worker offers {REMBG}.{model}{text}"


def test_engine_without_models_needs_a_worker() -> None:
    assert advice("stylize.opencv", [node(f"{REMBG}.u2net")]) == (
        "no worker offers stylize.opencv; start one with `imagemill worker --cpu`"
    )


def test_models_of_another_engine_are_not_meant() -> None:
    said = advice("inpaint.lama.shop", [node(f"{REMBG}.shopp")])
    assert said is not None
    assert "did you mean" not in said


def test_no_advice_is_needed_if_a_node_offers_the_lane() -> None:
    assert advice(f"{REMBG}.shop", [node("stylize.opencv"), node(f"{REMBG}.shop")]) is None


@pytest.mark.parametrize(
    ("parts", "have", "missing"),
    [
        (("red",), [("red", "blue")], None),
        (("red",), [(), ("red",)], None),
        (("red",), [None], None),
        (("red", "blue"), [("blue",)], "red"),
        (("red", "blue"), [()], "red or blue"),
        ((), [()], None),
    ],
)
def test_advice_names_parts_that_no_node_of_the_lane_has(
    parts: tuple[str, ...], have: list[tuple[str, ...] | None], missing: str | None
) -> None:
    lane = "stylize.diffusion.sd15"
    nodes = [node(lane).model_copy(update={"parts": own}) for own in have] + [node("stylize.opencv")]
    said = advice(lane, nodes, parts)
    assert said == (
        missing
        and f"no worker that offers the model has {missing}, so the job waits; get it with `imagemill models pull "
        f"{missing.split()[0]}`, or `imagemill models add {missing.split()[0]} SOURCE` if it is your own"
    )
