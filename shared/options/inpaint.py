"""Options of `inpaint`, per engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from imagemill.shared.options.base import Boxes, EngineOptions


class InpaintOptions(EngineOptions):
    """What to fill, for every engine."""

    mask: str | None = Field(None, description="URL of a mask for all images of the job; white is filled")
    boxes: Boxes = Field((), description="rectangles to fill in every image, as x,y,width,height")
    mask_threshold: int = Field(127, ge=0, le=254, description="mask pixels above this value are filled")
    mask_dilate: int = Field(0, ge=0, le=200, description="pixels by which the hole is enlarged")
    mask_feather: int = Field(0, ge=0, le=200, description="pixels outside the hole over which the fill blends into the image")


class OpencvInpaint(InpaintOptions):
    """OpenCV's inpainting, from the edge of the hole inwards."""

    engine: Literal["opencv"] = "opencv"
    method: Literal["telea", "navier-stokes"] = Field("telea", description="algorithm: Telea 2004 or Bertalmio et al. 2001")
    radius: float = Field(5.0, gt=0, le=50, description="radius in pixels that each filled pixel is computed from")


class LamaInpaint(InpaintOptions):
    """LaMa in tiles along the hole."""

    engine: Literal["lama"] = "lama"
    model: Literal["lama"] = Field("lama", description="model to fill with")
    strategy: Literal["auto", "tile", "resize", "whole"] = Field(
        "auto",
        description="'auto': tiles, guided by a pass at reduced size where a hole is large; 'tile': tiles without guidance; "
        "'resize': each hole in one pass, reduced to fit a tile; 'whole': the image in one pass, up to 4 megapixels",
    )
    tile: int = Field(
        1024, ge=512, le=1024, multiple_of=64, description="longest side of a tile in pixels; smaller tiles need less memory"
    )

    @model_validator(mode="after")
    def _tiles_where_there_are_some(self) -> LamaInpaint:
        if self.strategy == "whole" and self.tile != type(self).model_fields["tile"].default:
            raise ValueError("strategy=whole ignores tile: omit one of them")
        return self
