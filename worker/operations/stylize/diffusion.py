"""stylize with Stable Diffusion 1.5 and a ControlNet that keeps each image's edges in place."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import diffusers
import numpy as np
import torch
import transformers

from imagemill.shared.errors import ImageError
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.shared.seeds import diffusion_seed, next_seed
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.extend import extended
from imagemill.worker.imaging.opencv import set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels, flatten
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.models.catalogue import CONTROLNETS, repository
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.diffusion_models import base_of, controlnet_of
from imagemill.worker.models.repositories import digest_of, is_here, models_here, state
from imagemill.worker.operations.base import Evidence, Inputs, Operation, Sample, Spec, Work
from imagemill.worker.operations.open_model import OpenModel, missing_model
from imagemill.worker.operations.stylize.buckets import Size, bucket, cropped, inside, laid_in, taken_out
from imagemill.worker.operations.stylize.loras import Stamp, find, stamp
from imagemill.worker.operations.stylize.palette import Colours, Palettes, transferred
from imagemill.worker.operations.stylize.pipeline import CHECKER, LARGEST_BATCH, Canvas, Pipeline, Styled, dtype_of
from imagemill.worker.operations.stylize.prompts import CUT

REVISION = 3
"""Raise this whenever the same image and options give different pixels, so that cached results are not reused."""

MULTIPLE, COMPILED_MULTIPLE = 8, 64
"""A bucket's sides are multiples of this: as the VAE requires, or larger so that there are few shapes to compile."""

HIDDEN = 255  # grey level behind transparent pixels, for the edges that the result should show


@dataclass(frozen=True)
class Plan:
    """What `finish` needs: the cropped source, the result's size and the reference's colours."""

    picture: Picture
    size: Size
    palette: Colours | None


Styling = Work[DiffusionStylize, Canvas, Plan]


class Diffusion(Operation[DiffusionStylize, Canvas, Styled, Plan]):
    """Keeps one model loaded, from the first job that asks for it; all styles run on it."""

    spec = Spec("stylize", "diffusion", restyles=True, max_batch=LARGEST_BATCH, runtime="torch", warm_up={"steps": 1})

    def __init__(self) -> None:
        self._device = Device()
        self._pipeline: OpenModel[str, Pipeline] = OpenModel()
        self._palettes = Palettes()
        self._folders: dict[str, str] = {}
        self._adapters: dict[Stamp, str] = {}

    def load(self, device: Device) -> None:
        """Check that a model is installed; ConfigurationError if none is. The first `run` loads the job's model."""
        set_up(device)
        self._device = device
        if device.gpu is None:  # on the CPU, images run one by one, see pipeline.py
            self.spec = replace(self.spec, max_batch=1)
        if not models_here(device.weights, self.spec.engine):
            raise missing_model(DiffusionStylize().model, device.weights)
        if device.diffusion.safety_checker and state(device.weights, repository(CHECKER)) == "missing":
            raise missing_model(CHECKER, device.weights)

    def fingerprint(self, options: DiffusionStylize) -> str:
        weights = self._device.weights
        parts = [f"{options.model} {self._folder(options.model)}"]
        parts += [f"{lora.name} {self._adapter(find(weights, lora.name))}" for lora in options.loras]
        parts += [
            f"diffusers {diffusers.__version__}",
            f"transformers {transformers.__version__}",
            f"{dtype_of(self._device)} {torch.__version__}",
        ]
        parts += ["compiled"] * self._device.compile + ["safety_checker"] * self._device.diffusion.safety_checker
        return ", ".join([*parts, f"revision {REVISION}"])

    def work_edge(self, options: DiffusionStylize) -> int | None:
        """The result's longest edge, or the longest edge of a bucket if that is longer."""
        if options.long_edge is None or options.crop is not None:
            return None
        return max(options.long_edge, 2 * options.size)  # a bucket of 4 to 1 is twice as wide as a square one

    @translated("preparing the image")
    def prepare(self, picture: Picture, inputs: Inputs[DiffusionStylize]) -> Styling:
        options = inputs.options
        if options.crop is not None:
            width, height = map(int, options.crop.split("x"))
            picture = replace(picture, pixels=cropped(picture.pixels, (width, height)))
        room = bucket(picture.size, options.size, COMPILED_MULTIPLE if self._device.compile else MULTIPLE)
        small = resize(picture.pixels, inside(picture.size, room))
        # The model sees no background: it would come back mixed into soft edges, where alpha mixes it in once more.
        pixels = laid_in(extended(small), room)
        seed = diffusion_seed(options, inputs.item.index, inputs.item.source)
        palette = self._palettes.of(options.reference, inputs.read) if options.reference else None
        canvas = Canvas(pixels, edges_of(pixels, options.canny_low, options.canny_high), seed)
        footprint = f"{room[0]}x{room[1]} {dtype_of(self._device)}"
        footprint += (
            " guided" * (options.cfg > 1) + " alone" * options.deterministic
        )  # then a batch takes no more memory than one image
        edges = canvas.edges
        if small.shape[2] == 4:
            edges = edges_of(laid_in(flatten(small, HIDDEN), room), options.canny_low, options.canny_high)
        edges = taken_out(edges, picture.size)
        evidence = Evidence(comparable=options.crop is None, recoloured=palette is not None, edges=edges)
        plan = Plan(picture, fit(picture.size, options.long_edge), palette)
        return _work(Sample(canvas, options, footprint), plan, evidence)

    def group_key(self, sample: Sample[DiffusionStylize, Canvas]) -> Hashable:
        return sample.options, sample.data.edges.shape

    def together(self, options: DiffusionStylize) -> bool:
        return self._device.gpu is not None and not options.deterministic

    def run(self, samples: Sequence[Sample[DiffusionStylize, Canvas]]) -> list[Styled | ImageError]:
        options = samples[0].options  # the same for all, thanks to the group key
        return self._open(options.model).run([sample.data for sample in samples], options)

    def relieve(self, level: int) -> bool:
        return self._pipeline.current is not None and self._pipeline.current.relieve(level)

    @translated("scaling the result")
    def finish(self, work: Styling, outputs: Sequence[Styled]) -> Picture:
        plan, (output,) = work.plan, outputs
        if output.prompt_cut:
            work.notes.append(CUT)
        rgb = resize(taken_out(output.pixels, plan.picture.size), plan.size)
        source, alpha = plan.picture.pixels, None
        if source.shape[2] == 4:
            alpha = resize(np.ascontiguousarray(source[..., 3]), plan.size)
        if plan.palette is not None:
            rgb = transferred(rgb if alpha is None else np.dstack([rgb, alpha]), plan.palette)
        return replace(plan.picture, pixels=rgb if alpha is None else np.dstack([rgb, alpha]))

    def _open(self, model: str) -> Pipeline:
        return self._pipeline.get(lambda: model, self._load)

    def _load(self, model: str) -> Pipeline:
        if not is_here(self._device.weights, model):
            raise missing_model(model, self._device.weights)
        return Pipeline(model, self._device)

    def _folder(self, model: str) -> str:
        """A model's digest, computed once: a loaded model stays the same even if its files change."""
        if model not in self._folders:
            base = base_of(self._device.weights, model)
            folders = [base.folder, controlnet_of(self._device.weights, CONTROLNETS[base.family])]
            self._folders[model] = " ".join(map(digest_of, folders))
        return self._folders[model]

    def _adapter(self, path: Path) -> str:
        """An adapter's digest, computed once per version of its file."""
        version = stamp(path)
        if version not in self._adapters:
            self._adapters[version] = digest(path)[:16]
        return self._adapters[version]


def _work(sample: Sample[DiffusionStylize, Canvas], plan: Plan, evidence: Evidence) -> Styling:
    """The work for one image; a retry starts from different noise."""

    def retry() -> Styling:
        canvas = sample.data
        return _work(replace(sample, data=replace(canvas, seed=next_seed(canvas.seed))), plan, evidence)

    return Work([sample], plan=plan, evidence=evidence, retry=retry)


def edges_of(rgb: Pixels, low: int, high: int) -> Grey:
    """Edges [h, w], 0 or 255, of RGB [h, w, 3]: Canny, A Computational Approach to Edge Detection, IEEE TPAMI 8(6), 1986."""
    return np.asarray(cv2.Canny(rgb, low, high), np.uint8)
