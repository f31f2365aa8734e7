"""Submitting a job: check a list while it streams in."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime

from imagemill.producer.duplicates import Firsts
from imagemill.producer.naming import Naming
from imagemill.producer.sources import BadRow, SourceRow, parse, refused
from imagemill.producer.without_effect import WithoutEffect
from imagemill.shared.errors import InvalidOption, InvalidSource
from imagemill.shared.keys import may_collide
from imagemill.shared.messages import Item, Job
from imagemill.shared.options.inpaint import InpaintOptions
from imagemill.shared.options.stylize import DiffusionStylize

MOST_BAD_ROWS = 1000
"""Bad rows that are kept for messages; all are counted."""


@dataclass(frozen=True)
class Submission:
    """A queued job. `total` counts the accepted rows, `duplicates` those among them that share another row's result.

    `warnings` tell which options and columns of the list have no effect, `advice` what to do if no node can work on it.
    """

    job: str
    total: int
    duplicates: int
    invalid: list[BadRow]
    """The first of the skipped rows."""
    invalid_count: int
    nodes: int | None
    """Running worker nodes that can work on this job; None if Redis was lost before they could be counted."""
    advice: str | None = None
    """Why none can, and what to do about it."""
    before: bool = False
    """The same list was queued under this name before; nothing was queued now."""
    warnings: tuple[str, ...] = ()
    """Options and columns of the list that have no effect, and why; one sentence each."""

    @property
    def served(self) -> bool:
        """Whether a node can work on the job now, as far as known; otherwise it waits for one."""
        return self.nodes != 0


def new_job_id() -> str:
    """The UTC date and 32 random bits: `260730-1f0c9a3e`."""
    return f"{datetime.now(UTC):%y%m%d}-{secrets.token_hex(4)}"


def check_name(name: str) -> str:
    """A job's name, which becomes its id: part of keys, URLs and file names. Raises InvalidOption."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise InvalidOption(f"a name has 1 to 64 letters, digits and ._- and starts with a letter or digit, unlike {name!r}")
    return name


@dataclass
class ListCheck:
    """Validates the rows of a list as they stream in, and counts them."""

    total: int = 0
    bad: list[BadRow] = field(default_factory=list)
    bad_count: int = 0
    collisions: int = 0
    """Bad rows whose results would get the same name as another's."""
    duplicates: dict[int, int] = field(default_factory=dict)
    """Index of an item -> its number of duplicates."""
    size: int = 0
    """Index of the last row + 1."""
    place: str = ""
    """Where the latest row stands in its list."""
    warnings: tuple[str, ...] = ()
    """What of the options and the list has no effect, once the last row was checked."""

    def accepted(self, sources: Iterable[SourceRow | BadRow], spec: Job, skip_invalid: bool) -> Iterator[Item]:
        """The items of valid rows. After a bad row, unless `skip_invalid`, the rest is only checked, not yielded."""
        with Naming(spec.output) if may_collide(spec.output.key) else nullcontext() as naming:
            yield from self._accepted(sources, spec, skip_invalid, naming)
            self.collisions = naming.collisions if naming is not None else 0

    def _accepted(
        self, sources: Iterable[SourceRow | BadRow], spec: Job, skip_invalid: bool, naming: Naming | None
    ) -> Iterator[Item]:
        firsts, parts, useless = Firsts(), spec.options.parts or (None,), WithoutEffect(spec)
        for number, given in enumerate(sources):
            row = given if isinstance(given, BadRow) else useless.without(given)
            self.place = row.place
            for index, part in enumerate(parts, number * len(parts)):
                item = row if isinstance(row, BadRow) else _checked(row, index, part, spec, naming)
                if isinstance(item, BadRow):
                    self._count_bad(item)
                    break
                self.total, self.size = self.total + 1, index + 1
                original = firsts.first(item.digest, index)
                if original != index:
                    self.duplicates[original] = self.duplicates.get(original, 0) + 1
                    item = item.model_copy(update={"duplicate_of": original})
                if skip_invalid or not self.bad_count:
                    yield item
        self.warnings = useless.warnings()

    def _count_bad(self, row: BadRow) -> None:
        self.bad_count += 1
        if len(self.bad) < MOST_BAD_ROWS:
            self.bad.append(row)

    def error(self) -> InvalidSource:
        """The reason why nothing was queued."""
        if not self.bad_count:
            return InvalidSource("the list has no images")
        places = "; ".join(f"{row.place}: {row.reason}" for row in self.bad[:3])
        more = f"; and {self.bad_count - 3:,} more" if self.bad_count > 3 else ""
        rows = "1 invalid row" if self.bad_count == 1 else f"{self.bad_count:,} invalid rows"
        also = "".join(f"; {warning}" for warning in self.warnings)
        return InvalidSource(f"{rows}, nothing was queued: {places}{more}{also}", self.bad, self.warnings)


def _checked(row: SourceRow, index: int, part: str | None, spec: Job, naming: Naming | None) -> Item | BadRow:
    options = spec.options
    try:
        item = parse(row, index)
        item = item if part is None else item.model_copy(update={"part": part})
        if naming is not None:
            item = naming.named(item, row)
    except InvalidSource as error:
        return refused(row, error.message)
    if isinstance(options, InpaintOptions) and not (item.mask or item.boxes or options.mask or options.boxes):
        return refused(row, "needs a mask or boxes, from the row or the job")
    if isinstance(options, DiffusionStylize) and item.control_image and not options.control:
        return refused(row, "has a control image, but the job has no control")
    return item
