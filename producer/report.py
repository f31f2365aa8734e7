"""A job, or several, as one HTML page that stands alone: before and after, failures, what to look at, figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel

from imagemill.producer.drift import Outlier
from imagemill.shared.messages import ItemResult, Job, JobStatus, Row
from imagemill.shared.quality import FLAG, RULES, flags_of
from imagemill.shared.urls import shown

STAGES = ("fetch", "wait", "decode", "prepare", "run", "finish", "check", "encode", "store")
MOST_FAILURES = 500
"""Failures listed per job; `imagemill results JOB --failed` has them all."""

MOST_FLAGGED = 100
"""Flagged images, and outliers, shown per job; `imagemill results JOB --flagged` has them all."""

REMARKS = {
    "cached": "copied from an earlier result of the same image",
    "empty_cutout": "no subject was found",
    "empty_mask": "the mask is empty: nothing was filled",
    "enlarged": "the canvas asks for more pixels than there are",
    "large_mask": "more than 30 % is masked",
    "matting_failed": "alpha matting failed: the plain edge",
    "matting_timed_out": "alpha matting took too long: the plain edge",
    "matting_too_large": "too large for alpha matting: the plain edge",
    "no_shadow_found": "no shadow was found",
    "prompt_cut": "the prompt is longer than the model reads, and was cut",
    "repaired_cast": "a tint was taken out",
    "repaired_seed": "made again with the next seed",
    "repaired_sharpness": "sharpened",
}
"""What workers note of a result, in words; flags have theirs in imagemill.shared.quality."""

Picture = Callable[[str], str | None]
"""Maps the address of an image to what an `<img src>` may use: a presigned link, a relative path; None if nothing can."""


@dataclass(frozen=True)
class Comparison:
    """Results of another engine, by source, to show beside a job's own."""

    engine: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class JobPage:
    """One job of a page. `rows` is read once, in one pass; `drift` tells by index which look unlike the others."""

    status: JobStatus
    spec: Job
    rows: Iterable[Row]
    drift: Mapping[int, Outlier] = field(default_factory=dict)
    comparison: Comparison | None = None


@dataclass
class Pair:
    """One image before and after; `before` and `after` are None where they can't be shown."""

    row: Row
    before: str | None
    after: str | None
    duplicates: int = 0
    remark: str | None = None
    compared: str | None = None  # the other engine's result


@dataclass
class Failures:
    """The failures with one code."""

    code: str
    retryable: bool = False
    count: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass
class Notable:
    """Images that are worth a look: how many, and the first of them."""

    count: int = 0
    pairs: list[Pair] = field(default_factory=list)

    def add(self, row: Row, picture: Picture, remark: str | None = None) -> None:
        """One more."""
        self.count += 1
        if len(self.pairs) < MOST_FLAGGED:
            self.pairs.append(Pair(row, _image(row.source, picture), _image(row.output, picture), remark=remark))


@dataclass
class _Section:
    """What the template shows of one job."""

    status: JobStatus
    spec: Job
    compared: str = ""  # the other engine
    stages: list[tuple[str, float, float]] = field(default_factory=list)  # name, mean in ms, share of the longest in %
    failures: list[Failures] = field(default_factory=list)
    flagged: Notable = field(default_factory=Notable)
    drifted: Notable = field(default_factory=Notable)
    pairs: list[Pair] = field(default_factory=list)
    unshown: int = 0
    unfinished: int = 0

    @property
    def rate(self) -> float:
        return self.status.done / self.status.seconds if self.status.seconds > 0 else 0.0

    @property
    def options(self) -> list[tuple[str, str, bool]]:
        """Name, value as text, and whether it differs from the default; those that differ first."""
        output, policy = self.spec.output, self.spec.policy
        told = [
            *_told(self.spec.options, without={"engine"}),
            *_told(output, without={"url", "key", "icc"}),
            ("icc", self.spec.icc, output.icc is not None),
            *_told(policy, without={"quality"}),
            ("check", policy.quality.mode, policy.quality.mode != "flag"),
            *((name, _option(value), True) for name, value in policy.quality if name != "mode" and value is not None),
        ]
        return sorted(told, key=lambda option: not option[2])


def render(
    jobs: Sequence[JobPage], *, picture: Picture, most: int = 200, title: str = "imagemill report", lead: str = ""
) -> str:
    """The page as text. Up to `most` images of each job are shown, in the list's order. With `lead`, a sentence
    to begin with, they come first in each job, and large.

    Only http, https, file and relative addresses that `picture` gives get into the page; it has no scripts and
    loads nothing but these images.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, size=size, shown=shown, worded=worded)
    sections = [_section(job, picture, most) for job in jobs]
    return environment.get_template("report.html.j2").render(title=title, jobs=sections, lead=lead, most_failures=MOST_FAILURES)


def _section(job: JobPage, picture: Picture, most: int) -> _Section:
    compared = job.comparison or Comparison("", {})
    section = _Section(job.status, job.spec, compared.engine)
    pairs: dict[int, Pair] = {}
    codes: dict[str, Failures] = {}
    sums: dict[str, tuple[float, int]] = {}
    listed = 0
    for row in job.rows:
        if row.duplicate_of is not None:
            if row.duplicate_of in pairs:
                pairs[row.duplicate_of].duplicates += 1
            elif row.state == "failed":
                _group(codes, row).count += 1
            elif row.state != "done":
                section.unfinished += 1
            continue
        if row.result is not None:
            _add(sums, row.result)
        if row.state == "failed":
            group = _group(codes, row)
            group.count += 1
            if listed < MOST_FAILURES:
                group.rows.append(row)
                listed += 1
        elif row.state == "done":
            if row.result is not None and flags_of(row.result.notes):
                section.flagged.add(row, picture)
            if row.index in job.drift:
                section.drifted.add(row, picture, str(job.drift[row.index]))
            if len(pairs) < most:
                other = _image(compared.outputs.get(row.source), picture)
                pairs[row.index] = Pair(row, _image(row.source, picture), _image(row.output, picture), compared=other)
            else:
                section.unshown += 1
        else:
            section.unfinished += 1
    section.pairs = list(pairs.values())
    section.failures = sorted(codes.values(), key=lambda group: (-group.count, group.code))
    section.stages = _means(sums)
    return section


def _group(codes: dict[str, Failures], row: Row) -> Failures:
    group = codes.setdefault(row.code or "error", Failures(row.code or "error"))
    group.retryable |= row.result is not None and row.result.retryable
    return group


def _add(sums: dict[str, tuple[float, int]], result: ItemResult) -> None:
    for stage, seconds in result.seconds.items():
        total, count = sums.get(stage, (0.0, 0))
        sums[stage] = total + seconds, count + 1


def _means(sums: dict[str, tuple[float, int]]) -> list[tuple[str, float, float]]:
    """Mean milliseconds of the images that went through each stage, in the order of the flow."""
    means = {stage: total / count * 1000 for stage, (total, count) in sums.items()}
    longest = max(means.values(), default=0.0) or 1.0
    order = sorted(means, key=lambda stage: (STAGES.index(stage) if stage in STAGES else len(STAGES), stage))
    return [(stage, means[stage], 100 * means[stage] / longest) for stage in order]


def _image(url: str | None, picture: Picture) -> str | None:
    return allowed(picture(url)) if url else None


def allowed(address: str | None) -> str | None:
    """The address if an image may be loaded from it (http, https, file, or a relative path), else None."""
    # Browsers drop tabs and line breaks inside an address, so `java\nscript:` must not pass for a relative path.
    if not address or re.search(r"[\x00-\x20\x7f\\]", address) or address.startswith("//"):
        return None
    try:
        scheme = urlsplit(address).scheme
    except ValueError:
        return None
    has_scheme = re.match(r"[^/?#]*:", address) is not None
    return address if scheme in ("http", "https", "file") or not has_scheme else None


def _told(model: BaseModel, without: set[str]) -> list[tuple[str, str, bool]]:
    """Name, value as text, and whether it differs from the default, of each field but those `without`."""
    changed = model.model_dump(mode="json", exclude_defaults=True)
    return [(name, _option(value), name in changed) for name, value in model.model_dump(mode="json", exclude=without).items()]


def _option(value: object) -> str:
    """An option's value as text: addresses without their query, boxes and LoRAs as they are given."""
    if isinstance(value, str):
        return shown(value) if "://" in value else value
    if isinstance(value, list):
        return "; ".join(_option(part) for part in value) or "none"
    if isinstance(value, dict) and "weight" in value:
        return f"{value['name']}:{value['weight']:g}"
    if isinstance(value, dict):
        return ", ".join(f"{part:g}" for part in value.values() if isinstance(part, int | float))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value}"


def worded(note: str) -> str:
    """A note or a flag, such as `flag:blurred`, with what it says in words; one that is not known as it is."""
    words = REMARKS | {rule.flag: rule.words for rule in RULES.values()}
    name = note.removeprefix(FLAG)
    return f"{name}: {words[name]}" if name in words else note


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """Bytes as `512 B`, `48 kB`, `3.1 MB`."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"
