"""stylize with Stable Diffusion, and ControlNets that keep what a job chooses of each image."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from imagemill.shared.diffusion_models import FAMILIES
from imagemill.shared.errors import BadReference, ConfigurationError, ImageError, ModelUnavailable
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.shared.seeds import diffusion_seed, next_seed
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.extend import extended
from imagemill.worker.imaging.opencv import set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels, flatten
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.models import stamps
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.diffusion_models import Base, base_of, check_lora, controlnet_of
from imagemill.worker.models.repositories import digest_of, folder_of, is_here, models_here, state
from imagemill.worker.operations.base import Evidence, Inputs, Operation, Sample, Spec, Work
from imagemill.worker.operations.job_images import job_image
from imagemill.worker.operations.open_model import OpenModel, missing_model
from imagemill.worker.operations.stylize.buckets import Size, bucket, cropped, inside, laid_in, taken_out
from imagemill.worker.operations.stylize.controls import KINDS, drawn, edges_of
from imagemill.worker.operations.stylize.loras import Stamp, find, stamp
from imagemill.worker.operations.stylize.palette import Colours, Palettes, transferred
from imagemill.worker.operations.stylize.pipeline import CHECKER, LARGEST_BATCH, RELIEFS, Canvas, Pipeline, Styled, dtype_of
from imagemill.worker.operations.stylize.prompts import about_pieces

REVISION = 4
"""Raise this whenever the same image and options give different pixels, so that cached results are not reused."""

MULTIPLE, COMPILED_MULTIPLE = 8, 64
"""A bucket's sides are multiples of this: as the VAE requires, or larger so that there are few shapes to compile."""

HIDDEN = 255  # grey level behind transparent pixels, for the edges that the result should show
UNDRAWN = 0  # grey level behind transparent pixels of control pictures


@dataclass(frozen=True)
class Plan:
    """What `finish` needs: the cropped source, the result's size and the reference's colours."""

    picture: Picture
    size: Size
    palette: Colours | None


Styling = Work[DiffusionStylize, Canvas, Plan]


class Diffusion(Operation[DiffusionStylize, Canvas, Styled, Plan]):
    """Loads the models that jobs ask for; all styles of a model run on it."""

    spec = Spec(
        "stylize",
        "diffusion",
        takes_control=True,
        restyles=True,
        max_batch=LARGEST_BATCH,
        runtime="torch",
        warm_up={"steps": 1, "control": "none"},  # a node may offer a base model without any ControlNet
    )

    def __init__(self) -> None:
        self._device = Device()
        self._pipeline: OpenModel[Base, str, Pipeline] = OpenModel(self._size)
        self._relief = 0
        self._palettes = Palettes()
        self._digests: dict[Path, tuple[stamps.Stamp, str]] = {}
        self._adapters: dict[Stamp, str] = {}

    def load(self, device: Device) -> None:
        """Check that a model is installed; ConfigurationError if none is. The first `run` loads the job's model."""
        set_up(device)
        self._device, self._pipeline.memory = device, device.models
        if device.gpu is None:  # on the CPU, images run one by one, see pipeline.py
            self.spec = replace(self.spec, max_batch=1)
        if not models_here(device.weights, self.spec.engine):
            raise missing_model(DiffusionStylize().model, device.weights)
        if device.diffusion.safety_checker and state(device.weights, repository(CHECKER)) == "missing":
            raise missing_model(CHECKER, device.weights)

    def fingerprint(self, options: DiffusionStylize) -> str:
        weights, (base, digests) = self._device.weights, self._version(options)
        parts = [f"{options.model} {digests}"]
        for control in options.control:
            found = controlnet_of(weights, base.family, control.name)
            parts.append(f"{found.name} {self._digest(found.folder)}")
        for lora in options.loras:
            check_lora(weights, base.family, lora.name)
            parts.append(f"{lora.name} {self._adapter(find(weights, lora.name))}")
        parts += [
            f"diffusers {diffusers.__version__}",
            f"transformers {transformers.__version__}",
            f"{dtype_of(self._device)} {torch.__version__}",
        ]
        parts += ["compiled"] * self._device.compile + ["safety_checker"] * self._device.diffusion.safety_checker
        return ", ".join([*parts, f"revision {REVISION}"])

    def companions(self, options: DiffusionStylize) -> Sequence[str]:
        return options.companions(self._family(options))

    def work_edge(self, options: DiffusionStylize) -> int | None:
        """The result's longest edge, or the longest edge of a bucket if that is longer."""
        if options.long_edge is None or options.crop is not None:
            return None
        return max(options.long_edge, 2 * self._side(options))  # a bucket of 4 to 1 is twice as wide as a square one

    @translated("preparing the image")
    def prepare(self, picture: Picture, inputs: Inputs[DiffusionStylize]) -> Styling:
        options = inputs.options
        if options.crop is not None:
            width, height = map(int, options.crop.split("x"))
            picture = replace(picture, pixels=cropped(picture.pixels, (width, height)))
        room = bucket(picture.size, self._side(options), COMPILED_MULTIPLE if self._device.compile else MULTIPLE)
        small = resize(picture.pixels, inside(picture.size, room))
        # The model sees no background: it would come back mixed into soft edges, where alpha mixes it in once more.
        pixels = laid_in(extended(small), room)
        seed = diffusion_seed(options, inputs.item.index, inputs.item.source)
        palette = self._palettes.of(options.reference, inputs.read) if options.reference else None
        own = self._own_picture(inputs, picture.size, room)
        canvas = Canvas(pixels, self._controls(pixels, own, options), seed)
        shown = pixels if small.shape[2] == 3 else laid_in(flatten(small, HIDDEN), room)
        evidence = _evidence(shown, own, picture.size, options)
        plan = Plan(picture, fit(picture.size, options.long_edge), palette)
        return _work(Sample(canvas, options, self._footprint(room, options)), plan, evidence)

    def group_key(self, sample: Sample[DiffusionStylize, Canvas]) -> Hashable:
        return sample.options, sample.data.pixels.shape

    def together(self, options: DiffusionStylize) -> bool:
        return self._device.gpu is not None and not options.deterministic

    def run(self, samples: Sequence[Sample[DiffusionStylize, Canvas]]) -> list[Styled | ImageError]:
        options = samples[0].options  # the same for all, thanks to the group key
        pipeline = self._open(options)
        pipeline.relieve(self._relief)
        try:
            return pipeline.run([sample.data for sample in samples], options)
        finally:
            self._pipeline.measure()

    def relieve(self, level: int) -> bool:
        if level > len(RELIEFS):
            return False
        self._relief = level
        return True

    @translated("scaling the result")
    def finish(self, work: Styling, outputs: Sequence[Styled]) -> Picture:
        plan, (output,) = work.plan, outputs
        rgb = resize(taken_out(output.pixels, plan.picture.size), plan.size)
        source, alpha = plan.picture.pixels, None
        if source.shape[2] == 4:
            alpha = resize(np.ascontiguousarray(source[..., 3]), plan.size)
        if plan.palette is not None:
            rgb = transferred(rgb if alpha is None else np.dstack([rgb, alpha]), plan.palette)
        return replace(plan.picture, pixels=rgb if alpha is None else np.dstack([rgb, alpha]))

    def _open(self, options: DiffusionStylize) -> Pipeline:
        return self._pipeline.get(lambda: self._version(options), lambda _: self._load(options))

    def _load(self, options: DiffusionStylize) -> Pipeline:
        if not is_here(self._device.weights, options.model):
            raise missing_model(options.model, self._device.weights)
        return Pipeline(options.model, self._device, options.vae, self._pipeline.load_part)

    def _size(self, base: Base) -> int:
        """Bytes of a base model's files, and of the safety checker's if it is in use."""
        weights, folders = self._device.weights, base.folders
        folders += [folder_of(weights, repository(CHECKER))] * self._device.diffusion.safety_checker
        return sum(stamps.size(folder.parent, folder.name) for folder in folders)

    def _family(self, options: DiffusionStylize) -> str:
        try:
            return base_of(self._device.weights, options.model).family
        except ConfigurationError as error:  # it was here when the node began to offer it
            raise ModelUnavailable(error.message) from error

    def _side(self, options: DiffusionStylize) -> int:
        return options.size or FAMILIES[self._family(options)].side

    def _controls(self, rgb: Pixels, own: Pixels | None, options: DiffusionStylize) -> tuple[Pixels | Grey, ...]:
        """The picture of each control; the first may be the submitter's `own`. Raises BadReference."""
        weights, family = self._device.weights, self._family(options)
        pictures: list[Pixels | Grey] = [] if own is None else [own]
        for control in options.control[len(pictures) :]:
            kind = controlnet_of(weights, family, control.name).kind
            if kind not in KINDS:
                raise BadReference(f"{control.name} needs a control image, as pictures for it can't be drawn from the source")
            pictures.append(drawn(kind, rgb, options))
        return tuple(pictures)

    def _own_picture(self, inputs: Inputs[DiffusionStylize], size: Size, room: Size) -> Pixels | None:
        """The item's own control picture, or the job's, cropped to the source's proportions and laid into the bucket."""
        options, picture = inputs.options, inputs.control
        if picture is None and options.control_image is not None:
            picture = job_image("control image", options.control_image, inputs.read)
        if picture is None or not options.control:
            return None
        return laid_in(resize(flatten(cropped(picture, size), UNDRAWN), inside(size, room)), room)

    def _footprint(self, room: Size, options: DiffusionStylize) -> str:
        family, controls = self._family(options), len(options.control)
        parts = [f"{room[0]}x{room[1]} {dtype_of(self._device)}"]
        parts += ["guided"] * (options.cfg > 1)
        parts += ["alone"] * options.deterministic  # then a batch takes no more memory than one image
        parts += [family] * (family != "sd15") + [f"{controls} controls"] * (controls != 1)
        parts += [f"{more} pieces"] if (more := about_pieces(options)) > 1 else []
        return " ".join(parts)

    def _version(self, options: DiffusionStylize) -> tuple[Base, str]:
        """A base model, and the digests of its folders."""
        base = base_of(self._device.weights, options.model, options.vae)
        return base, " ".join(map(self._digest, base.folders))

    def _digest(self, folder: Path) -> str:
        """A folder's digest, computed once per version of its files."""
        files = stamps.stamp(folder.parent, folder.name)
        known, found = self._digests.get(folder, ((), ""))
        if known != files:
            found = digest_of(folder)
            self._digests[folder] = files, found
        return found

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


def _evidence(shown: Pixels, own: Pixels | None, size: Size, options: DiffusionStylize) -> Evidence:
    """The edges that the result should have: those of the submitter's `own` control picture, or of the source as `shown`.

    A result that is made of nothing but noise and a prompt need have none.
    """
    edges = edges_of(shown if own is None else own, options.canny_low, options.canny_high)
    from_source = options.mode == "image-to-image" or (bool(options.control) and own is None)
    if not from_source and own is None:
        edges = np.zeros_like(edges)
    comparable = options.crop is None and from_source
    return Evidence(comparable, recoloured=options.reference is not None, edges=taken_out(edges, size))
