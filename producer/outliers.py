"""Results that look unlike the rest of their job: an outlier test on the measures that workers record per image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist, median

from imagemill.shared.messages import Row
from imagemill.shared.quality import Measures

FEWEST = 20  # images; a smaller job has no common look to compare with
SAMPLE = 2000  # images used to estimate how a measure depends on the source
SLOPES = [step / 10 for step in range(14)]
FALSE_ALARM = 0.01  # chance that a job without outliers gets one, if its measures were normally distributed
HEAVY = 1.1  # the limit is this much wider: photographs' measures have heavier tails (bench/quality.py)

GRAIN = 10.0
"""Sharpness of an image whose only detail is grain, which a style may or may not keep."""

COLOURS = ("lightness", "green-red", "blue-yellow", "contrast", "green-red-range", "blue-yellow-range")
"""The components of `Measures.look`."""

LEAST_SPREAD = dict(zip(COLOURS, (1.0, 1.0, 1.0, 2.0, 2.0, 2.0), strict=True)) | {"sharpness": 0.2, "edges": 0.15}
"""Smallest spread used per measure, because smaller differences are invisible however alike a job's images are.
Units: CIELAB for colours, natural logarithm for sharpness, share for edges."""


@dataclass(frozen=True)
class Outlier:
    """The measure in which an image differs most from its job, and the difference in signed robust deviations."""

    measure: str
    score: float

    def __str__(self) -> str:
        return f"{self.measure} is {abs(self.score):.0f} deviations {'above' if self.score > 0 else 'below'} the rest"


def outliers(rows: Iterable[Row]) -> dict[int, Outlier]:
    """A job's outliers by index, most extreme first; empty if the job is small or its images need not look alike.

    A style may fix a statistic (colour transfer), shift the source's (filters), or do something in between. The part
    explained by the source is therefore subtracted first: the multiple of it that leaves the smallest median absolute
    deviation. The remainder is compared with its median in robust deviations (Iglewicz and Hoaglin, How to Detect and
    Handle Outliers, 1993), with a Bonferroni limit over all images and measures of the job.
    """
    pairs_of: dict[str, dict[int, tuple[float, float]]] = {}
    for row in rows:
        if row.duplicate_of is None and row.result is not None and row.result.quality is not None:
            for measure, pair in _pairs(row.result.quality):
                pairs_of.setdefault(measure, {})[row.index] = pair
    pairs_of = {measure: pairs for measure, pairs in pairs_of.items() if len(pairs) >= FEWEST}
    tests = sum(map(len, pairs_of.values()))
    limit = -HEAVY * NormalDist().inv_cdf(FALSE_ALARM / (2 * tests)) if tests else math.inf
    found: dict[int, Outlier] = {}
    for measure, pairs in pairs_of.items():
        for index, score in _scores(pairs, LEAST_SPREAD[measure]).items():
            if abs(score) > max(limit, abs(found[index].score) if index in found else 0.0):
                found[index] = Outlier(measure, score)
    return dict(sorted(found.items(), key=lambda entry: -abs(entry[1].score)))


def _pairs(measures: Measures) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each compared measure: its value in the result, and in the source (0 if the source has none)."""
    if measures.look is None or measures.before is None:
        return
    yield from zip(COLOURS, zip(measures.look, measures.before, strict=True), strict=True)
    if measures.sharpness is not None and measures.kept:
        before = measures.sharpness / measures.kept
        yield "sharpness", (math.log(measures.sharpness + GRAIN), math.log(before + GRAIN))
    if measures.edges is not None:
        yield "edges", (measures.edges, 0.0)


def _scores(pairs: Mapping[int, tuple[float, float]], least: float) -> dict[int, float]:
    """Each image's distance from the median, in robust deviations."""
    sample = list(pairs.values())[:: max(1, len(pairs) // SAMPLE)]
    slope = min(SLOPES, key=lambda slope: _spread(_without_source(sample, slope)))
    rest = _without_source(list(pairs.values()), slope)
    middle = median(rest)
    # Up to a tenth of a job may be images of another kind, which are not outliers. So the spread also covers
    # the nine tenths that are closest to the median.
    distances = sorted(abs(value - middle) for value in rest)
    ninety = distances[int(0.9 * len(distances))] / NormalDist().inv_cdf(0.95)
    spread = max(_spread(rest), ninety, least)
    return {index: (value - middle) / spread for index, value in zip(pairs, rest, strict=True)}


def _without_source(pairs: Iterable[tuple[float, float]], slope: float) -> list[float]:
    return [result - slope * source for result, source in pairs]


def _spread(values: list[float]) -> float:
    """The median absolute deviation, scaled to a standard deviation."""
    middle = median(values)
    return median(abs(value - middle) for value in values) / NormalDist().inv_cdf(0.75)
