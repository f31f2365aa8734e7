"""Is a result good enough? It is measured, judged by the job's limits, and where the job wants it mended."""

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
"""Notes of what was repaired: a colour cast, a blur, or everything by another seed."""

REVISION = 1
"""Raise it when a repair gives other pixels than before: what is remembered is then forgotten."""

LIKE = 0.9  # of the source's sharpness that sharpening aims at
MOST = 2.5  # of its own detail that is added to a picture; more makes halos, not detail
STRIP = 256  # rows repaired at a time; floats take four times the bytes of the picture


@dataclass(frozen=True)
class Checked:
    """A result with what was measured of it; `beyond` tells what is wrong with it, and how much (imagemill.shared.quality)."""

    picture: Picture
    notes: tuple[str, ...]
    measures: Measures | None = None
    beyond: dict[str, float] = field(default_factory=dict)

    def better_than(self, other: Checked) -> bool:
        """Whether less is wrong with it, in all."""
        return sum(self.beyond.values()) < sum(other.beyond.values())


@translated("checking the result")
def check(picture: Picture, source: Picture, work: Work[Any, Any, Any], operation: Spec, spec: Job) -> Checked:
    """The result, measured and judged, and repaired where the job's policy says so and that makes it better.

    Neither `picture` nor `source` is changed.
    """
    quality, notes = spec.policy.quality, tuple(work.notes)
    if quality.mode == "off":
        return Checked(picture, notes)
    given = source.pixels if work.evidence.comparable else None  # which `finish` may have written into
    pair = Pair.of(picture.pixels, given, work.evidence.alpha)
    found = measured(picture.pixels, pair, work.evidence, operation)
    checked = Checked(picture, notes, found, beyond(found, quality, spec.operation))
    if quality.mode == "flag" or work.evidence.hole is not None or work.evidence.alpha is not None:
        return checked  # around a hole all stays bit for bit, and so does a background that was asked for
    for flag, (note, repair) in REPAIRS.items():
        if flag in checked.beyond:
            pixels = repair(checked.picture.pixels, pair)
            other = Pair.of(pixels, given, work.evidence.alpha)
            found = measured(pixels, other, work.evidence, operation)
            mended = replace(picture, pixels=pixels)
            tried = Checked(mended, (*checked.notes, note), found, beyond(found, quality, spec.operation))
            if tried.better_than(checked):
                checked, pair = tried, other
    return checked


def measured(result: Pixels, pair: Pair, evidence: Evidence, operation: Spec) -> Measures:
    """All that can be said of a result; `pair` is of it and its source."""
    found = {"entropy": by.entropy(pair.grey, pair.solid)}
    looks: dict[str, Look | None] = {}
    if evidence.hole is not None:
        inside, around = by.rings(evidence.hole, pair.size)
        found["sharpness"] = by.sharpness(pair.grey, inside)
        found["kept"] = by.kept(found["sharpness"], by.sharpness(pair.grey, around))
        found["step"] = by.border_step(result, evidence.hole)
    else:
        found["sharpness"] = by.sharpness(pair.grey, pair.solid)
    if evidence.comparable:
        found["kept"] = by.kept(found["sharpness"], by.sharpness(pair.source_grey, pair.solid))
        if not evidence.recoloured:
            found["cast"] = by.cast(pair)
    alpha = pair.alpha if evidence.alpha is None else evidence.alpha
    if operation.makes_alpha and alpha is not None:
        found["opaque"], found["half"] = by.shares(alpha)
    if operation.restyles:
        asked = by.edges(pair.source_grey) if evidence.edges is None else by.edge_map(evidence.edges, pair.size)
        found["edges"] = by.agreement(by.edges(pair.grey), asked)
        made, given, solid = pair.labs
        looks = {"look": by.look(made, solid), "before": by.look(given, solid)}
    return Measures.model_validate({**{name: _short(value) for name, value in found.items()}, **looks})


def sharpened(pixels: Pixels, pair: Pair) -> Pixels:
    """By an unsharp mask, as strong as it takes to be about as sharp as the source; only what can be seen counts."""
    amount, sigma = lacking(pair), max(1.0, max(pixels.shape[:2]) / EDGE)
    margin = math.ceil(3 * sigma)
    made = pixels.copy()
    for top in range(0, len(pixels), STRIP):
        first = max(0, top - margin)
        part = pixels[first : top + STRIP + margin].astype(np.float32)
        rgb, weight = part[..., :3], part[..., 3:] if part.shape[2] == 4 else np.ones((*part.shape[:2], 1), np.float32)
        share = np.maximum(cv2.GaussianBlur(weight, (0, 0), sigma), 1e-3)[..., None]
        blurred = cv2.GaussianBlur(rgb * weight, (0, 0), sigma) / share
        sharp = np.clip(rgb + amount * (rgb - blurred), 0, 255)
        rows = slice(top - first, top - first + STRIP)
        np.copyto(made[top : top + STRIP, :, :3], np.rint(sharp[rows]).astype(np.uint8), where=weight[rows] > 0)
    return made


def lacking(pair: Pair) -> float:
    """How much of its own detail (what a blur of one pixel takes away) a result lacks, 0 to `MOST`.

    With `amount` of it more, the Laplacian's variance is quadratic in `amount`: solved for `LIKE` times the source's.
    """
    grey, seen = pair.grey.astype(np.float32), pair.solid > 0
    detail = grey - cv2.GaussianBlur(grey, (0, 0), 1)
    own, more = (cv2.Laplacian(plane, cv2.CV_32F)[seen] for plane in (grey, detail))
    wanted = by.sharpness(pair.source_grey, pair.solid)
    if wanted is None or float(more.var()) < 1e-6:
        return 0.0
    (has, both), (_, adds) = np.cov(own, more)
    root = both**2 + adds * max(0.0, LIKE * wanted - has)
    return float(np.clip((math.sqrt(root) - both) / adds, 0, MOST))


def without_cast(pixels: Pixels, pair: Pair) -> Pixels:
    """With a and b in CIELAB moved back by as much as those of what was grey have moved; brightness stays."""
    found = by.shift(pair)
    if found is None:
        return pixels
    _, (da, db) = found
    made = pixels.copy()
    for top in range(0, len(pixels), STRIP):
        strip = made[top : top + STRIP, :, :3]
        colours = by.lab(strip) - np.array([0, da, db], np.float32)
        np.copyto(strip, np.rint(np.clip(cv2.cvtColor(colours, cv2.COLOR_LAB2RGB), 0, 1) * 255).astype(np.uint8))
    return made


Repair = Callable[[Pixels, Pair], Pixels]
REPAIRS: dict[str, tuple[str, Repair]] = {
    "cast": (REPAIRED_CAST, without_cast),
    "blurred": (REPAIRED_SHARPNESS, sharpened),
}
"""What a result is flagged as, the note of its repair, and the repair."""


def _short(value: float | None) -> float | None:
    """To three digits: it stands in Redis for each image."""
    return None if value is None else float(f"{round(value, 3):.3g}")
