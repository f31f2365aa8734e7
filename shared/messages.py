"""What goes over the wire and stands in the ledger: frozen, versioned pydantic models, as JSON only."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from imagemill.shared.options.base import Boxes, Model, Operation
from imagemill.shared.options.inpaint import LamaInpaint, OpencvInpaint
from imagemill.shared.options.remove_background import OpencvRemoveBackground, RembgRemoveBackground
from imagemill.shared.options.stylize import DiffusionStylize, OpencvStylize
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


class _Job(Model):
    usual_icc: ClassVar[Profile] = "srgb"

    version: Literal[1] = 1
    output: Output
    policy: Policy = Policy()

    @property
    def icc(self) -> Profile:
        """The profile that results are in."""
        return self.output.icc or self.usual_icc

    @property
    def engine(self) -> str:
        return self.options.engine  # type: ignore[attr-defined,no-any-return]  # every job below has options

    @property
    def lane(self) -> str:
        """What a node must offer to take this job's chunks; see imagemill.shared.queues."""
        model: str | None = getattr(self.options, "model", None)  # type: ignore[attr-defined]
        return f"{self.engine}.{model}" if model else self.engine


def _engine(options: Any) -> str | None:
    """Options that don't name their engine are of `opencv`."""
    return options.get("engine", "opencv") if isinstance(options, dict) else getattr(options, "engine", None)


class RemoveBackgroundJob(_Job):
    operation: Literal["remove-background"] = "remove-background"
    options: Annotated[
        Annotated[OpencvRemoveBackground, Tag("opencv")] | Annotated[RembgRemoveBackground, Tag("rembg")],
        Discriminator(_engine),
    ] = OpencvRemoveBackground()


class InpaintJob(_Job):
    usual_icc: ClassVar[Profile] = "keep"  # outside of what is filled, nothing may change

    operation: Literal["inpaint"] = "inpaint"
    options: Annotated[
        Annotated[OpencvInpaint, Tag("opencv")] | Annotated[LamaInpaint, Tag("lama")],
        Discriminator(_engine),
    ] = OpencvInpaint()


class StylizeJob(_Job):
    operation: Literal["stylize"] = "stylize"
    options: Annotated[
        Annotated[OpencvStylize, Tag("opencv")] | Annotated[DiffusionStylize, Tag("diffusion")],
        Discriminator(_engine),
    ] = OpencvStylize()


Job = RemoveBackgroundJob | InpaintJob | StylizeJob
JobSpec = Annotated[Job, Field(discriminator="operation")]
JOB_SPEC: TypeAdapter[Job] = TypeAdapter(JobSpec)
"""Reads any job's spec, by its `operation`."""


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
