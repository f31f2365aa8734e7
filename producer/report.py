"""One or several jobs as a self-contained HTML page: before and after, failures, flagged images, timings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel

from imagemill.producer.outliers import Outlier
from imagemill.producer.terminal import duration
from imagemill.shared.errors import Expired
from imagemill.shared.messages import Job, JobStatus, Row
from imagemill.shared.quality import FLAG, RULES, flags_of
from imagemill.shared.urls import shown

STAGES = ("fetch", "wait", "decode", "prepare", "run", "finish", "check", "encode", "store")
MOST_FAILURES = 500
"""Failures listed per job; `imagemill results JOB --failed` prints them all."""

MOST_FLAGGED = 100
"""Flagged images and outliers shown per job; `imagemill results JOB --flagged` prints them all."""

REMARKS = {
    "cached": "copied from an earlier result of the same image",
    "cmyk_inverted": "a CMYK JPEG without Adobe's marker, read as inverted because its colours would make no sense otherwise",
    "empty_cutout": "no subject found, or not this garment",
    "empty_mask": "the mask is empty, so nothing was filled",
    "enlarged": "the canvas is larger than the image, so the image was upscaled",
    "junk_skipped": "the file has junk between its parts; the picture is complete",
    "large_mask": "the mask covers more than 30 % of the image",
    "mask_read_as:alpha": "the mask was read from its transparency",
    "mask_read_as:colour": "the coloured part of the mask was filled",
    "mask_read_as:inverted": "the dark part of the mask was filled, because the bright part covers nearly all of it",
    "mask_read_as:levels": "the mask is neither black nor white; its brighter part was filled",
    "matting_failed": "alpha matting failed; the edge is unrefined",
    "matting_timed_out": "alpha matting took too long; the edge is unrefined",
    "matting_too_large": "too large for alpha matting; the edge is unrefined",
    "no_end_marker": "the file's end marker is missing; the picture is complete",
    "no_shadow_found": "no shadow found",
    "prompt_cut": "the prompt was longer than 75 tokens and was truncated (earlier versions only)",
    "reduced_to_8_bits": "the source has more than 8 bits per channel; the result has 8",
    "repaired_cast": "a colour cast was corrected",
    "repaired_seed": "run again with the next seed",
    "repaired_sharpness": "sharpened",
    "thumbnail_skipped": "the file's first page is a thumbnail; the full page was read",
}
"""Workers' notes on results, in words. The words for flags are in imagemill.shared.quality."""

Picture = Callable[[str], str | None]
"""Maps an image's URL to one for `<img src>`, such as a presigned link or a relative path; None if there is none."""


@dataclass(frozen=True)
class JobPage:
    """One job of a page. `rows` is read once; `drift` maps the index of each outlier to its deviation.

    `others` maps sources to the results of another engine, `compared`, to show beside the job's own.
    """

    status: JobStatus
    spec: Job
    rows: Iterable[Row]
    drift: Mapping[int, Outlier] = field(default_factory=dict)
    compared: str = ""
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Pair:
    """One image before and after. `before` and `after` are URLs, or None if the image can't be shown."""

    row: Row
    before: str | None
    after: str | None
    duplicates: int = 0
    remark: str | None = None
    compared: str | None = None  # the other engine's result


@dataclass
class Failures:
    """The failures that share an error code."""

    code: str
    retryable: bool = False
    count: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass
class Notable:
    """Images that deserve a look: their number, and the first of them."""

    count: int = 0
    pairs: list[Pair] = field(default_factory=list)

    def add(self, row: Row, image: Callable[[str | None], str | None], remark: str | None = None) -> None:
        """Count an image, and keep it if there is room."""
        self.count += 1
        if len(self.pairs) < MOST_FLAGGED:
            self.pairs.append(Pair(row, image(row.source), image(row.output), remark=remark))


@dataclass
class _Section:
    """One job's data for the template."""

    page: JobPage
    stages: list[tuple[str, float, float]] = field(default_factory=list)  # name, mean in ms, share of the longest in %
    failures: list[Failures] = field(default_factory=list)
    flagged: Notable = field(default_factory=Notable)
    drifted: Notable = field(default_factory=Notable)
    pairs: list[Pair] = field(default_factory=list)
    unshown: int = 0
    unfinished: int = 0

    @property
    def outlined(self) -> bool:
        return any(pair.row.result and pair.row.result.filled for pair in self.pairs)

    @property
    def rate(self) -> float:
        status = self.page.status
        return status.done / status.seconds if status.seconds > 0 else 0.0

    @property
    def options(self) -> list[tuple[str, str, bool]]:
        """(name, value as text, differs from the default) of every option, changed ones first."""
        spec, policy = self.page.spec, self.page.spec.policy
        entries = [
            *_entries(spec.options, without={"engine"}),
            *_entries(spec.output, without={"url", "key", "icc"}),
            ("icc", spec.icc, spec.output.icc is not None),
            *_entries(policy, without={"quality"}),
            ("check", policy.quality.mode, policy.quality.mode != "flag"),
            *((name, _option(value), True) for name, value in policy.quality if name != "mode" and value is not None),
        ]
        return sorted(entries, key=lambda option: not option[2])


def render(
    jobs: Sequence[JobPage], *, picture: Picture, most: int = 200, title: str = "imagemill report", lead: str = ""
) -> str:
    """The page as HTML. Up to `most` images of each job are shown, in the list's order. With `lead`, an opening
    sentence, the images come first in each job, and large.

    The page has no scripts and loads nothing but images, and only from http, https, file and relative URLs
    returned by `picture`.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(duration=duration, shown=shown, worded=worded)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    sections = [_section(job, picture, most) for job in jobs]
    return template.render(title=title, jobs=sections, lead=lead, most_failures=MOST_FAILURES)


def _section(page: JobPage, picture: Picture, most: int) -> _Section:
    section = _Section(page)
    pairs: dict[int, Pair] = {}
    codes: dict[str, Failures] = {}
    totals: dict[str, float] = defaultdict(float)  # seconds by stage
    counts = Counter[str]()  # images by stage
    listed = 0

    def image(url: str | None) -> str | None:
        return allowed(picture(url)) if url else None

    for row in page.rows:
        result = row.result
        if result is not None and row.duplicate_of is None:
            counts.update(result.seconds.keys())
            for stage, seconds in result.seconds.items():
                totals[stage] += seconds
        if row.state == "failed":
            group = codes.setdefault(row.code or "error", Failures(row.code or "error"))
            group.retryable |= result.retryable if result is not None else row.code == Expired.code
            group.count += 1
            if listed < MOST_FAILURES and row.duplicate_of is None:
                group.rows.append(row)
                listed += 1
        elif row.state != "done":
            section.unfinished += 1
        elif row.duplicate_of is not None:
            if row.duplicate_of in pairs:
                pairs[row.duplicate_of].duplicates += 1
        else:
            if result is not None and flags_of(result.notes):
                section.flagged.add(row, image)
            if row.index in page.drift:
                section.drifted.add(row, image, str(page.drift[row.index]))
            if len(pairs) < most:
                compared = image(page.others.get(row.source))
                pairs[row.index] = Pair(row, image(row.source), image(row.output), compared=compared)
            else:
                section.unshown += 1
    section.pairs = list(pairs.values())
    section.failures = sorted(codes.values(), key=lambda group: (-group.count, group.code))
    means = {stage: total / counts[stage] * 1000 for stage, total in totals.items()}
    longest = max(means.values(), default=0.0) or 1.0
    order = sorted(means, key=lambda stage: (STAGES.index(stage) if stage in STAGES else len(STAGES), stage))
    section.stages = [(stage, means[stage], 100 * means[stage] / longest) for stage in order]
    return section


def allowed(url: str | None) -> str | None:
    """The URL if it is http, https, file or relative, otherwise None."""
    # Browsers drop tabs and line breaks inside a URL, so `java\nscript:` must not pass as a relative path.
    if not url or re.search(r"[\x00-\x20\x7f\\]", url) or url.startswith("//"):
        return None
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        return None
    has_scheme = re.match(r"[^/?#]*:", url) is not None
    return url if scheme in ("http", "https", "file") or not has_scheme else None


def _entries(model: BaseModel, without: set[str]) -> list[tuple[str, str, bool]]:
    """(name, value as text, differs from the default) of each field except `without`."""
    changed = model.model_dump(mode="json", exclude_defaults=True)
    return [(name, _option(value), name in changed) for name, value in model.model_dump(mode="json", exclude=without).items()]


def _option(value: object) -> str:
    """An option's value as text: URLs without their query string, boxes, points, LoRAs and controls as typed."""
    if isinstance(value, str):
        return shown(value) if "://" in value else value
    if isinstance(value, list):
        return "; ".join(_option(part) for part in value) or "none"
    if isinstance(value, dict) and "weight" in value:
        return f"{value['name']}:{value['weight']:g}" if value["weight"] is not None else f"{value['name']}"
    if isinstance(value, dict):
        return ", ".join(f"{part:g}" for part in value.values() if isinstance(part, int | float))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value}"


def worded(note: str) -> str:
    """A note or flag such as `flag:blurred` with its explanation; unknown ones are returned unchanged."""
    words = REMARKS | {rule.flag: rule.words for rule in RULES.values()}
    name = note.removeprefix(FLAG)
    return f"{name}: {words[name]}" if name in words else note
