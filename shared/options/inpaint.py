"""Options of `inpaint`, per engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from imagemill.shared.options.base import Boxes, EngineOptions


class InpaintOptions(EngineOptions):
    """What is filled, whatever fills it."""

    mask: str | None = Field(None, description="address of one mask for the whole job; white is filled")
    boxes: Boxes = Field((), description="rectangles to fill in every image, x,y,width,height")
    mask_threshold: int = Field(127, ge=0, le=254, description="a mask's pixel above this is filled")
    mask_dilate: int = Field(0, ge=0, le=200, description="pixels by which the hole grows")
    mask_feather: int = Field(0, ge=0, le=200, description="pixels over which the fill fades into the image, outside the hole")


class OpencvInpaint(InpaintOptions):
    """OpenCV's inpainting from the hole's rim inwards; sources in `method`."""

    engine: Literal["opencv"] = "opencv"
    method: Literal["telea", "navier-stokes"] = Field("telea", description="Telea 2004, or Bertalmio et al. 2001")
    radius: float = Field(5.0, gt=0, le=50, description="how far each filled pixel looks, in pixels")


class LamaInpaint(InpaintOptions):
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

    @model_validator(mode="after")
    def _tiles_where_there_are_some(self) -> LamaInpaint:
        if self.strategy == "whole" and self.tile != type(self).model_fields["tile"].default:
            raise ValueError("strategy=whole ignores tile: leave one of them out")
        return self
