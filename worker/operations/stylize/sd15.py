"""Stable Diffusion 1.5."""

from __future__ import annotations

from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from imagemill.worker.operations.stylize.architecture import Architecture

SD15 = Architecture(
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    # safety.py checks the results of all families.
    arguments={"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False},
)
