"""A stand-in for a GPU: an engine that sleeps. `python -m bench.stand_in ...` runs `imagemill ...` with it.

STAND_IN_SECONDS is how long it takes per image. Into the folder STAND_IN_FOLDER it writes how many images are on its device,
in one file per process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from imagemill.shared.engines import ENGINES, Engine
from imagemill.shared.options.base import EngineOptions
from imagemill.worker.hardware.device import Device
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


ROW = Engine("stylize", "stand-in", options=StandInOptions, module="bench.stand_in:StandIn", extra="worker")


if __name__ == "__main__":
    from bench import stand_in
    from imagemill.producer.cli import main

    ENGINES.append(stand_in.ROW)
    main(prog_name="imagemill")
