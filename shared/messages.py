"""Messages and ledger entries: frozen, versioned pydantic models, stored as JSON."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from imagemill.shared.engines import engines_of, lane_of
from imagemill.shared.errors import Expired, RecordDamaged
from imagemill.shared.keys import LAYOUTS, check_inside, check_key
from imagemill.shared.options.base import MODEL_NAME, Boxes, EngineOptions, Model, Operation, Points, validation_sentence
from imagemill.shared.plain_text import shortened
from imagemill.shared.quality import Measures, Quality
from imagemill.shared.urls import check_output_url, check_source_url

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
JobState = Literal["submitting", "queued", "running", "paused", "finishing", "done", "failed", "cancelled"]
"""`failed`: every image failed."""
ENDED: tuple[JobState, ...] = ("done", "failed", "cancelled")
Unfinished = Literal["pending", "cancelled", "expired", "damaged"]
"""What an image without a result is."""
ItemState = Literal["pending", "done", "failed", "cancelled"]

LONGEST_OUTPUT, LONGEST_KEY = 2048, 1024
"""Characters of an output URL, and of a template for names below it. S3 allows 1,024 bytes for both together."""
LONGEST_MESSAGE, LONGEST_NOTE, MOST_NOTES = 1000, 60, 20
"""Of a result. Strangers supply some of it, and all of it is kept in Redis."""
SourceUrl = Annotated[str, Field(max_length=4096), AfterValidator(check_source_url)]

Profile = Literal["srgb", "keep"]
"""Convert colours to sRGB, or keep the source's profile."""


KeepMetadata = Literal["keep", "copyright", "none"]
"""Which EXIF, XMP and IPTC of a source its result gets."""
Format = Literal["same", "png", "webp", "webp-lossless", "jpeg", "avif"]


class Output(Model):
    """Where results are stored, and in which format."""

    url: Annotated[str, Field(max_length=LONGEST_OUTPUT), AfterValidator(check_output_url)]
    format: Format = "same"
    quality: int = Field(90, ge=1, le=100, description="quality of JPEG, AVIF and lossy WebP files")
    icc: Profile | None = Field(None, description="colour profile of the results; 'none': the operation's default")
    metadata: KeepMetadata = Field(
        "copyright",
        description="EXIF, XMP and IPTC of the source: keep (positions too), copyright (creator, rights, resolution) or none",
    )
    key: Annotated[str, Field(max_length=LONGEST_KEY), AfterValidator(check_key)] = LAYOUTS["indexed"]


class Policy(Model):
    """How a job is processed."""

    priority: Priority = "normal"
    owner: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$", description="who the job is for; owners take turns"
    )
    not_before: AwareDatetime | None = Field(None, description="when the job may begin")
    until: AwareDatetime | None = Field(None, description="deadline: images that have not begun by then fail as `expired`")
    attempts: int = Field(3, ge=1, le=10, description="attempts per image before it is recorded as failed")
    batch: Literal["quality", "throughput"] = Field(
        "throughput", description="quality: small batches; throughput: batches as large as memory allows"
    )
    reuse: bool = Field(True, description="copy the earlier result of the same image instead of computing it again")
    quality: Quality = Quality()


USUAL_PROFILE: dict[Operation, Profile] = {"remove-background": "srgb", "inpaint": "keep", "stylize": "srgb"}
"""The default profile of results. Inpainting keeps the source's, so that nothing outside the hole changes."""


class Job(Model):
    """A job: an operation, options for one of its engines (`opencv` by default), an output and a policy."""

    version: Literal[1] = 1
    operation: Operation
    options: SerializeAsAny[EngineOptions] = Field(None, validate_default=True)
    output: Output
    policy: Policy = Policy()

    @field_validator("options", mode="before")
    @classmethod
    def _of_the_engine(cls, options: Any, info: ValidationInfo) -> EngineOptions:
        """The options, as an instance of their engine's model."""
        name = options.engine if isinstance(options, EngineOptions) else (options or {}).get("engine", "opencv")
        engine = engines_of(info.data.get("operation", "")).get(name)
        if engine is None:
            raise ValueError(f"the operation has no engine {name!r}")
        try:
            return engine.options.model_validate(options or {}, context=info.context)
        except ValidationError as error:
            raise ValueError(validation_sentence(error)) from error

    @property
    def engine(self) -> str:
        """The name of the job's engine."""
        return self.options.engine

    @property
    def icc(self) -> Profile:
        """The profile of the results."""
        return self.output.icc or USUAL_PROFILE[self.operation]

    @cached_property
    def lane(self) -> str:
        """What a node must offer to process this job; see imagemill.shared.engines."""
        return lane_of(self.operation, self.engine, getattr(self.options, "model", None))


class Item(Model):
    """One image of a job."""

    index: int = Field(ge=0, description="position in the submitted list, from 0")
    source: SourceUrl
    mask: SourceUrl | None = None
    control_image: SourceUrl | None = None
    boxes: Boxes = ()
    points: Points = ()
    part: str | None = Field(
        None, pattern=r"^[a-z]{1,20}$", description="which of an image's results it is, such as that of the upper garment"
    )
    name: str | None = Field(None, max_length=200, description="name of the output; by default the source's")
    key: Annotated[str, AfterValidator(check_inside)] | None = Field(
        None, max_length=1024, description="the job's template of keys with the fields filled in that only the submitter knows"
    )
    duplicate_of: int | None = Field(None, description="index of the item whose result this one shares")

    @property
    def id(self) -> str:
        """The same row at the same position has the same ID in every job."""
        return f"{self.index:06d}-{self.digest[:8]}"

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the fields that, together with the job, determine the item's result."""
        more = "" if self.key is None else f"\n{self.key}"
        more += "" if self.control_image is None else f"\ncontrol {self.control_image}"
        more += f"\npoints\n{self.points}" if self.points else ""
        more += "" if self.part is None else f"\npart\n{self.part}"
        return hashlib.sha256(f"{self.source}\n{self.mask}\n{self.boxes}\n{self.name}{more}".encode()).hexdigest()

    def companion(self, *, mask: bool, control: bool) -> str | None:
        """The URL of its own mask or control image, whichever the job's engine takes."""
        return self.mask if mask else self.control_image if control else None


LANE = re.compile(rf"[a-z-]+\.[A-Za-z0-9_-]+(\.{MODEL_NAME})?")


class WakeUp(Model):
    """A Celery message: there is work in this lane."""

    version: Literal[2] = 2
    lane: str = Field(max_length=200, pattern=f"^{LANE.pattern}$")


def _few(notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(shortened(note, LONGEST_NOTE) for note in notes[:MOST_NOTES])


LONGEST_OUTLINE = 400
"""Characters of the outline in a record."""


class ItemResult(Model):
    """The result of one image, recorded once. Sizes are (width, height) in pixels."""

    index: int
    state: Literal["done", "failed"]
    output: str | None = None
    code: str | None = None
    message: Annotated[str, AfterValidator(lambda text: shortened(text, LONGEST_MESSAGE))] | None = None
    retryable: bool = False
    attempts: int = 1
    source_format: str | None = None
    source_bytes: int = 0
    source_size: tuple[int, int] | None = None
    output_bytes: int = 0
    output_size: tuple[int, int] | None = None
    batch: int = Field(1, description="size of the largest model batch that included a sample of this image")
    seconds: dict[str, float] = Field(default_factory=dict, description="seconds by stage")
    notes: Annotated[tuple[str, ...], AfterValidator(_few)] = Field(
        (), description="remarks for the submitter on a successful result"
    )
    filled: str | None = Field(
        None,
        max_length=LONGEST_OUTLINE,
        pattern=r"^[MZ0-9, ]*$",
        description="outline of the filled area, as the path of an SVG in thousandths of the sides (`inpaint`)",
    )
    quality: Measures | None = None
    node: str | None = None


class Row(Model):
    """One line of `results` and of the manifest: an item and its result."""

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
    control_image: str | None = None
    part: str | None = None
    result: ItemResult | None = Field(None, exclude=True)


class JobStatus(Model):
    """A job's state and counts. Times are in seconds since the epoch, by Redis' clock."""

    job: str
    operation: Operation
    engine: str
    lane: str = Field(description="what a node must offer to process it: operation, engine and model")
    state: JobState
    total: int
    done: int
    failed: int
    duplicates: int
    waiting: int = Field(0, description="images not handed out yet")
    running: int = Field(0, description="images that workers have taken")
    priority: Priority
    owner: str | None = Field(None, description="who it is for")
    not_before: float | None = Field(None, description="when it may begin, if that is in the future")
    until: float | None = Field(None, description="its deadline")
    position: int | None = Field(None, description="number of jobs that come first (`Client.explain`)")
    ahead: int | None = Field(
        None, description="images of other jobs that are handed out before its last one (`Client.explain`)"
    )
    why: str | None = Field(None, description="why it is waiting, in a few words (mostly from `Client.explain`)")
    starts: float | None = Field(None, description="when it began or, by forecast, will begin (`Client.explain`)")
    ends: float | None = Field(None, description="when it will end, by forecast (`Client.explain`)")
    output: str
    manifest: str | None = Field(None, description="URL of manifest.jsonl, once the job is over")
    created: float
    ended: float | None = None
    seconds: float

    @property
    def over(self) -> bool:
        return self.state in ENDED


class Node(Model):
    """A worker node's report."""

    model_config = ConfigDict(extra="ignore")  # during an upgrade, nodes report other fields

    node: str
    host: str
    pid: int
    process: str = Field("", description="identifies its parent process across all hosts")
    device: str
    lanes: tuple[str, ...] = ()
    children: int
    ready: bool
    parts: tuple[str, ...] | None = Field(None, description="the LoRAs, ControlNets and VAEs that it can use")
    lacks: tuple[str, ...] = Field((), description="why it doesn't offer everything it is configured for")
    faults: dict[str, str] = Field({}, description="lanes, LoRAs, ControlNets and VAEs out of service, and why")
    busy: int = Field(0, description="children that are working on images")
    problem: str = Field("", description="why it can't work: its engines don't load, or a child hangs")
    gone: bool = Field(False, description="its process has ended because of the problem; shown until it starts again")
    gpu: str = Field("", description="the UUID of its GPU if known, otherwise its own name; empty on a CPU")
    expected_gpus: int | None = Field(None, description="GPUs that its host must have")
    seen: float = 0.0


class HostGpus(Model):
    """A supervisor's report of the GPUs that it sees."""

    model_config = ConfigDict(extra="ignore")  # during an upgrade

    host: str
    expected: int | None
    present: tuple[str, ...] = Field(description="their UUIDs")
    seen: float = 0.0


class DeadLetter(Model):
    """An entry in Redis that could not be read, and was set aside."""

    model_config = ConfigDict(extra="ignore")  # during an upgrade

    time: float = Field(description="when it was found, in seconds since the epoch")
    where: str = Field(description="the queue, or the key and field")
    reason: str
    content: str = Field(description="its first 2 kB")


def compact(model: Item | ItemResult) -> str:
    """An item or result as JSON, without fields at their defaults."""
    return model.model_dump_json(exclude_defaults=True)


def row(item: Item, result: ItemResult | None, unfinished: Unfinished = "pending") -> Row:
    """The public line for an item and its result, if any."""
    own = {name: getattr(item, name) for name in ("index", "source", "duplicate_of", "mask", "control_image", "part")}
    base: dict[str, Any] = {"item": item.id, **own, "result": result}
    if result is None:
        if unfinished == "expired":
            return Row(state="failed", code=Expired.code, message="the deadline passed before this image began", **base)
        if unfinished == "damaged":
            return Row(state="failed", code=RecordDamaged.code, message="the job's record in Redis was damaged", **base)
        return Row(state=unfinished, **base)
    return Row(
        state=result.state, output=result.output, code=result.code, message=result.message, attempts=result.attempts, **base
    )
