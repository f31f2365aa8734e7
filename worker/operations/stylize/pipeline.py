"""Stable Diffusion with a ControlNet, loaded once and shared by every style, scheduler and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from billiard.exceptions import SoftTimeLimitExceeded
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from imagemill.shared.errors import (
    ConfigurationError,
    ImageError,
    ModelUnavailable,
    OperationFailed,
    OutOfMemory,
    UnsafeContent,
    sentence,
)
from imagemill.shared.options.stylize import Control, DiffusionStylize
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.hardware.torch_device import bytes_of, torch_device, torch_dtype
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.models.added import TAKEN
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.diffusion_models import base_of, controlnet_of
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.operations.open_model import getting
from imagemill.worker.operations.stylize.architecture import Architecture
from imagemill.worker.operations.stylize.controlnets import ControlNets
from imagemill.worker.operations.stylize.latents import Latents
from imagemill.worker.operations.stylize.loading import LoadPart, check_finite, from_disk, load_at_once
from imagemill.worker.operations.stylize.loras import Loras
from imagemill.worker.operations.stylize.prompts import Prompts
from imagemill.worker.operations.stylize.safety import SafetyChecker
from imagemill.worker.operations.stylize.sd15 import SD15
from imagemill.worker.operations.stylize.sdxl import SDXL

LARGEST_BATCH = 16
TILED_ABOVE = 1024 * 1024
"""Pixels above which the VAE works in tiles, as it would need several times the UNet's memory."""

MOST_SHAPES = 128
"""Most shapes and styles that each part is compiled for: 17 buckets in batches of six sizes are 102. Torch's own limit is 8
for all parts together, above which it silently runs uncompiled."""

RELIEFS = ("VAE in slices and tiles", "attention in slices")

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-trailing": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "lcm": (LCMScheduler, {}),
}
"""Their classes, and what differs from the model's own configuration."""

LATENT_CHANNELS = 4
"""Of all families."""
ARCHITECTURES: dict[str, Architecture] = {"sd15": SD15, "sdxl": SDXL}
CHECKER = "sd15-safety-checker"


@dataclass(frozen=True)
class Canvas:
    """One input: RGB uint8 [h, w, 3], the picture of each control, and the seed of the noise.

    Control pictures are uint8 [h, w] or [h, w, 3]. All pictures have a bucket's size.
    """

    pixels: Pixels
    controls: tuple[Grey | Pixels, ...]
    seed: int


@dataclass(frozen=True)
class Styled:
    """One output: RGB uint8 [h, w, 3]."""

    pixels: Pixels


class Pipeline:
    """One loaded base model, with its own VAE or another, and the ControlNets and LoRAs that jobs need. For one thread.

    ControlNets and LoRAs are loaded with `load_part`, which makes room for them. Raises ConfigurationError if the model's
    files are missing, damaged or of another kind, or if torch can't use the device, ModelUnavailable if the VAE's are, and
    OutOfMemory if the model does not fit.
    """

    def __init__(self, model: str, device: Device, vae: str | None = None, load_part: LoadPart = load_at_once) -> None:
        self._device, self._dtype = torch_device(device, model), dtype_of(device)
        self._on_cpu, self._compiled = device.gpu is None, device.compile
        self._model, self._base = model, base_of(device.weights, model, vae)
        self._architecture = ARCHITECTURES[self._base.family]
        self._text = self._load(device, vae)
        own = self._text.scheduler.config
        self._schedulers = {name: kind.from_config(own, **changes) for name, (kind, changes) in SCHEDULERS.items()}
        self._latents = Latents(self._text.vae, self._dtype)
        self.prompts = Prompts(self._text)
        self.loras = Loras(self._text, device.weights, device.diffusion.loras, load_part, self.prompts.forget)
        self._relieved = 0
        self._find = partial(controlnet_of, device.weights, self._base.family)
        unet, limit = self._text.unet.config, device.diffusion.controlnets
        self.controlnets = ControlNets(model, unet, self._dtype, limit, self._find, load_part, self._place)
        if self._compiled:
            for part in (self._text.unet, self._text.vae.decoder):
                _compile(part)
            for size in device.diffusion.warm_up:
                self._warm_up(*map(int, size.split("x")))

    @property
    def bytes(self) -> int:
        """Bytes of all that is loaded: the model with its LoRAs, ControlNets, and the safety checker."""
        parts = [part for part in self._text.components.values() if isinstance(part, torch.nn.Module)]
        checker = [self.checker.network] if self.checker else []
        return sum(map(bytes_of, [*parts, *self.controlnets.networks, *checker]))

    def run(self, canvases: Sequence[Canvas], options: DiffusionStylize) -> list[Styled | ImageError]:
        """Each canvas in the style of the options, or the error of that image alone. All canvases must have the same size.

        On the CPU, and with `deterministic`, images run one by one, as a kernel's rounding depends on the batch. Raises
        OutOfMemory and OperationFailed.
        """
        alone = self._on_cpu or options.deterministic
        with _translated(), _repeatable(on_cpu=self._on_cpu, deterministic=options.deterministic), torch.no_grad():
            self.loras.use(options.loras)
            # An uncompiled model runs the whole batch at once, so that the memory for this batch size can be measured.
            largest = 1 if alone else LARGEST_BATCH
            batches = parts(len(canvases), largest) if alone or self._compiled else [slice(None)]
            return [result for batch in batches for result in self._run(canvases[batch], options)]

    def relieve(self, level: int) -> bool:
        """Apply the first `level` memory-saving measures and no others: VAE in slices and tiles, attention in slices.

        Each costs time. Returns False, and changes nothing, if there are fewer.
        """
        if level > len(RELIEFS):
            return False
        if level == self._relieved:
            return True
        vae, self._relieved = self._text.vae, level
        (vae.enable_slicing if level > 0 else vae.disable_slicing)()
        for part in (self._text.unet, *self.controlnets.networks):
            self._slice_attention(part)
        return True

    def _run(self, canvases: Sequence[Canvas], options: DiffusionStylize) -> list[Styled | ImageError]:
        height, width = canvases[0].pixels.shape[:2]
        tiled = self._relieved > 0 or height * width > TILED_ABOVE
        (self._text.vae.enable_tiling if tiled else self._text.vae.disable_tiling)()
        pipe = self._pipe(options)
        # One generator per image, on the CPU, where the same seed gives the same noise on every machine.
        generators = [torch.Generator().manual_seed(canvas.seed) for canvas in canvases]
        latents = pipe(
            **self._pictures(canvases, options, generators),
            **self.prompts.of(options).arguments(len(canvases)),
            num_inference_steps=options.timesteps,
            guidance_scale=options.cfg,
            generator=generators,
            output_type="latent",
        ).images
        made = self._latents.decoded(latents)
        finite = torch.isfinite(made).flatten(1).all(1).tolist()
        images = (made.float().nan_to_num() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        refused = self.checker.refuses(images) if self.checker else [False] * len(canvases)
        return [
            self._checked(image, options, finite=fine, refused=unsafe)
            for image, fine, unsafe in zip(images, finite, refused, strict=True)
        ]

    def _checked(self, image: Pixels, options: DiffusionStylize, *, finite: bool, refused: bool) -> Styled | ImageError:
        if not finite:
            return OperationFailed(f"the model's output is not finite: {self._suspects(options)}")
        if refused:
            return UnsafeContent("the safety checker rejected the result for this image")
        return Styled(image)

    def _pipe(self, options: DiffusionStylize) -> Any:
        """diffusers' pipeline for a job's mode and controls: a shell around the same parts, which keeps no ControlNet alive."""
        given = {**self._architecture.arguments, **self._text.components, "scheduler": self._schedulers[options.scheduler]}
        if options.control:
            given["controlnet"] = self.controlnets.of([control.name for control in options.control])
        pipe = self._architecture.kind(options.mode, controlled=bool(options.control))(**given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _pictures(
        self, canvases: Sequence[Canvas], options: DiffusionStylize, generators: Sequence[torch.Generator]
    ) -> dict[str, Any]:
        """The arguments of a pipeline's call that depend on its mode and controls."""
        given: dict[str, Any] = {}
        image_to_image = options.mode == "image-to-image"
        if options.control:
            pictures = [self._on_device(each) for each in zip(*(canvas.controls for canvas in canvases), strict=True)]
            several = len(pictures) > 1
            given["control_image" if image_to_image else "image"] = pictures if several else pictures[0]
            given["controlnet_conditioning_scale"] = options.weights if several else options.weights[0]
        elif not image_to_image:
            given["height"], given["width"] = canvases[0].pixels.shape[:2]
        if image_to_image:
            pixels = self._on_device([canvas.pixels for canvas in canvases])
            given |= {"image": self._latents.encoded(pixels, generators), "strength": options.strength}
        return given

    def _warm_up(self, width: int, height: int) -> None:
        """Compile for one image size before any image waits for it: with and without guidance, in batches of all sizes.

        Batches that don't fit into memory are skipped, but a single image must fit.
        """
        blank = np.zeros((height, width, 3), np.uint8)
        control = self._usual_control()
        canvas = Canvas(blank, (blank,) * len(control), seed=0)
        for cfg in (2.0, 1.0):
            options = DiffusionStylize(model=self._model, steps=1, cfg=cfg, control=control)
            for power in range(1 if self._on_cpu else LARGEST_BATCH.bit_length()):
                if not self._fit([canvas] * 2**power, options):
                    break

    def _usual_control(self) -> tuple[Control, ...]:
        """The default control, if its ControlNet is here."""
        usual = DiffusionStylize(model=self._model).control
        try:
            for control in usual:
                self._find(control.name)
        except ModelUnavailable:
            return ()
        return usual

    def _fit(self, canvases: Sequence[Canvas], options: DiffusionStylize) -> bool:
        """Whether the canvases fit into memory, tried by running them. Raises OutOfMemory if a single one does not."""
        try:
            self.run(canvases, options)
        except OutOfMemory:
            if len(canvases) == 1:
                raise
        else:
            return True
        give_up_caches()
        return False

    def _on_device(self, pictures: Sequence[Pixels | Grey]) -> torch.Tensor:
        """float32 [images, 3, h, w], 0 to 1, from uint8 [h, w] or [h, w, 3]; only bytes are copied to the GPU."""
        planes = [each if each.ndim == 3 else each[..., None] for each in pictures]
        channels = max(each.shape[2] for each in planes)
        stacked = torch.from_numpy(np.stack([np.broadcast_to(each, (*each.shape[:2], channels)) for each in planes]))
        return (stacked.to(self._device).permute(0, 3, 1, 2).to(torch.float32) / 255).expand(-1, 3, -1, -1)

    def _place(self, network: Any) -> None:
        """Move a ControlNet to the device, as the other parts."""
        network.to(self._device)
        if not self._on_cpu:
            network.to(memory_format=torch.channels_last)
        if self._compiled:
            _compile(network)
        self._slice_attention(network)

    def _slice_attention(self, part: Any) -> None:
        part.set_attention_slice("auto" if self._relieved > 1 else None)

    def _load(self, device: Device, vae: str | None) -> Any:
        checker = folder_of(device.weights, repository(CHECKER)) if device.diffusion.safety_checker else None
        for library in (diffusers, transformers):  # their messages would end up in the log; notes report what matters
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        base = self._base
        try:
            parts = dict(self._architecture.arguments)
            if base.vae is not None:
                parts["vae"] = self._load_vae(base.vae, vae)
            self.checker = SafetyChecker(checker, self._dtype, self._device) if checker else None
            pipe = self._architecture.text_to_image.from_pretrained(base.folder, **parts, **from_disk(base.folder, self._dtype))
            if self._architecture.vae_overflows and pipe.vae.config.force_upcast and self._dtype == torch.float16:
                pipe.vae.to(torch.float32)
            pipe.to(self._device)
        except (ModelUnavailable, SoftTimeLimitExceeded):
            raise
        except Exception as error:  # the files may contain anything
            if is_out_of_memory(error):
                raise OutOfMemory(f"the model {self._model} does not fit into memory: {sentence(error)}") from error
            names = [self._model, *([CHECKER] if checker else [])]
            hint = f"check it with `imagemill models verify` or get it again with {getting(*names)}"
            raise ConfigurationError(
                f"the model {self._model} can't be loaded from {base.folder.parent} ({sentence(error)}): {hint}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        if not self._on_cpu:
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
        return pipe

    def _load_vae(self, folder: Path, part: str | None) -> Any:
        """A VAE of its own folder: `part` if the job has named it, or else the model's."""
        try:
            vae = AutoencoderKL.from_pretrained(folder, **from_disk(folder, self._dtype))
            check_finite(vae)
        except Exception as error:  # the files may contain anything
            if part is None or isinstance(error, SoftTimeLimitExceeded) or is_out_of_memory(error):
                raise
            raise ModelUnavailable.of_part(part, f"the VAE {part} can't be used from {folder}: {sentence(error)}") from error
        if part is not None and vae.config.latent_channels != LATENT_CHANNELS:
            reason = (
                f"the VAE {part} does not fit: its latents have {vae.config.latent_channels} channels, not {LATENT_CHANNELS}"
            )
            raise ModelUnavailable.of_part(part, reason, misfit=True)
        return vae

    def _suspects(self, options: DiffusionStylize) -> str:
        """What of a job may be the cause of values that are not finite; of the catalogue's files, none is."""
        loras = [lora.name for lora in options.loras]
        files = [name for name in (self._model, *options.companions(self._base.family)) if name not in {*TAKEN, *loras}]
        known = "overflow in half precision" if self._dtype == torch.float16 else "be damaged"
        causes = [f"the weight of {' or '.join(loras)} may be too high"] * bool(loras)
        causes += ["cfg may be too high"] * (options.cfg > 1) + [f"{' or '.join(files)} may {known}"] * bool(files)
        return ", or ".join(causes) or "the prompt's weights may be too high"


def dtype_of(device: Device) -> torch.dtype:
    """The model's precision: half precision on a GPU unless the settings override it."""
    return torch_dtype(device, torch.float16)


def parts(count: int, largest: int) -> Iterator[slice]:
    """`count` images in batches of powers of two, largest first, so that a model is compiled for few shapes."""
    start = 0
    while start < count:
        size = min(largest, 1 << (count - start).bit_length() - 1)
        yield slice(start, start + size)
        start += size


def _compile(part: Any) -> None:
    part.compile(dynamic=False, recompile_limit=MOST_SHAPES, isolate_recompiles=True)


@contextmanager
def _repeatable(*, on_cpu: bool, deterministic: bool) -> Iterator[None]:
    """One thread on the CPU, as splitting sums over threads changes their last bits; deterministic algorithms if requested."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if on_cpu:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(before or deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"there was not enough memory for the model: {sentence(error)}") from error
        raise
