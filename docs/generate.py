"""Writes the parts of the documentation that describe code: `{{ settings }}` in a page becomes the table of all settings.

mkdocs calls `on_page_markdown` for each page (see `hooks` in mkdocs.yml). Everything is read from the code that runs, so
these parts cannot go stale; a mark without a function below fails the build.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

import click
import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

import imagemill
from imagemill.producer.cli import main
from imagemill.producer.report import REMARKS
from imagemill.shared import errors
from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import BadMask
from imagemill.shared.messages import Item, ItemResult, Job, row
from imagemill.shared.options.base import listed
from imagemill.shared.presets import Presets
from imagemill.shared.quality import LIMITS, RULES, Measures, Quality
from imagemill.shared.settings import Settings
from imagemill.worker.imaging.masks import read_mask
from imagemill.worker.line.manifest import manifest_line
from imagemill.worker.models.catalogue import REPOSITORIES, WEIGHTS, Repository, Weights

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^\{\{ (\w+) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page with its marks replaced."""
    return MARK.sub(lambda mark: PARTS[mark[1]](), markdown)


# --- settings and options ---------------------------------------------------------------------------------------------


def settings() -> str:
    """Every setting as its environment variable, with its default."""
    return table(("`IMAGEMILL_...`", "default", "meaning"), _settings(Settings, ""))


def _settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from _settings(type(field.default), f"{prefix}{name.upper()}__")
        else:
            yield f"`{prefix}{name.upper()}`", _default(field), _meaning(field, listed(field))


def options() -> str:
    """What `--set` takes, per operation and engine."""
    parts = []
    for engine in ENGINES:
        rows = [
            (f"`{name}`", _default(field), _meaning(field, engine.choices(name)))
            for name, field in fields(engine.options)
            if name != "engine"
        ]
        about = table(("option", "default", "meaning"), rows)
        parts.append(f"## {engine.operation} with {engine.name}\n\n{_doc(engine.options)}\n\n{about}")
    return "\n\n".join(parts)


def fields(model: type[BaseModel]) -> Iterable[tuple[str, FieldInfo]]:
    """The fields of a model, by name."""
    return model.model_fields.items()


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else None
    if value is None or value == "":
        return "" if value is None else "empty"
    if isinstance(value, SecretStr):
        return f"`{value.get_secret_value()}`"
    if isinstance(value, tuple) and any(isinstance(part, BaseModel) for part in value):
        return f"`{'; '.join(map(str, value))}`"
    if isinstance(value, tuple):
        return f"`{json.dumps([str(part) for part in value])}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _meaning(field: FieldInfo, choices: Sequence[str]) -> str:
    """A field's description, its choices and its range."""
    text = field.description or ""
    missing = [f"`{choice}`" for choice in choices if str(choice) not in text]
    return text + (f"; one of {', '.join(f'`{choice}`' for choice in choices)}" if missing else "") + _range(field)


def _range(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(rule, name):,}" for rule in field.metadata for name, sign in signs.items() if hasattr(rule, name)
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


# --- the command line -------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options."""
    loaded = {entry.name: entry.load() for entry in entry_points(group="imagemill.commands")}
    context = click.Context(main, info_name="imagemill")
    commands = {name: loaded.get(name) or main.get_command(context, name) for name in main.list_commands(context)}
    return "\n\n".join(part for name, command in commands.items() if command for part in _command(name, command, context))


def _command(name: str, command: click.Command, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) and not parameter.hidden else None
        if record:
            rows.append((f"`{record[0]}`", record[1]))
    text = inspect.cleandoc(command.help or "").replace("\b\n", "").replace("\b", "")
    yield f"## {context.command_path}\n\n```text\n{usage}\n```\n\n{text}"
    if rows:
        yield table(("option", "meaning"), rows)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found:
                yield from _command(child, found, context)


# --- results ----------------------------------------------------------------------------------------------------------


def error_codes() -> str:
    """The codes of failed images."""
    rows = [(f"`{kind.code}`", _doc(kind), "yes" if kind.retryable else "no") for kind in errors.leaves(errors.ImageError)]
    return table(("code", "what happened", "a retry can help"), rows)


def exit_codes() -> str:
    """The codes of failed commands."""
    kinds = [kind for kind in _tree(errors.ImagemillError) if not issubclass(kind, errors.ImageError)]
    rows = [(f"`{kind.code}`", f"`{kind.__name__}`", _doc(kind), str(kind.exit_code)) for kind in kinds[1:]]
    return table(("code", "exception", "what happened", "exit status"), rows)


def _tree(kind: type[errors.ImagemillError]) -> list[type[errors.ImagemillError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child) if child.__module__ == errors.__name__)]


MANIFEST = {
    "item": "stable id of the row: its place and a digest of its contents",
    "index": "place in the submitted list, from 0",
    "source": "URL of the source image",
    "mask": "URL of the row's mask",
    "control_image": "URL of the row's control image",
    "part": "which of an image's results it is: the garment (`u2net_cloth_seg`)",
    "duplicate_of": "index of the row whose result this row shares",
    "state": "`done`, `failed` or `cancelled`",
    "output": "URL of the result",
    "code": "error code of a failed image ([list](errors.md))",
    "message": "one sentence about the failure",
    "attempts": "how often the image was tried",
    "source_format": "format of the source: `jpeg`, `png`, ...",
    "source_bytes": "size of the source file",
    "source_size": "width and height of the source in pixels, after it was turned upright",
    "output_bytes": "size of the result file",
    "output_size": "width and height of the result in pixels",
    "seconds": "time spent per stage",
    "notes": "remarks and flags ([list](../operations.md#notes-and-flags))",
    "filled": "outline of the filled area, as the path of an SVG in thousandths of width and height (`inpaint`)",
    "node": "worker node that did the work",
    "quality": "what the check measured ([list](#measurements))",
    "job": "id of the job",
    "operation": "operation of the job",
    "options": "every option of the job, defaults included",
    "metadata": "what results get of their sources' metadata ([list](../files.md#metadata))",
    "versions": "versions of Python, imagemill and the libraries that affect results",
    "seed": "seed of this image (`diffusion`)",
    "fingerprint": "the engine's libraries and the digests of its weights",
    "batch": "largest batch in which a sample of this image was processed; absent for `cached` results",
}


def manifest() -> str:
    """The fields of a manifest's line, as the code that writes it makes them."""
    item = Item(index=0, source="https://example.com/a.jpg", mask="https://example.com/m.png", part="upper", duplicate_of=0)
    item = item.model_copy(update={"control_image": "https://example.com/c.png"})
    optional: dict[str, Any] = {"source_format": "jpeg", "source_size": (1, 1), "output_size": (1, 1), "node": "cpu@host"}
    optional |= {"output": "file:///a.png", "code": "timeout", "message": "", "quality": Measures(), "filled": "M0,0Z"}
    job = {"operation": "stylize", "options": {"engine": "diffusion"}, "output": {"url": "file:///results"}}
    spec = Job.model_validate(job)
    line = manifest_line("job", spec, row(item, ItemResult(index=0, state="done", **optional)), "digest")
    if line.keys() != MANIFEST.keys():
        raise ValueError(f"docs/generate.py: MANIFEST and the manifest differ: {line.keys() ^ MANIFEST.keys()}")
    return table(("field", "meaning"), [(f"`{name}`", meaning) for name, meaning in MANIFEST.items()])


def measurements() -> str:
    """What the check measures."""
    return table(("field", "meaning"), [(f"`{name}`", field.description or "") for name, field in fields(Measures)])


def flags() -> str:
    """What the check flags, beyond which limit."""
    rows = []
    for name, rule in RULES.items():
        usual = ", ".join(f"{operation} {limits[name]:g}" for operation, limits in LIMITS.items() if name in limits)
        about = (Quality.model_fields[name].description or "").partition(": ")[2]
        rows.append((f"`flag:{rule.flag}`", rule.words, f"`{name}`", about, usual))
    return table(("note", "meaning", "limit", "what it limits", "default"), rows)


def notes() -> str:
    """Notes other than flags."""
    return table(("note", "meaning"), [(f"`{name}`", words) for name, words in sorted(REMARKS.items())])


# --- presets and models -----------------------------------------------------------------------------------------------


def presets() -> str:
    """The presets that ship, with everything they set."""
    known = Presets()
    parts = []
    for name in known.names():
        preset = known.get(name)
        contents = yaml.safe_dump({name: preset.resolved()}, sort_keys=False, allow_unicode=True, width=100)
        parts.append(f"## {name}\n\n{preset.description}\n\n```yaml\n{contents}```")
    return "\n\n".join(parts)


def models() -> str:
    """The models that `imagemill models pull` knows."""
    rows = []
    entries: tuple[Weights | Repository, ...] = (*WEIGHTS, *REPOSITORIES)
    for each in entries:
        size = f"{each.about_bytes / 1e6:.0f} MB" if each.about_bytes else ""
        rows.append((f"`{each.name}`", f"`{each.engine}`", size, each.licence, f"{each.source} {each.revision[:12]}"))
    return table(("model", "engine", "size", "licence", "source, pinned to"), rows)


# --- Python -----------------------------------------------------------------------------------------------------------


def python_example() -> str:
    """examples/submit.py; ruff would reformat an include inside a block of Python."""
    return f"```python\n{(ROOT / 'examples/submit.py').read_text(encoding='utf-8')}```"


def engine_example() -> str:
    """The engine that the tests add, without the lines that start it."""
    code = (ROOT / "tests/extra_engine.py").read_text(encoding="utf-8")
    _, start, rest = code.partition("from __future__")
    return f"```python\n{start}{rest.partition('if __name__')[0].rstrip()}\n```"


def python_api() -> str:
    """Every name that `imagemill` exports."""
    public = {name: getattr(imagemill, name) for name in sorted(imagemill.__all__, key="Client".__ne__)}  # it comes first
    exceptions = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, Exception)}
    return "\n\n".join(_public(name, value) for name, value in public.items() if name not in exceptions)


def _public(name: str, value: Any) -> str:
    if inspect.isfunction(value):
        return f"## {name}\n\n```text\n{name}{_signature(value)}\n```\n\n{_doc(value)}"
    parts = [f"## {name}", _doc(value)]
    if issubclass(value, BaseModel) and value is not Settings:
        rows = [(f"`{field}`", f"`{_type(info)}`", _default(info), info.description or "") for field, info in fields(value)]
        parts.append(table(("field", "type", "default", "meaning"), rows))
    elif value is not Settings:
        parts += [_member(name, *member) for member in vars(value).items() if not member[0].startswith("_")]
        if not any(inspect.isfunction(member) for member in vars(value).values() if getattr(member, "__name__", "_")[0] != "_"):
            parts[1:1] = [f"```text\n{name}{_signature(value)}\n```"]
    return "\n\n".join(part for part in parts if part)


def _member(owner: str, name: str, value: Any) -> str:
    if isinstance(value, property):
        return f"### {owner}.{name} {{: #{owner}-{name} }}\n\n{_doc(value)}"
    if not inspect.isfunction(value):
        return ""
    return f"### {owner}.{name} {{: #{owner}-{name} }}\n\n```text\n{name}{_signature(value)}\n```\n\n{_doc(value)}"


def _signature(value: Callable[..., Any]) -> str:
    signature = inspect.signature(value)
    shown = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    return str(signature.replace(parameters=shown)).replace("'", "")


def _type(field: FieldInfo) -> str:
    kind = field.annotation
    text = kind.__name__ if inspect.isclass(kind) and not get_args(kind) else str(kind)
    return re.sub(
        r"Annotated\[([\w.]+), .*\]",
        r"\1",
        re.sub(r"\b(typing|imagemill|shared|options|messages|quality|\w+)\.(?=\w)", "", text),
    )


# --- masks ------------------------------------------------------------------------------------------------------------


def mask_forms() -> str:
    """How masks are read, with pictures: each is read by the code that workers run."""
    height, width = 72, 96
    hole = np.zeros((height, width), np.uint8)
    cv2.ellipse(hole, (48, 36), (26, 16), 20, 0, 360, 255, cv2.FILLED)
    ramp = np.linspace(40, 220, width).astype(np.uint8)
    photo = np.dstack([np.tile(ramp, (height, 1)), np.tile(ramp[::-1], (height, 1)), np.full_like(hole, 120)])
    cv2.circle(photo, (24, 50), 14, (230, 200, 60), cv2.FILLED)
    on = hole[..., None] > 0
    forms = {
        "white on black": hole,
        "soft at its edges": cv2.GaussianBlur(hole, (0, 0), 2),
        "the picture with the hole rubbed out": np.dstack([photo, 255 - hole]),
        "paint on a transparent layer": np.dstack([np.full_like(photo, (220, 40, 40)), hole // 255 * 200]),
        "one colour on black": np.where(on, np.uint8((220, 0, 0)), np.uint8(0)),
        "numbers 0 and 1, or any two greys": hole // 255,
        "black on white": 255 - hole,
        "the picture, painted over": np.where(on, np.uint8(255), photo),
        "a photo": photo,
        "an outline": cv2.ellipse(np.zeros_like(hole), (48, 36), (40, 28), 20, 0, 360, 255, 1),
    }
    rows = []
    for form, pixels in forms.items():
        try:
            mask = read_mask(_png(pixels), max_pixels=10_000)
            outcome = _shown(mask.levels), ", ".join(f"`{note}`" for note in mask.notes) or "as it is"
        except BadMask as error:
            outcome = "", f"`bad_mask`: {error.message}"
        rows.append((_shown(pixels), form, *outcome))
    head = "| mask | | filled | note |\n|---|---|---|---|"
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)])


def _shown(pixels: NDArray[np.uint8]) -> str:
    """The picture as HTML, within the page."""
    return f'<img class="mask" alt="" src="data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}">'


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


# --- Markdown ---------------------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that neither ends its cell nor reads as HTML, outside of code."""
    flat = " ".join(text.replace("|", "\\|").split())
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", flat))


def _doc(value: Any) -> str:
    return inspect.cleandoc(value.__doc__ or "")


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        *(settings, options, command_line, error_codes, exit_codes, manifest, measurements, flags, notes, presets, models),
        *(python_api, python_example, engine_example, mask_forms),
    )
}
