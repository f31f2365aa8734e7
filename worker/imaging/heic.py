"""HEIC (HEIF with HEVC), as phones write it, with libheif; it comes with the extra `formats`.

Rotation, mirroring and cropping are in the file's boxes, and libheif applies them; the orientation in EXIF only repeats them
(ISO/IEC 23008-12, 6.5.10).
"""

from __future__ import annotations

import io

import numpy as np
from PIL.ImageFile import ImageFile

from imagemill.shared.errors import Truncated, UnsupportedFormat
from imagemill.worker.imaging import colour, heif
from imagemill.worker.imaging.facts import REDUCED, Facts, Samples, check_size


def read_header(data: bytes, max_pixels: int) -> Facts:
    """What the file states, without decoding; the orientation is applied already.

    Raises UnsupportedFormat without the extra and for HDR pictures, and TooManyPixels if one of the tiles has them.
    """
    stated = heif.read(data)
    for size in heif.sizes(data):
        check_size(size, max_pixels)
    image = _opened(data)
    icc = image.info.get("icc_profile")
    if icc is None and stated.code_points is not None:
        icc = colour.by_code_points(*stated.code_points, what="the HEIC file")
    return Facts(image.size, icc=icc, orientation=1, notes=(REDUCED,) * (stated.bits > 8))


def decode(data: bytes, size: tuple[int, int]) -> Samples:
    """RGB or RGBA pixels of the main picture. Raises Truncated and what libheif raises."""
    image = _opened(data)
    image.load()
    if image.size != size:
        raise Truncated(f"the file has conflicting sizes: {size[0]} x {size[1]} and {image.width} x {image.height} pixels")
    mode = "RGBA" if image.mode in ("RGBA", "RGBa", "LA") else "L" if image.mode == "L" else "RGB"
    return Samples(np.array(image if image.mode == mode else image.convert(mode)), mode)


def _opened(data: bytes) -> ImageFile:
    try:
        from pillow_heif import options
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError as error:
        raise UnsupportedFormat("reading HEIC images needs pip install 'imagemill[formats]'") from error
    # Parts that are never read. One thread each: the line decodes several pictures at once.
    options.THUMBNAILS, options.DEPTH_IMAGES, options.AUX_IMAGES, options.DECODE_THREADS = False, False, False, 1
    image: ImageFile = HeifImageFile(io.BytesIO(data))
    return image
