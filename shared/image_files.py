"""The image formats that are read: their extensions, and how to recognise them by their first bytes."""

from __future__ import annotations

EXTENSIONS = {
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "png": (".png",),
    "webp": (".webp",),
    "gif": (".gif",),
    "bmp": (".bmp", ".dib"),
    "tiff": (".tif", ".tiff"),
    "avif": (".avif",),
    "heic": (".heic", ".heif", ".hif"),
    "jxl": (".jxl",),
}
"""File extensions of each format. worker/imaging/headers.py reads these formats, the last two with the extra `formats`."""
IMAGE_EXTENSIONS = frozenset(extension for extensions in EXTENSIONS.values() for extension in extensions)
RAW_EXTENSIONS = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"})
"""Of cameras' raw files, which begin like TIFF files and are not read."""
HEAD = 32
"""Bytes that `looks_like_image` needs."""

_STARTS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
)
_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins like this has a format that is read, whatever its name."""
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[:2] == b"BM":
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    if head[4:8] == b"ftyp":
        return head[8:12] in _BRANDS
    return head.startswith(_STARTS)
