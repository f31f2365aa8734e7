"""What a job can't use of its options and of its list, and columns whose names look like typos: `submit` warns of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from imagemill.producer.rows import FIELDS, SOURCE_NAMES, SourceRow
from imagemill.shared.keys import KEY_FIELD
from imagemill.shared.messages import Job
from imagemill.shared.options.remove_background import PROMPTED_MODELS
from imagemill.shared.quality import UNMEASURED

_SAM = f"remove-background with engine=rembg and model={PROMPTED_MODELS[0]}"
USERS = {
    "mask": "inpaint",
    "boxes": f"inpaint and {_SAM}",
    "points": _SAM,
    "control_image": "stylize with engine=diffusion",
}
"""What each column of a list is for, beside those that every job uses."""
EVERY = frozenset({*SOURCE_NAMES, "name"})
LOSSLESS = ("png", "webp-lossless")

_ALSO = {
    "maskimage": "mask",
    "box": "boxes",
    "bbox": "boxes",
    "bboxes": "boxes",
    "boundingboxes": "boxes",
    "control": "control_image",
}
_ALIKE = {name.replace("_", ""): name for name in FIELDS if name not in EVERY} | _ALSO
_ENDING = re.compile(r"(url|link|path|src|file)s?$")


@dataclass
class Counted:
    """Some rows of a list: how many, and where the first is."""

    count: int
    first: str

    def __str__(self) -> str:
        return f"1 row, {self.first}" if self.count == 1 else f"{self.count:,} rows, the first is {self.first}"


class WithoutEffect:
    """Takes from the rows of a list what the job can't use, and remembers what there is to say about it."""

    def __init__(self, spec: Job) -> None:
        self.spec = spec
        self._takes = spec.options.columns
        self._useless, self._prompted = USERS.keys() - self._takes, "points" in self._takes
        self._rows = 0
        self._filled: dict[str, Counted] = {}
        self._unprompted: Counted | None = None
        self._tables: dict[tuple[str, ...], tuple[str, str]] = {}  # the columns of each, its name, and where its images are

    def without(self, row: SourceRow) -> SourceRow:
        """The row without what the job can't use: a shop's table may mean something else by it."""
        if row.columns is not None and (names := tuple(row.columns)) not in self._tables:
            images = next((name for name, cell in row.columns.items() if str(row.fields.get("source")) in cell), "")
            self._tables[names] = row.place.rpartition(":")[0], images
        self._rows += 1
        filled = row.fields.keys() - EVERY
        if not filled and not self._prompted:
            return row
        filled = {name for name in filled if row.fields[name]}
        for name in filled:
            self._filled[name] = _one_more(self._filled.get(name), row)
        if self._prompted and not filled & self._takes:
            self._unprompted = _one_more(self._unprompted, row)
        if not filled & self._useless:
            return row
        return replace(row, fields={name: value for name, value in row.fields.items() if name not in self._useless})

    def warnings(self) -> tuple[str, ...]:
        """All there is to say, once the last row was seen."""
        return *self._of_options(), *self._of_output(), *self._of_columns(), *self._of_tables()

    def _of_options(self) -> Iterator[str]:
        options = self.spec.options
        ignored = options.ignored(self._filled)
        ignored |= dict.fromkeys(self._replaced(), "each row has its own")
        yield from (f"{name} has no effect, because {reason}" for name, reason in ignored.items() if name in options.given)

    def _replaced(self) -> Iterator[str]:
        """Options that are for rows that say nothing, if there are none."""
        if self._prompted and self._unprompted is None:
            yield from ("points", "boxes")
        for name in self._takes & {"mask", "control_image"} & self._filled.keys():
            if self._filled[name].count == self._rows:
                yield name

    def _of_output(self) -> Iterator[str]:
        output, quality, operation = self.spec.output, self.spec.policy.quality, self.spec.operation
        if output.format in LOSSLESS and output.quality != type(output).model_fields["quality"].default:
            yield f"quality has no effect, because {output.format} is lossless"
        for limit in sorted(UNMEASURED[operation]):
            if getattr(quality, limit) is not None:
                yield f"the limit {limit} has no effect on {operation}"
        if quality.mode == "repair" and operation == "inpaint":
            yield "check=repair only flags, because inpaint must not change what is around the hole"

    def _of_columns(self) -> Iterator[str]:
        options = self.spec.options
        engine = ", ".join(filter(None, (options.engine, getattr(options, "model", None))))
        for name, rows in sorted(self._filled.items()):
            if name in USERS and name not in options.columns:
                yield f"{name!r} in the list has no effect on {self.spec.operation} ({engine}), only on {USERS[name]}: {rows}"
        if self._unprompted is not None and not getattr(options, "points", ()) and not getattr(options, "boxes", ()):
            yield f"without points or boxes, whatever is at the centre is cut out: {self._unprompted}"

    def _of_tables(self) -> Iterator[str]:
        keys = {match[1].strip().lower() for match in KEY_FIELD.finditer(self.spec.output.key)}
        for names, (table, images) in self._tables.items():
            unread = [name for name in names if name not in (*FIELDS, *keys, images)]
            for column in unread:
                meant = resembled(column)
                if meant in self._takes and meant not in names and _option(column) not in self._options:
                    yield f"the column {column!r} of {table} is not read; did you mean {meant!r}?"
            options = {name: column for column in unread if (name := _option(column)) in self._options}
            if options:
                columns, first = ", ".join(options.values()), next(iter(options))
                reason = "because they are the same for all images of a job"
                yield f"{table} can't set options in columns ({columns}), {reason}; use --set {first}=VALUE"

    @property
    def _options(self) -> set[str]:
        """Names of options that aren't also columns."""
        return type(self.spec.options).model_fields.keys() - {"engine"} - USERS.keys()


def resembled(column: str) -> str | None:
    """The column of lists whose name this one resembles, such as `mask` for `Mask URLs`; None if there is none."""
    plain = _ENDING.sub("", re.sub(r"[\W_]+", "", column.lower()))
    close = difflib.get_close_matches(plain, [name for name in _ALIKE if name[:1] == plain[:1]], n=1, cutoff=0.75)
    return _ALIKE[close[0]] if close else None


def _option(column: str) -> str:
    return re.sub(r"[\W_]+", "_", column)


def _one_more(rows: Counted | None, row: SourceRow) -> Counted:
    if rows is None:
        return Counted(1, row.place)
    rows.count += 1
    return rows
