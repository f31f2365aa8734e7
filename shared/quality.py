"""The quality check: the measures of each result, their limits, and the flags of results outside them.

Workers take the measures (worker/checking/), producers read them. Both apply these rules, so a remembered result is
checked again with the limits of the job that reuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from imagemill.shared.options.base import Model, Operation

FLAG = "flag:"
"""Prefix of the notes that flag a result: `flag:blurred`."""

Share = Annotated[float, Field(ge=0, le=1)]
Look = tuple[float, float, float, float, float, float]
"""Means of L, a and b in CIELAB, followed by their standard deviations."""


class Quality(Model):
    """The limits, and what to do with results outside them. None means the operation's default limit (`LIMITS`)."""

    mode: Literal["off", "flag", "repair"] = Field(
        "flag", description="off: measure nothing; flag: mark results outside a limit with a note; repair: also try to fix them"
    )
    least_sharpness: float | None = Field(
        None, ge=0, le=10, description="flag:blurred: minimum sharpness relative to the source; 0 never flags"
    )
    most_cast: float | None = Field(
        None, ge=0, le=100, description="flag:cast: maximum colour cast in neutral greys, in CIEDE2000; 100 never flags"
    )
    least_entropy: float | None = Field(
        None, ge=0, le=8, description="flag:blank: minimum entropy of the brightness, in bits; 0 never flags"
    )
    least_edges: Share | None = Field(None, description="flag:unlike: minimum match with the requested edges; 0 never flags")
    most_step: float | None = Field(
        None,
        ge=0,
        le=256,
        description="flag:seam: maximum contrast across a hole's border, relative to outside; 256 never flags",
    )
    least_opaque: Share | None = Field(None, description="flag:empty: minimum opaque share of a cut-out; 0 never flags")
    most_opaque: Share | None = Field(None, description="flag:uncut: maximum opaque share of a cut-out; 1 never flags")
    most_faint: Share | None = Field(
        None, description="flag:faint: maximum half-transparent share of a cut-out's visible pixels; 1 never flags"
    )


class Measures(Model):
    """Measures of a result scaled to 512 pixels, rounded to three digits; None if a measure does not apply."""

    sharpness: float | None = Field(
        None, description="variance of the Laplacian of the brightness; when inpainting, in the hole"
    )
    kept: float | None = Field(
        None, description="sharpness relative to the source; when inpainting, to the hole's surroundings"
    )
    entropy: float | None = Field(None, description="entropy of the brightness histogram in bits, 0 to 8")
    cast: float | None = Field(None, description="colour cast, in CIEDE2000, of pixels that are nearly grey in the source")
    opaque: float | None = Field(None, description="share of a cut-out's pixels that are opaque")
    half: float | None = Field(None, description="share of a cut-out's pixels that are half transparent")
    step: float | None = Field(None, description="contrast across a hole's border, divided by the contrast just outside it")
    edges: float | None = Field(None, description="F-measure of the result's edges against the requested edges, 0 to 1")
    look: Look | None = None
    before: Look | None = Field(None, description="look of the source")

    @property
    def faint(self) -> float | None:
        """Share of half-transparent pixels among the visible ones."""
        if self.opaque is None or self.half is None or self.opaque + self.half == 0:
            return None
        return self.half / (self.opaque + self.half)


LIMITS: dict[Operation, dict[str, float]] = {
    "remove-background": {
        "least_sharpness": 0.5,
        "most_cast": 3,
        "least_opaque": 0.002,
        "most_opaque": 0.98,
        "most_faint": 0.6,
    },
    "inpaint": {"most_step": 3.0},
    "stylize": {"least_entropy": 0.5, "least_edges": 0.2},
}
"""Default limits, lenient enough that every flagged result deserves a look."""

_CUT_OUTS = frozenset({"least_opaque", "most_opaque", "most_faint"})
UNMEASURED: dict[Operation, frozenset[str]] = {
    "remove-background": frozenset({"most_step", "least_edges"}),
    "inpaint": frozenset({"most_cast", "least_edges"}) | _CUT_OUTS,
    "stylize": frozenset({"most_step"}) | _CUT_OUTS,
}
"""Limits of what results of the operation never have, such as a hole's border."""


class Rule(NamedTuple):
    """A limit's measure, its flag, and the flag in words."""

    measure: str
    flag: str
    words: str


RULES: dict[str, Rule] = {
    "least_sharpness": Rule("kept", "blurred", "less sharp than the source"),
    "most_cast": Rule("cast", "cast", "a colour cast in neutral greys"),
    "least_entropy": Rule("entropy", "blank", "almost uniform brightness"),
    "least_edges": Rule("edges", "unlike", "edges differ from the requested ones"),
    "most_step": Rule("step", "seam", "a visible seam around the filled area"),
    "least_opaque": Rule("opaque", "empty", "almost nothing is left"),
    "most_opaque": Rule("opaque", "uncut", "almost nothing was removed"),
    "most_faint": Rule("faint", "faint", "most of the subject is half transparent"),
}
"""Rules by name of limit."""


def flagged(beyond: Mapping[str, float]) -> tuple[str, ...]:
    """The notes for the flags that `beyond` returns."""
    return tuple(FLAG + name for name in beyond)


def flags_of(notes: Iterable[str]) -> tuple[str, ...]:
    """The flags among a result's notes."""
    return tuple(note.removeprefix(FLAG) for note in notes if note.startswith(FLAG))


def beyond(measures: Measures | None, quality: Quality, operation: Operation) -> dict[str, float]:
    """A result's flags, each with its distance from the limit as a share of the limit."""
    flags: dict[str, float] = {}
    if measures is None or quality.mode == "off":
        return flags
    for name, rule in RULES.items():
        override: float | None = getattr(quality, name)
        limit = override if override is not None else LIMITS[operation].get(name)
        value: float | None = getattr(measures, rule.measure)
        if limit is None or value is None:
            continue
        over = limit - value if name.startswith("least") else value - limit
        if over > 0:
            flags[rule.flag] = over / max(limit, 1e-3)
    return flags
