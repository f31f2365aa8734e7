"""Stable Diffusion with a ControlNet, loaded once and shared by every style, scheduler and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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

from imagemill.shared.errors import ConfigurationError, ImageError, OperationFailed, OutOfMemory, UnsafeContent, sentence
from imagemill.shared.options.stylize import Control, DiffusionStylize
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.hardware.torch_device import bytes_of, torch_device, torch_dtype
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.diffusion_models import base_of, controlnet_of
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.operations.open_model import getting
from imagemill.worker.operations.stylize.architecture import Architecture
from imagemill.worker.operations.stylize.controlnets import ControlNets
from imagemill.worker.operations.stylize.latents import Latents
from imagemill.worker.operations.stylize.loading import from_disk
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

    Raises ConfigurationError if its files are missing, damaged or of another kind, or if torch can't use the device, and
    OutOfMemory if the model does not fit.
    """

    def __init__(self, model: str, device: Device, vae: str | None = None) -> None:
        self._device, self._dtype = torch_device(device, model), dtype_of(device)
        self._on_cpu, self._compiled = device.gpu is None, device.compile
        self._model, self._base = model, base_of(device.weights, model, vae)
        self._architecture = ARCHITECTURES[self._base.family]
        self._text = self._load(device)
        own = self._text.scheduler.config
        self._schedulers = {name: kind.from_config(own, **changes) for name, (kind, changes) in SCHEDULERS.items()}
        self._latents = Latents(self._text.vae, self._dtype)
        self.prompts = Prompts(self._text)
        self.loras = Loras(self._text, device.weights, device.diffusion.loras, self.prompts.forget)
        self._relieved = 0
        self.bytes = sum(bytes_of(part) for part in self._text.components.values() if isinstance(part, torch.nn.Module))
        self._find = partial(controlnet_of, device.weights, self._base.family)
        width = self._text.unet.config.cross_attention_dim
        limit = device.diffusion.controlnets
        self.controlnets = ControlNets(model, width, self._dtype, limit, self._find, self._place)
        if self._compiled:
            for part in (self._text.unet, self._text.vae.decoder):
                _compile(part)
            for size in device.diffusion.warm_up:
                self._warm_up(*map(int, size.split("x")))

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
            _checked(image, finite=fine, refused=unsafe) for image, fine, unsafe in zip(images, finite, refused, strict=True)
        ]

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
        except OperationFailed:
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

    def _load(self, device: Device) -> Any:
        checker = folder_of(device.weights, repository(CHECKER)) if device.diffusion.safety_checker else None
        for library in (diffusers, transformers):  # their messages would end up in the log; notes report what matters
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        base = self._base
        try:
            self.checker = SafetyChecker(checker, self._dtype, self._device) if checker else None
            parts = dict(self._architecture.arguments)
            if base.vae is not None:
                parts["vae"] = AutoencoderKL.from_pretrained(base.vae, **from_disk(base.vae, self._dtype))
            pipe = self._architecture.text_to_image.from_pretrained(base.folder, **parts, **from_disk(base.folder, self._dtype))
            if self._architecture.vae_overflows and pipe.vae.config.force_upcast and self._dtype == torch.float16:
                pipe.vae.to(torch.float32)
            pipe.to(self._device)
        except SoftTimeLimitExceeded:
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


def _checked(image: Pixels, *, finite: bool, refused: bool) -> Styled | ImageError:
    if not finite:
        return OperationFailed("the model's output is not finite: a LoRA's weight or cfg may be too high")
    if refused:
        return UnsafeContent("the safety checker rejected the result for this image")
    return Styled(image)


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
