"""Looks by name: what `imagemill submit --preset NAME` stands for, from the file that ships and one of the operator's own.

    product-dark:
      extends: product-clean          # another preset; of the same name, the one that ships
      description: ...
      operation: stylize              # these two name the options
      engine: diffusion
      options: {prompt: ..., steps: 30, loras: {my-style: 0.8}}
      output: {format: png}           # as in imagemill.shared.messages.Output, without an address
      policy: {priority: low}         # as in imagemill.shared.messages.Policy

What a preset says wins over what it extends, name by name. A file is plain YAML: text, numbers, true, false, null, lists and
mappings; no tags, no anchors. Only `true` and `false` are taken for truth values, so `off` is a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from imagemill.shared.engines import engines_of, parse_options
from imagemill.shared.errors import InvalidOption, InvalidPreset, UsageError
from imagemill.shared.messages import Output, Policy
from imagemill.shared.options.base import ADDRESSES, OPERATIONS, Model, Operation, nearest, validation_sentence
from imagemill.shared.urls import check_source_url, shown

SHIPPED = Path(__file__).with_name("presets.yaml")
LARGEST_FILE = 256 * 1024
DEEPEST = 8
"""Levels of lists and mappings; the parser calls itself for each."""

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}
TAGS = ("bool", "float", "int", "map", "null", "seq", "str", "timestamp")  # those that untagged values are given
INTEGER, NUMBER = re.compile(r"[-+]?\d{1,18}"), re.compile(r"[-+]?(\d{1,18}\.\d*|\.\d+|\d{1,18})([eE][-+]?\d{1,3})?")

HEADS = ("extends", "description", "operation", "engine")
SECTIONS = ("options", "output", "policy")
Place = tuple[str, ...]
"""Where in a preset a value stands: `("options", "steps")`, `("description",)`."""


@dataclass(frozen=True)
class Value:
    """A value with where it was written."""

    value: Any
    file: Path
    line: int

    def wrong(self, reason: str) -> InvalidPreset:
        """The error that says so."""
        return InvalidPreset(f"{self.file}:{self.line}: {reason}")


@dataclass(frozen=True)
class Preset:
    """A preset with all that it extends. `options`, `output` and `policy` hold what it says, not what is at its default."""

    name: str
    file: Path
    description: str
    operation: Operation
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    output: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """All of it, with every option that it leaves at its default."""
        options = parse_options(self.operation, self.engine, self.options)
        return {
            "description": self.description,
            "operation": self.operation,
            "engine": self.engine,
            "options": options.model_dump(mode="json", exclude={"engine"}),
            "output": {**self.output},
            "policy": {**self.policy},
        }


def work_of(operation: str | None, engine: str | None, preset: Preset | None) -> tuple[str, str]:
    """Operation and engine, as named or as the preset has them; opencv where nothing says which engine.

    Raises UsageError where nothing says which operation, and InvalidOption where the preset is for another one.
    """
    if preset is None:
        if operation is None:
            raise UsageError(f"say what to do: --operation {', '.join(OPERATIONS)}, or --preset NAME")
        return operation, engine or "opencv"
    for name, given, wanted in (("operation", operation, preset.operation), ("engine", engine, preset.engine)):
        if given is not None and given != wanted:
            raise InvalidOption(f"the preset {preset.name} is for the {name} {wanted}, not {given!r}")
    return preset.operation, preset.engine


class Presets:
    """The presets of the file that ships and of `own`, of which the latter's win.

    Making it raises InvalidPreset where a file can't be read, or is no YAML of the kind above.
    """

    def __init__(self, own: Path | None = None) -> None:
        self._shipped = read(SHIPPED)
        self._own = read(own.expanduser()) if own is not None else {}

    def names(self) -> list[str]:
        """All names, the shipped ones first."""
        return list({**self._shipped, **self._own})

    def get(self, name: str) -> Preset:
        """A preset by its name. Raises UsageError where there is none, and InvalidPreset with file and line if it is wrong."""
        if name not in self.names():
            raise UsageError(f"there is no preset {name!r}{nearest(name, self.names())}")
        said = self._with_what_it_extends(name, [])
        return _checked(name, said)

    def faults(self) -> Iterator[InvalidPreset]:
        """What is wrong with any of them, the first fault of each."""
        for name in self.names():
            try:
                self.get(name)
            except InvalidPreset as error:
                yield error

    def _with_what_it_extends(self, name: str, on_the_way: list[tuple[str, bool]]) -> dict[Place, Value]:
        shipped = (name, False) in on_the_way or name not in self._own  # `name: {extends: name}` extends what ships
        said = (self._shipped if shipped else self._own)[name]
        base = said.get(("extends",))
        if base is None:
            return said
        on_the_way = [*on_the_way, (name, shipped)]
        known = self._shipped if shipped else {**self._shipped, **self._own}
        if not isinstance(base.value, str) or base.value not in known:
            raise base.wrong(f"extends a preset that there isn't, {base.value!r}{nearest(str(base.value), list(known))}")
        itself = base.value == name and not shipped and name in self._shipped
        if not itself and any(base.value == seen for seen, _ in on_the_way):
            chain = " extends ".join([*(seen for seen, _ in on_the_way), base.value])
            raise base.wrong(f"presets extend each other in a circle: {chain}")
        inherited = self._with_what_it_extends(base.value, on_the_way)
        for head in ("operation", "engine"):
            own, theirs = said.get((head,)), inherited.get((head,))
            if own and theirs and own.value != theirs.value:
                raise own.wrong(f"extends {base.value}, which is for the {head} {theirs.value}, not {own.value!r}")
        return {**said, **{place: value for place, value in inherited.items() if place not in said}}


def _checked(name: str, said: Mapping[Place, Value]) -> Preset:
    first = next(iter(said.values()))
    heads = {head: said.get((head,)) for head in HEADS}
    operation, engine, about = heads["operation"], heads["engine"], heads["description"]
    if operation is None or engine is None:
        missing = "operation" if operation is None else "engine"
        raise first.wrong(f"the preset {name} names no {missing}, nor does one that it extends")
    if operation.value not in OPERATIONS:
        raise operation.wrong(f"there is no operation {operation.value!r}{nearest(str(operation.value), list(OPERATIONS))}")
    engines = engines_of(operation.value)
    if engine.value not in engines:
        raise engine.wrong(f"{operation.value} has no engine {engine.value!r}{nearest(str(engine.value), list(engines))}")
    if about is not None and not isinstance(about.value, str):
        raise about.wrong(f"description is text, not {about.value!r}")
    kinds: dict[str, type[Model]] = {"options": engines[engine.value].options, "output": Output, "policy": Policy}
    sections = {section: _section(section, kind, said) for section, kind in kinds.items()}
    text = about.value if about is not None else ""
    return Preset(name, first.file, text, operation.value, engine.value, **sections)


def _section(section: str, kind: type[Model], said: Mapping[Place, Value]) -> dict[str, Any]:
    """What a preset says in a section, checked by the section's model."""
    own = {place: value for place, value in said.items() if place[0] == section}
    given: dict[str, Any] = {}
    for place, value in own.items():
        inner = given
        for key in place[1:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = value.value
    hidden = {"engine"} if section == "options" else {"url"} if section == "output" else set()
    names = [name for name in kind.model_fields if name not in hidden]
    for place, value in own.items():
        if place[1] not in names:
            raise value.wrong(f"{section} has no {place[1]!r}{nearest(place[1], names)}")
        if section == "options" and place[1] in ADDRESSES:
            _check_address(place[1], value)
    try:
        kind.model_validate({**given, **({"url": "file:///"} if section == "output" else {})})
    except ValidationError as error:
        where = next(iter(error.errors()))["loc"]
        guilty = [value for place, value in own.items() if place[1 : 1 + len(where)] == where[: len(place) - 1]]
        # A rule that several break together names none of them: what was said last, and not by what ships.
        last = max(own.values(), key=lambda value: (value.file != SHIPPED, value.line))
        raise (guilty or [last])[0].wrong(f"{section}: {validation_sentence(error)}") from error
    return given


def _check_address(name: str, value: Value) -> None:
    """Of an image; a path is looked at when the job is submitted, from the folder that is then the current one."""
    if isinstance(value.value, str) and "://" in value.value:
        try:
            check_source_url(value.value)
        except ValueError as error:
            raise value.wrong(f"{name}: {error}, not {shown(value.value)!r}") from error


# --- files ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[Place, Value]]:
    """A file's presets as they are written, by name. Raises InvalidPreset."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InvalidPreset(f"{path}: can't be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE:
        raise InvalidPreset(f"{path}: is larger than {LARGEST_FILE // 1024} kB")
    try:
        text = data.decode()
        _check_depth(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InvalidPreset(f"{path}{line}: {error.problem or error.context or 'is no YAML'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidPreset(f"{path}: is no YAML in UTF-8: {str(error).splitlines()[0]}") from error
    presets = {}
    for name, value in _pairs(path, root, "a file of presets") if root is not None else ():
        if not NAME.fullmatch(name):
            raise InvalidPreset(f"{path}:{_line(value)}: a preset's name has small letters, digits and dashes, not {name!r}")
        presets[name] = _preset(path, name, value)
    return presets


def _check_depth(path: Path, text: str) -> None:
    """Refuse what could take much from little, before anything is built of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise InvalidPreset(f"{path}:{event.start_mark.line + 1}: is nested more than {DEEPEST} levels deep")
        if isinstance(event, yaml.AliasEvent):
            raise InvalidPreset(f"{path}:{event.start_mark.line + 1}: anchors are not used here: extend a preset instead")


def _preset(path: Path, name: str, node: Any) -> dict[Place, Value]:
    said: dict[Place, Value] = {}
    for key, value in _pairs(path, node, f"the preset {name}"):
        if key in SECTIONS:
            said |= dict(_places(path, (key,), value))
        elif key in HEADS:
            said[(key,)] = Value(_value(path, value), path, _line(value))
        else:
            raise InvalidPreset(f"{path}:{_line(value)}: a preset has no {key!r}{nearest(key, [*HEADS, *SECTIONS])}")
    if not said:
        raise InvalidPreset(f"{path}:{_line(node)}: the preset {name} says nothing")
    return said


def _places(path: Path, above: Place, node: Any) -> Iterator[tuple[Place, Value]]:
    """A section's values; mappings in the policy are taken apart, those among the options are values (LoRAs and weights)."""
    for key, value in _pairs(path, node, ".".join(above)):
        if isinstance(value, yaml.MappingNode) and above[0] != "options":
            yield from _places(path, (*above, key), value)
        else:
            yield (*above, key), Value(_value(path, value), path, _line(value))


def _pairs(path: Path, node: Any, what: str) -> Iterator[tuple[str, Any]]:
    """A mapping's keys, each once, and nodes."""
    if not isinstance(node, yaml.MappingNode):
        raise InvalidPreset(f"{path}:{_line(node)}: {what} maps names to values")
    seen: set[str] = set()
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name is None or name in seen:
            reason = f"{name!r} stands twice in {what}" if name else f"a key of {what} is text"
            raise InvalidPreset(f"{path}:{_line(key)}: {reason}")
        seen.add(name)
        yield name, value


def _value(path: Path, node: Any) -> Any:
    """A node as text, number, truth value, None, list or dict; by YAML 1.2's rules, where 1:1 is text and not 61."""
    if node.tag.removeprefix("tag:yaml.org,2002:") not in TAGS:
        raise InvalidPreset(f"{path}:{_line(node)}: tags are not used here, as {node.tag!r}")
    if isinstance(node, yaml.MappingNode):
        return {key: _value(path, value) for key, value in _pairs(path, node, "a mapping")}
    if isinstance(node, yaml.SequenceNode):
        return [_value(path, part) for part in node.value]
    text: str = node.value
    if node.style is not None:  # in quotes, or a block of text
        return text.strip() if node.style in "|>" else text
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
