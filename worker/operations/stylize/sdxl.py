"""SDXL, also as Turbo and with the Lightning LoRA: two text encoders, and sizes among the inputs."""

from __future__ import annotations

from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from imagemill.worker.operations.stylize.architecture import Architecture

SDXL = Architecture(
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    arguments={"feature_extractor": None, "image_encoder": None, "add_watermarker": False},
    vae_overflows=True,
)
