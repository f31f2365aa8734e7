"""inpaint by LaMa (Suvorov et al., WACV 2022, arXiv 2109.07161), in tiles along the hole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import torch

from imagemill.shared.errors import OperationFailed
from imagemill.shared.options.inpaint import LamaInpaint
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.extend import extended
from imagemill.worker.imaging.opencv import fingerprint, set_up, translated
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import resize
from imagemill.worker.models.checksums import digest, with_digest
from imagemill.worker.models.files import model_file
from imagemill.worker.models.repositories import models_here
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Untouched, Work
from imagemill.worker.operations.inpaint.lama_model import LARGEST_BATCH, LamaModel, dtype_of
from imagemill.worker.operations.inpaint.mask import blend, fill_mask, find_hole, reveal, shrunk
from imagemill.worker.operations.inpaint.rectangle import Rectangle
from imagemill.worker.operations.inpaint.tiles import Labels, Tile, labels_at, plan, weights
from imagemill.worker.operations.open_model import OpenModel, file_size, missing_model

REVISION = 3
"""Raise this whenever the same image and options give different pixels, so that cached results are not reused."""

WHOLE = 4_000_000
"""Largest image in pixels for `strategy=whole`: up to 3 GB of memory on a GPU."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness: Rec. ITU-R BT.601-7, section 2.5.1. They make the fill of a grey image grey."""

STRIP = 128  # rows blended at once: the floats take four times the bytes of the picture


@dataclass(frozen=True)
class Crop:
    """One tile of an image, with views of the whole image, so that a waiting crop takes no memory."""

    tile: Tile
    rgb: Pixels
    opacity: Grey
    labels: Labels
    guide: Guide | None = None


@dataclass
class Guide:
    """The coarse fill of a large hole, which its tiles continue; the first batch with one of them computes it."""

    crop: Crop
    fill: Pixels | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.crop.tile.size


@dataclass(frozen=True)
class Plan:
    """The image, the opacity of its fill, and the region of the hole that each cell belongs to."""

    picture: Picture
    opacity: Grey
    labels: Labels


Filling = Work[LamaInpaint, Crop, Plan]


class Lama(Operation[LamaInpaint, Crop, Pixels, Plan]):
    """Each sample is a tile. The model stays open after the first `run`."""

    spec = Spec("inpaint", "lama", needs_mask=True, max_batch=LARGEST_BATCH, runtime="torch")

    def __init__(self) -> None:
        self._device = Device()
        self._model: OpenModel[Path, str, LamaModel] = OpenModel(file_size)

    def load(self, device: Device) -> None:
        """Check that a model is installed; ConfigurationError if none is. The first `run` opens the job's model."""
        set_up(device)
        self._device, self._model.memory = device, device.models
        if device.gpu is None:  # batches gain nothing on a CPU, see LamaModel.run
            self.spec = replace(self.spec, max_batch=1)
        if not models_here(device.weights, self.spec.engine):
            raise missing_model(LamaInpaint().model, device.weights)

    def fingerprint(self, options: LamaInpaint) -> str:
        parts = [f"{options.model} {digest(self._path(options))}", f"{dtype_of(self._device)} {torch.__version__}"]
        return ", ".join([*parts, *["compiled"] * self._device.compile, fingerprint(REVISION)])

    @translated("finding the hole")
    def prepare(self, picture: Picture, inputs: Inputs[LamaInpaint]) -> Filling | Untouched:
        options = inputs.options
        hole = find_hole(picture.size, inputs)
        if isinstance(hole, Untouched):
            return hole
        opacity = hole.opacity
        if options.strategy == "whole" and opacity.size > WHOLE:
            raise OperationFailed(
                f"strategy=whole takes images up to {WHOLE / 1e6:g} megapixels, and this one has {opacity.size / 1e6:.1f}: "
                "use strategy=auto"
            )
        tiling = plan(opacity, strategy=options.strategy, longest=options.tile)
        image = (extended(picture.pixels), opacity, tiling.labels)
        guides = {label: Guide(Crop(tile, *image)) for label, tile in tiling.guides.items()}
        samples = [Sample(Crop(tile, *image, guides.get(tile.label)), options) for tile in tiling.tiles]
        where = Plan(picture, opacity, tiling.labels)
        return Work(samples, plan=where, notes=hole.notes, evidence=hole.evidence, filled=hole.outline)

    def group_key(self, sample: Sample[LamaInpaint, Crop]) -> Hashable:
        return sample.options.model, sample.data.tile.size

    def together(self, options: LamaInpaint) -> bool:  # noqa: ARG002
        return self._model.current is not None and self._model.current.batches

    @translated("filling the hole")
    def run(self, samples: Sequence[Sample[LamaInpaint, Crop]]) -> list[Pixels]:
        model = self._open(samples[0].options)
        # A guide keeps its fill, so it is computed once even if this batch runs out of memory and comes back halved.
        guides = {id(guide): guide for sample in samples if (guide := sample.data.guide) is not None and guide.fill is None}
        for _, same_size in groupby(sorted(guides.values(), key=lambda guide: guide.size), key=lambda guide: guide.size):
            batch = list(same_size)
            for guide, fill in zip(batch, _paint(model, [guide.crop for guide in batch]), strict=True):
                guide.fill = fill
        painted = _paint(model, [sample.data for sample in samples])
        return [_used(sample.data.tile, output) for sample, output in zip(samples, painted, strict=True)]

    @translated("blending the fill into the image")
    def finish(self, work: Filling, outputs: Sequence[Pixels]) -> Picture:
        tiles = [sample.data.tile for sample in work.samples]
        height, width = work.plan.opacity.shape
        for top in range(0, height, STRIP):
            strip = Rectangle(slice(top, min(top + STRIP, height)), slice(0, width))
            _fill_strip(strip, work.plan, tiles, outputs)
        reveal(work.plan.picture.pixels, work.plan.opacity)
        return work.plan.picture

    def _open(self, options: LamaInpaint) -> LamaModel:
        return self._model.get(lambda: with_digest(self._path(options)), lambda file: LamaModel(file[0], self._device))

    def _path(self, options: LamaInpaint) -> Path:
        """The model's file. Raises ConfigurationError if it is missing."""
        folder = self._device.weights
        path = model_file(folder, self.spec.engine, options.model)
        if not path.is_file():
            raise missing_model(options.model, folder)
        return path


def network_input(crop: Crop) -> tuple[Pixels, Grey]:
    """What the network gets for a tile, both at the tile's size: RGB [h, w, 3], and a mask [h, w], 255 where it has to fill."""
    rgb, mask = crop.rgb[crop.tile.area], fill_mask(crop.opacity[crop.tile.area])
    if crop.tile.reduced:
        size = (crop.tile.size[1], crop.tile.size[0])
        return resize(rgb, size), shrunk(mask, size)
    if crop.guide is not None and crop.guide.fill is not None:
        rgb, mask = _guided(crop, crop.guide.fill, crop.guide.crop.tile.area, rgb, mask)
    padding = [(0, padded - length) for padded, length in zip(crop.tile.size, mask.shape, strict=True)]
    return np.pad(rgb, [*padding, (0, 0)], mode="symmetric"), np.pad(mask, padding, mode="symmetric")


def _guided(crop: Crop, fill: Pixels, fill_area: Rectangle, rgb: Pixels, mask: Grey) -> tuple[Pixels, Grey]:
    """A tile's RGB and mask, with the coarse fill wherever other tiles fill the same hole.

    The network can't see the pixels that it has to fill: they are 0 in its input. So the only way to show it how the picture
    continues is outside its own part of the hole, as if those pixels were known. It then fills its part at full size,
    between sharp surroundings at the rim and coarse ones inside, and all tiles of the hole lead to the same picture.
    """
    area = crop.tile.area
    others = labels_at(crop.labels, area) == crop.tile.label
    for _, place, weight in weights([crop.tile], crop.labels, area):
        others[place.relative_to(area)] &= weight == 0
    others &= mask > 0
    rgb, mask = rgb.copy(), mask.copy()
    rgb[others] = enlarged(fill, fill_area, area)[others]
    mask[others] = 0
    return rgb, mask


def enlarged(fill: Pixels, area: Rectangle, place: Rectangle) -> Pixels:
    """The rectangle `place` of a fill that was computed for `area` at a smaller size."""
    down, across = (small / length for small, length in zip(fill.shape[:2], area.shape, strict=True))
    top, left = place.rows.start - area.rows.start, place.columns.start - area.columns.start
    matrix = np.array([[across, 0, (left + 0.5) * across - 0.5], [0, down, (top + 0.5) * down - 0.5]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    height, width = place.shape
    return np.asarray(cv2.warpAffine(fill, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _paint(model: LamaModel, crops: Sequence[Crop]) -> list[Pixels]:
    pictures, holes = zip(*(network_input(crop) for crop in crops), strict=True)
    return model.run(pictures, holes)


def _used(tile: Tile, output: Pixels) -> Pixels:
    """The part of a tile's output that `finish` uses, copied so that the rest is freed."""
    return output if tile.reduced else output[tile.used.relative_to(tile.area)].copy()


def _fill_strip(strip: Rectangle, plan: Plan, tiles: Sequence[Tile], outputs: Sequence[Pixels]) -> None:
    """Blend the outputs of all tiles in a strip of the picture, and lay the result over it."""
    parts = list(weights(tiles, plan.labels, strip))
    if not parts:
        return
    left, right = min(place.columns.start for _, place, _ in parts), max(place.columns.stop for _, place, _ in parts)
    strip = strip._replace(columns=slice(left, right))
    fill = np.zeros((*strip.shape, 3), np.float32)
    total = np.zeros(strip.shape, np.float32)
    for index, place, weight in parts:
        tile, output = tiles[index], outputs[index]
        part = enlarged(output, tile.area, place) if tile.reduced else output[place.relative_to(tile.used)]
        fill[place.relative_to(strip)] += part * weight[..., None]
        total[place.relative_to(strip)] += weight
    fill /= np.maximum(total, np.float32(1e-6))[..., None]
    if plan.picture.grey:
        fill[:] = fill @ LUMA[:, None]
    blend(plan.picture.pixels[strip][..., :3], fill, plan.opacity[strip])
