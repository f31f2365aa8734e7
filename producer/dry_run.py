"""`submit --dry-run`: what would be queued, under which names, how long it might take and what it needs; queues nothing."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from rich.console import Console

from imagemill.producer.advice import advice
from imagemill.producer.naming import shown_key
from imagemill.producer.sources import BadRow, SourceRow
from imagemill.producer.submission import ListCheck, check_name
from imagemill.producer.terminal import bad_rows, counted, duration, say
from imagemill.producer.times import check_times
from imagemill.shared import image_files
from imagemill.shared.errors import BrokerUnavailable, MissingExtra
from imagemill.shared.messages import Item, Job
from imagemill.shared.settings import Settings
from imagemill.shared.urls import path_of, shown

if TYPE_CHECKING:
    from imagemill.producer.client import Client

FIRST, OTHERS = 20, 20
"""Images that are looked at: the first ones, and as many of the rest, chosen at random."""
NAMES = 5
"""Output names that are shown."""
PER_PIXEL = {"png": 1.8, "jpg": 0.4, "webp": 0.2, "avif": 0.15}
"""Bytes per pixel of typical results, for an estimate; very detailed photos need twice that."""
EXTENSIONS = {"jpeg": "jpg", "webp-lossless": "webp"}
UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass
class DryRun:
    """What a submission would do. Sizes are in bytes, times in seconds; None where nothing is known."""

    total: int = 0
    duplicates: int = 0
    invalid: int = 0
    accepted: bool = True
    """Whether `submit` would queue the list as it is."""
    collisions: int = 0
    """Rows among the invalid ones whose results would get the same name as another's."""
    outputs: list[str] = field(default_factory=list)
    """The first results' URLs, with the expected extension."""
    parts: tuple[str, ...] = ()
    """The results of each image, if it has several."""
    lane: str = ""
    nodes: int | None = None
    """Nodes that can work on the job; None without Redis."""
    advice: str | None = None
    """Why none can, and what to do about it."""
    warnings: tuple[str, ...] = ()
    """Options and columns of the list that have no effect, and why."""
    begins_in: float | None = None
    seconds: float | None = None
    """Until all is done, at the lane's present speed and behind the jobs that wait."""
    source_bytes: int | None = None
    output_bytes: int | None = None
    looked_at: list[dict[str, Any]] = field(default_factory=list)
    """What the opened images are, or the error that a job would give them."""


def dry_run(
    client: Client,
    settings: Settings,
    rows: Iterable[SourceRow | BadRow],
    spec: Job,
    *,
    name: str | None = None,
    skip_invalid: bool = False,
    fetch: bool = False,
) -> tuple[DryRun, list[BadRow]]:
    """Check a whole list, and with `fetch` open some of its images; also returns the first invalid rows.

    Raises InvalidSource, InvalidOption for a name or times that `submit` would refuse, and MissingExtra if the packages that
    open images are not installed.
    """
    check_times(spec.policy)
    job = "{job}" if name is None else check_name(name)
    check, sample = ListCheck(), Sample()
    named: list[Item] = []
    for item in check.accepted(rows, spec, skip_invalid=True):
        if item.duplicate_of is None:
            named += [item] * (len(named) < NAMES)
            if item.part in (None, *spec.options.parts[:1]):  # one result of each image
                sample.add(item, check.place)
    duplicates = sum(check.duplicates.values())
    accepted = check.total > 0 and (skip_invalid or not check.bad_count)
    found = DryRun(check.total, duplicates, check.bad_count, accepted, check.collisions, lane=spec.lane)
    found.parts, found.warnings = spec.options.parts, check.warnings
    found.outputs = [_output(item, spec, job) for item in named]
    computed = check.total - duplicates
    try:
        found.nodes, found.begins_in, found.seconds = client.forecast(spec, computed)
        found.advice = advice(spec.lane, client.nodes(), spec.options.companions())
    except BrokerUnavailable:
        found.nodes = None
    if fetch:
        looks = _look(settings, sample.items, spec)
        found.looked_at = [{"place": place, **look} for place, look in zip(sample.places, looks, strict=True)]
    found.source_bytes, found.output_bytes = _storage(found, sample.items, spec, check.total, computed)
    return found, check.bad


class Sample:
    """The first images of a list, and a random choice of the others."""

    def __init__(self) -> None:
        self._chosen: list[tuple[Item, str]] = []  # the first ones, then the others
        self._seen, self._random = 0, random.Random()  # noqa: S311  # not for secrets

    def add(self, item: Item, place: str = "") -> None:
        """Consider the next image, which is at this place of its list."""
        self._seen += 1
        if self._seen <= FIRST + OTHERS:
            self._chosen.append((item, place))
        elif (other := self._random.randrange(self._seen - FIRST)) < OTHERS:
            self._chosen[FIRST + other] = item, place

    @property
    def items(self) -> list[Item]:
        """The sample in the list's order."""
        return [item for item, _ in self._in_order]

    @property
    def places(self) -> list[str]:
        """Where each of them stands in its list."""
        return [place for _, place in self._in_order]

    @property
    def _in_order(self) -> list[tuple[Item, str]]:
        return sorted(self._chosen, key=lambda chosen: chosen[0].index)


def _output(item: Item, spec: Job, job: str) -> str:
    return f"{spec.output.url}/{shown_key(item, spec.output.key).replace('{job}', job)}.{_extension(item.source, spec)}"


def _extension(source: str, spec: Job) -> str:
    """The extension that a result will probably have; the content of the source decides."""
    if spec.output.format != "same":
        return EXTENSIONS.get(spec.output.format, spec.output.format)
    suffix = PurePosixPath(source.partition("?")[0]).suffix.lower()
    lossy = suffix in (*image_files.EXTENSIONS["jpeg"], *image_files.EXTENSIONS["heic"], ".jxl")
    if lossy and spec.operation != "remove-background":
        return "jpg"
    return suffix.removeprefix(".") if suffix in (".webp", ".avif") else "png"


def _storage(found: DryRun, items: Sequence[Item], spec: Job, total: int, computed: int) -> tuple[int | None, int | None]:
    """Bytes to read and to store, from a sample: opened images, or files of this machine."""
    opened = [look for look in found.looked_at if "size" in look]
    sizes = [look["bytes"] for look in opened] or [size for item in items if (size := _file_size(item.source)) is not None]
    if not sizes:
        return None, None
    mean, photos = sum(sizes) / len(sizes), total / max(1, len(found.parts))
    if not opened:
        return round(mean * photos), None
    stored = [look["size"][0] * look["size"][1] * PER_PIXEL.get(_extension(look["source"], spec), 1) for look in opened]
    return round(mean * photos), round(sum(stored) / len(stored) * computed)


def _file_size(source: str) -> int | None:
    try:
        return path_of(source).stat().st_size if source.startswith("file:") else None
    except (OSError, ValueError):
        return None


def _look(settings: Settings, items: Sequence[Item], spec: Job) -> list[dict[str, Any]]:
    """Open images with the worker's own fetcher and decoder, whose packages a producer need not have."""
    try:
        looking = importlib.import_module("imagemill.worker.node.look")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise
        needed = f"--dry-run=fetch needs {error.name}, which is not installed: pip install 'imagemill[worker]'"
        raise MissingExtra(needed) from error
    looks: list[dict[str, Any]] = looking.look(settings, items, spec)
    return looks


def as_json(found: DryRun, bad: Sequence[BadRow]) -> dict[str, Any]:
    """All of it, with the first invalid rows."""
    return {"dry_run": True, **asdict(found), "invalid_rows": [asdict(row) for row in bad[:NAMES]]}


def show(out: Console, found: DryRun, bad: Sequence[BadRow]) -> None:
    """Print it for people."""
    if bad:
        bad_rows(out, bad, found.invalid)
    text = f"dry run, nothing was queued: {counted(found.total, 'result' if found.parts else 'image')}"
    text += f" ({', '.join(found.parts)} of each image)" if found.parts else ""
    text += f", including {counted(found.duplicates, 'duplicate')}" if found.duplicates else ""
    text += f"; {counted(found.invalid, 'invalid row')}" if found.invalid else ""
    text += f", {found.collisions:,} with the same name as another" if found.collisions else ""
    say(out, text)
    if not found.accepted:
        hint = "the rows above are invalid; fix them, or skip them with --skip-invalid" if found.invalid else "it has no images"
        say(out, f"`submit` would refuse this list: {hint}", "yellow")
    for output in found.outputs:
        say(out, f"  {output}")
    say(out, f"time: {_time(found)}")
    hint = " (--dry-run=fetch gives an estimate)" if found.output_bytes is None and not found.looked_at else ""
    say(out, f"storage: reads {_bytes(found.source_bytes)}, writes {_bytes(found.output_bytes)}{hint}")
    for look in found.looked_at:
        place = f"{look['place']}: " if look["place"].rpartition(":")[2].isdecimal() else ""  # otherwise it is the source
        say(out, f"  {place}{shown(look['source'])}: {_seen(look)}", "" if look["ok"] else "yellow")
    if codes := Counter(look["error"].partition(":")[0] for look in found.looked_at if not look["ok"]):
        reasons = ", ".join(f"{count:,} {code}" for code, count in codes.most_common())
        say(out, f"{codes.total():,} of the {counted(len(found.looked_at), 'opened image')} would fail: {reasons}", "yellow")


def _seen(look: dict[str, Any]) -> str:
    """What an opened image and its mask are, and its error."""
    seen = [f"{look['format']}, {'×'.join(map(str, look['size']))}, {look['bytes']:,} bytes"] if "size" in look else []
    seen += [f"{name.replace('_', ' ')}: {look[name]}" for name in ("mask", "control_image") if name in look]
    return "; ".join([*seen, *look.get("errors", [])])


def _time(found: DryRun) -> str:
    if found.nodes is None:
        return "unknown, Redis can't be reached"
    if not found.nodes:
        return f"unknown, {found.advice or 'no worker offers ' + found.lane}"
    if found.seconds is None:
        return f"unknown, no node has worked on {found.lane} yet"
    wait = f", beginning in {duration(found.begins_in)}" if found.begins_in else ""
    return f"about {duration(found.seconds)}{wait}"


def _bytes(size: int | None) -> str:
    if size is None:
        return "an unknown amount"
    power = min(len(UNITS) - 1, (len(str(size)) - 1) // 3)
    return f"about {size / 1000**power:.3g} {UNITS[power]}"
