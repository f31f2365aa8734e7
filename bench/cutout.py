"""How good the cut-outs are: remove-background against reference mattes, image by image.

    python -m bench.cutout --images FOLDER [--engine opencv] [--sheet FILE.png]

FOLDER holds `NAME.jpg` (or .png, .webp) and beside it `NAME.MODEL.png`, whose alpha is the reference. Images
without a reference are cut and shown on the sheet but not counted.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device, share_of_cores
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import resize
from imagemill.worker.operations import registry
from imagemill.worker.operations.base import Inputs

GOAL_IOU = 0.6  # what the opencv engine must not fall below on the photos it was tuned with
TILE = 480
MAGENTA = np.array([[[255, 0, 255]]], np.uint8)


@dataclass(frozen=True)
class Cut:
    """One image's outcome; `iou` and `difference` (mean absolute difference of alpha, 0..1) are None without a reference."""

    name: str
    source: Pixels
    result: Pixels
    reference: Grey | None
    seconds: float
    iou: float | None
    difference: float | None


def read(path: Path) -> Pixels:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        alpha = upright.has_transparency_data
        return np.ascontiguousarray(upright.convert("RGBA" if alpha else "RGB"))


def pairs(images: Path) -> list[tuple[Path, Path | None]]:
    """Each image of a folder with its reference, by name."""
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    found = [path for path in sorted(images.iterdir()) if path.suffix.lower() in kinds and "." not in path.stem]
    return [(path, next(iter(sorted(images.glob(f"{path.stem}.*.png"))), None)) for path in found]


def cut(operation: Any, path: Path, reference: Path | None, engine: str) -> Cut:
    source = read(path)
    options = parse_options("remove-background", engine, {})
    item = Item(index=0, source=f"https://bench.example/{path.name}")
    started = time.perf_counter()
    work = operation.prepare(Picture(source), Inputs(item, options))
    result = operation.finish(work, operation.run(work.samples)).pixels
    seconds = time.perf_counter() - started
    if reference is None:
        return Cut(path.stem, source, result, None, seconds, None, None)
    alpha, wanted = result[..., 3], read(reference)[..., 3]
    wanted = resize(np.ascontiguousarray(wanted), (alpha.shape[1], alpha.shape[0]))
    ours, theirs = alpha > 127, wanted > 127
    iou = float((ours & theirs).sum() / max(1, (ours | theirs).sum()))
    difference = float(np.abs(alpha.astype(int) - wanted).mean() / 255)
    return Cut(path.stem, source, result, wanted, seconds, iou, difference)


def measure(images: Path, engine: str = "opencv") -> list[Cut]:
    operation = registry.create("remove-background", engine)
    operation.load(Device(threads=share_of_cores(1)))
    return [cut(operation, path, reference, engine) for path, reference in pairs(images)]


def summary(cuts: list[Cut], engine: str = "opencv") -> list[dict[str, Any]]:
    rated = [one for one in cuts if one.iou is not None and one.difference is not None]
    if not rated:
        raise SystemExit("there are no images with a reference (NAME.jpg and NAME.MODEL.png) in the folder")
    iou = float(np.mean([one.iou for one in rated]))
    difference = float(np.mean([one.difference for one in rated]))
    seconds = float(np.median([one.seconds for one in cuts]))
    count, name = len(rated), f"remove-background ({engine})"
    return [
        {"name": f"{name}: mean IoU", "value": iou, "goal": GOAL_IOU, "unit": "", "holds": iou >= GOAL_IOU, "rounds": count},
        {
            "name": f"{name}: mean alpha difference",
            "value": difference,
            "goal": None,
            "unit": "",
            "holds": None,
            "rounds": count,
        },
        {"name": f"{name}: median time", "value": seconds, "goal": None, "unit": "s", "holds": None, "rounds": len(cuts)},
    ]


def run(images: Path) -> list[dict[str, Any]]:
    """The figures of the opencv engine on a folder, for a table of benchmarks."""
    return summary(measure(images))


def sheet(cuts: list[Cut]) -> Pixels:
    """Source, cut-out on a checkerboard and on magenta, and reference, one row per image."""
    y, x = np.mgrid[:TILE, :TILE] // 12
    checks = np.where(((x + y) % 2)[..., None] > 0, 235, 180).astype(np.uint8)
    rows = []
    for one in cuts:
        reference = one.reference if one.reference is not None else np.zeros(one.result.shape[:2], np.uint8)
        tiles = [_tile(one.source[..., :3]), _tile(_on(one.result, checks)), _tile(_on(one.result, MAGENTA))]
        rows.append(np.hstack([*tiles, _tile(np.repeat(reference[..., None], 3, axis=2))]))
    return np.vstack(rows)


def _on(result: Pixels, ground: NDArray[np.uint8]) -> Pixels:
    times = [-(-result.shape[axis] // ground.shape[axis]) for axis in (0, 1)]
    ground = np.tile(ground, (*times, 1))[: result.shape[0], : result.shape[1]]
    alpha = result[..., 3:] / np.float32(255)
    return np.rint(result[..., :3] * alpha + ground * (1 - alpha)).astype(np.uint8)


def _tile(pixels: Pixels) -> Pixels:
    scale = TILE / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    fitted = resize(pixels, size)
    tile = np.full((TILE, TILE, 3), 64, np.uint8)
    tile[: size[1], : size[0]] = fitted
    return tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--engine", default="opencv")
    parser.add_argument("--sheet", type=Path)
    given = parser.parse_args()
    cuts = measure(given.images, given.engine)
    for one in cuts:
        rated = "no reference" if one.iou is None else f"IoU {one.iou:.3f}  alpha difference {one.difference:.3f}"
        print(f"{one.name:<24} {one.seconds:6.2f} s  {rated}")
    for figure in summary(cuts, given.engine):
        print(f"{figure['name']}: {figure['value']:.3f} {figure['unit']}".rstrip())
    if given.sheet:
        Image.fromarray(sheet(cuts)).save(given.sheet)
        print(f"sheet: {given.sheet}")


if __name__ == "__main__":
    main()
