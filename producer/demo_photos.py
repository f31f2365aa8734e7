"""The demo's photos: where they come from, and the date stamps and scratches that it has removed from them."""

from __future__ import annotations

import importlib.util
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill.shared.errors import MissingExtra, UsageError
from imagemill.shared.image_files import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

OWN_PHOTOS = 24
"""Photos taken from the user's folder unless a count is given."""
STAMP = "'98 7 14"
USES = ("rembg", "opencv", "inpaint", "stylize")
"""What a photo may be used for: cutting out with one of two engines, or one of the other operations."""


@dataclass(frozen=True)
class Shipped:
    """A photo that comes with an installed package, and the `uses` in which it looks good.

    `crop` is left, top, right and bottom in pixels.
    """

    name: str
    package: str
    path: str
    uses: tuple[str, ...]
    crop: tuple[int, int, int, int] | None = None


SHIPPED = (
    Shipped("flower.jpg", "sklearn", "datasets/images/flower.jpg", USES),
    Shipped("coffee.png", "skimage", "data/coffee.png", ("rembg", "opencv")),
    Shipped("pagoda.png", "sklearn", "datasets/images/china.jpg", ("rembg", "opencv"), crop=(60, 0, 380, 350)),
    Shipped("retina.jpg", "skimage", "data/retina.jpg", ("rembg", "opencv")),
    Shipped("astronaut.png", "skimage", "data/astronaut.png", ("rembg", "stylize")),
    Shipped("motorcycle.png", "skimage", "data/motorcycle_left.png", ("rembg", "stylize")),
    Shipped("cat.png", "skimage", "data/chelsea.png", ("inpaint", "stylize")),
    Shipped("rocket.jpg", "skimage", "data/rocket.jpg", ("inpaint",)),
)
"""Chosen by eye: GrabCut loses the astronaut's head and most of the motorcycle, which a trained model keeps.

The documentation of `skimage.data` names the sources of scikit-image's photos, which are free to use. Those of scikit-learn
are CC BY 2.0, from Flickr: flower.jpg by vultilion, china.jpg by danielbuechele.
"""


@dataclass(frozen=True)
class Retouch:
    """A photo with something to remove: `path` and `mask` are relative to the demo's folder, `boxes` is in fractions."""

    path: str
    mask: str | None = None
    boxes: str = ""


@dataclass
class Material:
    """Everything the server serves; paths are relative to the demo's folder."""

    folder: Path
    photos: dict[str, list[str]]  # by use
    retouches: list[Retouch]


def gather(folder: Path, images: Path | None, count: int | None) -> Material:
    """Copy the photos into `folder`, and make the dated and scratched ones.

    Raises MissingExtra without the demo's packages, UsageError if `images` contains no photo.
    """
    (folder / "photos").mkdir()
    photos = _copy_own(folder, images, count) if images else _copy_shipped(folder, count)
    return Material(folder, photos, _retouches(folder, photos["inpaint"]))


def _copy_own(folder: Path, images: Path, count: int | None) -> dict[str, list[str]]:
    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file() and p.name.isprintable())
    if not paths:
        raise UsageError(f"{images}: there are no images in this folder")
    for path in paths[: count or OWN_PHOTOS]:
        shutil.copyfile(path, folder / "photos" / path.name)
    return {use: [f"photos/{path.name}" for path in paths[: count or OWN_PHOTOS]] for use in USES}


def _copy_shipped(folder: Path, count: int | None) -> dict[str, list[str]]:
    chosen = {use: [photo for photo in SHIPPED if use in photo.uses][:count] for use in USES}
    for photo in {photo for photos in chosen.values() for photo in photos}:
        source, target = _package(photo.package) / photo.path, folder / "photos" / photo.name
        if photo.crop is None:
            shutil.copyfile(source, target)
        else:
            from PIL import Image

            with Image.open(source) as picture:
                picture.crop(photo.crop).save(target)
    return {use: [f"photos/{photo.name}" for photo in photos] for use, photos in chosen.items()}


def _package(name: str) -> Path:
    # Without importing it: scikit-image and scikit-learn load SciPy, which takes a second.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "the demo's photos come with scikit-image and scikit-learn: pip install 'imagemill[demo]', "
            "or use your own photos with --images"
        )
    return Path(spec.submodule_search_locations[0])


def _retouches(folder: Path, photos: list[str]) -> list[Retouch]:
    """Every photo with a date stamped on, as old cameras did, and the first one also with scratches and their mask."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise MissingExtra("the demo draws with Pillow: pip install 'imagemill[demo]'") from error
    for name in ("dated", "scratched", "masks"):
        (folder / "photos" / name).mkdir()
    retouches: list[Retouch] = []
    for photo in photos:
        try:
            with Image.open(folder / photo) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # the worker will report what is wrong with it
        if not retouches:
            retouches.append(_scratch(folder, photo, picture.copy()))
        retouches.append(_stamp(folder, photo, picture))
    if not retouches:
        raise UsageError("none of the photos can be read")
    return retouches


def _stamp(folder: Path, photo: str, picture: PillowImage) -> Retouch:
    from PIL import ImageDraw, ImageFont

    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(8, min(width, height) // 16))
    corner = round(width * 0.95), round(height * 0.95)
    draw.text(corner, STAMP, fill=(255, 140, 20), font=font, anchor="rb")
    left, top, right, bottom = draw.textbbox(corner, STAMP, font=font, anchor="rb")
    margin = max(3, min(width, height) // 100)  # JPEG blurs the edges of the stamp into its surroundings
    x, y = max(0, left - margin) / width, max(0, top - margin) / height
    right, bottom = min(width, right + margin) / width, min(height, bottom + margin) / height
    path = f"photos/dated/{Path(photo).stem}.jpg"
    if (folder / path).exists():  # a.jpg and a.png in the same folder
        path = f"photos/dated/{Path(photo).name}.jpg"
    picture.save(folder / path, quality=92)
    return Retouch(path, boxes=f"{x:.4f},{y:.4f},{right - x:.4f},{bottom - y:.4f}")


def _scratch(folder: Path, photo: str, picture: PillowImage) -> Retouch:
    from PIL import Image, ImageDraw

    width, height = picture.size
    mask = Image.new("L", picture.size, 0)
    scratches, holes = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    thick = max(1, min(width, height) // 200)
    chance = random.Random(7)  # noqa: S311  # the same scratches in every demo
    for _ in range(7):
        x, lean = chance.uniform(0.05, 0.95), chance.uniform(-0.12, 0.12)
        line = [((x + lean * t / 8 + chance.uniform(-0.008, 0.008)) * width, height * t / 8) for t in range(9)]
        scratches.line(line, fill=(245, 242, 235), width=thick)
        holes.line(line, fill=255, width=thick + 4)
    retouch = Retouch(f"photos/scratched/{Path(photo).stem}.png", mask=f"photos/masks/{Path(photo).stem}.png")
    picture.save(folder / retouch.path)
    mask.save(folder / f"{retouch.mask}")
    return retouch
