"""Options of `stylize`, per engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from imagemill.shared.options.base import EngineOptions, LongEdge, Model, ModelName


class OpencvStylize(EngineOptions):
    """OpenCV's non-photorealistic filters and Reinhard's colour transfer."""

    engine: Literal["opencv"] = "opencv"
    style: Literal["stylization", "pencil-sketch", "detail", "colour-transfer"] = Field("stylization", description="filter")
    colour: bool = Field(False, description="draw pencil sketches in colour")
    reference: str | None = Field(None, description="URL of the image that colour-transfer takes its colours from")
    strength: float = Field(1.0, ge=0, le=1, description="share of the filtered image in the result")
    long_edge: LongEdge | None = Field(None, description="longest edge of the result in pixels; 'none': source size")

    @model_validator(mode="after")
    def _check_reference(self) -> OpencvStylize:
        if (self.style == "colour-transfer") != (self.reference is not None):
            raise ValueError("style=colour-transfer and reference=URL go together")
        return self


MOST_TIMESTEPS = 1000
"""Stable Diffusion was trained with this many; the LCM LoRA's schedule has 50."""
MOST_LCM_TIMESTEPS = 50


class Lora(Model):
    """A LoRA adapter, by file name, with its weight."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    weight: float = Field(1.0, ge=-4, le=4)


def _split_loras(value: Any) -> Any:
    """Adapters from `name:0.8;other` or a mapping of names to weights; None means no adapters."""
    if value is None:
        return ()
    if isinstance(value, str):
        parts = [part.strip().partition(":") for part in value.split(";") if part.strip()]
        return [{"name": name.strip()} | ({"weight": weight.strip()} if mark else {}) for name, mark, weight in parts]
    if isinstance(value, Mapping):
        return [{"name": name, "weight": weight} for name, weight in value.items()]
    return value


Loras = Annotated[tuple[Lora, ...], BeforeValidator(_split_loras), Field(max_length=8)]
"""Adapters as a list, a mapping, or text separated by `;`."""


class DiffusionStylize(EngineOptions):
    """Stable Diffusion 1.5 with a ControlNet that preserves the source's edges."""

    engine: Literal["diffusion"] = "diffusion"
    model: ModelName = Field("sd15-canny", description="base model and ControlNet")
    prompt: str = Field("", max_length=2000, description="describes the result; only the first 75 CLIP tokens are used")
    negative_prompt: str = Field("", max_length=2000, description="describes what to avoid; ignored if cfg is 1")
    mode: Literal["image-to-image", "text-to-image"] = Field(
        "image-to-image", description="start from the source with added noise, or only from noise and the source's edges"
    )
    strength: float = Field(
        0.5,
        ge=0.05,
        le=1,
        description="share of noise that image-to-image starts with; more noise preserves less of the source",
    )
    steps: int = Field(25, ge=1, le=150, description="denoising steps, independent of strength")
    cfg: float = Field(7.5, ge=1, le=30, description="how closely to follow the prompt; at 1 a step takes half the time")
    scheduler: Literal["unipc", "ddim", "euler", "lcm"] = Field("unipc", description="noise schedule; lcm needs an LCM LoRA")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the noise")
    seed_policy: Literal["fixed", "per-item", "url"] = Field(
        "fixed",
        description="fixed: the same noise for all images; per-item: by position in the list; url: by URL without its query",
    )
    control_scale: float = Field(0.8, ge=0, le=2, description="weight of the source's edges")
    canny_low: int = Field(100, ge=0, le=1000, description="edges continue while the gradient is above this")
    canny_high: int = Field(200, ge=0, le=1000, description="edges start where the gradient is above this")
    loras: Loras = Field((), description="LoRAs and their weights, as name:0.8;other")
    size: int = Field(
        512, ge=64, le=2048, multiple_of=8, description="area that the model works on, as the side of a square in pixels"
    )
    crop: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,3}x[1-9]\d{0,3}$",
        description="first crop the centre to this aspect ratio, such as 1x1 or 4x3",
    )
    long_edge: LongEdge | None = Field(None, description="longest edge of the result in pixels; 'none': source size")
    reference: str | None = Field(None, description="URL of an image whose colours are transferred to every result")
    deterministic: bool = Field(False, description="process one image at a time with deterministic algorithms; slower on a GPU")

    @model_validator(mode="after")
    def _check_combination(self) -> DiffusionStylize:
        if self.canny_low > self.canny_high:
            raise ValueError("canny_low may not be above canny_high")
        names = [lora.name for lora in self.loras]
        if len(set(names)) < len(names):
            raise ValueError("loras contains the same name twice")
        most = MOST_LCM_TIMESTEPS if self.scheduler == "lcm" else MOST_TIMESTEPS
        if self.timesteps > most:
            raise ValueError(f"steps by strength may be at most {most} for the scheduler {self.scheduler}")
        return self

    @property
    def timesteps(self) -> int:
        """Length of the full schedule, of which image-to-image runs the last `steps`."""
        if self.mode == "text-to-image":
            return self.steps
        whole = math.ceil(self.steps / self.strength)
        return whole if int(whole * self.strength) >= self.steps else whole + 1  # as diffusers counts
