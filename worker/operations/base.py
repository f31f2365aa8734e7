"""The small interface that every operation implements, and what goes in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from imagemill.shared.engines import Options
from imagemill.shared.messages import Item
from imagemill.shared.options.base import Operation as OperationName
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture


@dataclass(frozen=True)
class Spec:
    """What an operation can and needs, as data; the flow reads it and has no branches per operation.

    `max_batch` is the most samples that `run` takes at a time, and `runtime` what it runs on: that is asked for memory.
    """

    name: OperationName
    engine: str
    needs_mask: bool = False
    makes_alpha: bool = False
    restyles: bool = False  # a job's results should look alike, and keep their sources' edges
    max_batch: int = 1
    runtime: Literal["cpu", "onnxruntime", "torch"] = "cpu"
    warm_up: Mapping[str, Any] = field(default_factory=dict)  # options of the made-up image that a child begins with


@dataclass(frozen=True)
class Sample:
    """One input of the device step, with the job's options; `data` is the operation's own.

    `footprint` is what decides the memory that it takes on the device, such as `768x512 float16`; empty where that is
    what decides its group.
    """

    data: Any
    options: Any
    footprint: str = ""


REPAIRED_CAST, REPAIRED_SHARPNESS, REPAIRED_SEED = "repaired_cast", "repaired_sharpness", "repaired_seed"
"""Notes of what the check mended (imagemill.worker.checking.quality): a tint, a blur, or all of it by another seed."""

CACHED = "cached"
"""The note of a result that was copied from an earlier one."""

LASTING_NOTES = frozenset(
    {"empty_cutout", "empty_mask", "enlarged", "large_mask", "matting_too_large", "no_shadow_found", "prompt_cut"}
    | {REPAIRED_CAST, REPAIRED_SHARPNESS, REPAIRED_SEED}
)
"""Notes that the same image gets each time. A result with any other may be owed to haste, such as a deadline that was
missed, and is not remembered (imagemill.worker.line.cache)."""


@dataclass(frozen=True)
class Evidence:
    """What the check of a result (imagemill.worker.checking.quality) can't see in it and its source.

    `comparable` says whether each place of the result shows what that place of the source shows, whatever its size, and
    `recoloured` whether it was given other colours on purpose, so that a cast is none.
    `hole` [height, width] of the result's size is above 0 where it was filled. `alpha` [height, width], of any size, is of
    a cut-out that was given a background. `edges` [height, width], of any size, are those that the result was to have, 255
    on 0; None where they are the source's.
    """

    comparable: bool = True
    recoloured: bool = False
    hole: Grey | None = None
    alpha: Grey | None = None
    edges: Grey | None = None


@dataclass
class Work:
    """One image between `prepare` and `finish`: 1..n samples, and what `finish` needs to know.

    `finish` may add to `notes` and set `evidence`. `again`, where there is chance in the result, makes the work of another
    try: the same image with the next seed.

    An image that is `untouched`, since there is nothing to do, has no samples and goes neither to `run` nor to `finish`.
    """

    samples: list[Sample]
    state: Any = None
    notes: list[str] = field(default_factory=list)
    untouched: bool = False
    evidence: Evidence = Evidence()
    again: Callable[[], Work] | None = None


@dataclass(frozen=True)
class Inputs:
    """What `prepare` may use besides the image: the item, the job's options and further pictures.

    `mask` [height, width] uint8 is None unless `spec.needs_mask` and the item or job has one;
    `read(url)` fetches and decodes a picture of the job (a reference), remembered per process;
    it raises an ImageError.
    """

    item: Item
    options: Any
    mask: Grey | None = None
    read: Callable[[str], Picture] | None = None


class Operation(Protocol):
    """The flow owns order, threads, counts and errors; an operation owns pixels.

    `prepare` and `finish` run in threads and touch no shared state; `run` runs in one thread.
    """

    spec: Spec

    def load(self, device: Device) -> None:
        """Once per child, from disk only. Raises if it can't work on `device`."""

    def work_edge(self, options: Options) -> int | None:
        """Longest edge in pixels that `prepare` makes use of; None when it wants the full size."""

    def fingerprint(self, options: Options) -> str:
        """What decides the result besides the source and the options: versions of the engine's libraries, the weights'
        digest, and a revision of its own code, to be raised when the same image gives other pixels than before.

        Asked for every image, in threads. Raises OSError or an ImagemillError if it can't be told.
        """

    def prepare(self, picture: Picture, inputs: Inputs) -> Work:
        """CPU: sizes, masks, tiles. Raises an ImageError."""

    def group_key(self, sample: Sample) -> Hashable:
        """Samples with equal keys may share a batch."""

    def together(self, options: Options) -> bool:
        """Whether samples that `run` gets at a time go through the model in one pass, whose rounding may hang on their number.

        Asked after a `run`.
        """

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        """The device step: one output per sample, in order (the caller checks the count)."""

    def finish(self, work: Work, outputs: Sequence[Any]) -> Picture:
        """CPU: blend tiles, apply alpha, restore size; the result, uint8 RGB or RGBA.

        It may write into the picture that `prepare` had, and return that, where the evidence is not `comparable`: else
        the check looks at it once more.
        """


@runtime_checkable
class Relievable(Operation, Protocol):
    """An operation that can do with less memory, more slowly, where not even one sample fits."""

    def relieve(self, level: int) -> bool:
        """Take the first `level` measures that save memory, and no others, from the next `run` on; 0 is as loaded.

        False, and nothing is changed, where there are not so many.
        """
