"""HEIC and JPEG XL: the right pixels, upright once, within limits; and a refusal that helps where the libraries are missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from imagemill.shared.errors import TooManyPixels, Truncated, UnsupportedFormat
from imagemill.worker.imaging import codec, headers, jxl
from imagemill.worker.imaging.headers import sniff
from tests.unit.worker.imaging.metadata.sources import CREATOR, XMP
from tests.unit.worker.imaging.metadata.sources import exif as full_exif
from tests.unit.worker.imaging.samples import difference, exif, picture, save, scene

pillow_heif = pytest.importorskip("pillow_heif", reason="the extra formats is not installed")
pytest.importorskip("pillow_jxl", reason="the extra formats is not installed")
pillow_heif.register_heif_opener()

EXACT = {"HEIF": {"quality": -1, "chroma": 444, "matrix_coefficients": 0}, "JXL": {"lossless": True}}
"""Options of the two encoders that lose nothing."""


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", EXACT)
def test_pixels_and_alpha_are_exact(kind: str, channels: int) -> None:
    wanted = scene(channels=channels)
    found = picture(save(kind, wanted, **EXACT[kind]))
    assert difference(found.pixels, wanted) == 0
    assert (found.format, found.icc) == ({"HEIF": "heic", "JXL": "jxl"}[kind], None)


@pytest.mark.parametrize("turn", range(1, 9))
def test_heic_is_turned_once(turn: int) -> None:
    data = save("HEIF", scene(), **EXACT["HEIF"], exif=exif(turn))
    source = Image.fromarray(scene())
    source.getexif()[274] = turn
    wanted = np.array(ImageOps.exif_transpose(source))
    assert codec.probe(data, max_pixels=10_000).size == (wanted.shape[1], wanted.shape[0])
    assert difference(picture(data).pixels, wanted) == 0


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_jpeg_xl(mode: str) -> None:
    source = Image.fromarray(scene()).convert(mode)
    assert difference(picture(save("JXL", source, lossless=True)).pixels[:, :, 0], np.array(source.convert("L"))) == 0


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "heic"),
        (b"\0\0\0\x18ftyphevc\0\0\0\0msf1", "heic"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "avif"),
        (b"\xff\x0a\xfa", "jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
    ],
)
def test_formats_are_recognised_by_content(start: bytes, kind: str) -> None:
    assert sniff(start + bytes(80)) == kind


@pytest.mark.parametrize(
    ("kind", "options", "opaque", "transparent"),
    [("HEIF", {}, "jpeg", "png"), ("JXL", {"quality": 80}, "jpeg", "png"), ("JXL", {"lossless": True}, "png", "png")],
)
def test_results_are_written_in_a_format_that_everybody_reads(
    kind: str, options: dict[str, object], opaque: str, transparent: str
) -> None:
    chosen = [codec.choose_format(picture(save(kind, scene(channels=channels), **options)), "same") for channels in (3, 4)]
    assert chosen == [opaque, transparent]


@pytest.mark.parametrize("options", [{"exif": True}, {"exif": True, "compress_metadata": True}])
@pytest.mark.parametrize("kind", EXACT)
def test_metadata_comes_along(kind: str, options: dict[str, bool]) -> None:
    if kind == "HEIF":
        options = {}
    made = save(kind, scene(), **(options | {"exif": full_exif(), "xmp": XMP, **EXACT[kind]}))
    found = picture(made, keep="keep").metadata
    assert found.tags.image[315][2] == CREATOR.encode() + b"\0"
    assert found.tags.gps
    assert found.properties.names


@pytest.mark.parametrize("kind", EXACT)
def test_size_is_limited_before_decoding(kind: str) -> None:
    with pytest.raises(TooManyPixels):
        codec.probe(save(kind, scene(), **EXACT[kind]), max_pixels=64 * 48 - 1)


@pytest.mark.parametrize("kind", EXACT)
def test_cut_file_is_truncated(kind: str) -> None:
    data = save(kind, scene(), **EXACT[kind])
    for end in range(32, len(data) - 1, len(data) // 12):
        with pytest.raises(Truncated):
            picture(data[:end])


def test_floating_point_jpeg_xl_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="floating-point"):
        picture(save("JXL", Image.fromarray(scene()[:, :, 0].astype(np.float32) / 255), lossless=True))


@pytest.mark.parametrize("what", ["animated", "extra channels"])
def test_header_of_jpeg_xl_names_what_is_not_read(what: str) -> None:
    # small size 8 x 8 (ratio 1), then the fields of ImageMetadata
    size = "1" + "00000" + "100"
    fields = {"animated": "0" + "1" + "000" + "0" + "0" + "1", "extra channels": "0" + "0" + "0" + "00" + "1" + "11" + "1" * 12}
    written = size + fields[what] + "0" * 64
    stream = int(written[::-1], 2).to_bytes(len(written) // 8 + 1, "little")
    with pytest.raises(UnsupportedFormat, match=what):
        codec.probe(jxl.BARE + stream, max_pixels=10_000)


@pytest.mark.parametrize(("kind", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_without_the_extra_the_refusal_names_it(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(kind, scene())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedFormat, match=r"needs pip install 'imagemill\[formats\]'"):
        headers.probe(data, max_pixels=10_000)  # in this process, where the module can be hidden
