"""Small files that would cost much: each a sample of a kind. The tests read them, too."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageCms


def save(kind: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: Any) -> bytes:
    """A picture of one colour as a file."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def profile(*tags: tuple[bytes, bytes], space: bytes = b"RGB ", pcs: bytes = b"XYZ ") -> bytes:
    """A colour profile of these tags, whose data lies one after another."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at, table, data = 132 + 12 * len(tags), b"", b""
    for name, payload in tags:
        table += struct.pack(">4sII", name, at + len(data), len(payload))
        data += payload + bytes(-len(payload) % 4)
    head = bytearray(srgb[:128])
    head[16:24] = space + pcs
    head[0:4] = struct.pack(">I", at + len(data))
    return bytes(head) + struct.pack(">I", len(tags)) + table + data


def pipeline(stages: int) -> bytes:
    """A tag for a profile: so many matrices one after another, all of which lie at the same place."""
    matrix = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, 1, 0.001, 0, 0, 1, 0, 0, 0.001, 1, 0, 0, 0)
    places = struct.pack(">II", 16 + 8 * stages, len(matrix)) * stages
    return b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, stages) + places + matrix


def with_profile(icc: bytes, jpeg: bytes | None = None) -> bytes:
    """A JPEG file with a profile in as many parts as it needs."""
    jpeg = jpeg or save("JPEG")
    parts = [icc[at : at + 65_519] for at in range(0, len(icc), 65_519)]
    heads = [struct.pack(">H", len(part) + 16) + b"ICC_PROFILE\0" + bytes([n, len(parts)]) for n, part in enumerate(parts, 1)]
    packed = [head + part for head, part in zip(heads, parts, strict=True)]
    return jpeg[:2] + b"".join(b"\xff\xe2" + part for part in packed) + jpeg[2:]


def scans(count: int, size: tuple[int, int] = (8000, 8000), *, comment: bytes = b"") -> bytes:
    """A progressive JPEG whose scans say nothing, each in a few bytes, but cost a pass over the picture."""
    blocks = -(-size[0] // 8) * -(-size[1] // 8)
    tables = b"\xff\xdb\0\x43\0" + b"\1" * 64
    tables += b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, size[1], size[0], 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    tables += b"\xff\xc4\0\x14\0\1" + bytes(16) + b"\xff\xc4\0\x14\x10\1" + bytes(15) + b"\xe0"
    first = b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\0\0" + bytes(-(-3 * blocks // 8))
    runs = int("0" + "1" * 14 + ("0" + "1" * 14) * (blocks // 32767) + "1" * 7, 2)
    ends = runs.to_bytes(-(-runs.bit_length() // 8) + 1, "big").replace(b"\xff", b"\xff\0")
    later = [b"\xff\xda\0\x08\1" + bytes([1 + n % 3, 0, 1 + n // 3 % 63, 1 + n // 3 % 63, 0x0D]) + ends for n in range(count)]
    return b"\xff\xd8" + tables + first + comment + b"".join(later) + b"\xff\xd9"


def chunk(kind: bytes, payload: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def with_chunks(*chunks: bytes) -> bytes:
    """A PNG file with more chunks after its header."""
    png = save("PNG")
    return png[:33] + b"".join(chunks) + png[33:]


def rle_bmp(width: int, height: int, data: bytes) -> bytes:
    """A BMP file with run-length coded pixels."""
    at = 14 + 40 + 1024
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + head + bytes(1024) + data


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"", size: tuple[int, int] = (8, 8)) -> bytes:
    """A TIFF file of one grey strip with more tags, whose values may lie in `data`, from offset 400 on."""
    own = [(256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    own += [(277, 3, 1, 1), (278, 4, 1, size[1]), (279, 4, 1, 64), *tags]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in own)
    return (struct.pack("<2sHIH", b"II", 42, 8, len(own)) + entries + bytes(4)).ljust(400, b"\0") + data


_BOMB = zlib.compress(bytes(5 << 20), 9)

SAMPLES: dict[str, Callable[[], bytes]] = {
    "plain.gif": lambda: save("GIF"),
    "scans.jpg": lambda: scans(2600),
    "scans-after-comment.jpg": lambda: scans(2600, comment=b"\xff\xfe\0\6\xff\xd9\0\0"),
    "90-scans.jpg": lambda: scans(90),
    "fill-bytes.jpg": lambda: b"\xff\xd8\xff" + b"\xff" * (16 << 20),
    "fill-bytes-zero.jpg": lambda: b"\xff\xd8\xff\xe0\0\2" + b"\xff\0" * (8 << 20),
    "pipeline.jpg": lambda: with_profile(profile((b"D2B0", pipeline(30_000)), (b"D2B1", pipeline(30_000)))),
    "profiles.png": lambda: with_chunks(*[chunk(b"iCCP", b"a\0\0" + _BOMB)] * 800),
    "texts.png": lambda: with_chunks(*[chunk(b"zTXt", b"a\0\0" + _BOMB)] * 200),
    "runs.bmp": lambda: rle_bmp(8000, 8000, b"\1\0\0\0" * 8000),
    "steps.bmp": lambda: rle_bmp(64_000_000, 1, b"\0\2\0\xff" * 10),
    "rationals.tiff": lambda: tiff((282, 5, 2 << 20, 400), (283, 5, 2 << 20, 400), data=b"\1" * (17 << 20)),
    "strips.tiff": lambda: tiff((273, 4, 99_999, 400), (279, 4, 99_999, 400), data=bytes(500_000), size=(8, 99_999)),
    "lossless.webp": lambda: save("WEBP", (8000, 8000), "RGBA", lossless=True, method=0),
    "large.png": lambda: save("PNG", (8000, 8000), "RGBA", compress_level=1),
    "large.jpg": lambda: save("JPEG", (8000, 8000)),
    "large-progressive.jpg": lambda: save("JPEG", (8000, 8000), progressive=True),
    "large-cmyk.jpg": lambda: save("JPEG", (8000, 8000), "CMYK"),
    "large.avif": lambda: save("AVIF", (8000, 8000), speed=10),
    "comments.gif": lambda: save("GIF").replace(b"\x2c", b"\x21\xfe" + (b"\xff" + b"a" * 255) * 60_000 + b"\0\x2c", 1),
}
