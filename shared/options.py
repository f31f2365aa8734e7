"""What each operation can be told, per engine: pydantic models, checked when a job is submitted."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shared.errors import InvalidOption
from shared.urls import shown

Operation = Literal["remove-background", "inpaint", "stylize"]
OPERATIONS: tuple[Operation, ...] = ("remove-background", "inpaint", "stylize")

Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
LongEdge = Annotated[int, Field(ge=16, le=65_535)]


ADDRESSES = ("mask", "reference", "background_image")
"""Options whose value is the address of an image."""


class Model(BaseModel):
    """Frozen; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Box(Model):
    """A rectangle to fill, from its top left corner, in pixels or in fractions of the image.

    As text `x,y,width,height`, as JSON a list of four numbers: all at most 1 and at least one
    with a decimal point means fractions, else pixels.
    """

    x: float = Field(ge=0)
    y: float = Field(ge=0)
    width: float = Field(gt=0)
    height: float = Field(gt=0)
    unit: Literal["px", "fraction"] = "px"

    @model_validator(mode="before")
    @classmethod
    def _from_four(cls, value: Any) -> Any:
        if isinstance(value, str):
            parts: list[Any] = [part.strip() for part in value.split(",")]
            if not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
                raise ValueError(f"a box is x,y,width,height in numbers, not {value!r}")
            value = [float(part) if "." in part else int(part) for part in parts]
        if not isinstance(value, list | tuple):
            return value
        if len(value) != 4:
            raise ValueError(f"a box has four numbers, x, y, width and height, not {len(value)}")
        fractions = all(isinstance(n, int | float) and n <= 1 for n in value) and any(isinstance(n, float) for n in value)
        return dict(zip(("x", "y", "width", "height"), value, strict=True), unit="fraction" if fractions else "px")

    @model_validator(mode="after")
    def _fractions_inside(self) -> Box:
        if self.unit == "fraction" and (self.x + self.width > 1.0001 or self.y + self.height > 1.0001):
            raise ValueError("a box in fractions reaches beyond the image")
        return self


def _split_boxes(value: Any) -> Any:
    value = () if value is None else value
    return [part for part in value.split(";") if part.strip()] if isinstance(value, str) else value


def _original(value: Any) -> Any:
    return None if value == "original" else value


Boxes = Annotated[tuple[Box, ...], BeforeValidator(_split_boxes)]
"""Boxes as a list, or as one text with `;` between them; None stands for no box."""


class OpencvRemoveBackground(Model):
    """GrabCut, seeded by a colour model of the image's border and a centre prior."""

    engine: Literal["opencv"] = "opencv"
    long_edge: LongEdge | None = Field(
        1600, description="longest edge of the cut-out in pixels; 'none' keeps the source's size"
    )
    work_edge: int = Field(320, ge=64, le=2048, description="longest edge in pixels at which GrabCut runs")
    iterations: int = Field(3, ge=1, le=20, description="rounds of GrabCut")
    border: float = Field(0.04, gt=0, le=0.25, description="share of each side that is taken as background to learn from")
    feather: float = Field(1.5, ge=0, le=20, description="softness of the edge in pixels of the result")
    background: Colour | None = Field(None, description="colour to put behind the subject, as #rrggbb; 'none' is transparent")


RembgModel = Literal[
    "u2net",
    "u2netp",
    "u2net_human_seg",
    "silueta",
    "isnet-general-use",
    "isnet-anime",
    "birefnet-general",
    "birefnet-general-lite",
]
"""rembg's models that may be used commercially; names as rembg has them."""


class RembgRemoveBackground(Model):
    """rembg's models on onnxruntime."""

    engine: Literal["rembg"] = "rembg"
    model: RembgModel = Field("u2net", description="which model finds the subject")
    exact: bool = Field(False, description="rembg's very pixels, slower: its own scaling and compositing")
    long_edge: Annotated[LongEdge | None, BeforeValidator(_original)] = Field(
        1600, description="longest edge of the cut-out in pixels; 'original' keeps the source's size"
    )
    alpha_matting: bool = Field(False, description="find the edge's transparency by closed-form matting: hair and fur, slowly")
    matting_pixels: int = Field(
        2_560_000,
        ge=10_000,
        le=16_000_000,
        description="pixels that an image to be matted may have, a quarter of them at an unsure edge (2 kB of memory each)",
    )
    matting_seconds: float = Field(
        20.0,
        gt=0,
        le=600,
        description="seconds that matting one image may take, before it gets the plain edge; exact has no such limit",
    )
    clean_rim: bool = Field(True, description="take the old background's colour out of the edge")
    background: Colour | None = Field(None, description="colour to put behind the subject, as #rrggbb; 'none' is transparent")
    background_image: str | None = Field(None, description="address of an image to put behind the subject, scaled to cover")
    crop: bool = Field(False, description="crop to the subject, and to its shadow if that is kept")
    margin: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="room on each side of the cropped subject, as a share of its longer side (0.06 fills 89 %)",
    )
    canvas: int | None = Field(
        None,
        ge=16,
        le=8_000,
        description="side in pixels of a square that the cropped subject and its margin are scaled to fill",
    )
    shadow: bool = Field(
        False, description="keep the subject's shadow on the ground, where the backdrop is plain enough to tell"
    )
    mask_only: bool = Field(
        False,
        description="give the mask in grey (white is the subject) instead of the cut-out; a JPEG's as JPEG, or by --format png",
    )

    @model_validator(mode="after")
    def _that_go_together(self) -> RembgRemoveBackground:
        if self.background is not None and self.background_image is not None:
            raise ValueError("background and background_image exclude each other")
        if self.canvas is not None and not self.crop:
            raise ValueError("canvas needs crop=true")
        if self.mask_only and (self.background or self.background_image or self.shadow):
            raise ValueError("mask_only goes without background, background_image and shadow")
        # What is given is compared with the default: a spec that comes back from the ledger has all its fields set.
        if self.exact and (self.shadow or self.long_edge not in (None, type(self).model_fields["long_edge"].default)):
            raise ValueError("exact works at the source's size: without long_edge and shadow")
        return self


class _Inpaint(Model):
    """What is filled, whatever fills it."""

    mask: str | None = Field(None, description="address of one mask for the whole job; white is filled")
    boxes: Boxes = Field((), description="rectangles to fill in every image, x,y,width,height")
    mask_threshold: int = Field(127, ge=0, le=254, description="a mask's pixel above this is filled")
    mask_dilate: int = Field(0, ge=0, le=200, description="pixels by which the hole grows")
    mask_feather: int = Field(0, ge=0, le=200, description="pixels over which the fill fades into the image, outside the hole")


class OpencvInpaint(_Inpaint):
    """OpenCV's inpainting from the hole's rim inwards; sources in `method`."""

    engine: Literal["opencv"] = "opencv"
    method: Literal["telea", "navier-stokes"] = Field("telea", description="Telea 2004, or Bertalmio et al. 2001")
    radius: float = Field(5.0, gt=0, le=50, description="how far each filled pixel looks, in pixels")


class LamaInpaint(_Inpaint):
    """LaMa in tiles along the hole."""

    engine: Literal["lama"] = "lama"
    model: Literal["lama"] = Field("lama", description="which model fills")
    strategy: Literal["auto", "tile", "resize", "whole"] = Field(
        "auto",
        description="'auto': tiles, guided by a reduced pass where a hole is large; 'tile': never guided; "
        "'resize': each hole at once, reduced to fit a tile; 'whole': all at once, up to 4 megapixels",
    )
    tile: int = Field(
        1024, ge=512, le=1024, multiple_of=64, description="longest side of a tile in pixels; less takes less memory"
    )
    overlap: int = Field(64, ge=64, le=128, multiple_of=2, description="pixels over which neighbouring tiles are blended")

    @model_validator(mode="after")
    def _tiles_where_there_are_some(self) -> LamaInpaint:
        fields = {"resize": ("overlap",), "whole": ("overlap", "tile")}.get(self.strategy, ())
        idle = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if idle:
            raise ValueError(f"strategy={self.strategy} makes no use of {' and '.join(idle)}")
        return self


class OpencvStylize(Model):
    """OpenCV's non-photorealistic filters, and Reinhard's colour transfer."""

    engine: Literal["opencv"] = "opencv"
    style: Literal["stylization", "pencil-sketch", "detail", "colour-transfer"] = Field(
        "stylization", description="which filter"
    )
    sigma_s: float | None = Field(
        None, ge=0, le=200, description="how far smoothing reaches, in pixels; 'none': the style's own"
    )
    sigma_r: float | None = Field(
        None, ge=0, le=1, description="how different colours may be and still be smoothed together; 'none': the style's own"
    )
    shade: float = Field(0.05, ge=0, le=0.1, description="brightness of a pencil sketch")
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


class DiffusionStylize(Model):
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


Options = OpencvRemoveBackground | RembgRemoveBackground | OpencvInpaint | LamaInpaint | OpencvStylize | DiffusionStylize

ENGINES: dict[Operation, dict[str, type[Options]]] = {
    "remove-background": {"opencv": OpencvRemoveBackground, "rembg": RembgRemoveBackground},
    "inpaint": {"opencv": OpencvInpaint, "lama": LamaInpaint},
    "stylize": {"opencv": OpencvStylize, "diffusion": DiffusionStylize},
}


def nearest(word: str, valid: list[str]) -> str:
    """`; did you mean ...?` and the list of what is valid, to end an error's sentence with."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (valid: {', '.join(sorted(valid))})"


def parse_options(operation: str, engine: str, given: Mapping[str, Any]) -> Options:
    """The options of a job from a mapping of names to values, which may be text.

    Raises InvalidOption with the nearest valid name for an operation, engine or option that
    does not exist, and with the range for a value outside it.
    """
    if operation not in OPERATIONS:
        raise InvalidOption(f"there is no operation {operation!r}{nearest(operation, list(OPERATIONS))}")
    engines = ENGINES[operation]
    if engine not in engines:
        raise InvalidOption(f"{operation} has no engine {engine!r}{nearest(engine, list(engines))}")
    model = engines[engine]
    names = [name for name in model.model_fields if name != "engine"]
    for name in given:
        if name not in names:
            raise InvalidOption(f"{operation} ({engine}) has no option {name!r}{nearest(name, names)}")
    values = {name: None if isinstance(value, str) and value.lower() == "none" else value for name, value in given.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InvalidOption(validation_sentence(error)) from error


def validation_sentence(error: ValidationError) -> str:
    """All of pydantic's complaints in one line: `name: what is wrong, not 'value'`."""
    said = []
    for fault in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in fault["loc"])
        reason = fault["msg"].removeprefix("Value error, ")
        given = fault.get("input")
        given = shown(given) if isinstance(given, str) else given  # an address may carry a signature
        value = f", not {given!r}" if isinstance(given, str | int | float) and len(str(given)) <= 80 else ""
        value = "" if reason.endswith(value) else value  # some reasons say it themselves
        said.append(f"{name + ': ' if name else ''}{reason[:1].lower()}{reason[1:]}{value}")
    return "; ".join(said)
