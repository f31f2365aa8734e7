"""Which session each of rembg's models takes. Most find the subject with one network, and differ in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imagemill.shared.options.remove_background import GARMENT_MODELS, PROMPTED_MODELS, RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background.garments import Garments
from imagemill.worker.operations.remove_background.model_families import Family, family_of, in_bytes
from imagemill.worker.operations.remove_background.onnx_model import OnnxModel, Tensor
from imagemill.worker.operations.remove_background.segment_anything import SegmentAnything
from imagemill.worker.operations.remove_background.session import Opened, Session, Size, by_lanczos


@dataclass(frozen=True)
class Subject(Session):
    """The image's subject, found by a model of a family."""

    family: Family

    def data(self, picture: Picture, pixels: Pixels, inputs: Inputs[RembgRemoveBackground]) -> Tensor:  # noqa: ARG002
        return self.family.tensor(pixels, as_rembg=inputs.options.exact)

    def open(self, files: Sequence[Path], name: str, device: Device) -> Opened:
        return OnnxModel(files[0], name, device, self.family.size, self.family.output)

    def matte(self, output: Tensor, size: Size, part: str | None) -> Grey:  # noqa: ARG002
        return in_bytes(self.family.matte(output))

    def rembgs_mask(self, output: Tensor, size: Size, part: str | None) -> Grey:
        return by_lanczos(self.matte(output, size, part), size)


SPECIAL: dict[str, Session] = {
    **dict.fromkeys(GARMENT_MODELS, Garments()),
    **dict.fromkeys(PROMPTED_MODELS, SegmentAnything()),
}
"""The models that don't look for the subject, by name."""


def session_of(weights: Path, model: str) -> Session:
    """The session for a model in the catalogue, or for one that the operator has added. Raises ModelUnavailable."""
    return SPECIAL.get(model) or Subject(family_of(weights, model))
