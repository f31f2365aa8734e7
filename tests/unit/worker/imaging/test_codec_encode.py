"""Encoding: lossless or as good as the quality asks for, without hidden colours, in a suitable format."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.errors import OperationFailed
from imagemill.shared.messages import Format
from imagemill.worker.imaging import codec, png
from imagemill.worker.imaging.codec import choose_format, encode
from imagemill.worker.imaging.picture import Picture
from tests.unit.worker.imaging.samples import FRAMES, LOSSLESS, difference, picture, save, scene


@pytest.mark.parametrize("channels", [3, 4])
def test_encode_png_is_lossless_and_clears_hidden_colour(channels: int) -> None:
    wanted = scene(channels=channels)
    made = encode(Picture(wanted), format="png", quality=1)
    assert made.format == "png"
    if channels == 4:
        wanted[wanted[:, :, 3] == 0] = 0
    assert (np.array(Image.open(io.BytesIO(made.data))) == wanted).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_encode_webp_improves_with_quality_and_keeps_alpha(channels: int) -> None:
    wanted = scene(channels=channels)
    made = [encode(Picture(wanted), format="webp", quality=quality) for quality in (5, 50, 95)]
    assert made[0].format == "webp"
    read = [np.array(Image.open(io.BytesIO(one.data))) for one in made]
    assert [len(one.data) for one in made] == sorted(len(one.data) for one in made)
    errors = [difference(one[:, 1:, :3], wanted[:, 1:, :3]) for one in read]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 3
    if channels == 4:
        assert all((one[:, :, 3] == wanted[:, :, 3]).all() for one in read)


def test_encode_webp_clears_hidden_colour() -> None:
    secret = np.full((64, 64, 4), (255, 0, 0, 0), np.uint8)
    secret[32:] = (0, 0, 255, 255)
    assert np.array(Image.open(io.BytesIO(encode(Picture(secret), format="webp", quality=90).data)))[:16, :, 0].max() < 60


def test_encode_jpeg_improves_with_quality_and_composites_over_white() -> None:
    wanted = scene(channels=4)
    over_white = wanted[:, :, :3] * (wanted[:, :, 3:] / 255) + 255 * (1 - wanted[:, :, 3:] / 255)
    made = [encode(Picture(wanted), format="jpeg", quality=quality) for quality in (5, 50, 95)]
    assert made[0].format == "jpeg"
    errors = [difference(np.array(Image.open(io.BytesIO(one.data))), over_white) for one in made]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2
    assert len(made[0].data) < len(made[1].data) < len(made[2].data)


def test_encode_does_not_modify_picture() -> None:
    source = scene(channels=4)
    for format in ("png", "webp", "jpeg"):  # noqa: A001
        encode(Picture(source), format=format, quality=80)
    assert (source == scene(channels=4)).all()


@pytest.mark.parametrize(("format", "side", "name"), [("webp", 16_383, "WebP"), ("jpeg", 65_500, "JPEG")])
def test_encode_rejects_sides_above_format_limit(format: str, side: int, name: str) -> None:  # noqa: A002
    for size in ((1, side), (side, 1)):
        data = encode(Picture(np.zeros((*size, 3), np.uint8)), format=format, quality=50).data
        assert codec.probe(data, max_pixels=side).size == size[::-1]
    for size in ((1, side + 1), (side + 1, 1)):
        too_long = Picture(np.zeros((*size, 3), np.uint8))
        with pytest.raises(OperationFailed, match=rf"{name} is limited to {side:,} .* has {side + 1:,}; use format png"):
            encode(too_long, format=format, quality=50)
        assert encode(too_long, format="png", quality=50).data.startswith(png.SIGNATURE)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("source", ["png", "jpeg", "tiff"])
def test_encode_writes_grey_source_as_grey_unless_coloured(source: str, kind: str) -> None:
    found = picture(save(source, Image.fromarray(scene(70, 600)).convert("L"), **LOSSLESS.get(source, {})))
    assert found.grey
    with Image.open(io.BytesIO(encode(found, format=kind, quality=100).data)) as image:
        assert image.mode == "L"
        assert np.abs(np.asarray(image).astype(int) - found.pixels[:, :, 0]).max() <= (0 if kind == "png" else 1)
    assert Image.open(io.BytesIO(encode(found, format="webp", quality=90).data)).mode == "RGB"
    coloured = found.pixels.copy()
    coloured[-1, -1, 2] ^= 128
    alpha = np.dstack([found.pixels, found.pixels[:, :, 0]])
    for changed, mode in ((coloured, "RGB"), (alpha, "RGB" if kind == "jpeg" else "RGBA")):
        made = encode(replace(found, pixels=changed), format=kind, quality=90).data
        assert Image.open(io.BytesIO(made)).mode == mode
    assert not picture(save(source, np.dstack([scene()[:, :, 0]] * 3))).grey, "colours that happen to be grey"


def test_encode_reports_too_large_profile() -> None:
    with pytest.raises(OperationFailed, match=r"can't be encoded as jpeg .*profile"):
        encode(Picture(scene(), icc=bytes(255 * 65_519 + 1)), format="jpeg", quality=80)


EVERY_FORMAT: tuple[Format, ...] = ("png", "webp", "webp-lossless", "jpeg", "avif")


@pytest.mark.parametrize(
    ("source", "lossless", "opaque", "transparent"),
    [
        ("jpeg", False, "jpeg", "png"),
        ("heic", False, "jpeg", "png"),
        ("jxl", False, "jpeg", "png"),
        ("jxl", True, "png", "png"),
        ("webp", False, "webp", "webp"),
        ("webp", True, "webp-lossless", "webp-lossless"),
        ("avif", False, "avif", "avif"),
        *((source, False, "png", "png") for source in ("png", "gif", "bmp", "tiff")),
    ],
)
def test_choose_format_follows_source_if_possible(source: str, lossless: bool, opaque: str, transparent: str) -> None:
    pictures = [Picture(scene(channels=channels), source, lossless=lossless) for channels in (3, 4)]
    assert [choose_format(each, "same") for each in pictures] == [opaque, transparent]
    assert all(choose_format(each, wanted) == wanted for each in pictures for wanted in EVERY_FORMAT)


# --- lossless and lossy ---


@pytest.mark.parametrize("form", ["png", "webp-lossless"])
@pytest.mark.parametrize("channels", [3, 4])
def test_lossless_formats_keep_every_value_even_under_alpha_0(form: str, channels: int) -> None:
    wanted = np.random.default_rng(1).integers(0, 256, (40, 50, channels), np.uint8)
    wanted[:, :, 3:] |= 1
    wanted[:20, :, 3:] = 0
    made = encode(Picture(wanted), format=form, quality=1, clear=False)
    assert made.format == form.removesuffix("-lossless")
    assert (picture(made.data).pixels == wanted).all()
    wanted[:20] *= channels == 3
    assert (picture(encode(Picture(wanted), format=form, quality=1).data).pixels == wanted).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_lossless_source_comes_out_as_it_went_in(kind: str, mode: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    source = picture(save(kind, Image.fromarray(scene(channels=4)).convert(mode), **options))
    form = choose_format(source, "same")
    assert form == {"png": "png", "webp": "webp-lossless"}[kind]
    again = picture(encode(source, format=form, quality=1, clear=False).data)
    assert (again.pixels == source.pixels).all()
    assert again.lossless == source.lossless


@pytest.mark.parametrize(("options", "lossless"), [({"lossless": True}, True), ({"quality": 80}, False), (FRAMES, False)])
def test_lossless_webp_is_recognised(options: dict[str, Any], lossless: bool) -> None:
    profile = b"VP8L VP8 " * 40  # a profile may contain anything
    for more in ({}, {"icc_profile": profile}):
        assert codec.probe(save("webp", scene(), **options, **more), max_pixels=10_000).lossless == lossless
    animated = save("webp", scene(), **(FRAMES | options))
    assert codec.probe(animated, max_pixels=10_000).lossless == lossless


@pytest.mark.parametrize("channels", [3, 4])
def test_avif_improves_with_quality_and_keeps_alpha(channels: int) -> None:
    wanted = scene(channels=channels)
    made = [encode(Picture(wanted), format="avif", quality=quality) for quality in (5, 50, 95)]
    assert {one.format for one in made} == {"avif"}
    errors = [difference(picture(one.data).pixels[:, 1:], wanted[:, 1:]) for one in made]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2
    again = encode(Picture(wanted), format="avif", quality=95)
    assert again.data == made[-1].data
