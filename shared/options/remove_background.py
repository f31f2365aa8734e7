"""Options of `remove-background`, per engine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from imagemill.shared.options.base import Boxes, Colour, EngineOptions, LongEdge, ModelName, Points


def _original(value: Any) -> Any:
    return None if value == "original" else value


class OpencvRemoveBackground(EngineOptions):
    """GrabCut, initialised with a colour model of the image's border and a prior for its centre."""

    engine: Literal["opencv"] = "opencv"
    long_edge: LongEdge | None = Field(1600, description="longest edge of the cut-out in pixels; 'none': source size")
    feather: float = Field(1.5, ge=0, le=20, description="softness of the edge, in pixels of the result")
    background: Colour | None = Field(None, description="background colour as #rrggbb; 'none': transparent")


GARMENT_MODELS = ("u2net_cloth_seg",)
"""Models that give a result for each garment."""
PROMPTED_MODELS = ("sam", "sam-quant", "sam-vit-l", "sam-vit-l-quant", "sam-vit-h-quant")
"""Segment Anything in several sizes, in full precision or with 8 bits, which cut out what points and boxes show."""

Garment = Literal["upper", "lower", "full", "attire"]


def _names(value: Any) -> Any:
    value = () if value is None else value
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class RembgRemoveBackground(EngineOptions):
    """rembg's models on ONNX Runtime."""

    engine: Literal["rembg"] = "rembg"
    model: ModelName = Field("u2net", description="model that finds the subject: your own, or from the catalogue")
    garments: Annotated[tuple[Garment, ...], BeforeValidator(_names)] = Field(
        (),
        description="garments to cut out with u2net_cloth_seg, separated by commas, with one result for each: upper, lower, "
        "full (such as dresses), attire (all of them in one); 'none' stands for upper,lower,full",
    )
    points: Points = Field(
        (),
        description="what sam cuts out of every image: points on it as x,y, or off it as x,y,0, separated by ;, in pixels or "
        "fractions; a row's own points and boxes replace those of the job; without any, it is what is at the centre",
    )
    boxes: Boxes = Field((), description="what sam cuts out of every image: rectangles around it, as x,y,width,height")
    post_process_mask: bool = Field(False, description="smooth the mask's outline; every pixel is then opaque or transparent")
    exact: bool = Field(False, description="get exactly rembg's pixels by using its own scaling and compositing; slower")
    long_edge: Annotated[LongEdge | None, BeforeValidator(_original)] = Field(
        1600, description="longest edge of the cut-out in pixels; 'original': source size"
    )
    alpha_matting: bool = Field(False, description="refine edges such as hair and fur by closed-form matting; slow")
    alpha_matting_foreground_threshold: int = Field(
        240, ge=0, le=255, description="matting: pixels whose mask is above this level definitely belong to the subject"
    )
    alpha_matting_background_threshold: int = Field(
        10, ge=0, le=255, description="matting: pixels whose mask is below this level definitely don't"
    )
    alpha_matting_erode_size: int | None = Field(
        None,
        ge=0,
        le=100,
        description="matting: side in pixels of the square by which both definite areas are shrunk; 0: one pixel; "
        "'none': rembg's 10 with exact, else 3, which smears less",
    )
    background: Colour | None = Field(None, description="background colour as #rrggbb; 'none': transparent")
    background_image: str | None = Field(None, description="URL of a background image, scaled to fill the result")
    crop: bool = Field(False, description="crop to the subject and, if kept, its shadow")
    margin: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="margin around the cropped subject, as a share of its longer side (at 0.06 the subject fills 89 %)",
    )
    canvas: int | None = Field(
        None, ge=16, le=8_000, description="scale the cropped subject with its margin to a square of this many pixels a side"
    )
    shadow: bool = Field(False, description="keep the subject's shadow if the backdrop is plain enough to detect it")
    mask_only: bool = Field(
        False,
        description="output the mask (the subject in white) instead of the cut-out; a JPEG's is a JPEG unless --format is png",
    )

    @property
    def parts(self) -> tuple[str, ...]:
        return self.garments or (("upper", "lower", "full") if self.model in GARMENT_MODELS else ())

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"points", "boxes"} if self.model in PROMPTED_MODELS else ())

    @model_validator(mode="after")
    def _check_model(self) -> RembgRemoveBackground:
        if self.garments and self.model not in GARMENT_MODELS:
            raise ValueError(f"garments needs model={GARMENT_MODELS[0]}")
        if len(set(self.garments)) < len(self.garments):
            raise ValueError("garments names one twice")
        if (self.points or self.boxes) and not self.columns:
            raise ValueError(f"points and boxes need model={PROMPTED_MODELS[0]} (or {', '.join(PROMPTED_MODELS[1:])})")
        return self

    @model_validator(mode="after")
    def _check_matting(self) -> RembgRemoveBackground:
        fields = type(self).model_fields
        changed = [name for name in fields if name.startswith("alpha_matting_") and getattr(self, name) != fields[name].default]
        if changed and not self.alpha_matting:
            raise ValueError(f"{changed[0]} needs alpha_matting=true")
        if self.alpha_matting_background_threshold > self.alpha_matting_foreground_threshold:
            raise ValueError("alpha_matting_background_threshold must not be above alpha_matting_foreground_threshold")
        return self

    @model_validator(mode="after")
    def _check_combination(self) -> RembgRemoveBackground:
        if self.background is not None and self.background_image is not None:
            raise ValueError("background and background_image can't be combined")
        if self.canvas is not None and not self.crop:
            raise ValueError("canvas needs crop=true")
        if self.mask_only and (self.background or self.background_image or self.shadow):
            raise ValueError("mask_only can't be combined with background, background_image or shadow")
        # Compared with the default, since a spec from the ledger has all fields set.
        if self.exact and (self.shadow or self.long_edge not in (None, type(self).model_fields["long_edge"].default)):
            raise ValueError("exact works at the source's size and can't be combined with long_edge or shadow")
        return self

    def ignored(self, filled: Collection[str] = ()) -> dict[str, str]:  # noqa: ARG002
        matting = [name for name in type(self).model_fields if name.startswith("alpha_matting")]
        ignored = {} if self.crop else {"margin": "crop is false"}
        ignored |= {"long_edge": "exact works at the source's size"} if self.exact else {}
        if not self.alpha_matting:
            ignored |= dict.fromkeys(matting[1:], "alpha_matting is false")
        elif self.exact and self.mask_only:
            ignored |= dict.fromkeys(matting, "with exact, mask_only shows the mask before matting")
        return ignored
