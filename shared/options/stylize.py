"""Options of `stylize`, per engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from imagemill.shared.diffusion_models import BASES, FAMILIES, family_of_controlnet, kind_of_control
from imagemill.shared.options.base import STORED, EngineOptions, LongEdge, Model, ModelName
from imagemill.shared.prompts import check


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

    def ignored(self, filled: Collection[str] = ()) -> dict[str, str]:  # noqa: ARG002
        return {} if self.style == "pencil-sketch" else {"colour": f"style is {self.style}"}


LONGEST_PROMPT = 2000
"""Characters. They are about 450 tokens of English, or six pieces, and none of it is cut."""

MOST_TIMESTEPS = 1000
"""Stable Diffusion was trained with this many; the LCM LoRA's schedule has 50."""
MOST_LCM_TIMESTEPS = 50


LORA_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


class Lora(Model):
    """A LoRA adapter, by file name, with its weight."""

    name: str = Field(pattern=LORA_NAME)
    weight: float = Field(1.0, ge=-4, le=4)


class Control(Model):
    """What a result keeps of its source: a kind of control, or a ControlNet by name, with its weight.

    Without a weight, it uses `control_scale`.
    """

    name: ModelName
    weight: float | None = Field(None, ge=0, le=2)

    def __str__(self) -> str:
        return self.name if self.weight is None else f"{self.name}:{self.weight:g}"

    @property
    def kind(self) -> str | None:
        """The kind of its pictures; None for a ControlNet of the operator's own, which only nodes know."""
        return kind_of_control(self.name)


def _split(value: Any) -> Any:
    """Names and weights from `name:0.8;other` or a mapping of names to weights; None means none."""
    if value is None or value == "none":
        return ()
    if isinstance(value, str):
        parts = [part.strip().partition(":") for part in value.split(";") if part.strip()]
        return [{"name": name.strip()} | ({"weight": weight.strip()} if mark else {}) for name, mark, weight in parts]
    if isinstance(value, Mapping):
        return [{"name": name, "weight": weight} for name, weight in value.items()]
    return value


Loras = Annotated[tuple[Lora, ...], BeforeValidator(_split), Field(max_length=8)]
"""Adapters as a list, a mapping, or text separated by `;`."""

Controls = Annotated[tuple[Control, ...], BeforeValidator(_split), Field(max_length=2)]
"""The same for controls."""


class DiffusionStylize(EngineOptions):
    """Stable Diffusion 1.5 or SDXL, with up to two ControlNets that keep what the job chooses of the source."""

    engine: Literal["diffusion"] = "diffusion"
    model: ModelName = Field(
        "sd15-canny",
        description="base model: your own, or from the catalogue; sd15-canny is sd15 with the ControlNet for canny",
    )
    vae: ModelName | None = Field(None, description="VAE to use instead of the base model's; 'none': its own")
    prompt: str = Field(
        "", max_length=LONGEST_PROMPT, description="describes the result; (word:1.3) weights a word, BREAK starts a new piece"
    )
    negative_prompt: str = Field(
        "", max_length=LONGEST_PROMPT, description="describes what to avoid, with the same syntax; ignored if cfg is 1"
    )
    mode: Literal["image-to-image", "text-to-image"] = Field(
        "image-to-image", description="start from the source with added noise, or only from noise and the control picture"
    )
    strength: float = Field(
        0.5,
        ge=0.05,
        le=1,
        description="share of noise that image-to-image starts with; more noise preserves less of the source",
    )
    steps: int = Field(25, ge=1, le=150, description="denoising steps, independent of strength")
    cfg: float = Field(7.5, ge=1, le=30, description="how closely to follow the prompt; at 1 a step takes half the time")
    scheduler: Literal["unipc", "ddim", "euler", "euler-trailing", "lcm"] = Field(
        "unipc", description="noise schedule; lcm needs an LCM LoRA, and SDXL Turbo and Lightning need euler-trailing"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the noise")
    seed_policy: Literal["fixed", "per-item", "url"] = Field(
        "fixed",
        description="fixed: the same noise for all images; per-item: by position in the list; url: by URL without its query",
    )
    control: Controls = Field(
        (Control(name="canny"),),
        description="what to keep of the source, one or two of canny, scribble, lineart, tile or added ControlNets, "
        "with weights: canny:0.8;tile:0.4; 'none': nothing",
    )
    control_scale: float = Field(0.8, ge=0, le=2, description="weight of controls that don't have one")
    control_image: str | None = Field(
        None, description="URL of a control picture for all images, in place of the first one drawn from the source"
    )
    canny_low: int = Field(100, ge=0, le=1000, description="edges continue while the gradient is above this")
    canny_high: int = Field(200, ge=0, le=1000, description="edges start where the gradient is above this")
    loras: Loras = Field((), description="LoRAs and their weights, as name:0.8;other")
    size: int | None = Field(
        None,
        ge=64,
        le=2048,
        multiple_of=8,
        description="area that the model works on, as the side of a square in pixels; "
        "'none': what it was trained on, 1024 for SDXL and 512 for SDXL Turbo and Stable Diffusion 1.5",
    )
    crop: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,3}x[1-9]\d{0,3}$",
        description="first crop the centre to this aspect ratio, such as 1x1 or 4x3",
    )
    long_edge: LongEdge | None = Field(None, description="longest edge of the result in pixels; 'none': source size")
    reference: str | None = Field(None, description="URL of an image whose colours are transferred to every result")
    deterministic: bool = Field(False, description="process one image at a time with deterministic algorithms; slower on a GPU")

    @model_validator(mode="before")
    @classmethod
    def _take_defaults(cls, values: Any) -> Any:
        """Fill in what the base model needs and the job does not set."""
        base = BASES.get(str(values.get("model"))) if isinstance(values, Mapping) else None
        return values if base is None else {**base.defaults, **values}

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _check_prompt(cls, prompt: str, info: ValidationInfo) -> str:
        if info.context != STORED:
            check(prompt)
        return prompt

    @model_validator(mode="after")
    def _check_combination(self) -> DiffusionStylize:
        if self.canny_low > self.canny_high:
            raise ValueError("canny_low may not be above canny_high")
        for option, chosen in (("loras", self.loras), ("control", self.control)):
            names = [one.name for one in chosen]
            if len(set(names)) < len(names):
                raise ValueError(f"{option} contains the same name twice")
        self._check_controls()
        most = MOST_LCM_TIMESTEPS if self.scheduler == "lcm" else MOST_TIMESTEPS
        if self.timesteps > most:
            raise ValueError(f"steps by strength may be at most {most} for the scheduler {self.scheduler}")
        return self

    def _check_controls(self) -> None:
        if self.control_image is not None and not self.control:
            raise ValueError("control_image needs a control")
        base = BASES.get(self.model)
        for control in self.control:
            family = family_of_controlnet(control.name)
            if base is not None and family is not None and family != base.family:
                raise ValueError(f"{control.name} is for {FAMILIES[family].title}, unlike the model {self.model}")

    @property
    def weights(self) -> list[float]:
        """The weight of each control."""
        return [self.control_scale if control.weight is None else control.weight for control in self.control]

    def companions(self, family: str | None = None) -> list[str]:
        """The same; `family` is that of a model of the operator's own."""
        family = BASES[self.model].family if self.model in BASES else family
        kinds = FAMILIES[family].controlnets if family is not None else dict.fromkeys(FAMILIES["sd15"].controlnets)
        controlnets = [kinds.get(control.name, control.name) for control in self.control]
        return [name for name in (*controlnets, self.vae, *(lora.name for lora in self.loras)) if name is not None]

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"control_image"})

    def ignored(self, filled: Collection[str] = ()) -> dict[str, str]:  # noqa: ARG002
        ignored = {"negative_prompt": "cfg is 1"} if self.cfg == 1 else {}
        ignored |= {"strength": "mode is text-to-image"} if self.mode == "text-to-image" else {}
        if all(control.weight is not None for control in self.control):
            ignored["control_scale"] = "every control has its own weight" if self.control else "control is none"
        drawn = self.control[1:] if self.control_image is not None else self.control
        if all(control.kind not in ("canny", None) for control in drawn):
            ignored |= dict.fromkeys(("canny_low", "canny_high"), "no canny edges are drawn")
        return ignored

    @property
    def timesteps(self) -> int:
        """Length of the full schedule, of which image-to-image runs the last `steps`."""
        if self.mode == "text-to-image":
            return self.steps
        whole = math.ceil(self.steps / self.strength)
        return whole if int(whole * self.strength) >= self.steps else whole + 1  # as diffusers counts
