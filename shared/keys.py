"""Where results are stored below the output URL: templates of keys, and which of them need the list to be checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from imagemill.shared.image_files import IMAGE_EXTENSIONS
from imagemill.shared.urls import CONTROL, NO_TEXT, safe_name

LAYOUTS = {"flat": "{name}", "tree": "{path}/{name}", "indexed": "{job}/{index:06d}-{name}"}
"""Templates for people who don't want templates; `indexed` is the default."""
KEY_FIELD = re.compile(r"\{([^{}:/!.\x00-\x1f]{1,64})(?::0(\d)d)?\}")
OWN_FIELDS = ("job", "index", "item", "name")
"""Fields that any worker can fill in from the item; the submitter fills in all others."""
RUN_TOGETHER = re.compile(r"\{index[^}]*\}(\d|\{job\})*\{name|\{name[^}]*\}(\d|\{job\})*\{index")
"""Index and name without a separator: index 1 with name `1a` gives the same key as index 11 with name `a`."""
LONGEST_KEY = 1024
"""Bytes of an S3 key, with the prefix."""
LONGEST_NAME = 255
"""Bytes of a file's or folder's name on most file systems."""


def check_key(template: str) -> str:
    """The template itself. Raises ValueError if all items would get the same key, or a key could leave its prefix."""
    rest = KEY_FIELD.sub("", template)
    if "{" in rest or "}" in rest:
        raise ValueError(
            "a key may only use {job}, {index}, {index:06d}, {item}, {name}, {path}, {stem}, {ext} and a table's columns"
        )
    if not any(match[1] != "job" for match in KEY_FIELD.finditer(template)):
        raise ValueError("a key needs {name}, {index} or another field that differs, or the images would overwrite each other")
    if "{item}" not in template and RUN_TOGETHER.search(template):
        raise ValueError("a key needs a separator between {index} and {name}, or two images could overwrite each other")
    return check_inside(template)


def check_inside(key: str) -> str:
    """The key or template itself. Raises ValueError if it isn't text that stays below the output URL."""
    if key.startswith("/") or ".." in key.split("/"):
        raise ValueError("a key must stay below the output URL: no leading / and no ..")
    if CONTROL.search(key) or NO_TEXT.search(key):
        raise ValueError("a key may not contain control characters")
    return key


def may_collide(template: str) -> bool:
    """Whether two items of a job could get the same key, so that the list has to be checked."""
    fields = {match[1] for match in KEY_FIELD.finditer(template)}
    return not fields & {"index", "item"} or not fields <= {*OWN_FIELDS}


def fill(template: str, fields: Mapping[str, str | int]) -> str:
    """The template with these fields filled in; others stay."""

    def value(match: re.Match[str]) -> str:
        found, width = fields.get(match[1]), match[2]
        if found is None:
            return match[0]
        return f"{found:0{width}d}" if width and isinstance(found, int) else str(found)

    return KEY_FIELD.sub(value, template)


def of_part(key: str, part: str | None) -> str:
    """The key of one of an image's results, `shirt-upper`; the key itself if the image has one result."""
    return key if part is None else f"{key}-{part}"


def item_name(name: str | None, source: str) -> str:
    """What `{name}` stands for: the row's name or the source's, sanitised so that a key never leaves its prefix."""
    if name is None:
        return safe_name(source)
    has_extension = PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS
    return safe_name(name if has_extension else f"{name}.")  # `v1.5` is a name without extension
