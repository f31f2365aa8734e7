"""How good a result has to be: what is measured of each, the limits, and what lies beyond them.

Workers measure (worker/quality.py) and producers read; both judge by the same rules, so a remembered result is judged
anew by the limits of the job that asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from imagemill.shared.options.base import Model, Operation

FLAG = "flag:"
"""What the notes of a result begin with that lies beyond a limit: `flag:blurred`."""

Share = Annotated[float, Field(ge=0, le=1)]
Look = tuple[float, float, float, float, float, float]
"""Mean of L, a and b in CIELAB, then their standard deviations."""


class Quality(Model):
    """What becomes of results that lie beyond a limit. A limit of None is the operation's own (`LIMITS`)."""

    mode: Literal["off", "flag", "repair"] = Field(
        "flag", description="off measures nothing, flag notes what is beyond a limit, repair also tries to mend it"
    )
    least_sharpness: float | None = Field(
        None, ge=0, le=10, description="flag:blurred: share of the source's sharpness that is kept; 0 never flags"
    )
    most_cast: float | None = Field(
        None, ge=0, le=100, description="flag:cast: shift in CIEDE2000 of what was grey; 100 never flags"
    )
    least_entropy: float | None = Field(None, ge=0, le=8, description="flag:blank: bits of the brightness; 0 never flags")
    least_edges: Share | None = Field(
        None, description="flag:unlike: agreement with the edges that were asked for; 0 never flags"
    )
    most_step: float | None = Field(
        None, ge=0, le=256, description="flag:seam: steps at a hole's border in those of its surroundings; 256 never flags"
    )
    least_opaque: Share | None = Field(None, description="flag:empty: share of opaque pixels of a cut-out; 0 never flags")
    most_opaque: Share | None = Field(None, description="flag:uncut: share of opaque pixels of a cut-out; 1 never flags")
    most_faint: Share | None = Field(
        None, description="flag:faint: share of half-transparent pixels among the visible of a cut-out; 1 never flags"
    )


class Measures(Model):
    """What was measured of a result, at 512 pixels; None where it has no such thing. Rounded to three digits."""

    sharpness: float | None = Field(None, description="variance of the brightness's Laplacian, of an inpainting in the hole")
    kept: float | None = Field(None, description="sharpness over the source's, of an inpainting over the surroundings'")
    entropy: float | None = Field(None, description="bits of the brightness's histogram, 0 to 8")
    cast: float | None = Field(None, description="CIEDE2000 by which what is near grey in the source has changed its hue")
    opaque: float | None = Field(None, description="share of a cut-out's pixels")
    half: float | None = Field(None, description="share of a cut-out's pixels that are half transparent")
    step: float | None = Field(None, description="steps across a hole's border over those next to it outside")
    edges: float | None = Field(None, description="F-measure of the result's edges against those asked for, 0 to 1")
    look: Look | None = None
    before: Look | None = Field(None, description="the source's look")

    @property
    def faint(self) -> float | None:
        """Share of half-transparent pixels among the visible."""
        if self.opaque is None or self.half is None or self.opaque + self.half == 0:
            return None
        return self.half / (self.opaque + self.half)


LIMITS: dict[Operation, dict[str, float]] = {
    "remove-background": {
        "least_sharpness": 0.5,
        "most_cast": 3.0,
        "least_opaque": 0.002,
        "most_opaque": 0.98,
        "most_faint": 0.6,
    },
    "inpaint": {"most_step": 3.0},
    "stylize": {"least_entropy": 0.5, "least_edges": 0.2},
}
"""Limits that hold where a job sets none: so lenient that a flag is worth a look."""


class Rule(NamedTuple):
    """What a limit limits, what a result beyond it is flagged as, and that in words."""

    measure: str
    flag: str
    words: str


RULES: dict[str, Rule] = {
    "least_sharpness": Rule("kept", "blurred", "less sharp than its source"),
    "most_cast": Rule("cast", "cast", "greys have taken on a colour"),
    "least_entropy": Rule("entropy", "blank", "nearly all of one brightness"),
    "least_edges": Rule("edges", "unlike", "edges are not where they should be"),
    "most_step": Rule("step", "seam", "a seam around what was filled"),
    "least_opaque": Rule("opaque", "empty", "next to nothing is left"),
    "most_opaque": Rule("opaque", "uncut", "next to nothing was cut away"),
    "most_faint": Rule("faint", "faint", "most of the subject is half transparent"),
}
"""By the name of the limit."""


def flagged(beyond: Mapping[str, float]) -> tuple[str, ...]:
    """The notes of a result, from what `beyond` found."""
    return tuple(FLAG + name for name in beyond)


def flags_of(notes: Iterable[str]) -> tuple[str, ...]:
    """What a result with these notes is flagged as."""
    return tuple(note.removeprefix(FLAG) for note in notes if note.startswith(FLAG))


def beyond(measures: Measures | None, quality: Quality, operation: Operation) -> dict[str, float]:
    """What to flag a result as, with how far beyond the limit it lies as a share of the limit; empty where all is well."""
    found: dict[str, float] = {}
    if measures is None or quality.mode == "off":
        return found
    for name, rule in RULES.items():
        given: float | None = getattr(quality, name)
        limit = given if given is not None else LIMITS[operation].get(name)
        value: float | None = getattr(measures, rule.measure)
        if limit is None or value is None:
            continue
        over = limit - value if name.startswith("least") else value - limit
        if over > 0:
            found[rule.flag] = over / max(limit, 1e-3)
    return found
