"""What goes over the wire and stands in the ledger: frozen, versioned pydantic models, as JSON only."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator

from imagemill.shared.engines import engines_of
from imagemill.shared.options.base import Boxes, EngineOptions, Model, Operation, validation_sentence
from imagemill.shared.quality import Measures, Quality
from imagemill.shared.urls import check_output_url, check_source_url

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
JobState = Literal["submitting", "queued", "running", "finishing", "done", "cancelled"]
ENDED: tuple[JobState, ...] = ("done", "cancelled")
ItemState = Literal["pending", "done", "failed", "cancelled"]

SourceUrl = Annotated[str, Field(max_length=4096), AfterValidator(check_source_url)]
KEY_FIELD = re.compile(r"\{(job|index|item|name)(?::0(\d)d)?\}")
RUN_TOGETHER = re.compile(r"\{index[^}]*\}(\d|\{job\})*\{name|\{name[^}]*\}(\d|\{job\})*\{index")
"""Where the digits of an index can't be told from those of a name: 1 and `1a` make the same as 11 and `a`."""

MANIFEST = -1
"""The number that stands for 'write the manifest' where a chunk's number is expected."""


def check_key(template: str) -> str:
    """A key template that can't make two items of a job collide, nor leave its prefix."""
    rest = KEY_FIELD.sub("", template)
    if "{" in rest or "}" in rest:
        raise ValueError("a key may use {job}, {index}, {index:06d}, {item} and {name} only")
    if not re.search(r"\{(index|item)", template):
        raise ValueError("a key needs {index} or {item}, else two images could overwrite each other")
    if "{item}" not in template and RUN_TOGETHER.search(template):
        raise ValueError("a key needs a separator between {index} and {name}, else two images could overwrite each other")
    if template.startswith("/") or ".." in template.split("/"):
        raise ValueError("a key stays below the output's address: no leading / and no ..")
    return template


Profile = Literal["srgb", "keep"]
"""Colours in sRGB, or in the source's own profile."""


class Output(Model):
    """Where results go and as what."""

    url: Annotated[str, AfterValidator(check_output_url)]
    format: Literal["same", "png", "webp", "jpeg"] = "same"
    quality: int = Field(90, ge=1, le=100, description="of JPEG and lossy WebP")
    icc: Profile | None = Field(None, description="of the results; 'none': as is usual for the operation")
    key: Annotated[str, AfterValidator(check_key)] = "{job}/{index:06d}-{name}"


class Policy(Model):
    """How hard a job tries."""

    priority: Priority = "normal"
    attempts: int = Field(3, ge=1, le=10, description="how often an image is tried before it is recorded as failed")
    batch: Literal["quality", "throughput"] = Field("throughput", description="small batches, or as large as memory allows")
    reuse: bool = Field(True, description="copy the result that the same image has had before, instead of computing it anew")
    quality: Quality = Quality()


USUAL_PROFILE: dict[Operation, Profile] = {"remove-background": "srgb", "inpaint": "keep", "stylize": "srgb"}
"""The profile of results when the job names none. Inpainting keeps the source's, so that nothing outside the hole changes."""


class Job(Model):
    """What a job asks for: an operation, options for one of its engines (`opencv` by default), an output and a policy."""

    version: Literal[1] = 1
    operation: Operation
    options: SerializeAsAny[EngineOptions] = Field(None, validate_default=True)
    output: Output
    policy: Policy = Policy()

    @field_validator("options", mode="before")
    @classmethod
    def _of_the_engine(cls, options: Any, info: ValidationInfo) -> EngineOptions:
        """The options as the model of the engine that they name."""
        name = options.engine if isinstance(options, EngineOptions) else (options or {}).get("engine", "opencv")
        engine = engines_of(info.data.get("operation", "")).get(name)
        if engine is None:
            raise ValueError(f"the operation has no engine {name!r}")
        try:
            return engine.options.model_validate(options or {})
        except ValidationError as error:
            raise ValueError(validation_sentence(error)) from error

    @property
    def engine(self) -> str:
        """The name of the engine that does the work."""
        return self.options.engine

    @property
    def icc(self) -> Profile:
        """The profile that results are in."""
        return self.output.icc or USUAL_PROFILE[self.operation]

    @property
    def lane(self) -> str:
        """What a node must offer to take this job's chunks; see shared.queues."""
        model: str | None = getattr(self.options, "model", None)
        return f"{self.engine}.{model}" if model else self.engine


class Item(Model):
    """One image of a job."""

    index: int = Field(ge=0, description="place in the submitted list, from 0")
    source: SourceUrl
    mask: SourceUrl | None = None
    boxes: Boxes = ()
    name: str | None = Field(None, max_length=200, description="what to call the output; else the source's own name")
    duplicate_of: int | None = Field(None, description="index of the item whose result this one shares")

    @property
    def id(self) -> str:
        """Stable: the same row at the same place of a list has the same id in every job."""
        return f"{self.index:06d}-{self.digest[:8]}"

    @property
    def digest(self) -> str:
        """Hex SHA-256 of what decides this item's result, apart from the job."""
        return hashlib.sha256(f"{self.source}\n{self.mask}\n{self.boxes}\n{self.name}".encode()).hexdigest()


class Chunk(Model):
    """One Celery message: `number` of `job`, with how many images it holds."""

    version: Literal[1] = 1
    job: str = Field(pattern=r"^[0-9a-z-]{4,40}$")
    number: int = Field(ge=MANIFEST)
    images: int = Field(ge=0)


class ItemResult(Model):
    """What became of one image; recorded once. Sizes are (width, height) in pixels."""

    index: int
    state: Literal["done", "failed"]
    output: str | None = None
    code: str | None = None
    message: str | None = None
    retryable: bool = False
    attempts: int = 1
    source_format: str | None = None
    source_bytes: int = 0
    source_size: tuple[int, int] | None = None
    output_bytes: int = 0
    output_size: tuple[int, int] | None = None
    batch: int = Field(1, description="most samples, of any images, that went through the model together with one of its own")
    seconds: dict[str, float] = Field(default_factory=dict, description="per stage")
    notes: tuple[str, ...] = Field((), description="what the submitter should know though all went well")
    quality: Measures | None = None
    node: str | None = None


class Row(Model):
    """One line of `results` and of the manifest: an item with what became of it."""

    item: str
    index: int
    source: str
    state: ItemState
    output: str | None = None
    code: str | None = None
    message: str | None = None
    attempts: int = 0
    duplicate_of: int | None = None
    mask: str | None = None
    result: ItemResult | None = Field(None, exclude=True)


class JobStatus(Model):
    """How far a job is. Times are seconds since the epoch, by Redis' clock."""

    job: str
    operation: Operation
    engine: str
    lane: str = Field(description="what a node must offer to work on it, see imagemill.shared.queues")
    state: JobState
    total: int
    done: int
    failed: int
    duplicates: int
    priority: Priority
    output: str
    manifest: str | None = Field(None, description="where manifest.jsonl was written, once the job is over")
    created: float
    ended: float | None = None
    seconds: float

    @property
    def over(self) -> bool:
        return self.state in ENDED


class Node(Model):
    """A worker node as it reports itself."""

    model_config = ConfigDict(extra="ignore")  # while a fleet is renewed, newer nodes tell more

    node: str
    host: str
    pid: int
    device: str
    queues: tuple[str, ...]
    children: int
    ready: bool
    lacks: tuple[str, ...] = Field((), description="why it does not offer what it was set up for")
    seen: float = 0.0


def compact(model: Item | ItemResult) -> str:
    """An item or a result as JSON without what is at its default."""
    return model.model_dump_json(exclude_defaults=True)


def row(item: Item, result: ItemResult | None, *, ended: bool) -> Row:
    """An item and its result, if there is one yet, as the public line."""
    base: dict[str, Any] = dict(
        item=item.id, index=item.index, source=item.source, duplicate_of=item.duplicate_of, mask=item.mask, result=result
    )
    if result is None:
        return Row(state="cancelled" if ended else "pending", **base)
    return Row(
        state=result.state, output=result.output, code=result.code, message=result.message, attempts=result.attempts, **base
    )
