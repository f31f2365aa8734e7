"""An engine added from outside: one row and one class. `python -m tests.extra_engine ...` runs `imagemill ...` with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from imagemill.shared.engines import ENGINES, Engine
from imagemill.shared.options.base import EngineOptions
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Work


class InvertOptions(EngineOptions):
    """Invert each image."""

    engine: Literal["invert"] = "invert"
    strength: int = Field(1, ge=1, le=2, description="how many times each image is inverted")


class Invert(Operation[InvertOptions, Pixels, Pixels, Picture]):
    """Inverts each image once or twice."""

    spec = Spec("stylize", "invert", max_batch=4)

    def load(self, device: Device) -> None:
        pass

    def fingerprint(self, options: InvertOptions) -> str:
        return "revision 1"

    def prepare(self, picture: Picture, inputs: Inputs[InvertOptions]) -> Work[InvertOptions, Pixels, Picture]:
        return Work([Sample(picture.pixels, inputs.options)], plan=picture)

    def run(self, samples: Sequence[Sample[InvertOptions, Pixels]]) -> Sequence[Pixels]:
        return [255 - sample.data if sample.options.strength == 1 else sample.data for sample in samples]

    def finish(self, work: Work[InvertOptions, Pixels, Picture], outputs: Sequence[Pixels]) -> Picture:
        return replace(work.plan, pixels=outputs[0])


ROW = Engine("stylize", "invert", options=InvertOptions, module="tests.extra_engine:Invert", extra="worker")


if __name__ == "__main__":
    from imagemill.producer.cli import main
    from tests import extra_engine

    ENGINES.append(extra_engine.ROW)
    main(prog_name="imagemill")
