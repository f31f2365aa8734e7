"""Outliers are found whatever the job's style does to its images, without false alarms."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.producer.outliers import FEWEST, Outlier, outliers
from imagemill.shared.messages import Item, ItemResult, Row, row
from imagemill.shared.quality import Look, Measures

Style = Callable[[list[float]], list[float]]
STYLES: dict[str, Style] = {
    "sets": lambda source: [60 + 0 * source[0], 5, 8, 20, 6, 7],
    "moves": lambda source: [value + shift for value, shift in zip(source, (4, -3, 9, 2, 0, 1), strict=True)],
    "shrinks": lambda source: [0.6 * value + 10 for value in source],
}


def look(values: list[float]) -> Look:
    light, a, b, *spread = (round(value, 1) for value in values)
    return light, a, b, spread[0], spread[1], spread[2]


def measures(rng: random.Random, style: Style, spoilt: dict[int, float] | None = None, blur: float = 1.0) -> Measures:
    """Measures of a random photo in a style, with some components of its look shifted."""
    source = [rng.uniform(20, 80), rng.gauss(0, 12), rng.gauss(0, 15), *(rng.uniform(5, 25) for _ in range(3))]
    made = [value + rng.gauss(0, 0.8) for value in style(source)]
    for place, shift in (spoilt or {}).items():
        made[place] += shift
    sharpness, keeps = rng.lognormvariate(6, 1), blur * rng.lognormvariate(0, 0.2)
    edges = min(1.0, max(0.0, rng.gauss(0.8, 0.03)))
    return Measures(sharpness=sharpness * keeps, kept=keeps, edges=edges, look=look(made), before=look(source))


def rows(found: list[Measures | None]) -> list[Row]:
    items = [Item(index=index, source=f"https://shop.example/{index}.jpg") for index in range(len(found))]
    return [
        row(item, ItemResult(index=item.index, state="done", quality=measured))
        for item, measured in zip(items, found, strict=True)
    ]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(5))
def test_planted_outliers_are_found_and_nothing_else(style: str, seed: int) -> None:
    rng = random.Random(seed)
    job: list[Measures | None] = [measures(rng, STYLES[style]) for _ in range(195)]
    planted = [
        measures(rng, STYLES[style], {1: 15.0}),
        measures(rng, STYLES[style], {2: -18.0}),
        measures(rng, STYLES[style], {0: 25.0}),
        measures(rng, STYLES[style], {3: 35.0}),
        measures(rng, STYLES[style], blur=0.05),
    ]
    found = outliers(rows([*job, *planted]))
    assert {index: outlier.measure for index, outlier in found.items()} == {
        195: "green-red", 196: "blue-yellow", 197: "lightness", 198: "contrast", 199: "sharpness",
    }  # fmt: skip
    assert [found[index].score > 0 for index in range(195, 200)] == [True, False, True, True, False]
    scores = [abs(outlier.score) for outlier in found.values()]
    assert scores == sorted(scores, reverse=True)


@given(seed=st.integers(0, 10_000), images=st.integers(FEWEST, 120), style=st.sampled_from(sorted(STYLES)))
def test_uniform_job_has_no_outliers(seed: int, images: int, style: str) -> None:
    rng = random.Random(seed)
    assert outliers(rows([measures(rng, STYLES[style]) for _ in range(images)])) == {}


def test_second_kind_of_image_in_a_tenth_of_the_job_is_not_an_outlier() -> None:
    rng = random.Random(1)
    kinds = [{2: 30.0} if index % 9 == 0 else {} for index in range(180)]
    assert outliers(rows([measures(rng, STYLES["sets"], kind) for kind in kinds])) == {}


def test_invisible_differences_are_not_outliers() -> None:
    same = Measures(sharpness=400, kept=1, edges=0.8, look=(60, 0, 0, 9, 5, 5), before=(50, 0, 0, 9, 5, 5))
    nearly = same.model_copy(update={"look": (61.5, 1.5, 0, 9, 5, 5), "edges": 0.7, "sharpness": 500.0})
    assert outliers(rows([same] * 60 + [nearly])) == {}


@pytest.mark.parametrize("missing", ["few", "not measured", "failed", "no look"])
def test_no_outliers_without_a_common_look(missing: str) -> None:
    rng = random.Random(2)
    job: list[Measures | None] = [measures(rng, STYLES["sets"]) for _ in range(40)]
    job[7] = measures(rng, STYLES["sets"], {1: 40.0})
    if missing == "few":
        job = job[: FEWEST - 1]
    elif missing == "not measured":
        job = [None] * 40
    elif missing == "no look":
        job = [one.model_copy(update={"look": None}) if one else None for one in job]
    found = rows(job)
    if missing == "failed":
        found = [row(Item(index=n, source="https://a.example/x.jpg"), None) for n in range(40)]
    assert outliers(found) == {}


def test_duplicates_are_ignored() -> None:
    rng = random.Random(3)
    job = rows([*(measures(rng, STYLES["sets"]) for _ in range(60)), measures(rng, STYLES["sets"], {0: 30.0})])
    again = [job[60].model_copy(update={"index": 61 + n, "duplicate_of": 60}) for n in range(40)]
    assert set(outliers([*job, *again])) == {60}


def test_outlier_is_described_in_words() -> None:
    assert str(Outlier("sharpness", -11.4)) == "sharpness is 11 deviations below the rest"
    assert str(Outlier("green-red", 6.0)) == "green-red is 6 deviations above the rest"
