"""Reading headers: format recognition by content, rejection of decompression bombs, clear errors."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.errors import EmptyFile, ImageError, NotAnImage, OutOfMemory, TooManyPixels, Truncated, UnsupportedFormat
from imagemill.worker.imaging import headers, png, tiff_pages
from imagemill.worker.imaging.facts import check_size
from imagemill.worker.imaging.headers import FORMATS, Header, probe, sniff, translated
from imagemill.worker.imaging.pillow import open_checked
from tests.unit.worker.imaging.samples import exif, png_chunk

ROOT = Path(__file__).resolve().parents[4]
LIMIT = 64_000_000
SCENE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8))


def save(kind: str, image: Image.Image = SCENE, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


EXTRA = ("heic", "jxl")  # test_more_formats.py
FILES = {kind: save(kind) for kind in FORMATS if kind not in EXTRA}
ANIMATION = {"save_all": True, "append_images": [SCENE.rotate(180)]}


def patched(data: bytes, place: int, layout: str, *values: int) -> bytes:
    return data[:place] + struct.pack(layout, *values) + data[place + struct.calcsize(layout) :]


def tiff(*entries: tuple[int, int, int, int], big: bool = False, order: str = "<") -> bytes:
    """A TIFF with entries (tag, type, count, value); values may point into the zeros that follow."""
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(order + "HHHQQ", 43, 8, 0, 16, len(entries))
        table = b"".join(struct.pack(order + "HHQQ", *entry) for entry in entries)
    else:
        head = mark + struct.pack(order + "HIH", 42, 8, len(entries))
        # a short is left-aligned in its four bytes
        table = b"".join(
            struct.pack(order + "HHI", *entry[:3])
            + (struct.pack(order + "HH", entry[3], 0) if entry[1] in (3, 8) else struct.pack(order + "I", entry[3]))
            for entry in entries
        )
    return head + table + bytes(5000)


def grey_tiff(width: int, height: int, *more: tuple[int, int, int, int], kind: int = 4, packing: int = 5) -> bytes:
    """A grey TIFF, LZW-compressed by default, whose tags claim the given values."""
    basic = [(256, kind, 1, width), (257, kind, 1, height), (258, 3, 1, 8), (259, 3, 1, packing), (262, 3, 1, 1)]
    return tiff(*sorted([*basic, (277, 3, 1, 1), *more]))


STRIP = ((273, 4, 1, 200), (279, 4, 1, 4000))
TILE = ((324, 4, 1, 200), (325, 4, 1, 4000))


# --- formats ---


@pytest.mark.parametrize("kind", FILES)
def test_probe_recognises_format_by_content(kind: str) -> None:
    assert sniff(FILES[kind]) == kind
    assert probe(FILES[kind], max_pixels=64 * 48) == Header(kind, (64, 48))
    with pytest.raises(TooManyPixels, match=r"64 x 48 pixels, more than the limit of 3,071"):
        probe(FILES[kind], max_pixels=64 * 48 - 1)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("webp", save("webp", lossless=True)),
        ("webp", save("webp", **ANIMATION)),
        ("gif", save("gif", **ANIMATION)),
        ("gif", b"GIF87a" + save("gif")[6:]),
        ("png", save("png", **ANIMATION)),
        ("avif", save("avif", **ANIMATION)),
        ("tiff", save("tiff", **ANIMATION)),
        ("tiff", save("tiff", big_tiff=True)),
        ("tiff", tiff((256, 3, 1, 64), (257, 3, 1, 48), (262, 3, 1, 1), (273, 4, 1, 200), order=">")),
        ("jpeg", save("jpeg", progressive=True)),
        ("bmp", patched(save("bmp"), 22, "<i", -48)),  # stored top to bottom
    ],
)
def test_probe_recognises_variant(kind: str, data: bytes) -> None:
    assert probe(data, max_pixels=LIMIT) == Header(kind, (64, 48), lossless=b"VP8L" in data)


@pytest.mark.parametrize(
    ("data", "description"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbf\r\n  <HTML lang=en>", "a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"<?xml version='1.0'?>\n<svg>", "an SVG drawing"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isom", "a video"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b'{"error": "not found"}\n', "text"),
        (b"BMW M3 for sale", "text"),
        (b"\0\1\2\3", "of an unknown kind"),
        (b"%!PS-Adobe-3.0 EPSF", "a PostScript document"),  # Pillow would run Ghostscript
    ],
)
def test_probe_names_unsupported_file_type(data: bytes, description: str) -> None:
    with pytest.raises(NotAnImage) as caught:
        probe(data, max_pixels=LIMIT)
    assert caught.value.message.startswith(f"the file is {description}")
    assert caught.value.message.endswith("; supported formats are jpeg, png, webp, gif, bmp, tiff, avif, heic, jxl")


def test_probe_raises_empty_file() -> None:
    with pytest.raises(EmptyFile, match="0 bytes"):
        probe(b"", max_pixels=LIMIT)


def test_probe_rejects_other_pillow_formats() -> None:
    for kind in ("ppm", "ico", "tga", "pcx", "sgi", "dds", "msp"):
        image = SCENE.convert("1") if kind == "msp" else SCENE
        with pytest.raises(NotAnImage):
            probe(save(kind, image), max_pixels=LIMIT)


# --- orientation and profile ---


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_header_has_upright_and_stored_size(kind: str) -> None:
    header = probe(save(kind, exif=exif(6), icc_profile=b"p" * 129), max_pixels=LIMIT)
    assert (header.size, header.orientation, header.stored_size) == ((48, 64), 6, (64, 48))
    header = probe(save(kind, exif=exif(3)), max_pixels=LIMIT)
    assert (header.size, header.orientation, header.stored_size) == ((64, 48), 3, (64, 48))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
def test_probe_returns_profile_of_at_least_128_bytes(kind: str) -> None:
    profile = bytes(range(256)) * 2
    assert probe(save(kind, icc_profile=profile), max_pixels=LIMIT).icc == profile
    assert probe(save(kind, icc_profile=profile[:127]), max_pixels=LIMIT).icc is None


# --- bombs ---


def white_png(side: int) -> bytes:
    """A valid PNG of one colour, three bytes per pixel: a single deflate block, repeated."""
    rows = 100
    block = bytes(rows * (1 + 3 * side))
    pack = zlib.compressobj(9)
    first = pack.compress(block) + pack.flush(zlib.Z_FULL_FLUSH)
    again = pack.compress(block) + pack.flush(zlib.Z_FULL_FLUSH)
    total = (side * (1 + 3 * side)) % 65_521
    last = b"\x03\0" + struct.pack(">HH", total, 1)  # an empty last block and the Adler-32 of that many zeros
    pixels = first + again * (side // rows - 1) + last
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return png.SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


JPEG, GIF, WEBP, BMP = FILES["jpeg"], FILES["gif"], FILES["webp"], FILES["bmp"]
FRAME, SIDES = GIF.index(b",\0\0\0\0"), FILES["avif"].index(b"ispe") + 8
SIGNED = [(322, 9, 1, 30_000), (323, 9, 1, 30_000)]
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (lambda: white_png(30_000), "too_many_pixels"),
    "png-that-lies": (lambda: patched(FILES["png"], 16, ">II", 2**31 - 1, 2**31 - 1), "too_many_pixels"),
    "jpeg": (lambda: patched(JPEG, JPEG.index(b"\xff\xc0") + 5, ">HH", 65_500, 65_500), "too_many_pixels"),
    "gif-canvas": (lambda: patched(GIF, 6, "<HH", 60_000, 60_000), "too_many_pixels"),
    "gif-frame": (lambda: patched(GIF, FRAME + 5, "<HH", 60_000, 60_000), "too_many_pixels"),
    "gif-frame-far-out": (lambda: patched(GIF, FRAME + 1, "<HH", 65_000, 65_000), "too_many_pixels"),
    "webp": (lambda: patched(WEBP, 26, "<HH", 16_383, 16_383), "too_many_pixels"),
    "webp-lossless": (lambda: patched(save("webp", lossless=True), 21, "<I", 0x0FFFFFFF), "too_many_pixels"),
    "webp-animated": (lambda: patched(save("webp", **ANIMATION), 24, "<HBHB", 65_535, 255, 65_535, 255), "too_many_pixels"),
    "bmp": (lambda: patched(BMP, 18, "<ii", 100_000, -100_000), "too_many_pixels"),
    "avif": (lambda: patched(FILES["avif"], SIDES, ">II", 16_000, 16_000), "too_many_pixels"),
    "tiff": (lambda: grey_tiff(30_000, 30_000, *STRIP), "too_many_pixels"),
    "tiff-big": (lambda: tiff((256, 16, 1, 2**40), (257, 16, 1, 2**40), big=True), "too_many_pixels"),
    "tiff-tile": (lambda: grey_tiff(64, 64, (322, 4, 1, 30_000), (323, 4, 1, 30_000), *TILE), "too_many_pixels"),
    "tiff-tile-signed": (lambda: grey_tiff(64, 64, *SIGNED, *TILE), "not_an_image"),
    "tiff-strip": (lambda: grey_tiff(64, 64, (278, 4, 1, 2**31), *STRIP), "truncated"),
    "tiff-strip-bytes": (lambda: grey_tiff(64, 64, STRIP[0], (279, 4, 1, 2**31)), "truncated"),
    "tiff-strips": (lambda: grey_tiff(64, 64, (273, 4, 2**31 - 1, 200), STRIP[1]), "not_an_image"),
    "tiff-pieces": (lambda: grey_tiff(64, 64, (324, 4, tiff_pages.MAX_PIECES + 1, 200), TILE[1]), "not_an_image"),
    "tiff-tags": (lambda: tiff(*[(65_000, 3, 1, 1)] * (tiff_pages.MAX_TAGS + 1)), "not_an_image"),
    "gif-blocks": (lambda: GIF[:FRAME] + b"\0" * (headers.MAX_BLOCKS + 1) + GIF[FRAME:], "not_an_image"),
}

# Limits the address space to 64 MiB more than Python and the codec need: a larger allocation raises MemoryError and would
# give another error code.
WITH_LITTLE_MEMORY = """
import json, os, resource, sys
from pathlib import Path
from imagemill.shared.errors import ImageError
from imagemill.worker.imaging import codec
files = [(path, path.read_bytes()) for path in sorted(Path(sys.argv[1]).iterdir())]
codec.decode(Path(sys.argv[2]).read_bytes(), codec.probe(Path(sys.argv[2]).read_bytes(), max_pixels=10**6))
used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
codes = {}
for path, data in files:
    try:
        codec.decode(data, codec.probe(data, max_pixels=64_000_000))
        codes[path.name] = "decoded"
    except ImageError as error:
        codes[path.name] = error.code
print(json.dumps(codes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit needs Linux")
def test_decompression_bombs_are_rejected_without_allocating_memory(tmp_path: Path) -> None:
    folder, plain = tmp_path / "bombs", tmp_path / "plain.tif"
    folder.mkdir()
    plain.write_bytes(save("tiff", compression="tiff_lzw"))
    for name, (make, _) in BOMBS.items():
        (folder / name).write_bytes(make())
    process = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY, folder, plain], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(process.stdout) == {name: code for name, (_, code) in sorted(BOMBS.items())}


def test_png_bomb_is_a_valid_picture() -> None:
    """Otherwise it might be rejected for another reason."""
    data = white_png(300)
    assert probe(data, max_pixels=90_000) == Header("png", (300, 300))
    assert not np.array(Image.open(io.BytesIO(data))).any()


def test_zero_size_is_truncated() -> None:
    for size in ((0, 5), (5, 0)):
        with pytest.raises(Truncated, match="no pixels"):
            check_size(size, LIMIT)
    with pytest.raises(Truncated):
        probe(patched(FILES["png"], 16, ">I", 0), max_pixels=LIMIT)


def test_gif_without_picture_is_truncated() -> None:
    with pytest.raises(Truncated, match="no picture"):
        probe(GIF[:FRAME] + b"\x3b", max_pixels=LIMIT)


def test_open_checked_rejects_conflicting_size() -> None:
    assert open_checked(FILES["webp"], "webp", (64, 48)).size == (64, 48)
    with pytest.raises(Truncated, match="64 x 49 and 64 x 48"):
        open_checked(FILES["webp"], "webp", (64, 49))


# --- decoder exceptions ---


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        *((error("x"), Truncated) for error in (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError)),
        *(
            (error("x"), Truncated)
            for error in (OverflowError, ZeroDivisionError, AttributeError, AssertionError, RuntimeError)
        ),
        (struct.error("x"), Truncated),
        (zlib.error("x"), Truncated),
        (UnicodeDecodeError("ascii", b"x", 0, 1, "x"), Truncated),
        (Image.DecompressionBombError("x"), Truncated),
        (Image.UnidentifiedImageError("x"), Truncated),
        (NotImplementedError("x"), UnsupportedFormat),
        (OSError("Unsupported BMP pixel depth (2)"), UnsupportedFormat),
        (MemoryError("x"), OutOfMemory),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_decoder_exception_is_translated(raised: Exception, kind: type[ImageError]) -> None:
    with pytest.raises(kind, match="WebP") as caught, translated("webp"):
        raise raised
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [TooManyPixels("x"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_image_error_and_interrupt_are_not_translated(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, translated("png"):
        raise raised
    assert caught.value is raised
