"""Photos with every kind of metadata, made by hand."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from tests.unit.worker.imaging.samples import png_chunk, save, scene

CREATOR, RIGHTS, PLACE = "Ann & Sons", "(c) 2026 Ann", "Nowhere"
XMP = """<?xpacket begin="\ufeff"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><r:Description r:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
 xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:xmpRights="http://ns.adobe.com/xap/1.0/rights/"
 xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmlns:xmpGImg="http://ns.adobe.com/xap/1.0/g/img/"
 tiff:Orientation="6" exif:GPSLatitude="12,34.5N" xmp:Rating="4" xmpRights:Marked="True" xmpNote:HasExtendedXMP="0123">
<dc:creator><r:Seq><r:li>Ann &amp; Sons</r:li></r:Seq></dc:creator>
<dc:title><r:Alt><r:li xml:lang="x-default">Boat</r:li></r:Alt></dc:title>
<xmp:Thumbnails><r:Alt><r:li r:parseType="Resource"><xmpGImg:image>/9j/4AAQ</xmpGImg:image></r:li></r:Alt></xmp:Thumbnails>
</r:Description></r:RDF></x:xmpmeta><?xpacket end="w"?>""".encode()


def exif(orientation: int = 1, *, thumbnail: bytes = b"", packet: bytes = b"") -> bytes:
    """A block with a creator, rights, a camera, 300 dpi, a size, a maker note, a position and, if given, a
    thumbnail and an XMP packet."""
    block = Image.Exif()
    block[271], block[274], block[282], block[283], block[296] = "Camera", orientation, 300.0, 300.0, 2
    block[315], block[33432] = CREATOR, RIGHTS
    if packet:
        block[700] = packet
    photo, gps = block.get_ifd(34665), block.get_ifd(34853)
    photo[36867], photo[40962], photo[40963], photo[37500] = "2026:01:02 03:04:05", 9_999, 9_999, b"MAKER" * 20
    gps[1], gps[2] = "N", (12.0, 34.0, 30.0)
    made = block.tobytes().removeprefix(b"Exif\0\0")
    if thumbnail:  # a second directory at the end, linked from the first
        order = "<" if made[:2] == b"II" else ">"
        (first,) = struct.unpack_from(order + "I", made, 4)
        (count,) = struct.unpack_from(order + "H", made, first)
        at = len(made)
        rows = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in ((513, at + 30), (514, len(thumbnail))))
        made = bytearray(made + struct.pack(order + "H", 2) + rows + bytes(4) + thumbnail)
        struct.pack_into(order + "I", made, first + 2 + 12 * count, at)
    return bytes(made)


def iptc(**datasets: str) -> bytes:
    """A Photoshop block with the datasets of these numbers (`n80="..."`), and a thumbnail resource."""
    records = b"".join(
        struct.pack(">BBBH", 0x1C, 2, int(name[1:]), len(text.encode())) + text.encode() for name, text in datasets.items()
    )
    records = struct.pack(">BBBH", 0x1C, 1, 90, 3) + b"\x1b%G" + records
    return b"".join(
        b"8BIM" + struct.pack(">HHI", kind, 0, len(value)) + value + bytes(len(value) % 2)
        for kind, value in ((0x040C, b"THUMBNAIL"), (0x0404, records))
    )


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def photo(kind: str, orientation: int = 1, pixels: np.ndarray | None = None) -> bytes:
    """A file of format `kind` with all of the metadata that the format has a place for."""
    picture, block = scene() if pixels is None else pixels, exif(orientation, thumbnail=b"THUMBNAIL")
    if kind == "jpeg":
        bare = save("jpeg", picture, quality=95, dpi=(300, 300))
        parts = (
            segment(0xE1, b"Exif\0\0" + block),
            segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
            segment(0xED, b"Photoshop 3.0\0" + iptc(n80=CREATOR, n116=RIGHTS, n92=PLACE)),
            segment(0xFE, b"hello"),
        )
        return bare[:20] + b"".join(parts) + bare[20:] + b"TRAILER"
    if kind == "png":
        bare = save("png", picture, dpi=(300, 300))
        texts = b"".join(
            png_chunk(b"tEXt", text) for text in (b"Author\0Ann & Sons", b"Comment\0hello", b"Copyright\0(c) 2026 Ann")
        )
        more = png_chunk(b"eXIf", block) + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + texts
        return bare[:33] + more + bare[33:]
    if kind == "tiff":
        return save("tiff", picture, exif=exif(orientation, packet=XMP))
    options = {"webp": {"lossless": True, "exact": True}, "avif": {"quality": 90}}[kind]
    return save(kind, picture, exif=b"Exif\0\0" + block, xmp=XMP, **options)
