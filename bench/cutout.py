"""Quality of remove-background's cut-outs, compared with reference mattes.

    python -m bench.cutout --images FOLDER [--engine opencv] [--sheet FILE.png]

FOLDER holds `NAME.jpg` (or .png, .webp) and, for reference, `NAME.MODEL.png`, whose alpha is used. Images without a
reference appear on the sheet but are not counted.
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

from bench.figures import Figure, figure
from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device, share_of_cores
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import resize
from imagemill.worker.operations import registry
from imagemill.worker.operations.base import Inputs

GOAL_IOU = 0.6  # for the opencv engine, on the photos it was tuned on
TILE = 480
MAGENTA = np.array([[[255, 0, 255]]], np.uint8)


@dataclass(frozen=True)
class Cut:
    """The result of one image. `iou` and `difference` (mean absolute difference of alpha, 0..1) need a reference."""

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
    """Each image of a folder with its reference, in order of name."""
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    images_found = [path for path in sorted(images.iterdir()) if path.suffix.lower() in kinds and "." not in path.stem]
    return [(path, next(iter(sorted(images.glob(f"{path.stem}.*.png"))), None)) for path in images_found]


def cut_out(operation: Any, path: Path, reference: Path | None, engine: str) -> Cut:
    source = read(path)
    options = parse_options("remove-background", engine, {})
    item = Item(index=0, source=f"https://bench.example/{path.name}")
    started = time.perf_counter()
    work = operation.prepare(Picture(source), Inputs(item, options))
    result = operation.finish(work, operation.run(work.samples)).pixels
    seconds = time.perf_counter() - started
    if reference is None:
        return Cut(path.stem, source, result, None, seconds, None, None)
    alpha, expected = result[..., 3], read(reference)[..., 3]
    expected = resize(np.ascontiguousarray(expected), (alpha.shape[1], alpha.shape[0]))
    ours, theirs = alpha > 127, expected > 127
    iou = float((ours & theirs).sum() / max(1, (ours | theirs).sum()))
    difference = float(np.abs(alpha.astype(int) - expected).mean() / 255)
    return Cut(path.stem, source, result, expected, seconds, iou, difference)


def measure(images: Path, engine: str = "opencv") -> list[Cut]:
    operation = registry.create("remove-background", engine)
    operation.load(Device(threads=share_of_cores(1)))
    return [cut_out(operation, path, reference, engine) for path, reference in pairs(images)]


def summary(cuts: list[Cut], engine: str = "opencv") -> list[Figure]:
    ious = [cut.iou for cut in cuts if cut.iou is not None]
    differences = [cut.difference for cut in cuts if cut.difference is not None]
    if not ious:
        raise SystemExit("the folder has no image with a reference (NAME.jpg and NAME.MODEL.png)")
    name = f"remove-background ({engine})"
    return [
        figure(f"{name}: mean IoU", float(np.mean(ious)), "", GOAL_IOU, rounds=len(ious)),
        figure(f"{name}: mean alpha difference", float(np.mean(differences)), rounds=len(differences)),
        figure(f"{name}: median time", [cut.seconds for cut in cuts], "s"),
    ]


def run(images: Path) -> list[Figure]:
    """Measure the opencv engine on a folder."""
    return summary(measure(images))


def sheet(cuts: list[Cut]) -> Pixels:
    """One row per image: source, cut-out on a checkerboard and on magenta, reference."""
    y, x = np.mgrid[:TILE, :TILE] // 12
    checks = np.where(((x + y) % 2)[..., None] > 0, 235, 180).astype(np.uint8)
    rows = []
    for cut in cuts:
        reference = cut.reference if cut.reference is not None else np.zeros(cut.result.shape[:2], np.uint8)
        tiles = [_tile(cut.source[..., :3]), _tile(_on(cut.result, checks)), _tile(_on(cut.result, MAGENTA))]
        rows.append(np.hstack([*tiles, _tile(np.repeat(reference[..., None], 3, axis=2))]))
    return np.vstack(rows)


def _on(result: Pixels, background: NDArray[np.uint8]) -> Pixels:
    times = [-(-result.shape[axis] // background.shape[axis]) for axis in (0, 1)]
    background = np.tile(background, (*times, 1))[: result.shape[0], : result.shape[1]]
    alpha = result[..., 3:] / np.float32(255)
    return np.rint(result[..., :3] * alpha + background * (1 - alpha)).astype(np.uint8)


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
    arguments = parser.parse_args()
    cuts = measure(arguments.images, arguments.engine)
    for cut in cuts:
        rating = "no reference" if cut.iou is None else f"IoU {cut.iou:.3f}  alpha difference {cut.difference:.3f}"
        print(f"{cut.name:<24} {cut.seconds:6.2f} s  {rating}")
    for result in summary(cuts, arguments.engine):
        print(f"{result['name']}: {result['value']:.3f} {result['unit']}".rstrip())
    if arguments.sheet:
        Image.fromarray(sheet(cuts)).save(arguments.sheet)
        print(f"sheet: {arguments.sheet}")


if __name__ == "__main__":
    main()
