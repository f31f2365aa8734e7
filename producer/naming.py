"""Name results after their sources: fill in what only the submitter knows, and refuse two images with the same name."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from typing import Self
from urllib.parse import unquote, urlsplit

from imagemill.producer.duplicates import Firsts
from imagemill.producer.sources import SourceRow
from imagemill.shared.errors import InvalidSource
from imagemill.shared.keys import KEY_FIELD, LONGEST_KEY, LONGEST_NAME, OWN_FIELDS, fill, item_name, of_part
from imagemill.shared.messages import Item, Output
from imagemill.shared.options.base import nearest
from imagemill.shared.urls import safe_name, safe_part

LONGEST_JOB = 64
LONGEST_EXTENSION = len(".webp")
EXTENSION = re.compile(r"[A-Za-z0-9]{1,5}")


class Naming:
    """Names the items of a list and finds those with the same name, in bounded memory.

    Names are compared without the result's extension, which is known only once an image is opened: a.png and a.jpg may both
    become a.png. In folders, case is ignored, because many file systems ignore it.
    """

    def __init__(self, output: Output) -> None:
        self._output = output.url
        self._in_folder = output.url.startswith("file:")
        self._template = output.key.removesuffix(".{ext}")  # a result's extension is added to every key
        self._prefix = "" if self._in_folder else output.url.partition("://")[2].partition("/")[2]
        self.collisions = 0
        """Items that were refused because of another with the same name."""
        self._firsts = Firsts()
        self._rows = TemporaryFile("w+b")  # noqa: SIM115  # one line per name: digest and place
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()

    def named(self, item: Item, row: SourceRow) -> Item:
        """The item with its key. Raises InvalidSource if it has none, if it is too long, or if another image has it."""
        fields = {
            match[1]: _value(match[1], item, row) for match in KEY_FIELD.finditer(self._template) if match[1] not in OWN_FIELDS
        }
        key = "/".join(part for part in fill(self._template, fields).split("/") if part not in ("", "."))
        if not key or ".." in key.split("/"):  # of a template such as {path}../{name}
            raise InvalidSource(f"its output name would be {key!r}; use another --key")
        item = item.model_copy(update={"key": key})
        name = shown_key(item, key)
        self._check_length(name)
        self._check_original(item, name)
        self._check_first(item, name, row.place)
        return item

    def _check_length(self, name: str) -> None:
        full = f"{self._prefix}/{name}".replace("{job}", "j" * LONGEST_JOB)
        if len(full.encode()) + LONGEST_EXTENSION > LONGEST_KEY:
            raise InvalidSource(f"its output name would be longer than {LONGEST_KEY:,} bytes; use another --key")
        longest = max(len(part.encode()) for part in full.split("/")) + LONGEST_EXTENSION
        if self._in_folder and longest > LONGEST_NAME:
            raise InvalidSource(f"a part of its output name would be longer than {LONGEST_NAME} bytes; use another --key")

    def _check_original(self, item: Item, name: str) -> None:
        """The result must not overwrite its source, whatever its extension."""
        source = item.source.rpartition("/")[0] + "/" + item.source.rpartition("/")[2].rpartition(".")[0]
        if _comparable(source) == _comparable(f"{self._output}/{name}"):
            raise InvalidSource("its result would replace the image itself; choose another --output, --layout or --key")

    def _check_first(self, item: Item, name: str, place: str) -> None:
        same = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold()) if self._in_folder else name
        first = self._firsts.first(hashlib.sha256(same.encode()).hexdigest(), self._end)
        if first == self._end:
            self._end += self._rows.write(f"{item.digest} {place}\n".encode(errors="backslashreplace"))
            return
        self._rows.seek(first)
        digest, _, other = self._rows.readline().decode().rstrip("\n").partition(" ")
        self._rows.seek(self._end)
        if digest != item.digest:  # otherwise it is a duplicate, which shares the other's result
            self.collisions += 1
            raise InvalidSource(
                f"its result would get the same name as that of {other}, {name!r}; add {{index}} or {{ext}} to --key"
            )


def _comparable(url: str) -> str:
    """URLs of one file or object are equal in this form, whatever their encoding; S3 keys are not encoded."""
    return url if url.startswith("s3:") else unicodedata.normalize("NFC", unquote(url)).casefold()


def shown_key(item: Item, template: str) -> str:
    """The key of an item's result, without extension and with `{job}` left in place."""
    key = template if item.key is None else item.key
    own: dict[str, str | int] = {"index": item.index}
    if "{name" in key:
        own["name"] = item_name(item.name, item.source)
    if "{item" in key:  # takes a hash
        own["item"] = item.id
    return of_part(fill(key, own), item.part)


def _value(field: str, item: Item, row: SourceRow) -> str:
    """A field of one row as a safe part of a key, or several for `{path}`. Raises InvalidSource if the row doesn't have it."""
    known = FIELDS.get(field)
    if known is not None:
        return known(item.source, row.root)
    columns, name = row.columns or {}, field.strip().lower()
    if name not in columns:
        hint = nearest(name, [*FIELDS, *OWN_FIELDS, *columns])
        raise InvalidSource(f"--key uses {{{field}}}, but the row has no column of this name{hint}")
    if not columns[name].strip():
        raise InvalidSource(f"--key uses {{{field}}}, but the row's column is empty")
    return safe_part(columns[name], "_")


def _path(source: str, root: str | None) -> str:
    """The folder of an image below the root that was given, or below its host or bucket."""
    plain = source.startswith("s3:")  # keys are not percent-encoded and may contain ? and #
    if root is None:
        below = source.partition("://")[2].partition("/")[2] if plain else urlsplit(source).path
    else:
        below = source.removeprefix(root)
        if not root.endswith("/") and not below.startswith("/"):  # s3://bucket/photos/2024- holds 2024-01/a.jpg
            below = source.removeprefix(root.rpartition("/")[0])
    parts = [part if plain else unquote(part) for part in below.split("/")[:-1]]
    return "/".join(safe_part(part, "_") for part in parts if part)


def _stem(source: str, _root: str | None) -> str:
    return safe_name(source)


def _extension(source: str, _root: str | None) -> str:
    path = source if source.startswith("s3:") else unquote(urlsplit(source).path)
    suffix = PurePosixPath(path).suffix[1:]
    return suffix.lower() if EXTENSION.fullmatch(suffix) else ""


FIELDS: dict[str, Callable[[str, str | None], str]] = {"path": _path, "stem": _stem, "ext": _extension}
