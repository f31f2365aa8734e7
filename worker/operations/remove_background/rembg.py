"""remove-background with rembg's models: same files, input and output as rembg, but our own pipeline."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from imagemill.shared.errors import MissingExtra
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.opencv import set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.models.catalogue import MODELS
from imagemill.worker.models.checksums import digest, with_digest
from imagemill.worker.models.files import model_file, perhaps_half
from imagemill.worker.models.repositories import models_here
from imagemill.worker.operations.base import Evidence, Inputs, Operation, Sample, Spec, Work
from imagemill.worker.operations.job_images import job_image
from imagemill.worker.operations.open_model import OpenModel, file_size, missing_model
from imagemill.worker.operations.remove_background.compose import compose
from imagemill.worker.operations.remove_background.matte import EMPTY, is_cut_out
from imagemill.worker.operations.remove_background.matting import LARGEST, TOO_LARGE
from imagemill.worker.operations.remove_background.matting import REVISION as MATTING
from imagemill.worker.operations.remove_background.onnx_model import LARGEST_BATCH
from imagemill.worker.operations.remove_background.post_processing import post_processed, rembgs_post_processed
from imagemill.worker.operations.remove_background.session import Opened, Session, by_lanczos
from imagemill.worker.operations.remove_background.sessions import session_of

log = logging.getLogger(__name__)

REVISION = 4
"""Raise this whenever the same image and options give different pixels, so that cached results are not reused."""
PER_CORE = 4  # samples per core in a batch on CPUs; with fewer, cores would often wait for the slowest image
STRIP = 512  # rows that Pillow cuts out at once


@dataclass(frozen=True)
class Plan:
    """What `finish` needs: the picture at the result's size, what to put behind the subject, and how to read the output."""

    picture: Picture
    background: Pixels | None
    session: Session
    part: str | None


CutOut = Work[RembgRemoveBackground, Any, Plan]


class Rembg(Operation[RembgRemoveBackground, Any, Any, Plan]):
    """Opens the models that jobs ask for. Sessions know what goes in and comes out.

    If a GPU ever has to wait for `prepare`, decode and run `Family.tensor` on the GPU here; nothing else depends on where
    the tensor is computed.
    """

    spec = Spec("remove-background", "rembg", makes_alpha=True, max_batch=LARGEST_BATCH, runtime="onnxruntime")

    def __init__(self) -> None:
        self._device = Device()
        self._model: OpenModel[tuple[Path, ...], tuple[Any, ...], Opened] = OpenModel(lambda files: sum(map(file_size, files)))

    def load(self, device: Device) -> None:
        """Check that a model is installed; ConfigurationError if none is. The first `run` opens the job's model."""
        set_up(device)
        self._device, self._model.memory = device, device.models
        if device.provider == "cpu":
            # Each core runs one image at once, see onnx_model.py.
            self.spec = replace(self.spec, max_batch=PER_CORE * device.threads)
        if not models_here(device.weights, self.spec.engine):
            raise missing_model("u2net", device.weights)
        for model in perhaps_half(device.weights) if device.provider == "cpu" else ():
            fix = f"run `imagemill models pull {model}`, or for a file of your own, `imagemill models add NAME FILE`"
            reason = f"CPUs run that slowly: {fix}"
            log.warning("model seems to be in half precision", extra={"action": "load", "model": model, "reason": reason})

    def fingerprint(self, options: RembgRemoveBackground) -> str:
        files = " ".join(map(digest, self._files(options)))
        parts = [f"{options.model} {files}", f"onnxruntime {onnxruntime.__version__}", f"revision {REVISION}"]
        if options.model not in MODELS:
            parts.append(f"{self._session(options)}")
        if options.alpha_matting:
            parts += [_version("pymatting"), _version("rembg") if options.exact else f"matting {MATTING}"]
        if options.exact:
            parts.append(_version("scipy"))
        return ", ".join(filter(None, parts))

    def work_edge(self, options: RembgRemoveBackground) -> int | None:
        return None if options.exact else options.long_edge

    @translated("scaling the image")
    def prepare(self, picture: Picture, inputs: Inputs[RembgRemoveBackground]) -> CutOut:
        options = inputs.options
        pixels = resize(picture.pixels, fit(picture.size, self.work_edge(options)))
        session = self._session(options)
        data = session.data(picture, pixels, inputs)
        background = job_image("background", options.background_image, inputs.read) if options.background_image else None
        return Work([Sample(data, options)], Plan(replace(picture, pixels=pixels), background, session, inputs.item.part))

    def group_key(self, sample: Sample[RembgRemoveBackground, Any]) -> Hashable:
        return sample.options.model, sample.options.exact

    def together(self, options: RembgRemoveBackground) -> bool:
        return self._model.current is not None and self._model.current.batches and not options.exact

    def run(self, samples: Sequence[Sample[RembgRemoveBackground, Any]]) -> list[Any]:
        options = samples[0].options  # the same model for all, thanks to the group key
        return self._open(options).run([sample.data for sample in samples], together=not options.exact)

    @translated("cutting out the subject")
    def finish(self, work: CutOut, outputs: Sequence[Any]) -> Picture:
        plan, options = work.plan, work.samples[0].options
        pixels, size = plan.picture.pixels, plan.picture.size
        if options.exact:
            matte = plan.session.rembgs_mask(outputs[0], size, plan.part)
            if options.post_process_mask:
                matte = rembgs_post_processed(matte)
            result = as_rembg(pixels, matte, options, plan.background, work.notes)
        elif is_cut_out(pixels) and not plan.session.chooses:
            matte, as_it_is = pixels[..., 3], options.model_copy(update=dict(alpha_matting=False))
            result = compose(pixels, np.full_like(matte, 255), as_it_is, plan.background, work.notes, clean_rim=False)
        else:
            matte = plan.session.matte(outputs[0], size, plan.part)
            if options.post_process_mask:
                matte = post_processed(_at(matte, size))
            result = compose(pixels, _at(matte, size), options, plan.background, work.notes)
        hidden = result.shape[2] == 3 or options.crop  # the check can't see the matte in the result
        moved = options.crop or options.mask_only
        absent = plan.part is not None and EMPTY in work.notes  # few photos show all garments
        work.evidence = Evidence(comparable=not moved, alpha=matte if hidden else None, absent=absent)
        return replace(plan.picture, pixels=result)

    def _open(self, options: RembgRemoveBackground) -> Opened:
        session = self._session(options)

        def locate() -> tuple[tuple[Path, ...], tuple[Any, ...]]:
            paths, versions = zip(*map(with_digest, self._files(options)), strict=True)
            return paths, (session, *versions)

        return self._model.get(locate, lambda key: session.open(key[0], options.model, self._device))

    def _session(self, options: RembgRemoveBackground) -> Session:
        return session_of(self._device.weights, options.model)

    def _files(self, options: RembgRemoveBackground) -> list[Path]:
        """The model's files; for `exact`, those that rembg uses. Raises ConfigurationError."""
        device, names = self._device, MODELS.get(options.model, (options.model,))
        originals = [_file(device, name) for name in names]
        if not all(path.is_file() for path in originals):
            raise missing_model(options.model, device.weights)
        if options.exact or len(names) > 1:
            return originals
        cpu = device.provider == "cpu"
        return [model_file(device.weights, self.spec.engine, options.model, int8=device.int8, cpu=cpu)]


def as_rembg(pixels: Pixels, mask: Grey, options: RembgRemoveBackground, background: Pixels | None, notes: list[str]) -> Pixels:
    """Exactly what `rembg.remove` returns for `pixels` [h, w, 3 or 4] and its session's `mask` [h, w], bit for bit.

    RGBA with colours darkened where alpha is partial, or RGB on a colour; the rim is not cleaned. Cropping and background
    images, which rembg doesn't have, are applied afterwards.
    """
    after = options.model_copy(update=dict(alpha_matting=False))
    if options.mask_only:
        return compose(np.ascontiguousarray(pixels[..., :3]), mask, after, None, notes, clean_rim=False)
    if options.alpha_matting and mask.size <= LARGEST:
        cut = _matted(pixels, mask, options)
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
        ground = Image.new("RGBA", (pixels.shape[1], pixels.shape[0]), options.background)
        return np.ascontiguousarray(np.asarray(Image.alpha_composite(ground, Image.fromarray(cut)))[..., :3])
    return cut


def _at(matte: Grey, size: tuple[int, int]) -> Grey:
    """The matte at `size`. When enlarging, bicubic is 30 times as fast as Lanczos and 0.3 of 255 off rembg's result."""
    return by_lanczos(matte, size) if min(size) < max(matte.shape) else resize(matte, size)


def _cut(pixels: Pixels, mask: Grey) -> Pixels:
    """RGBA composited over transparent black, in strips, as no pixel depends on another."""
    result = np.empty((*mask.shape, 4), np.uint8)
    for top in range(0, len(mask), STRIP):
        rows = slice(top, top + STRIP)
        strip = Image.new("RGBA", mask[rows].shape[::-1], 0)
        strip.paste(Image.fromarray(pixels[rows]), None, Image.fromarray(mask[rows]))
        result[rows] = strip
    return result


def _matted(pixels: Pixels, mask: Grey, options: RembgRemoveBackground) -> Pixels:
    try:
        from rembg import remove  # type: ignore[import-untyped]  # takes a second and 200 MB, so only where it is needed
    except ImportError as error:
        raise MissingExtra(f"rembg's own alpha matting needs {error.name}: pip install 'imagemill[rembg]'") from error
    cut = remove(
        Image.fromarray(pixels),
        alpha_matting=True,
        alpha_matting_foreground_threshold=options.alpha_matting_foreground_threshold,
        alpha_matting_background_threshold=options.alpha_matting_background_threshold,
        alpha_matting_erode_size=10 if options.alpha_matting_erode_size is None else options.alpha_matting_erode_size,
        session=_FixedMask(Image.fromarray(mask)),
    )
    return np.array(cut)


@dataclass(frozen=True)
class _FixedMask:
    """A rembg session that returns a given mask."""

    mask: Image.Image

    def predict(self, *_: Any, **__: Any) -> list[Image.Image]:
        return [self.mask]


def _file(device: Device, name: str) -> Path:
    return device.weights / "rembg" / f"{name}.onnx"


@cache
def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""
