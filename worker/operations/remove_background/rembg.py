"""remove-background by rembg's models: their files, input and output are rembg's, the way in between is ours."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from imagemill.shared.errors import BadReference, ImageError, MissingExtra
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.shared.urls import shown
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.opencv import set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.models.catalogue import WEIGHTS
from imagemill.worker.models.checksums import digest, with_digest
from imagemill.worker.models.files import model_file
from imagemill.worker.operations.base import Evidence, Inputs, Operation, Sample, Spec, Work
from imagemill.worker.operations.open_model import OpenModel, missing_model
from imagemill.worker.operations.remove_background.compose import compose
from imagemill.worker.operations.remove_background.matting import LARGEST, TOO_LARGE
from imagemill.worker.operations.remove_background.model_families import FAMILIES, in_bytes
from imagemill.worker.operations.remove_background.onnx_model import LARGEST_BATCH, OnnxModel, Tensor
from imagemill.worker.operations.remove_background.opencv import EMPTY

REVISION = 2
"""Raise it when the same image and options give other pixels than before: what is remembered is then forgotten."""
PER_CORE = 4
STRIP = 512  # rows that Pillow cuts out at a time


@dataclass(frozen=True)
class Plan:
    picture: Picture  # at the result's size
    background: Pixels | None


CutOut = Work[RembgRemoveBackground, Tensor, Plan]


class Rembg(Operation[RembgRemoveBackground, Tensor, Tensor, Plan]):
    """One model is open at a time: it is swapped when a chunk asks for another one.

    A GPU that is fast enough to wait for `prepare` would have it replaced here, by a decoder and a `Family.tensor` that
    work on the GPU; nothing else depends on where the tensor was made.
    """

    spec = Spec("remove-background", "rembg", makes_alpha=True, max_batch=LARGEST_BATCH, runtime="onnxruntime")

    def __init__(self) -> None:
        self._device = Device()
        self._model: OpenModel[tuple[Path, str], OnnxModel] = OpenModel()

    def load(self, device: Device) -> None:
        """Look which models are there. One is opened at the first `run`, and ConfigurationError raised if it can't be."""
        set_up(device)
        self._device = device
        if device.provider == "cpu":
            # An image per core, see session.py; a few for each, or they would often wait for the slowest.
            self.spec = replace(self.spec, max_batch=PER_CORE * device.threads)
        if not any(_original(device, weights.name).is_file() for weights in WEIGHTS if weights.engine == self.spec.engine):
            raise missing_model("u2net", device.weights)

    def work_edge(self, options: RembgRemoveBackground) -> int | None:
        return None if options.exact else options.long_edge

    def fingerprint(self, options: RembgRemoveBackground) -> str:
        path = self._path(options)
        parts = [f"{options.model} {digest(path)}", f"onnxruntime {onnxruntime.__version__}", f"revision {REVISION}"]
        if options.alpha_matting:
            parts += [_version("pymatting"), _version("rembg") if options.exact else ""]
        return ", ".join(filter(None, parts))

    @translated("scaling the image")
    def prepare(self, picture: Picture, inputs: Inputs[RembgRemoveBackground]) -> CutOut:
        options = inputs.options
        pixels = resize(picture.pixels, fit(picture.size, self.work_edge(options)))
        tensor = FAMILIES[options.model].tensor(pixels, as_rembg=options.exact)
        background = _background(options.background_image, inputs.read) if options.background_image else None
        return Work([Sample(tensor, options)], plan=Plan(replace(picture, pixels=pixels), background))

    def group_key(self, sample: Sample[RembgRemoveBackground, Tensor]) -> Hashable:
        return sample.options.model, sample.options.exact

    def together(self, options: RembgRemoveBackground) -> bool:
        return self._model.current is not None and self._model.current.batches and not options.exact

    def run(self, samples: Sequence[Sample[RembgRemoveBackground, Tensor]]) -> list[Tensor]:
        options = samples[0].options  # the group key sees to it that all have the same model
        return self._open(options).run([sample.data for sample in samples], together=not options.exact)

    @translated("cutting out the subject")
    def finish(self, work: CutOut, outputs: Sequence[Tensor]) -> Picture:
        plan, options = work.plan, work.samples[0].options
        matte = in_bytes(FAMILIES[options.model].matte(outputs[0]))
        pixels = plan.picture.pixels
        if options.exact:
            made = as_rembg(pixels, matte, options, plan.background, work.notes)
        else:
            made = compose(pixels, _at(matte, plan.picture.size), options, plan.background, work.notes)
        hidden = made.shape[2] == 3 or options.crop  # what was cut out can't be told from the result
        moved = options.crop or options.mask_only
        work.evidence = Evidence(comparable=not moved, alpha=matte if hidden else None)
        return replace(plan.picture, pixels=made)

    def _open(self, options: RembgRemoveBackground) -> OnnxModel:
        size = FAMILIES[options.model].size
        return self._model.get(
            lambda: with_digest(self._path(options)), lambda file: OnnxModel(file[0], options.model, self._device, size)
        )

    def _path(self, options: RembgRemoveBackground) -> Path:
        """The file of a model; rembg's own for `exact`. Raises ConfigurationError."""
        device, original = self._device, _original(self._device, options.model)
        if not original.is_file():
            raise missing_model(options.model, device.weights)
        return original if options.exact else model_file(device.weights, self.spec.engine, options.model, int8=device.int8)


def as_rembg(
    pixels: Pixels, matte: Grey, options: RembgRemoveBackground, background: Pixels | None, notes: list[str]
) -> Pixels:
    """What `rembg.remove` makes of RGB or RGBA [h, w] and a matte [size, size] in bytes, to the last bit.

    RGBA, with colours darkened where alpha is partial; RGB before a colour. The rim is not cleaned. Cropping and pictures
    as background, which rembg doesn't have, come after.
    """
    size = (pixels.shape[1], pixels.shape[0])
    mask = _by_lanczos(matte, size)
    after = options.model_copy(update=dict(alpha_matting=False))
    if options.mask_only:
        return compose(np.ascontiguousarray(pixels[..., :3]), mask, after, None, notes, clean_rim=False)
    if options.alpha_matting and mask.size <= LARGEST:
        cut = _matted(pixels, mask)
    else:
        if options.alpha_matting:
            notes.append(TOO_LARGE)
        cut = _cut(pixels, mask)
    if options.crop or background is not None:
        rgb, alpha = np.ascontiguousarray(cut[..., :3]), np.ascontiguousarray(cut[..., 3])
        return compose(rgb, alpha, after, background, notes, clean_rim=False)
    if not mask.any():
        notes.append(EMPTY)
    if options.background is not None:
        ground = Image.new("RGBA", size, options.background)
        return np.ascontiguousarray(np.asarray(Image.alpha_composite(ground, Image.fromarray(cut)))[..., :3])
    return cut


def _at(matte: Grey, size: tuple[int, int]) -> Grey:
    """A matte at `size`. Bicubic is 0.3 of 255 off what rembg has and 30 times as fast; but only where it gets larger."""
    return _by_lanczos(matte, size) if min(size) < max(matte.shape) else resize(matte, size)


def _by_lanczos(matte: Grey, size: tuple[int, int]) -> Grey:
    return np.asarray(Image.fromarray(matte).resize(size, Image.Resampling.LANCZOS))


def _cut(pixels: Pixels, mask: Grey) -> Pixels:
    """The picture laid over transparent black, in strips: each pixel is made for itself."""
    made = np.empty((*mask.shape, 4), np.uint8)
    for top in range(0, len(mask), STRIP):
        rows = slice(top, top + STRIP)
        strip = Image.new("RGBA", mask[rows].shape[::-1], 0)
        strip.paste(Image.fromarray(pixels[rows]), None, Image.fromarray(mask[rows]))
        made[rows] = strip
    return made


def _matted(pixels: Pixels, mask: Grey) -> Pixels:
    try:
        from rembg import remove  # type: ignore[import-untyped]  # a second and 200 MB, which only this needs
    except ImportError as error:
        raise MissingExtra(f"alpha matting as rembg does it needs {error.name}: pip install 'imagemill[rembg]'") from error
    return np.array(remove(Image.fromarray(pixels), alpha_matting=True, session=_Found(Image.fromarray(mask))))


@dataclass(frozen=True)
class _Found:
    """A session for rembg that has found its mask already."""

    mask: Image.Image

    def predict(self, *_: Any, **__: Any) -> list[Image.Image]:
        return [self.mask]


def _background(url: str, read: Callable[[str], Picture]) -> Pixels:
    """The job's background. Raises BadReference, or the error itself where trying again can help."""
    try:
        return read(url).pixels
    except ImageError as error:
        if error.retryable:
            raise
        raise BadReference(f"the background {shown(url)} can't be used: {error.message}") from error


def _original(device: Device, model: str) -> Path:
    return device.weights / "rembg" / f"{model}.onnx"


@cache
def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""
