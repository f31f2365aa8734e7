"""Metadata: kept, reduced to credits or dropped as a job asks, in every format, and never trusted."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.messages import KeepMetadata
from imagemill.worker.imaging import codec, png
from imagemill.worker.imaging.metadata import blocks, exif, files, iptc, metadata, xmp
from imagemill.worker.imaging.metadata.blocks import Blocks
from tests.unit.worker.imaging.metadata import sources
from tests.unit.worker.imaging.metadata.sources import CREATOR, PLACE, RIGHTS, XMP, photo
from tests.unit.worker.imaging.samples import picture, png_chunk, save, scene

SOURCES = ("jpeg", "png", "webp", "avif", "tiff")
RESULTS = ("jpeg", "png", "webp", "webp-lossless", "avif")
GPS, ORIENTATION, CAMERA, DATE = 34853, 274, 271, 36867


def result(source: str, form: str, keep: KeepMetadata, orientation: int = 6) -> bytes:
    return codec.encode(picture(photo(source, orientation), keep=keep), format=form, quality=80).data


def tags(data: bytes) -> dict[Any, Any]:
    """EXIF as Pillow reads it: the first directory, and the other two by their pointers' numbers."""
    with Image.open(io.BytesIO(data)) as image:
        read = image.getexif()
        return {**read, 34665: read.get_ifd(34665), GPS: read.get_ifd(GPS), "next": read.get_ifd(1)}


@pytest.mark.parametrize("form", RESULTS)
@pytest.mark.parametrize("source", SOURCES)
def test_keep_brings_all_tags_along_corrected_and_without_thumbnail(source: str, form: str) -> None:
    data = result(source, form, "keep")
    found = tags(data)
    assert (found[315], found[33432], found[CAMERA], found[282]) == (CREATOR, RIGHTS, "Camera", 300)
    assert found.get(ORIENTATION, 1) == 1
    assert found[GPS] == {1: "N", 2: (12.0, 34.0, 30.0)}
    assert (found[34665][40962], found[34665][40963]) == (48, 64)  # upright
    assert found[34665][37500] == b"MAKER" * 20
    assert not found["next"]
    assert b"THUMBNAIL" not in data
    packet = blocks.find(data, form.removesuffix("-lossless")).xmp
    assert all(part in packet for part in (b"Ann &amp; Sons", b"12,34.5N", b'xmp:Rating="4"', b"Boat"))
    assert not any(part in packet for part in (b"Orientation", b"/9j/", b"HasExtendedXMP"))


@pytest.mark.parametrize("form", RESULTS)
@pytest.mark.parametrize("source", SOURCES)
def test_copyright_keeps_creator_rights_and_resolution_and_nothing_else(source: str, form: str) -> None:
    data = result(source, form, "copyright")
    found = tags(data)
    assert (found.pop(315), found.pop(33432)) == (CREATOR, RIGHTS)
    assert {tag for tag, value in found.items() if value} == {282, 283, 296}
    packet = blocks.find(data, form.removesuffix("-lossless")).xmp
    assert b"Ann &amp; Sons" in packet
    assert b'xmpRights:Marked="True"' in packet
    assert not any(part in data for part in (b"GPS", b"12,34.5N", b"Rating", b"Boat", b"Camera", PLACE.encode(), b"hello"))


@pytest.mark.parametrize("form", RESULTS)
@pytest.mark.parametrize("source", SOURCES)
def test_none_leaves_the_very_file_that_a_source_without_metadata_gives(source: str, form: str) -> None:
    bare = codec.encode(picture(photo(source, 6)), format=form, quality=80)
    assert result(source, form, "none") == bare.data
    assert not blocks.find(bare.data, bare.format)


@pytest.mark.parametrize("keep", ["keep", "copyright", "none"])
@pytest.mark.parametrize("form", RESULTS)
def test_pixels_do_not_depend_on_metadata(form: str, keep: KeepMetadata) -> None:
    with_metadata, without = (picture(result("png", form, each)).pixels for each in (keep, "none"))
    assert (with_metadata == without).all()


@pytest.mark.parametrize(("form", "read"), [("jpeg", "dpi"), ("png", "dpi")])
def test_resolution_is_written_where_every_program_looks(form: str, read: str) -> None:
    with Image.open(io.BytesIO(result("png", form, "copyright"))) as image:
        assert tuple(round(side) for side in image.info[read]) == (300, 300)


def test_iptc_stays_in_jpeg_and_becomes_xmp_elsewhere() -> None:
    bare = save("jpeg", scene())
    block = sources.iptc(n80="Zoë", n116=RIGHTS, n92=PLACE)
    file = bare[:20] + sources.segment(0xED, b"Photoshop 3.0\0" + block) + bare[20:]
    for keep, place in (("keep", True), ("copyright", False)):
        kept = picture(file, keep=keep)
        records = blocks.find(codec.encode(kept, format="jpeg", quality=80).data, "jpeg").resources
        assert set(records) == {iptc.IPTC}
        assert "Zoë".encode() in records[iptc.IPTC]
        assert (PLACE.encode() in records[iptc.IPTC]) == place
        for form in ("png", "webp", "avif"):
            packet = blocks.find(codec.encode(kept, format=form, quality=80).data, form).xmp
            properties = xmp.read(packet, all_of_it=True, moved=False)
            assert {(xmp.DC, "creator"), (xmp.DC, "rights")} <= properties.names
            assert "Zoë".encode() in packet
            assert (PLACE.encode() in packet) == place


def test_texts_of_png_stay_and_become_xmp_and_a_comment_elsewhere() -> None:
    file = png_text(b"tEXt", b"Author\0Zo\xeb") + png_text(b"zTXt", b"Comment\0\0" + zlib.compress(b"hello"))
    kept = picture(with_chunks(file), keep="keep")
    assert blocks.find(codec.encode(kept, format="png", quality=80).data, "png").texts == {"Author": "Zoë", "Comment": "hello"}
    jpeg = blocks.find(codec.encode(kept, format="jpeg", quality=80).data, "jpeg")
    assert jpeg.texts == {"Comment": "hello"}
    assert "Zoë".encode() in jpeg.xmp
    assert blocks.find(
        codec.encode(picture(with_chunks(file), keep="copyright"), format="png", quality=80).data, "png"
    ).texts == {"Author": "Zoë"}


def png_text(kind: bytes, content: bytes) -> bytes:
    return png_chunk(kind, content)


def with_chunks(more: bytes) -> bytes:
    bare = save("png", scene())
    return bare[:33] + more + bare[33:]


# --- files that stay as they are ---


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_unchanged_file_keeps_its_bytes_with_keep_and_its_pixels_with_less(kind: str) -> None:
    data = photo(kind)
    for keep in ("keep", "copyright", "none"):
        kept = picture(data, keep=keep)
        made = codec.unchanged(data, kept, format=kind, keep=keep)
        assert made is not None
        assert (made.data == data) == (keep == "keep")
        assert (picture(made.data).pixels == kept.pixels).all()
        left = metadata.read(made.data, kind, "keep")
        assert bool(left.tags.gps) == (keep == "keep")
        assert bool(left.tags.image) == (keep != "none")
        assert not any(part in made.data for part in (b"12,34.5N", b"THUMBNAIL", b"TRAILER")) or keep == "keep"


@pytest.mark.parametrize("keep", ["copyright", "none"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_unchanged_file_without_metadata_is_the_same_file(kind: str, keep: KeepMetadata) -> None:
    data = save(kind, scene())
    made = codec.unchanged(data, picture(data, keep=keep), format=kind, keep=keep)
    assert made is not None
    assert made.data == data


# --- untrusted ---


@pytest.mark.parametrize("kind", SOURCES)
def test_damaged_metadata_never_fails_an_image(kind: str) -> None:
    data, random = photo(kind), np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for at in random.integers(0, len(data), 20):
            broken[at] = random.integers(256)
        found = metadata.read(bytes(broken), kind, "keep")
        for form in ("jpeg", "png", "webp", "avif"):
            found.blocks(form, (64, 48), srgb=True)
    for cut in range(0, len(data), max(1, len(data) // 60)):
        metadata.read(data[:cut], kind, "copyright")


@pytest.mark.parametrize(
    "packet",
    [
        b'<!DOCTYPE x [<!ENTITY a "aaaa">]>' + XMP[40:],
        XMP.replace(b"Boat", b"<a>" * 100 + b"</a>" * 100),
        XMP[:-80],
        XMP + b" " * xmp.MAX_PACKET,
        XMP.replace(b"Boat", b"".join(b'<y:a xmlns:y="%s"/>' % (b"u" * 9_000 + b"%d" % n) for n in range(100)) * 2),
        b"\xff" + XMP,
        b"",
    ],
    ids=["entities", "deep", "cut", "large", "swelling", "not-text", "empty"],
)
def test_hostile_xmp_is_dropped(packet: bytes) -> None:
    assert xmp.read(packet, all_of_it=True, moved=False) == xmp.Xmp()


def test_exif_values_that_overlap_do_not_add_up() -> None:
    rows = b"".join(
        tag.to_bytes(2, "big") + b"\0\7" + (60_000).to_bytes(4, "big") + (8).to_bytes(4, "big") for tag in range(1, 900)
    )
    file = b"MM\0*\0\0\xf0\0" + bytes(0xF000 - 8) + (899).to_bytes(2, "big") + rows + bytes(4)
    _, first = exif.read(file)
    assert sum(len(value) for _, _, value in first.values()) <= exif.MAX_DIRECTORY


def test_maker_note_stays_where_its_own_offsets_hold() -> None:
    block = sources.exif()
    again = exif.write(exif.read(block)[0], size=(1, 1), srgb=True, dpi=None)
    assert again.index(b"MAKER" * 20) == block.index(b"MAKER" * 20)


def test_block_too_large_for_jpeg_loses_the_maker_note_first() -> None:
    block = exif.Exif(image={315: (2, 4, b"Ann\0")}, photo={exif.MAKER_NOTE: (7, 66_000, bytes(66_000))})
    kept = metadata.Metadata(block).blocks("jpeg", (1, 1), srgb=True)
    assert b"Ann" in kept.exif
    assert len(kept.exif) < 200
    assert len(metadata.Metadata(block).blocks("png", (1, 1), srgb=True).exif) > 66_000


def test_regions_go_when_the_picture_was_turned() -> None:
    packet = XMP.replace(b'xmp:Rating="4"', b'xmlns:m="http://www.metadataworkinggroup.com/schemas/regions/" m:Regions="x"')
    names = [xmp.read(packet, all_of_it=True, moved=moved).names for moved in (False, True)]
    assert [any(name == "Regions" for _, name in each) for each in names] == [True, False]


def test_profile_stays_when_metadata_are_rewritten() -> None:
    profile = Image.open(io.BytesIO(save("png", scene()))).info.get("icc_profile", b"x" * 200)
    for kind in ("jpeg", "png", "webp"):
        data = save(kind, scene(), icc_profile=profile)
        rewritten = files.rewritten(data, kind, Blocks(exif=sources.exif()))
        assert rewritten is not None
        assert Image.open(io.BytesIO(rewritten)).info["icc_profile"] == profile


# --- as exiftool sees it ---

EXIFTOOL = shutil.which("exiftool")


@pytest.mark.skipif(EXIFTOOL is None, reason="exiftool is not installed")
@pytest.mark.parametrize("form", RESULTS)
def test_exiftool_finds_what_was_kept_and_no_fault(form: str) -> None:
    said = {}
    for keep in ("keep", "copyright", "none"):
        command = [str(EXIFTOOL), "-json", "-G1", "-a", "-n", "-"]
        done = subprocess.run(command, input=result("jpeg", form, keep), capture_output=True, check=True)
        (said[keep],) = json.loads(done.stdout)
    assert said["keep"]["GPS:GPSLatitude"] == pytest.approx(12.575)
    assert said["keep"].get("IFD0:Orientation", 1) == 1
    for keep in ("keep", "copyright"):
        assert (said[keep]["IFD0:Artist"], said[keep]["XMP-dc:Creator"]) == (CREATOR, CREATOR)
        assert said[keep]["IFD0:XResolution"] == 300
        assert RIGHTS in (said[keep].get("IPTC:CopyrightNotice"), said[keep].get("XMP-dc:Rights"))
    groups = {name.split(":")[0] for name in said["copyright"]}
    assert not groups & {"GPS", "ExifIFD", "IFD1", "XMP-xmp", "XMP-exif"}
    assert not {name.split(":")[0] for name in said["none"]} & {"IFD0", "IPTC", "GPS"}
    assert "ExifTool:Warning" not in said["copyright"]


def test_png_encoder_is_untouched_without_metadata() -> None:
    pixels = scene()
    assert codec.encode(picture(save("png", pixels), keep="keep"), format="png", quality=1).data == png.encode(pixels)
