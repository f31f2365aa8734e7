"""Building blocks of all operations' options."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from imagemill.shared.errors import InvalidOption
from imagemill.shared.urls import shown

Operation = Literal["remove-background", "inpaint", "stylize"]
OPERATIONS: tuple[Operation, ...] = ("remove-background", "inpaint", "stylize")

Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
LongEdge = Annotated[int, Field(ge=16, le=65_535)]

MODEL_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?"


def check_model_name(name: str) -> str:
    """A model's name, which is part of lanes and file names. Raises ValueError."""
    if not re.fullmatch(MODEL_NAME, name):
        raise ValueError("a name has 1 to 64 letters, digits and ._- and begins and ends with a letter or digit")
    return name


ModelName = Annotated[str, AfterValidator(check_model_name)]
"""The name of a model in the catalogue, or of one that the operator has added."""

ADDRESSES = ("mask", "reference", "background_image", "control_image")
"""Options whose value is the URL of an image."""


STORED = {"stored": True}
"""Pydantic's context for a job that was accepted earlier, perhaps by an older version: new rules about text don't apply."""


class Model(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineOptions(Model):
    """Options of one engine, whose name is `engine`."""

    engine: str

    def companions(self) -> list[str]:
        """The names of the models that the job needs besides its `model`, as far as they are known without opening it."""
        return []

    def ignored(self, filled: Collection[str] = ()) -> dict[str, str]:  # noqa: ARG002
        """The options that have no effect, given the others, and why. `submit` warns about those that were given.

        `filled` are the columns in which the list says something.
        """
        return {}

    @property
    def given(self) -> set[str]:
        """The options that were set. A job from Redis has them all: then those that differ from the default."""
        fields = type(self).model_fields
        if len(self.model_fields_set) < len(fields):
            return self.model_fields_set
        return {name for name, field in fields.items() if getattr(self, name) != field.default}

    @property
    def columns(self) -> frozenset[str]:
        """The columns of a list that this job uses, besides those of the image and its name."""
        return frozenset()

    @property
    def parts(self) -> tuple[str, ...]:
        """What each image is divided into, with a result for each; empty if an image has one result."""
        return ()


def _numbers(texts: Iterable[str]) -> list[float]:
    return [float(text) if "." in text else int(text) for text in texts]


def _unit(numbers: Sequence[Any]) -> str:
    """Fractions of the image if all numbers are at most 1 and one of them has a decimal point, otherwise pixels."""
    small = all(isinstance(number, int | float) and number <= 1 for number in numbers)
    return "fraction" if small and any(isinstance(number, float) for number in numbers) else "px"


class Box(Model):
    """A rectangle, given by its top left corner and size, in pixels or fractions of the image.

    Written as text `x,y,width,height` or as a JSON list of four numbers. If all four are at most 1 and at least one has a
    decimal point, they are fractions; otherwise they are pixels.
    """

    x: float = Field(ge=0)
    y: float = Field(ge=0)
    width: float = Field(gt=0)
    height: float = Field(gt=0)
    unit: Literal["px", "fraction"] = "px"

    @model_validator(mode="before")
    @classmethod
    def _from_four(cls, value: Any) -> Any:
        if isinstance(value, str):
            parts: list[Any] = [part.strip() for part in value.split(",")]
            if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
                raise ValueError(f"a box must be four numbers x,y,width,height, not {value!r}")
            value = _numbers(parts)
        if not isinstance(value, list | tuple):
            return value
        if len(value) != 4:
            raise ValueError(f"a box must have four numbers x,y,width,height, not {len(value)}")
        return dict(zip(("x", "y", "width", "height"), value, strict=True), unit=_unit(value))

    @model_validator(mode="after")
    def _fractions_inside(self) -> Box:
        if self.unit == "fraction" and (self.x + self.width > 1.0001 or self.y + self.height > 1.0001):
            raise ValueError("a box in fractions must lie inside the image")
        return self


def listed(field: FieldInfo) -> tuple[Any, ...]:
    """The values that a field can take, if they are listed in its type."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _split(value: Any) -> Any:
    value = () if value is None else value
    return [part for part in value.split(";") if part.strip()] if isinstance(value, str) else value


Boxes = Annotated[tuple[Box, ...], BeforeValidator(_split)]
"""Boxes as a list or as text separated by `;`; None means no boxes."""


class Point(Model):
    """A point in an image, in pixels or fractions of it, that lies on the subject (label 1) or outside it (label 0).

    Written as text `x,y` or `x,y,label` or as a JSON list. If both coordinates are at most 1 and one of them has a decimal
    point, they are fractions; otherwise they are pixels.
    """

    x: float = Field(ge=0)
    y: float = Field(ge=0)
    label: Literal[0, 1] = 1
    unit: Literal["px", "fraction"] = "px"

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",")]
            if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
                raise ValueError(f"a point must be two numbers x,y and perhaps a label, 0 or 1, not {value!r}")
            value = _numbers(parts)
        if not isinstance(value, list | tuple):
            return value
        if len(value) not in (2, 3):
            raise ValueError(f"a point must have two numbers x,y and perhaps a label, not {len(value)} values")
        return dict(zip(("x", "y", "label"), value, strict=False), unit=_unit(value[:2]))


Points = Annotated[tuple[Point, ...], BeforeValidator(_split)]
"""Points as a list or as text separated by `;`; None means no points."""


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """The options given with `--set KEY=VALUE`; the last value of a key wins, and `-` in a key means `_`.

    Raises InvalidOption for a value without a key or `=`.
    """
    values: dict[str, str] = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or not name.strip():
            raise InvalidOption(f"--set takes KEY=VALUE, not {setting!r}")
        values[name.strip().replace("-", "_")] = value
    return values


def nearest(word: str, valid: list[str]) -> str:
    """`; did you mean ...?` and the valid words, to append to an error message."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (valid: {', '.join(sorted(valid))})"


def _dotted(location: Iterable[int | str]) -> str:
    return ".".join(map(str, location))


def validation_sentence(
    error: ValidationError, name: Callable[[tuple[int | str, ...]], str] = _dotted, *, secret: Collection[str] = ()
) -> str:
    """All of pydantic's errors in one line, one per name: `name: reason, not 'value'`.

    `name` turns the location of a value into its name. Values whose names are in `secret` are left out.
    """
    complaints: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_context=False):
        subject = name(fault["loc"])
        reason = fault["msg"].removeprefix("Value error, ")
        value = fault.get("input")
        value = shown(value) if isinstance(value, str) else value  # a URL may contain a signature
        short = subject not in secret and isinstance(value, str | int | float) and len(str(value)) <= 80
        suffix = f", not {value!r}" if short else ""
        reason = reason.removesuffix(suffix) + suffix  # some reasons already contain it
        complaints.setdefault(subject, f"{subject + ': ' if subject else ''}{reason[:1].lower()}{reason[1:]}")
    return "; ".join(complaints.values())
