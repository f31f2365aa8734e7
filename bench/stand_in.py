"""Stand-ins for a GPU: engines that sleep. `python -m bench.stand_in ...` runs `imagemill ...` with them.

- `stand-in` takes STAND_IN_SECONDS per image, on a device where batches are no faster. Into the folder STAND_IN_FOLDER it
  writes how many images are on its device, in one file per process.
- `stand-in-gpu` takes STAND_IN_SECONDS per batch of up to STAND_IN_BATCH images, however full it is, so the line learns how
  many fit and waits for full ones. The child processes of a node share it. It appends a line per batch to `batches` in
  STAND_IN_FOLDER: see `Batch`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from imagemill.shared.engines import ENGINES, Engine
from imagemill.shared.options.base import EngineOptions
from imagemill.shared.settings import Settings
from imagemill.worker.hardware import memory
from imagemill.worker.hardware.board import Board
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.memory import Memory, Peak
from imagemill.worker.hardware.turn import Turn
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Work

BATCH = 8


class StandInOptions(EngineOptions):
    """Return each image as it is, after a while."""

    engine: Literal["stand-in"] = "stand-in"


class StandIn(Operation[StandInOptions, Pixels, Pixels, Picture]):
    """Takes the same time for every image of a batch."""

    spec = Spec("stylize", "stand-in", max_batch=BATCH)

    def load(self, device: Device) -> None:
        self._seconds = float(os.environ["STAND_IN_SECONDS"])
        self._note = Path(os.environ["STAND_IN_FOLDER"], str(os.getpid()))

    def fingerprint(self, options: StandInOptions) -> str:
        return "revision 1"

    def prepare(self, picture: Picture, inputs: Inputs[StandInOptions]) -> Work[StandInOptions, Pixels, Picture]:
        return Work([Sample(picture.pixels, inputs.options)], plan=picture)

    def run(self, samples: Sequence[Sample[StandInOptions, Pixels]]) -> Sequence[Pixels]:
        self._tell(len(samples))
        time.sleep(self._seconds * len(samples))
        self._tell(0)
        return [sample.data for sample in samples]

    def finish(self, work: Work[StandInOptions, Pixels, Picture], outputs: Sequence[Pixels]) -> Picture:
        return work.plan

    def together(self, options: StandInOptions) -> bool:
        return True  # results tell how large their batch was

    def _tell(self, images: int) -> None:
        new = self._note.with_suffix(".new")  # replaced in one step, so that nobody reads half a file
        new.write_text(str(images))
        new.replace(self._note)


class StandInGpuOptions(EngineOptions):
    """Return each image as it is, after a while."""

    engine: Literal["stand-in-gpu"] = "stand-in-gpu"


class Card(Memory):
    """The memory of a large GPU, of which an image takes 0.1 GB."""

    name = "stand-in"
    images = 0

    def free(self) -> int:
        return 80 * 10**9

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        peak = Peak()
        yield peak
        peak.bytes = 2 * 10**9 + self.images * 10**8
        peak.share = peak.bytes / self.free()


@dataclass(frozen=True)
class Batch:
    """A batch that has run: when it began and ended, in seconds on the monotonic clock, its images, and the child's pid."""

    began: float
    ended: float
    images: int
    child: int

    @classmethod
    def read(cls, folder: Path) -> list[Batch]:
        """The batches so far of the node with this STAND_IN_FOLDER, in order."""
        lines = [line.split() for line in (folder / "batches").read_text().splitlines()]
        return sorted(
            (cls(float(began), float(ended), int(images), int(child)) for began, ended, images, child in lines),
            key=lambda one: one.began,
        )


class OneGpu(Device):
    """The device of a node whose children share a GPU."""

    @classmethod
    def of(cls, settings: Settings, children: int, *, gpus: int = 1) -> Device:
        device = Device.of(settings, children, gpus=gpus)
        return replace(device, siblings=children, turn=Turn(), board=Board()) if children > 1 else device


class StandInGpu(Operation[StandInGpuOptions, Pixels, Pixels, Picture]):
    """Takes the same time for every batch."""

    spec = Spec("stylize", "stand-in-gpu", max_batch=int(os.environ.get("STAND_IN_BATCH", BATCH)))

    def load(self, device: Device) -> None:
        self._seconds, self._card = float(os.environ["STAND_IN_SECONDS"]), Card()
        self._batches = Path(os.environ["STAND_IN_FOLDER"], "batches")
        vars(memory)["HostMemory"] = lambda: self._card  # what the line believes to be the memory of the CPU

    def fingerprint(self, options: StandInGpuOptions) -> str:
        return "revision 1"

    def prepare(self, picture: Picture, inputs: Inputs[StandInGpuOptions]) -> Work[StandInGpuOptions, Pixels, Picture]:
        return Work([Sample(picture.pixels, inputs.options)], plan=picture)

    def run(self, samples: Sequence[Sample[StandInGpuOptions, Pixels]]) -> Sequence[Pixels]:
        self._card.images = len(samples)
        with self._batches.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the device
            began = time.monotonic()
            time.sleep(self._seconds)
            file.write(f"{began} {time.monotonic()} {len(samples)} {os.getpid()}\n")
        return [sample.data for sample in samples]

    def finish(self, work: Work[StandInGpuOptions, Pixels, Picture], outputs: Sequence[Pixels]) -> Picture:
        return work.plan


ROW = Engine("stylize", "stand-in", options=StandInOptions, module="bench.stand_in:StandIn", extra="worker")
GPU_ROW = Engine(
    "stylize", "stand-in-gpu", options=StandInGpuOptions, module="bench.stand_in:StandInGpu", extra="worker", children=2
)


if __name__ == "__main__":
    from bench import stand_in
    from imagemill.producer.cli import main
    from imagemill.worker import main as node

    ENGINES.extend([stand_in.ROW, stand_in.GPU_ROW])
    node.Device = OneGpu  # type: ignore[misc,assignment]
    main(prog_name="imagemill")
