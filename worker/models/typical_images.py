"""The operator's own photos, by which 8-bit copies are calibrated and compared with the original."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from imagemill.shared.errors import ImageError, TooLarge, UsageError, sentence
from imagemill.worker.imaging.codec import decode
from imagemill.worker.imaging.headers import probe
from imagemill.worker.imaging.picture import Pixels

LEAST, MOST = 5, 60
"""Number of images to calibrate on and compare with; more only take time."""
HELD_BACK = 3
"""One image in this many, and at least two, are held back from calibration to compare masks on."""
EDGE = 2048
"""Longest edge of decoded images in pixels; more than any model's input."""
MAX_PIXELS = 100_000_000
MAX_BYTES = 200_000_000
"""Larger files are no photos, and are not read."""


def divide(images: Path) -> tuple[list[Path], list[Path], int]:
    """A folder's images to calibrate on, those held back, and the number of files that were skipped.

    Images are sorted by the hash of their path, which is random but reproducible, because neighbours in a folder resemble
    each other. Duplicates are skipped, so no image is on both sides. Raises UsageError for too few images.
    """
    files = [path for path in images.rglob("*") if path.is_file()]
    chosen, faults = dict[str, Path](), list[str]()
    for path in sorted(files, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(images))).digest()):
        try:
            data = _read(path)
            _decoded(data)
        except (ImageError, OSError) as error:
            faults.append(f"{path.relative_to(images)}: {sentence(error)}")
        else:
            chosen.setdefault(hashlib.sha256(data).hexdigest(), path)
        if len(chosen) == MOST:
            break
    if len(chosen) < LEAST:
        unfit = f"; files that can't be used: {len(faults)}, such as {faults[0]}" if faults else ""
        has = f"at least {LEAST} different images are needed, and 30 are better: {images} has {len(chosen) or 'none'}"
        raise UsageError(has + unfit)
    paths, count = list(chosen.values()), max(2, len(chosen) // HELD_BACK)
    return paths[count:], paths[:count], len(files) - len(paths)


def pixels(path: Path) -> Pixels:
    """An image, RGB or RGBA uint8 [h, w, 3 or 4], scaled down to `EDGE`. Raises ImageError and OSError."""
    return _decoded(_read(path))


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise TooLarge(f"it has more than {MAX_BYTES / 1e6:.0f} MB")
    return path.read_bytes()


def _decoded(data: bytes) -> Pixels:
    return decode(data, probe(data, max_pixels=MAX_PIXELS), edge=EDGE).pixels
