"""The interface that every engine implements, and its input and output types."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from imagemill.shared.errors import BadReference, ImageError
from imagemill.shared.messages import Item
from imagemill.shared.options.base import EngineOptions
from imagemill.shared.options.base import Operation as OperationName
from imagemill.shared.urls import shown
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels

Options = TypeVar("Options", bound=EngineOptions)
"""What a job can ask of the engine (shared/options)."""
Data = TypeVar("Data")
"""One input of the device step."""
Output = TypeVar("Output")
"""What the device step returns for one input."""
Plan = TypeVar("Plan")
"""What `finish` needs to know about an image besides the outputs."""


@dataclass(frozen=True)
class Spec:
    """What an engine can do and what it needs, as data, so that the line has no branches per operation.

    `max_batch` is the largest number of samples per `run`. `runtime` selects the runtime whose memory limits batch sizes.
    With `takes_control`, an item can have a control image of its own. With `restyles`, a job's results should look alike and
    keep the edges of their sources. `warm_up` holds options for the synthetic image that each child processes before its
    first task.
    """

    name: OperationName
    engine: str
    needs_mask: bool = False
    takes_control: bool = False
    makes_alpha: bool = False
    restyles: bool = False
    max_batch: int = 1
    runtime: Literal["cpu", "onnxruntime", "torch"] = "cpu"
    warm_up: Mapping[str, Any] = field(default_factory=dict)


def _unreadable(url: str) -> Picture:
    raise BadReference(f"{shown(url)} can't be read here")


@dataclass(frozen=True)
class Inputs(Generic[Options]):
    """What `prepare` may use besides the image.

    `mask` [height, width] uint8 is None unless `spec.needs_mask` is set and the item or job has one; `mask_notes` say how it
    was read. `control` [height, width, 3 or 4] is the item's own control image, if it has one and `spec.takes_control` is set.
    `read(url)` fetches and decodes another image of the job, such as a reference, and raises ImageError if it can't.
    """

    item: Item
    options: Options
    mask: Grey | None = None
    read: Callable[[str], Picture] = _unreadable
    mask_notes: tuple[str, ...] = ()
    control: Pixels | None = None


@dataclass(frozen=True)
class Sample(Generic[Options, Data]):
    """One input of the device step, with its job's options.

    `footprint` identifies, together with the model, how much device memory the sample takes, such as `768x512 float16`;
    leave it empty if the group key already does.
    """

    data: Data
    options: Options
    footprint: str = ""


@dataclass(frozen=True)
class Evidence:
    """What the check (worker/checking) needs to know about a result but can't see in it.

    `comparable`: the result shows the same scene as the source, position by position, at the same or another size.
    `recoloured`: colours were changed on purpose, so a colour cast is not a fault. `hole` [height, width], of the result's
    size, is above 0 where the image was filled. `alpha` [height, width], of any size, is the matte of a cut-out placed on
    a background. `edges` [height, width], of any size, holds the edges that the result should have (255 on 0); None means
    those of the source. `absent`: what was looked for is not in the image, so there is nothing to judge.
    """

    comparable: bool = True
    recoloured: bool = False
    hole: Grey | None = None
    alpha: Grey | None = None
    edges: Grey | None = None
    absent: bool = False


@dataclass
class Work(Generic[Options, Data, Plan]):
    """One image between `prepare` and `finish`: one or more samples, and the plan that `finish` follows.

    `finish` may add to `notes` and set `evidence`. `filled` is the outline of what is filled, for the record.
    Engines with an element of chance set `retry`, which returns the work for another attempt at the same image, with the
    next seed.
    """

    samples: Sequence[Sample[Options, Data]]
    plan: Plan
    notes: list[str] = field(default_factory=list)
    evidence: Evidence = Evidence()
    filled: str | None = None
    retry: Callable[[], Work[Options, Data, Plan]] | None = None


@dataclass(frozen=True)
class Untouched:
    """What `prepare` returns for an image that needs no work: the source is stored unchanged, with these notes."""

    notes: tuple[str, ...] = ()


class Operation(ABC, Generic[Options, Data, Output, Plan]):
    """One engine of one operation. The line handles order, threads, batches and errors; an engine handles pixels.

    `prepare` and `finish` run in several threads and must share no state; `run` runs in one thread. A complete engine:

        class Invert(Operation[InvertOptions, Pixels, Pixels, Picture]):
            spec = Spec("stylize", "invert")

            def load(self, device: Device) -> None:
                pass

            def fingerprint(self, options: InvertOptions) -> str:
                return "revision 1"

            def prepare(self, picture: Picture, inputs: Inputs[InvertOptions]) -> Work[InvertOptions, Pixels, Picture]:
                return Work([Sample(picture.pixels, inputs.options)], plan=picture)

            def run(self, samples: Sequence[Sample[InvertOptions, Pixels]]) -> Sequence[Pixels]:
                return [255 - sample.data for sample in samples]

            def finish(self, work: Work[InvertOptions, Pixels, Picture], outputs: Sequence[Pixels]) -> Picture:
                return replace(work.plan, pixels=outputs[0])
    """

    spec: Spec

    @abstractmethod
    def load(self, device: Device) -> None:
        """Get ready to work on `device`, without downloading anything. Called once per child. Raises ConfigurationError."""

    @abstractmethod
    def fingerprint(self, options: Options) -> str:
        """Identify everything besides source and options that determines the result.

        That is the versions of the engine's libraries, the weights' digest, and a revision of the engine's own code, which
        must be raised whenever the same image would get different pixels. Called for every image, from several threads.
        Raises OSError or an ImagemillError if it can't be determined.
        """

    def companions(self, options: Options) -> Sequence[str]:
        """The names of the models that a job needs beside its `model`. Raises ModelUnavailable if they depend on that."""
        return options.companions()

    @abstractmethod
    def prepare(self, picture: Picture, inputs: Inputs[Options]) -> Work[Options, Data, Plan] | Untouched:
        """CPU work before the device step: sizes, masks, tiles. Raises an ImageError."""

    @abstractmethod
    def run(self, samples: Sequence[Sample[Options, Data]]) -> Sequence[Output | ImageError]:
        """The device step: one output per sample, in order, or the error of that sample alone."""

    @abstractmethod
    def finish(self, work: Work[Options, Data, Plan], outputs: Sequence[Output]) -> Picture:
        """CPU work after the device step: blend tiles, apply alpha, restore the size. Returns the result as uint8 RGB or RGBA.

        It may overwrite and return the picture that `prepare` received, unless the evidence is `comparable`: the check then
        still needs the source.
        """

    def work_edge(self, options: Options) -> int | None:  # noqa: ARG002
        """Longest edge in pixels that `prepare` needs, so that larger images are decoded smaller; None for the full size."""
        return None

    def group_key(self, sample: Sample[Options, Data]) -> Hashable:  # noqa: ARG002
        """Samples with equal keys may share a batch."""
        return self.spec.engine

    def together(self, options: Options) -> bool:  # noqa: ARG002
        """Whether a batch goes through the model in one pass, so rounding may depend on its size. Called after a `run`."""
        return False

    def relieve(self, level: int) -> bool:
        """Apply exactly the first `level` memory-saving measures from the next `run` on; 0 restores the loaded state.

        Returns False, and changes nothing, if the engine has fewer. The line calls this when a single sample does not fit.
        """
        return level == 0


AnyOperation = Operation[Any, Any, Any, Any]
"""An engine chosen at run time by a job's options; only the engine itself knows its four types."""
