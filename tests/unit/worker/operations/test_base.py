"""The conformance kit passes an operation that keeps the contract, and fails each way of breaking it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from imagemill.shared.engines import parse_options
from imagemill.shared.options.stylize import OpencvStylize
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Work
from tests.unit.worker.operations import conformance

Inverting = Work[OpencvStylize, Pixels, Picture]


class Inverted(Operation[OpencvStylize, Pixels, Pixels, Picture]):
    """A minimal operation that keeps the contract: two samples per image, its upper and lower half."""

    spec = Spec("stylize", "opencv", max_batch=3)

    def load(self, device: Device) -> None:
        pass

    def fingerprint(self, options: OpencvStylize) -> str:
        return "revision 1"

    def prepare(self, picture: Picture, inputs: Inputs[OpencvStylize]) -> Inverting:
        half = len(picture.pixels) // 2
        rgb = picture.pixels[..., :3]
        return Work([Sample(rgb[:half], inputs.options), Sample(rgb[half:], inputs.options)], plan=picture)

    def group_key(self, sample: Sample[OpencvStylize, Pixels]) -> Hashable:
        return sample.data.shape

    def run(self, samples: Sequence[Sample[OpencvStylize, Pixels]]) -> list[Pixels]:
        return [255 - sample.data for sample in samples]

    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        pixels = work.plan.pixels.copy()
        pixels[..., :3] = np.concatenate(outputs)
        return replace(work.plan, pixels=pixels)


class OverwritesTheSource(Inverted):
    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        work.plan.pixels[0, 0] ^= 1
        return super().finish(work, outputs)


class DropsASample(Inverted):
    def run(self, samples: Sequence[Sample[OpencvStylize, Pixels]]) -> list[Pixels]:
        return super().run(samples)[: max(1, len(samples) - 1)]


class DependsOnTheBatch(Inverted):
    def run(self, samples: Sequence[Sample[OpencvStylize, Pixels]]) -> list[Pixels]:
        return [output // len(samples) for output in super().run(samples)]

    def group_key(self, sample: Sample[OpencvStylize, Pixels]) -> Hashable:
        return sample.data.shape[0] > 0


class RemembersTheLastImage(Inverted):
    last = 0

    def run(self, samples: Sequence[Sample[OpencvStylize, Pixels]]) -> list[Pixels]:
        outputs = [output ^ np.uint8(self.last) for output in super().run(samples)]
        self.last = 1 - self.last
        return outputs


class SharesStateBetweenThreads(Inverted):
    work: Any = None

    def prepare(self, picture: Picture, inputs: Inputs[OpencvStylize]) -> Inverting:
        self.work = super().prepare(picture, inputs)
        return self.work

    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        return super().finish(replace(work, plan=self.work.plan), outputs)


class LosesTheFormat(Inverted):
    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        return Picture(super().finish(work, outputs).pixels)


class LosesAlpha(Inverted):
    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        picture = super().finish(work, outputs)
        return replace(picture, pixels=np.ascontiguousarray(picture.pixels[..., :3]))


class ReturnsFloats(Inverted):
    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        picture = super().finish(work, outputs)
        return replace(picture, pixels=picture.pixels / 255)


class ReturnsAView(Inverted):
    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        picture = super().finish(work, outputs)
        return replace(picture, pixels=picture.pixels[:, ::-1])


class ChangesTheSize(Inverted):
    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        picture = super().finish(work, outputs)
        return replace(picture, pixels=np.repeat(picture.pixels, 2, axis=1))


class VariesItsNotes(Inverted):
    count = 0

    def finish(self, work: Inverting, outputs: Sequence[Pixels]) -> Picture:
        self.count += 1
        work.notes.append(f"image {self.count}")
        return super().finish(work, outputs)


class NamesAnUnknownEngine(Inverted):
    spec = Spec("stylize", "watercolour")


def test_kit_passes_an_operation_that_keeps_the_contract() -> None:
    conformance.check(Inverted(), parse_options("stylize", "opencv", {}))


@pytest.mark.parametrize("broken", Inverted.__subclasses__(), ids=lambda kind: kind.__name__)
def test_kit_fails_an_operation_that_breaks_the_contract(broken: type[Inverted]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        conformance.check(broken(), parse_options("stylize", "opencv", {}))


def test_picture_size_is_width_and_height() -> None:
    assert Picture(np.zeros((20, 30, 4), np.uint8)).size == (30, 20)


def test_work_has_its_own_list_of_notes() -> None:
    Work([], plan=None).notes.append("empty_cutout")
    assert Work([], plan=None).notes == []
