"""Options of `remove-background`, per engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from imagemill.shared.options.base import Colour, EngineOptions, LongEdge


def _original(value: Any) -> Any:
    return None if value == "original" else value


class OpencvRemoveBackground(EngineOptions):
    """GrabCut, seeded by a colour model of the image's border and a centre prior."""

    engine: Literal["opencv"] = "opencv"
    long_edge: LongEdge | None = Field(
        1600, description="longest edge of the cut-out in pixels; 'none' keeps the source's size"
    )
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


class RembgRemoveBackground(EngineOptions):
    """rembg's models on onnxruntime."""

    engine: Literal["rembg"] = "rembg"
    model: RembgModel = Field("u2net", description="which model finds the subject")
    exact: bool = Field(False, description="rembg's very pixels, slower: its own scaling and compositing")
    long_edge: Annotated[LongEdge | None, BeforeValidator(_original)] = Field(
        1600, description="longest edge of the cut-out in pixels; 'original' keeps the source's size"
    )
    alpha_matting: bool = Field(False, description="find the edge's transparency by closed-form matting: hair and fur, slowly")
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
