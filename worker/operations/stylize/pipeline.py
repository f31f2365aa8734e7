"""Stable Diffusion with a ControlNet, loaded once and shared by every style, scheduler and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from billiard.exceptions import SoftTimeLimitExceeded
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from imagemill.shared.errors import ConfigurationError, ImageError, OperationFailed, OutOfMemory, UnsafeContent, sentence
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.hardware.torch_device import torch_device, torch_dtype
from imagemill.worker.imaging.picture import Grey, Pixels
from imagemill.worker.models.catalogue import CONTROLNETS, repository
from imagemill.worker.models.diffusion_models import base_of, controlnet_of
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.operations.open_model import getting
from imagemill.worker.operations.stylize.loras import Loras
from imagemill.worker.operations.stylize.prompts import Prompts

LARGEST_BATCH = 16
TILED_ABOVE = 1024 * 1024
"""Pixels above which the VAE works in tiles, as it would need several times the UNet's memory."""

MOST_SHAPES = 128
"""Most shapes and styles that each part is compiled for: 17 buckets in batches of six sizes are 102. Torch's own limit is 8
for all parts together, above which it silently runs uncompiled."""

RELIEFS = ("VAE in slices and tiles", "attention in slices")

SCHEDULERS = {"unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "lcm": LCMScheduler}
CHECKER = "sd15-safety-checker"


@dataclass(frozen=True)
class Canvas:
    """One input: RGB uint8 [h, w, 3] and its edges [h, w], 0 or 255, both of a bucket's size, and the seed of the noise."""

    pixels: Pixels
    edges: Grey
    seed: int


@dataclass(frozen=True)
class Styled:
    """One output: RGB uint8 [h, w, 3], and whether the prompt was truncated."""

    pixels: Pixels
    prompt_cut: bool


class Pipeline:
    """One loaded model. For one thread.

    Raises ConfigurationError if its files are missing, damaged or of another kind, or if torch can't use the device, and
    OutOfMemory if the model does not fit.
    """

    def __init__(self, model: str, device: Device) -> None:
        self._device = torch_device(device, model)
        self._on_cpu, self._compiled = device.gpu is None, device.compile
        self._text = self._load(model, device)
        self._text.set_progress_bar_config(disable=True)
        self._image = StableDiffusionControlNetImg2ImgPipeline(**self._text.components, requires_safety_checker=False)
        self._image.set_progress_bar_config(disable=True)
        self._schedulers = {name: kind.from_config(self._text.scheduler.config) for name, kind in SCHEDULERS.items()}
        self.prompts = Prompts(self._text)
        self.loras = Loras(self._text, device.weights, device.diffusion.loras, self.prompts.forget)
        self._relieved = 0
        if device.compile:
            for part in (self._text.unet, self._text.controlnet, self._text.vae.decoder):
                part.compile(dynamic=False, recompile_limit=MOST_SHAPES, isolate_recompiles=True)
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
        vae, self._relieved = self._text.vae, level
        (vae.enable_slicing if level > 0 else vae.disable_slicing)()
        (self._text.enable_attention_slicing if level > 1 else self._text.disable_attention_slicing)()
        return True

    def _run(self, canvases: Sequence[Canvas], options: DiffusionStylize) -> list[Styled | ImageError]:
        height, width = canvases[0].edges.shape
        tiled = self._relieved > 0 or height * width > TILED_ABOVE
        (self._text.vae.enable_tiling if tiled else self._text.vae.disable_tiling)()
        embeddings = self.prompts.of(options)
        pipe = self._text if options.mode == "text-to-image" else self._image
        pipe.scheduler = self._schedulers[options.scheduler]
        edges = self._on_device([canvas.edges[..., None] for canvas in canvases]).expand(-1, 3, -1, -1)
        if pipe is self._text:
            images_in: dict[str, Any] = {"image": edges}
        else:
            pixels = self._on_device([canvas.pixels for canvas in canvases])
            images_in = {"image": pixels, "control_image": edges, "strength": options.strength}
        output = pipe(
            **images_in,
            prompt_embeds=_repeated(embeddings.prompt, len(canvases)),
            negative_prompt_embeds=_repeated(embeddings.negative, len(canvases)),
            num_inference_steps=options.timesteps,
            guidance_scale=options.cfg,
            controlnet_conditioning_scale=options.control_scale,
            # One generator per image, on the CPU, where the same seed gives the same noise on every machine.
            generator=[torch.Generator().manual_seed(canvas.seed) for canvas in canvases],
            output_type="pt",
        )
        finite = torch.isfinite(output.images).flatten(1).all(1).tolist()
        images = (output.images.float().nan_to_num() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        refused = output.nsfw_content_detected or [False] * len(canvases)
        return [
            _checked(image, finite=fine, refused=unsafe, cut=embeddings.cut)
            for image, fine, unsafe in zip(images, finite, refused, strict=True)
        ]

    def _warm_up(self, width: int, height: int) -> None:
        """Compile for one image size before any image waits for it: with and without guidance, in batches of all sizes.

        Batches that don't fit into memory are skipped, but a single image must fit.
        """
        canvas = Canvas(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8), seed=0)
        for cfg in (2.0, 1.0):
            for power in range(1 if self._on_cpu else LARGEST_BATCH.bit_length()):
                if not self._fit([canvas] * 2**power, DiffusionStylize(steps=1, cfg=cfg)):
                    break

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

    def _on_device(self, pictures: Sequence[Pixels]) -> torch.Tensor:
        """float32 [images, channels, h, w], 0 to 1, from uint8 [h, w, channels]; only bytes are copied to the GPU."""
        stacked = torch.from_numpy(np.stack(pictures)).to(self._device)
        return stacked.permute(0, 3, 1, 2).to(torch.float32) / 255

    def _load(self, model: str, device: Device) -> Any:
        found = base_of(device.weights, model)
        base, controlnet = found.folder, controlnet_of(device.weights, CONTROLNETS[found.family])
        checker = folder_of(device.weights, repository(CHECKER)) if device.diffusion.safety_checker else None
        dtype = dtype_of(device)
        for library in (diffusers, transformers):  # their messages would end up in the log; notes report what matters
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        names = [model, *([CHECKER] if checker else [])]
        try:
            parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
            if checker:
                parts = _checker(checker, dtype)
            pipe = StableDiffusionControlNetPipeline.from_pretrained(
                base,
                controlnet=ControlNetModel.from_pretrained(controlnet, **_from_disk(controlnet, dtype)),
                requires_safety_checker=checker is not None,
                **parts,
                **_from_disk(base, dtype),
            ).to(self._device)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # the files may contain anything
            if is_out_of_memory(error):
                raise OutOfMemory(f"the model {model} does not fit into memory: {sentence(error)}") from error
            hint = f"check it with `imagemill models verify` or get it again with {getting(*names)}"
            raise ConfigurationError(
                f"the model {model} can't be loaded from {base.parent} ({sentence(error)}): {hint}"
            ) from error
        if device.gpu is not None:
            for part in (pipe.unet, pipe.controlnet, pipe.vae):
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


def _from_disk(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for loading local safetensors only, in half precision if they were pulled in it."""
    half = any(folder.rglob("*.fp16.safetensors"))
    return dict(dtype=dtype, variant="fp16" if half else None, use_safetensors=True, local_files_only=True)


def _checker(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    arguments = _from_disk(folder, dtype)
    return {
        "safety_checker": StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker", **arguments),
        "feature_extractor": transformers.CLIPImageProcessor.from_pretrained(
            folder / "feature_extractor", local_files_only=True
        ),
    }


def _repeated(embedding: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return None if embedding is None else embedding.repeat(count, 1, 1)


def _checked(image: Pixels, *, finite: bool, refused: bool, cut: bool) -> Styled | ImageError:
    if not finite:
        return OperationFailed("the model's output is not finite: a LoRA's weight or cfg may be too high")
    if refused:
        return UnsafeContent("the safety checker rejected the result for this image")
    return Styled(image, cut)


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
