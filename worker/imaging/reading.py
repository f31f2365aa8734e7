"""The decoder of each format."""

from __future__ import annotations

from imagemill.worker.imaging import bmp, heic, jpeg, jxl, png_reading, tiff
from imagemill.worker.imaging.facts import Samples
from imagemill.worker.imaging.headers import Header
from imagemill.worker.imaging.pillow import open_checked
from imagemill.worker.imaging.png_reading import samples


def decode(data: bytes, header: Header, target: tuple[int, int]) -> Samples:
    """Pixels as stored, of at least `target` (width, height). Raises ImageErrors and whatever `headers.translated` converts."""
    size = header.stored_size
    if header.format == "jpeg":
        return jpeg.decode(data, size, target)
    if header.format == "png":
        return png_reading.decode(data, size)
    if header.format == "tiff":
        return tiff.decode(data, size)
    if header.format == "heic":
        return heic.decode(data, size)
    if header.format == "jxl":
        return jxl.decode(data, size)
    image = open_checked(data, header.format, size)
    if header.format == "bmp":
        bmp.corrected(data, image)
    image.load()
    vars(image).pop("_decoder", None)  # that of WebP keeps two copies of the picture
    return Samples(*samples(image))
