"""Files of presets: plain YAML whose mappings know their lines.

There are no tags, no aliases and no duplicate keys. Only `true` and `false` are booleans, and `1:1` is text, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from imagemill.shared.errors import InvalidPreset

LARGEST_FILE = 256 * 1024
DEEPEST = 8
"""Levels of nested lists and mappings; PyYAML recurses into each."""
YAML = "tag:yaml.org,2002:"


class Written(dict[str, Any]):
    """A mapping from a file, with the file and line of each key, for errors."""

    def __init__(self, file: Path, line: int) -> None:
        self.file, self.line = file, line
        self.places: dict[str, tuple[Path, int]] = {}

    def overridden(self, by: Written, *, deep: bool = True) -> Written:
        """This mapping with the values of another. Each section is merged, but an option that is a mapping is one value."""
        merged = Written(by.file, by.line)
        merged |= {key: self[key] for key in self if key not in by}
        for key, value in by.items():
            both = deep and isinstance(value, Written) and isinstance(self.get(key), Written)
            merged[key] = self[key].overridden(value, deep=key != "options") if both else value
        merged.places = {key: (by if key in by else self).places[key] for key in merged}
        return merged

    def wrong(self, path: Iterable[int | str], reason: str) -> InvalidPreset:
        """An error at the last key of `path` that exists."""
        (file, line), value = (self.file, self.line), self
        for key in path:
            if not isinstance(value, Written) or key not in value:
                break
            (file, line), value = value.places[str(key)], value[str(key)]
        return InvalidPreset(f"{file}:{line}: {reason}")


def load(path: Path) -> Written:
    """The mapping that a file holds; an empty file holds an empty one. Raises InvalidPreset."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise InvalidPreset(f"{path}: larger than {LARGEST_FILE // 1024} kB")
        text = data.decode()
        _check_events(text)
        loader = _Loader(text)
        loader.file = path
        document = loader.get_single_data()
    except OSError as error:
        raise InvalidPreset(f"{path}: can't be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InvalidPreset(f"{path}{line}: {error.problem or error.context or 'invalid YAML'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidPreset(f"{path}: not YAML in UTF-8: {str(error).splitlines()[0]}") from error
    if document is None:
        return Written(path, 1)
    if not isinstance(document, Written):
        raise InvalidPreset(f"{path}:1: a file of presets must map names to presets")
    return document


def _refused(reason: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=at.start_mark)


def _check_events(text: str) -> None:
    """Refuse aliases, tags and deep nesting before anything is built from them."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _refused(f"nested more than {DEEPEST} levels deep", event)
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases are not supported; extend a preset instead", event)
        if getattr(event, "tag", None):
            raise _refused(f"tags are not supported: {event.tag!r}", event)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and mappings that know their lines and refuse duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[Any]]] = {}
    file: Path

    def mapping(self, node: Any) -> Written:
        """Constructs a mapping; its keys stay text."""
        mapping = Written(self.file, node.start_mark.line + 1)
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key must be text", key)
            if key.value in mapping:
                raise _refused(f"duplicate key {key.value!r}", key)
            mapping[key.value] = self.construct_object(value, deep=True)
            mapping.places[key.value] = self.file, key.start_mark.line + 1
        return mapping


_Loader.add_constructor(f"{YAML}map", _Loader.mapping)
_Loader.add_constructor(f"{YAML}str", lambda _, node: node.value.strip() if node.style in ("|", ">") else node.value)
_Loader.add_constructor(f"{YAML}int", lambda _, node: int(node.value))  # SafeLoader reads 010 as 8
for _tag, _pattern in (
    ("bool", r"true|false"),
    ("null", r"null|~|"),
    ("int", r"[-+]?\d{1,18}"),
    ("float", r"[-+]?(\d{1,18}\.\d*|\.\d+|\d{1,18})([eE][-+]?\d{1,3})?"),
):
    _Loader.add_implicit_resolver(YAML + _tag, re.compile(rf"(?:{_pattern})\Z"), [None])
