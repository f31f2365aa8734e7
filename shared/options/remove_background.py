"""Options of `remove-background`, per engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from imagemill.shared.options.base import Colour, EngineOptions, LongEdge, ModelName


def _original(value: Any) -> Any:
    return None if value == "original" else value


class OpencvRemoveBackground(EngineOptions):
    """GrabCut, initialised with a colour model of the image's border and a prior for its centre."""

    engine: Literal["opencv"] = "opencv"
    long_edge: LongEdge | None = Field(1600, description="longest edge of the cut-out in pixels; 'none': source size")
    feather: float = Field(1.5, ge=0, le=20, description="softness of the edge, in pixels of the result")
    background: Colour | None = Field(None, description="background colour as #rrggbb; 'none': transparent")


class RembgRemoveBackground(EngineOptions):
    """rembg's models on ONNX Runtime."""

    engine: Literal["rembg"] = "rembg"
    model: ModelName = Field("u2net", description="model that finds the subject")
    exact: bool = Field(False, description="get exactly rembg's pixels by using its own scaling and compositing; slower")
    long_edge: Annotated[LongEdge | None, BeforeValidator(_original)] = Field(
        1600, description="longest edge of the cut-out in pixels; 'original': source size"
    )
    alpha_matting: bool = Field(False, description="refine edges such as hair and fur by closed-form matting; slow")
    background: Colour | None = Field(None, description="background colour as #rrggbb; 'none': transparent")
    background_image: str | None = Field(None, description="URL of a background image, which is scaled to cover")
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

    @model_validator(mode="after")
    def _check_combination(self) -> RembgRemoveBackground:
        if self.background is not None and self.background_image is not None:
            raise ValueError("background and background_image exclude each other")
        if self.canvas is not None and not self.crop:
            raise ValueError("canvas needs crop=true")
        if self.mask_only and (self.background or self.background_image or self.shadow):
            raise ValueError("mask_only can't be combined with background, background_image or shadow")
        # Compared with the default, since a spec from the ledger has all fields set.
        if self.exact and (self.shadow or self.long_edge not in (None, type(self).model_fields["long_edge"].default)):
            raise ValueError("exact works at the source's size and can't be combined with long_edge or shadow")
        return self

    def ignored(self) -> dict[str, str]:
        return {} if self.crop else {"margin": "crop is false"}
