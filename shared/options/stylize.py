"""Options of `stylize`, per engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from imagemill.shared.options.base import EngineOptions, LongEdge, Model


class OpencvStylize(EngineOptions):
    """OpenCV's non-photorealistic filters, and Reinhard's colour transfer."""

    engine: Literal["opencv"] = "opencv"
    style: Literal["stylization", "pencil-sketch", "detail", "colour-transfer"] = Field(
        "stylization", description="which filter"
    )
    colour: bool = Field(False, description="a pencil sketch in colour")
    reference: str | None = Field(None, description="address of the image whose colours are taken on (colour-transfer)")
    strength: float = Field(1.0, ge=0, le=1, description="share of the filtered image in the result")
    long_edge: LongEdge | None = Field(None, description="longest edge of the result in pixels; 'none' keeps the source's size")

    @model_validator(mode="after")
    def _reference_where_needed(self) -> OpencvStylize:
        if (self.style == "colour-transfer") != (self.reference is not None):
            raise ValueError("style=colour-transfer and reference=ADDRESS go together")
        return self


DiffusionModel = Literal["sd15-canny"]
"""A base and the ControlNet that goes with it: Stable Diffusion 1.5 with control_v11p_sd15_canny."""

MOST_TIMESTEPS = 1000
"""Timesteps that Stable Diffusion was trained with; of the LCM LoRA's schedule 50 are left."""
MOST_LCM_TIMESTEPS = 50


class Lora(Model):
    """An adapter, by the name of its file, and how much it counts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    weight: float = Field(1.0, ge=-4, le=4)


def _split_loras(value: Any) -> Any:
    """From `name:0.8;other` or a mapping of names to weights; None stands for no adapter."""
    if value is None:
        return ()
    if isinstance(value, str):
        parts = [part.strip().partition(":") for part in value.split(";") if part.strip()]
        return [{"name": name.strip()} | ({"weight": weight.strip()} if mark else {}) for name, mark, weight in parts]
    if isinstance(value, Mapping):
        return [{"name": name, "weight": weight} for name, weight in value.items()]
    return value


Loras = Annotated[tuple[Lora, ...], BeforeValidator(_split_loras), Field(max_length=8)]
"""Adapters as a list, as a mapping, or as one text with `;` between them."""


class DiffusionStylize(EngineOptions):
    """Stable Diffusion 1.5 and a ControlNet that holds the source's edges."""

    engine: Literal["diffusion"] = "diffusion"
    model: DiffusionModel = Field("sd15-canny", description="base and ControlNet")
    prompt: str = Field("", max_length=2000, description="what the images shall look like; 75 of CLIP's tokens count")
    negative_prompt: str = Field("", max_length=2000, description="what they shall not look like; counts where cfg is above 1")
    mode: Literal["image-to-image", "text-to-image"] = Field(
        "image-to-image", description="start from the source with noise over it, or from noise and the source's edges alone"
    )
    strength: float = Field(
        0.5, ge=0.05, le=1, description="share of noise that image-to-image starts with: the more, the less of the source stays"
    )
    steps: int = Field(25, ge=1, le=150, description="denoising steps that are run, whatever the strength")
    cfg: float = Field(7.5, ge=1, le=30, description="how closely the prompt is followed; 1 takes half the time")
    scheduler: Literal["unipc", "ddim", "euler", "lcm"] = Field("unipc", description="lcm needs a LoRA that was made for it")
    seed: int = Field(42, ge=0, lt=2**32, description="where the noise comes from")
    seed_policy: Literal["fixed", "per-item", "url"] = Field(
        "fixed",
        description="the same noise for all images, or another one by place in the list or by address without its query",
    )
    control_scale: float = Field(0.8, ge=0, le=2, description="how much the source's edges count")
    canny_low: int = Field(100, ge=0, le=1000, description="an edge goes on where the gradient is above this")
    canny_high: int = Field(200, ge=0, le=1000, description="an edge begins where the gradient is above this")
    loras: Loras = Field((), description="adapters and their weights, name:0.8;other")
    size: int = Field(
        512, ge=64, le=2048, multiple_of=8, description="side in pixels of a square as large as what the model works on"
    )
    crop: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,3}x[1-9]\d{0,3}$",
        description="cut to these proportions from the middle first, as 1x1 or 4x3",
    )
    long_edge: LongEdge | None = Field(None, description="longest edge of the result in pixels; 'none' keeps the source's size")
    reference: str | None = Field(None, description="address of an image whose colours all results take on")
    deterministic: bool = Field(
        False, description="one image at a time with algorithms that always give the same; slower on a GPU"
    )

    @model_validator(mode="after")
    def _that_go_together(self) -> DiffusionStylize:
        if self.canny_low > self.canny_high:
            raise ValueError("canny_low may not be above canny_high")
        names = [lora.name for lora in self.loras]
        if len(set(names)) < len(names):
            raise ValueError("loras names one twice")
        most = MOST_LCM_TIMESTEPS if self.scheduler == "lcm" else MOST_TIMESTEPS
        if self.timesteps > most:
            raise ValueError(f"steps by strength may be at most {most} for the scheduler {self.scheduler}")
        return self

    @property
    def timesteps(self) -> int:
        """Length of the whole schedule, of which image-to-image runs the last `steps`."""
        if self.mode == "text-to-image":
            return self.steps
        whole = math.ceil(self.steps / self.strength)
        return whole if int(whole * self.strength) >= self.steps else whole + 1  # as diffusers counts
