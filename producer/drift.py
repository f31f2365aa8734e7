"""Which results of a job don't look like the others: an outlier test on what workers have measured of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist, median

from imagemill.shared.messages import Row
from imagemill.shared.quality import Measures

FEWEST = 20  # images; fewer have no common look to speak of
SAMPLE = 2000  # images that tell how a measure hangs on the source's
SLOPES = [step / 10 for step in range(14)]
DOUBT = 0.01  # chance that a job without outliers has one, were its measures normally distributed
HEAVY = 1.1  # so much further out is the limit: photographs' measures have heavier tails (bench/quality.py)

GRAIN = 10.0
"""Sharpness of what has no detail to see but grain, which styles keep or not as it happens."""

COLOURS = ("lightness", "green-red", "blue-yellow", "contrast", "green-red-range", "blue-yellow-range")
"""What `Measures.look` holds."""

LEAST_SPREAD = dict(zip(COLOURS, (1.0, 1.0, 1.0, 2.0, 2.0, 2.0), strict=True)) | {"sharpness": 0.2, "edges": 0.15}
"""Smaller deviations nobody sees, however alike a job's images are: in CIELAB, of a logarithm, of a share."""


@dataclass(frozen=True)
class Outlier:
    """In what an image differs most from its job's others, and by how many of their deviations, with a sign."""

    measure: str
    score: float

    def __str__(self) -> str:
        return f"{self.measure} {abs(self.score):.0f} deviations {'above' if self.score > 0 else 'below'} the others"


def outliers(rows: Iterable[Row]) -> dict[int, Outlier]:
    """The outliers of a job by index, furthest first; none where images aren't to look alike, or are few.

    A style sets a statistic, as a transfer of colours does, or moves that of the source, as filters do, or something in
    between; so each is first freed of what the source explains: the multiple of it that leaves the least median absolute
    deviation. What is left is compared with its median in units of a robust deviation, image by image (Iglewicz, Hoaglin,
    How to Detect and Handle Outliers, 1993). The limit is Bonferroni's for all images and measures of the job.
    """
    known: dict[str, dict[int, tuple[float, float]]] = {}
    for row in rows:
        if row.duplicate_of is None and row.result is not None and row.result.quality is not None:
            for measure, pair in _pairs(row.result.quality):
                known.setdefault(measure, {})[row.index] = pair
    known = {measure: pairs for measure, pairs in known.items() if len(pairs) >= FEWEST}
    tests = sum(map(len, known.values()))
    limit = -HEAVY * NormalDist().inv_cdf(DOUBT / (2 * tests)) if tests else math.inf
    found: dict[int, Outlier] = {}
    for measure, pairs in known.items():
        for index, score in _scores(pairs, LEAST_SPREAD[measure]).items():
            if abs(score) > max(limit, abs(found[index].score) if index in found else 0.0):
                found[index] = Outlier(measure, score)
    return dict(sorted(found.items(), key=lambda one: -abs(one[1].score)))


def _pairs(measures: Measures) -> Iterator[tuple[str, tuple[float, float]]]:
    """What is compared of a result, each with the same of its source (0 where that has none)."""
    if measures.look is None or measures.before is None:
        return
    yield from zip(COLOURS, zip(measures.look, measures.before, strict=True), strict=True)
    if measures.sharpness is not None and measures.kept:
        before = measures.sharpness / measures.kept
        yield "sharpness", (math.log(measures.sharpness + GRAIN), math.log(before + GRAIN))
    if measures.edges is not None:
        yield "edges", (measures.edges, 0.0)


def _scores(pairs: Mapping[int, tuple[float, float]], least: float) -> dict[int, float]:
    """How many deviations off each image is."""
    some = list(pairs.values())[:: max(1, len(pairs) // SAMPLE)]
    slope = min(SLOPES, key=lambda slope: _spread(_freed(some, slope)))
    rest = _freed(list(pairs.values()), slope)
    middle = median(rest)
    # Images of another kind, up to a tenth of them, are no outliers: what holds nine tenths together counts as well.
    distances = sorted(abs(value - middle) for value in rest)
    ninety = distances[int(0.9 * len(distances))] / NormalDist().inv_cdf(0.95)
    spread = max(_spread(rest), ninety, least)
    return {index: (value - middle) / spread for index, value in zip(pairs, rest, strict=True)}


def _freed(pairs: Iterable[tuple[float, float]], slope: float) -> list[float]:
    return [made - slope * given for made, given in pairs]


def _spread(values: list[float]) -> float:
    """The median absolute deviation, as a standard deviation."""
    middle = median(values)
    return median(abs(value - middle) for value in values) / NormalDist().inv_cdf(0.75)
