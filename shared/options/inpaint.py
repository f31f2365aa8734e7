"""Options of `inpaint`, per engine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from imagemill.shared.options.base import Boxes, EngineOptions, ModelName

MaskFrom = Literal["auto", "luma", "alpha", "inverted"]
"""How masks are read."""


class InpaintOptions(EngineOptions):
    """The area to fill, the same for every engine."""

    mask: str | None = Field(None, description="URL of a mask for all images of the job; white areas are filled")
    boxes: Boxes = Field((), description="rectangles to fill in every image, as x,y,width,height")
    mask_from: MaskFrom = Field(
        "auto",
        description="how masks are read; 'auto': as what they clearly are; 'luma': bright areas are filled; 'alpha': what is "
        "painted on a transparent layer, or rubbed out of a picture; 'inverted': the opposite of what they show",
    )
    mask_threshold: int = Field(127, ge=0, le=254, description="mask pixels above this value are filled")
    mask_dilate: int = Field(0, ge=0, le=200, description="pixels by which to enlarge the hole")
    mask_feather: int = Field(0, ge=0, le=200, description="width in pixels of the blend around the hole")

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"mask", "boxes"})

    def ignored(self, filled: Collection[str] = ()) -> dict[str, str]:
        has_mask = self.mask is not None or "mask" in filled
        return {} if has_mask else dict.fromkeys(("mask_from", "mask_threshold"), "there is no mask")


class OpencvInpaint(InpaintOptions):
    """OpenCV's inpainting, which fills the hole from its edge inwards."""

    engine: Literal["opencv"] = "opencv"
    method: Literal["telea", "navier-stokes"] = Field("telea", description="algorithm: Telea 2004 or Bertalmio et al. 2001")
    radius: float = Field(5.0, gt=0, le=50, description="radius in pixels of the area from which each pixel is computed")


class LamaInpaint(InpaintOptions):
    """LaMa in tiles along the hole."""

    engine: Literal["lama"] = "lama"
    model: ModelName = Field("lama", description="inpainting model: your own, or lama")
    strategy: Literal["auto", "tile", "resize", "whole"] = Field(
        "auto",
        description="'tile': fill in tiles; 'auto': also guide the tiles of large holes by a pass at reduced size; "
        "'resize': fill each hole in one pass, reduced to fit a tile; 'whole': the whole image in one pass, up to 4 megapixels",
    )
    tile: int = Field(1024, ge=512, le=1024, multiple_of=64, description="tile size in pixels; smaller tiles need less memory")

    @model_validator(mode="after")
    def _check_tile(self) -> LamaInpaint:
        if self.strategy == "whole" and self.tile != type(self).model_fields["tile"].default:
            raise ValueError("strategy=whole ignores tile: omit one of them")
        return self

    def ignored(self, filled: Collection[str] = ()) -> dict[str, str]:
        return super().ignored(filled) | ({"tile": "strategy is whole"} if self.strategy == "whole" else {})
