"""Measure a result, compare it with the job's quality limits and, if the job wants it, repair it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from imagemill.shared.messages import Job
from imagemill.shared.quality import Look, Measures, beyond
from imagemill.worker.checking import measures as by
from imagemill.worker.checking.measures import EDGE, Pair
from imagemill.worker.imaging.opencv import translated
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.base import Evidence, Spec, Work

REPAIRED_CAST, REPAIRED_SHARPNESS, REPAIRED_SEED = "repaired_cast", "repaired_sharpness", "repaired_seed"
REPAIR_NOTES = frozenset({REPAIRED_CAST, REPAIRED_SHARPNESS, REPAIRED_SEED})
"""Notes on repairs: of a colour cast, of blur, or by running the operation again with another seed."""

REVISION = 1
"""Increase it when a repair produces different pixels: this invalidates cached results."""

LIKE = 0.9  # share of the source's sharpness that sharpening aims for
MOST = 2.5  # maximum amount of its own detail added to a picture; more produces halos instead of detail
STRIP = 256  # rows repaired at once; as floats they take four times the memory


@dataclass(frozen=True)
class Checked:
    """A result with its measures; `beyond` maps each exceeded limit to the excess (see imagemill.shared.quality)."""

    picture: Picture
    notes: tuple[str, ...]
    measures: Measures | None = None
    beyond: dict[str, float] = field(default_factory=dict)

    def better_than(self, other: Checked) -> bool:
        """Whether the limits are exceeded by less in total."""
        return sum(self.beyond.values()) < sum(other.beyond.values())

    def without_pixels(self) -> Checked:
        """The same with an empty picture, to free memory."""
        return replace(self, picture=replace(self.picture, pixels=self.picture.pixels[:0].copy()))


@translated("checking the result")
def check(picture: Picture, source: Picture, work: Work[Any, Any, Any], operation: Spec, spec: Job) -> Checked:
    """Measure a result and compare it with the job's limits; repair it if the policy asks for it and it improves the result.

    Neither `picture` nor `source` is modified.
    """
    quality, notes, evidence = spec.policy.quality, (*source.notes, *work.notes), work.evidence
    if quality.mode == "off":
        return Checked(picture, notes)
    if evidence.absent:
        return Checked(picture, notes, Measures())
    reference = source.pixels if evidence.comparable else None  # otherwise `finish` may have overwritten it

    def judged(candidate: Picture, notes: tuple[str, ...]) -> tuple[Checked, Pair]:
        pair = Pair.of(candidate.pixels, reference, evidence.alpha)
        measures = measured(candidate.pixels, pair, evidence, operation)
        return Checked(candidate, notes, measures, beyond(measures, quality, spec.operation)), pair

    best, pair = judged(picture, notes)
    if quality.mode == "flag" or evidence.hole is not None or evidence.alpha is not None:
        return best  # pixels around a hole, and a requested background, must stay bit-identical
    for flag, (note, repair) in REPAIRS.items():
        if flag in best.beyond:
            repaired = replace(picture, pixels=repair(best.picture.pixels, pair))
            candidate, candidate_pair = judged(repaired, (*best.notes, note))
            if candidate.better_than(best):
                best, pair = candidate, candidate_pair
    return best


def measured(result: Pixels, pair: Pair, evidence: Evidence, operation: Spec) -> Measures:
    """All measures that apply to a result at full size; `pair` holds it and its source."""
    found = {"entropy": by.entropy(pair.grey, pair.solid)}
    looks: dict[str, Look | None] = {}
    if evidence.hole is not None:
        inside, around = by.rings(evidence.hole, pair.size)
        found["sharpness"] = by.sharpness(pair.grey, by.without_rim(inside))
        found["kept"] = by.kept(found["sharpness"], by.sharpness(pair.grey, by.without_rim(around)))
        found["step"] = by.border_step(result, evidence.hole)
    else:
        found["sharpness"] = by.sharpness(pair.grey, pair.inner)
    if evidence.comparable:
        found["kept"] = by.kept(found["sharpness"], by.sharpness(pair.source_grey, pair.inner))
        if not evidence.recoloured:
            found["cast"] = by.cast(pair)
    alpha = pair.alpha if evidence.alpha is None else evidence.alpha
    if operation.makes_alpha and alpha is not None:
        found["opaque"], found["half"] = by.shares(alpha)
    if operation.restyles:
        wanted = by.edges(pair.source_grey) if evidence.edges is None else by.edge_map(evidence.edges, pair.size)
        found["edges"] = by.agreement(by.edges(pair.grey), wanted)
        colours, source_colours, solid = pair.labs
        looks = {"look": by.look(colours, solid), "before": by.look(source_colours, solid)}
    return Measures.model_validate({**{name: _short(value) for name, value in found.items()}, **looks})


def sharpened(pixels: Pixels, pair: Pair) -> Pixels:
    """Sharpen `pixels` with an unsharp mask until about as sharp as the source; transparent pixels have no influence."""
    amount, sigma = lacking(pair), max(1.0, max(pixels.shape[:2]) / EDGE)
    margin = math.ceil(3 * sigma)
    result = pixels.copy()
    for top in range(0, len(pixels), STRIP):
        first = max(0, top - margin)
        part = pixels[first : top + STRIP + margin].astype(np.float32)
        rgb, weight = part[..., :3], part[..., 3:] if part.shape[2] == 4 else np.ones((*part.shape[:2], 1), np.float32)
        share = np.maximum(cv2.GaussianBlur(weight, (0, 0), sigma), 1e-3)[..., None]
        blurred = cv2.GaussianBlur(rgb * weight, (0, 0), sigma) / share
        sharp = np.clip(rgb + amount * (rgb - blurred), 0, 255)
        rows = slice(top - first, top - first + STRIP)
        np.copyto(result[top : top + STRIP, :, :3], np.rint(sharp[rows]).astype(np.uint8), where=weight[rows] > 0)
    return result


def lacking(pair: Pair) -> float:
    """The factor, 0 to `MOST`, by which to add a result's own detail (what a blur of one pixel removes).

    The Laplacian's variance is quadratic in that factor; solved here for `LIKE` times the source's variance.
    """
    grey, solid = pair.grey.astype(np.float32), pair.solid > 0
    detail = grey - cv2.GaussianBlur(grey, (0, 0), 1)
    own, more = (cv2.Laplacian(plane, cv2.CV_32F)[solid] for plane in (grey, detail))
    wanted = by.sharpness(pair.source_grey, pair.inner)
    if wanted is None or float(more.var()) < 1e-6:
        return 0.0
    (has, both), (_, adds) = np.cov(own, more)
    root = both**2 + adds * max(0.0, LIKE * wanted - has)
    return float(np.clip((math.sqrt(root) - both) / adds, 0, MOST))


def without_cast(pixels: Pixels, pair: Pair) -> Pixels:
    """Remove a colour cast: undo in all pixels the change in CIELAB a and b of neutral ones; brightness stays."""
    moved = by.shift(pair)
    if moved is None:
        return pixels
    _, (da, db) = moved
    result = pixels.copy()
    for top in range(0, len(pixels), STRIP):
        strip = result[top : top + STRIP, :, :3]
        colours = by.lab(strip) - np.array([0, da, db], np.float32)
        np.copyto(strip, np.rint(np.clip(cv2.cvtColor(colours, cv2.COLOR_LAB2RGB), 0, 1) * 255).astype(np.uint8))
    return result


REPAIRS: dict[str, tuple[str, Callable[[Pixels, Pair], Pixels]]] = {
    "cast": (REPAIRED_CAST, without_cast),
    "blurred": (REPAIRED_SHARPNESS, sharpened),
}
"""For each flag that can be repaired, the note to add and the repair."""


def _short(value: float | None) -> float | None:
    """Rounded to three digits to save space: Redis stores it for every image."""
    return None if value is None else float(f"{round(value, 3):.3g}")
