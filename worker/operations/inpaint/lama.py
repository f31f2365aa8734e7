"""inpaint by LaMa (Suvorov et al., WACV 2022, arXiv 2109.07161), in tiles along the hole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from imagemill.shared.errors import OperationFailed
from imagemill.shared.options.inpaint import LamaInpaint
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.opencv import fingerprint, set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import resize
from imagemill.worker.models.checksums import digest, with_digest
from imagemill.worker.models.files import model_file
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Untouched, Work
from imagemill.worker.operations.inpaint.lama_model import LARGEST_BATCH, LamaModel, dtype_of
from imagemill.worker.operations.inpaint.mask import Region, find_hole, mix, shrunk, zone_of
from imagemill.worker.operations.inpaint.tiles import Tile, extent, owners, plan, weights
from imagemill.worker.operations.open_model import OpenModel, missing_model

REVISION = 2
"""Raise it when the same image and options give other pixels than before: what is remembered is then forgotten."""

WHOLE = 4_000_000
"""Pixels that `strategy=whole` takes: up to 3 GB of memory on a GPU."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Rec. ITU-R BT.601-7, section 2.5.1: how bright red, green and blue are. The fill of a grey image gets no colours."""

STRIP = 128  # rows blended at a time; floats take four times the bytes of the picture


@dataclass(frozen=True)
class Crop:
    """What one tile sees of its image; views, so that waiting costs no memory."""

    tile: Tile
    rgb: Pixels
    shares: Grey
    numbers: NDArray[np.int32]
    guide: Guide | None = None


@dataclass
class Guide:
    """The coarse fill of a large hole, of which its tiles take over how things go on; made by the first that needs it."""

    crop: Crop
    fill: Pixels | None = None


@dataclass(frozen=True)
class Plan:
    picture: Picture
    shares: Grey
    numbers: NDArray[np.int32]


Filling = Work[LamaInpaint, Crop, Plan]


class Lama(Operation[LamaInpaint, Crop, Pixels, Plan]):
    """A sample is a tile. One model is open, from the first `run` on."""

    spec = Spec("inpaint", "lama", needs_mask=True, max_batch=LARGEST_BATCH, runtime="torch")

    def __init__(self) -> None:
        self._device = Device()
        self._model: OpenModel[tuple[Path, str], LamaModel] = OpenModel()

    def load(self, device: Device) -> None:
        """Look whether the model is there. It is opened at the first `run`, and ConfigurationError raised if it can't be."""
        set_up(device)
        self._device = device
        if device.gpu is None:  # nothing is gained by batches there, see session.py
            self.spec = replace(self.spec, max_batch=1)
        self._path(LamaInpaint())

    def fingerprint(self, options: LamaInpaint) -> str:
        parts = [f"{options.model} {digest(self._path(options))}", f"{dtype_of(self._device)} {torch.__version__}"]
        return ", ".join([*parts, *["compiled"] * self._device.compile, fingerprint(REVISION)])

    @translated("finding what to fill")
    def prepare(self, picture: Picture, inputs: Inputs[LamaInpaint]) -> Filling | Untouched:
        options = inputs.options
        hole = find_hole(picture.size, inputs)
        if isinstance(hole, Untouched):
            return hole
        shares = hole.shares
        if options.strategy == "whole" and shares.size > WHOLE:
            most, given = WHOLE / 1e6, shares.size / 1e6
            raise OperationFailed(
                f"strategy=whole takes up to {most:g} megapixels, the image has {given:.1f}: leave it at auto"
            )
        made = plan(shares, strategy=options.strategy, longest=options.tile)
        rgb = picture.pixels[..., :3]
        common = (rgb, shares, made.numbers)
        guides = {number: Guide(Crop(tile, *common)) for number, tile in made.guides.items()}
        crops = [Crop(tile, *common, guides.get(tile.number)) for tile in made.tiles]
        samples = [Sample(crop, options) for crop in crops]
        return Work(samples, plan=Plan(picture, shares, made.numbers), notes=hole.notes, evidence=hole.evidence)

    def group_key(self, sample: Sample[LamaInpaint, Crop]) -> Hashable:
        return sample.options.model, sample.data.tile.size

    def together(self, options: LamaInpaint) -> bool:  # noqa: ARG002
        return self._model.current is not None and self._model.current.batches

    @translated("filling the holes")
    def run(self, samples: Sequence[Sample[LamaInpaint, Crop]]) -> list[Pixels]:
        model = self._open(samples[0].options)
        # Made once, whatever becomes of this batch: it may be halved, and come again.
        guides = {id(guide): guide for sample in samples if (guide := sample.data.guide) is not None and guide.fill is None}
        for _, alike in groupby(sorted(guides.values(), key=_guides_size), key=_guides_size):
            group = list(alike)
            for guide, fill in zip(group, _run(model, [guide.crop for guide in group]), strict=True):
                guide.fill = fill
        made = _run(model, [sample.data for sample in samples])
        return [_needed(sample.data, output) for sample, output in zip(samples, made, strict=True)]

    @translated("putting the fill into the image")
    def finish(self, work: Filling, outputs: Sequence[Pixels]) -> Picture:
        plan = work.plan
        tiles = [sample.data.tile for sample in work.samples]
        height, width = plan.shares.shape
        for top in range(0, height, STRIP):
            strip = Region(slice(top, min(top + STRIP, height)), slice(0, width))
            _paste(strip, plan, tiles, outputs)
        return plan.picture

    def _open(self, options: LamaInpaint) -> LamaModel:
        return self._model.get(lambda: with_digest(self._path(options)), lambda file: LamaModel(file[0], self._device))

    def _path(self, options: LamaInpaint) -> Path:
        """The model's file. Raises ConfigurationError where it is missing."""
        folder = self._device.weights
        path = model_file(folder, self.spec.engine, options.model)
        if not path.is_file():
            raise missing_model(options.model, folder)
        return path


def shown(crop: Crop) -> tuple[Pixels, Grey]:
    """What the network is given for a tile, both at its size: RGB, and 255 where it is to fill."""
    rows, columns = crop.tile.area.rows, crop.tile.area.columns
    rgb, zone = crop.rgb[rows, columns], zone_of(crop.shares[rows, columns])
    if crop.tile.reduced:
        size = (crop.tile.size[1], crop.tile.size[0])
        return resize(rgb, size), shrunk(zone, size)
    if crop.guide is not None and crop.guide.fill is not None:
        rgb, zone = _guided(crop, crop.guide.fill, crop.guide.crop.tile.area, rgb, zone)
    padding = [(0, wanted - had) for wanted, had in zip(crop.tile.size, zone.shape, strict=True)]
    return np.pad(rgb, [*padding, (0, 0)], mode="symmetric"), np.pad(zone, padding, mode="symmetric")


def _guided(crop: Crop, fill: Pixels, around: Region, rgb: Pixels, zone: Grey) -> tuple[Pixels, Grey]:
    """A tile's picture and zone, where the coarse fill stands for what other tiles of the same hole fill.

    The network sees nothing of what it is to fill: its picture is 0 there. So the one way to tell it how things go on
    is outside of its own part of the hole, as if it were known; it then fills its part at full size, from sharp
    surroundings at the rim and from coarse ones inside, and all tiles of the hole agree on what they lead to.
    """
    area = crop.tile.area
    others = owners(crop.numbers, area) == crop.tile.number
    for _, where, weight in weights([crop.tile], crop.numbers, area):
        others[inside(where, area)] &= weight == 0
    others &= zone > 0
    rgb, zone = rgb.copy(), zone.copy()
    rgb[others] = enlarged(fill, around, area)[others]
    zone[others] = 0
    return rgb, zone


def enlarged(fill: Pixels, area: Region, where: Region) -> Pixels:
    """The rectangle `where` of a fill that was made for `area` at a smaller size."""
    across, down = (
        have / (side.stop - side.start) for have, side in zip(fill.shape[1::-1], (area.columns, area.rows), strict=True)
    )
    left, top = where.columns.start - area.columns.start, where.rows.start - area.rows.start
    way = np.array([[across, 0, (left + 0.5) * across - 0.5], [0, down, (top + 0.5) * down - 0.5]])
    size = (where.columns.stop - where.columns.start, where.rows.stop - where.rows.start)
    how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(fill, way, size, flags=how, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def inside(where: Region, area: Region) -> tuple[slice, slice]:
    """Rows and columns of `where`, counted from the corner of `area`."""
    rows, columns = (
        slice(part.start - whole.start, part.stop - whole.start)
        for part, whole in ((where.rows, area.rows), (where.columns, area.columns))
    )
    return rows, columns


def _paste(strip: Region, plan: Plan, tiles: Sequence[Tile], outputs: Sequence[Pixels]) -> None:
    """Blend what all tiles made of a strip of the picture, and lay it over."""
    parts = list(weights(tiles, plan.numbers, strip))
    if not parts:
        return
    left, right = min(where.columns.start for _, where, _ in parts), max(where.columns.stop for _, where, _ in parts)
    strip = replace(strip, columns=slice(left, right))
    fill = np.zeros((strip.rows.stop - strip.rows.start, right - left, 3), np.float32)
    total = np.zeros(fill.shape[:2], np.float32)
    for place, where, weight in parts:
        tile, output, at = tiles[place], outputs[place], inside(where, strip)
        made = enlarged(output, tile.area, where) if tile.reduced else output[inside(where, extent(tile))]
        fill[at] += made * weight[..., None]
        total[at] += weight
    fill /= np.maximum(total, np.float32(1e-6))[..., None]
    if plan.picture.grey:
        fill[:] = fill @ LUMA[:, None]
    mix(plan.picture.pixels[strip.rows, strip.columns, :3], fill, plan.shares[strip.rows, strip.columns])


def _run(model: LamaModel, crops: Sequence[Crop]) -> list[Pixels]:
    pictures, holes = zip(*(shown(crop) for crop in crops), strict=True)
    return model.run(pictures, holes)


def _needed(crop: Crop, output: Pixels) -> Pixels:
    """The part of a tile's output that `finish` makes use of, which is all that is kept until then."""
    if crop.tile.reduced:
        return output
    return output[inside(extent(crop.tile), crop.tile.area)].copy()


def _guides_size(guide: Guide) -> tuple[int, int]:
    return guide.crop.tile.size
