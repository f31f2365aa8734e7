"""A sheet of inpainting results: source, mask, result, another tool's result, and the rim enlarged four times.

    python -m bench.inpaint_look FOLDER [--engine opencv] [--set key=value]... [--sheet FILE.png]

FOLDER holds `NAME.jpg` (or .png, .webp) with `NAME.mask.png` or `NAME.OTHER.jpg`, another tool's result; without a
mask, the pixels that the other tool changed are filled. The sheet has one row per image. `lama` needs the model that
`imagemill models pull lama` installs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from bench.cutout import read
from imagemill.producer.spec import option_values
from imagemill.shared.engines import parse_options
from imagemill.shared.errors import ImagemillError
from imagemill.shared.messages import Item
from imagemill.shared.options.base import EngineOptions
from imagemill.shared.settings import load_settings
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.operations import registry
from imagemill.worker.operations.base import AnyOperation, Inputs, Untouched

TILE = 480
TIMES = 4
CHANGED = 24  # a pixel that differs by more levels than this was filled by the other tool; JPEG alone differs less
MAGENTA = (255, 0, 255)

Example = tuple[str, Pixels, Grey, Pixels | None]


def examples(folder: Path) -> list[Example]:
    """Name, picture, mask and, if there is one, the other tool's result of each image."""
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    loaded = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in kinds or "." in path.stem:
            continue
        masks = sorted(folder.glob(f"{path.stem}.mask.*"))
        others = [other for other in sorted(folder.glob(f"{path.stem}.*.*")) if other not in masks]
        picture = read(path)[..., :3]
        other = read(others[0])[..., :3] if others else None
        if masks:
            loaded.append((path.stem, picture, np.ascontiguousarray(read(masks[0])[..., 0]), other))
        elif other is not None and other.shape == picture.shape:
            changed = (cv2.absdiff(picture, other).max(axis=2) > CHANGED).astype(np.uint8) * 255
            changed = cv2.morphologyEx(changed, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
            loaded.append((path.stem, picture, np.asarray(cv2.dilate(changed, np.ones((7, 7), np.uint8)), np.uint8), other))
    return loaded


def filled(operation: AnyOperation, picture: Pixels, mask: Grey, options: EngineOptions) -> Pixels:
    item = Item(index=0, source="https://bench.example/one.png")
    work = operation.prepare(Picture(picture.copy()), Inputs(item, options, mask))
    if isinstance(work, Untouched):
        return picture
    outputs = [output for sample in work.samples for output in operation.run([sample])]
    return operation.finish(work, outputs).pixels


def row(example: Example, result: Pixels) -> Pixels:
    """The tiles of one image, side by side."""
    _, picture, mask, other = example
    hole = resize(mask, (picture.shape[1], picture.shape[0])) > 127
    marked = picture // 2
    marked[hole] = MAGENTA
    spot = seam(hole.astype(np.uint8))
    tiles = [_tile(picture), _tile(marked), _tile(result)]
    tiles.append(_tile(other) if other is not None else np.full((TILE, TILE, 3), 64, np.uint8))
    tiles += [_tile(np.repeat(np.repeat(pixels[spot], TIMES, axis=0), TIMES, axis=1)) for pixels in (marked, result)]
    return np.hstack(tiles)


def seam(hole: Grey) -> tuple[slice, slice]:
    """The square with the most rim in it that fills a tile once enlarged."""
    side = TILE // TIMES
    rim = cv2.morphologyEx(hole, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).astype(np.float32)
    most = cv2.boxFilter(rim, -1, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
    middle = np.unravel_index(int(most.argmax()), most.shape)
    top, left = (max(0, min(int(at) - side // 2, extent - side)) for at, extent in zip(middle, hole.shape, strict=True))
    return slice(top, top + side), slice(left, left + side)


def _tile(pixels: Pixels) -> Pixels:
    scaled = resize(pixels, fit((pixels.shape[1], pixels.shape[0]), TILE))
    tile = np.full((TILE, TILE, 3), 64, np.uint8)
    tile[: scaled.shape[0], : scaled.shape[1]] = scaled
    return tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, metavar="FOLDER")
    parser.add_argument("--engine", default="opencv")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="options")
    parser.add_argument("--sheet", type=Path, default=Path("inpaint.png"))
    arguments = parser.parse_args()
    try:
        options = parse_options("inpaint", arguments.engine, option_values(arguments.options, None))
        operation = registry.create("inpaint", arguments.engine)
        operation.load(Device.of(load_settings(), 1))
    except ImagemillError as error:
        raise SystemExit(error.message) from error
    loaded = examples(arguments.images)
    if not loaded:
        raise SystemExit(f"no image in {arguments.images} has a mask (NAME.jpg and NAME.mask.png)")
    sheet = np.vstack([row(example, filled(operation, example[1], example[2], options)) for example in loaded])
    Image.fromarray(sheet).save(arguments.sheet)
    print(f"{', '.join(name for name, *_ in loaded)}: {arguments.sheet}")


if __name__ == "__main__":
    main()
