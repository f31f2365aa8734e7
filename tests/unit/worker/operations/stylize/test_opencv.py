from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import BadReference, ImageError, InvalidOption, NotFound, Timeout
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.stylize import opencv, palette
from imagemill.worker.operations.stylize.opencv import Stylize
from imagemill.worker.operations.stylize.palette import colours_of, transferred

ADDRESS = "https://images.example/reference.png"
STYLES: list[dict[str, Any]] = [
    {"style": "stylization"},
    {"style": "pencil-sketch"},
    {"style": "pencil-sketch", "colour": True},
    {"style": "detail"},
    {"style": "colour-transfer", "reference": ADDRESS},
]


def reference(_: str = "") -> Picture:
    return Picture(muted(photo(40, 60, seed=5, tint=(0.5, 0.9, 1.0))))


def stylize(
    pixels: Pixels, read: Callable[[str], Picture] = reference, operation: Stylize | None = None, **options: Any
) -> Pixels:
    operation = operation or Stylize()
    operation.load(Device(threads=1))
    item = Item(index=0, source="https://images.example/one.jpg")
    work = operation.prepare(Picture(pixels), Inputs(item, parse_options("stylize", "opencv", options), read=read))
    return operation.finish(work, operation.run(work.samples)).pixels


def photo(height: int, width: int, seed: int = 0, tint: tuple[float, ...] = (1.0, 0.8, 0.6), alpha: bool = False) -> Pixels:
    """Soft patches, a hard edge and some grain, without black or white."""
    rng = np.random.default_rng(seed)
    patches = cv2.resize(rng.uniform(60, 190, (5, 6, 3)), (width, height), interpolation=cv2.INTER_CUBIC).reshape(
        height, width, 3
    )
    patches[height // 3 : height // 2] *= 0.7
    pixels = np.clip(patches * tint + rng.normal(0, 5, patches.shape), 20, 230)
    if alpha:
        pixels = np.dstack([pixels, np.linspace(0, 255, height * width).reshape(height, width)])
    return np.ascontiguousarray(np.rint(pixels), np.uint8)


def muted(pixels: Pixels) -> Pixels:
    """`pixels` with less contrast, so that its colours keep other images inside the gamut."""
    return 80 + pixels // 3


def statistics(pixels: Pixels) -> tuple[Any, Any]:
    lab = cv2.cvtColor(pixels[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3).astype(np.float64)
    return lab.mean(axis=0), lab.std(axis=0)


def off_by(a: Pixels, b: Pixels) -> int:
    return int(abs(a.astype(int) - b).max())


@pytest.mark.parametrize("alpha", [False, True], ids=["rgb", "rgba"])
@pytest.mark.parametrize("options", STYLES, ids=lambda options: options["style"])
def test_every_style_changes_the_image_and_keeps_size_and_alpha(options: dict[str, Any], alpha: bool) -> None:
    pixels = photo(60, 80, alpha=alpha)
    result = stylize(pixels, **options)
    assert result.shape == pixels.shape
    assert abs(result[..., :3].astype(int) - pixels[..., :3]).mean() > 1.5
    if alpha:
        assert np.array_equal(result[..., 3], pixels[..., 3])
    assert np.array_equal(stylize(pixels, **options), result), "results are repeatable"


def test_all_styles_differ() -> None:
    pixels = photo(60, 80)
    assert len({stylize(pixels, **options).tobytes() for options in STYLES}) == len(STYLES)


def test_stylization_flattens_and_detail_sharpens() -> None:
    pixels = photo(90, 120)
    pixels[:, 60:] //= 3
    grain, edge = (slice(0, 25), slice(10, 50)), (slice(0, 25), slice(58, 62))

    def roughness(picture: Pixels) -> float:
        return float(abs(np.diff(picture[grain].astype(int), axis=1)).mean())

    flattened, detailed = stylize(pixels), stylize(pixels, style="detail")
    assert roughness(flattened) < 0.67 * roughness(pixels) < roughness(pixels) < 0.67 * roughness(detailed)
    assert np.ptp(flattened[edge].astype(int)) > 40, "the edge stays"


def test_pencil_sketch_is_grey_unless_colour_is_set() -> None:
    pixels = photo(60, 80)
    grey, colour = stylize(pixels, style="pencil-sketch"), stylize(pixels, style="pencil-sketch", colour=True)
    assert (np.ptp(grey, axis=2) == 0).all()
    assert np.ptp(colour, axis=2).mean() > 5


@pytest.mark.parametrize("options", STYLES, ids=lambda options: options["style"])
def test_strength_mixes_the_style_with_the_image(options: dict[str, Any]) -> None:
    pixels = photo(40, 50, alpha=True)
    full, half, none = (stylize(pixels, strength=share, **options) for share in (1, 0.5, 0))
    assert np.array_equal(none, pixels)
    assert abs(half[..., :3] - (full[..., :3].astype(float) + pixels[..., :3]) / 2).max() <= 1
    assert np.array_equal(half[..., 3], pixels[..., 3])


@pytest.mark.parametrize("options", STYLES, ids=lambda options: options["style"])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (2, 2), (3, 900)], ids=str)
def test_any_size_can_be_styled(size: tuple[int, int], options: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    assert stylize(pixels, **options).shape == pixels.shape


@pytest.mark.parametrize("options", STYLES[:4], ids=lambda options: options["style"])
def test_tiles_leave_no_seams(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = photo(150, 200)
    for sigmas in (opencv.SIGMAS[options["style"]], (5.0, 0.3), (20.0, 1.0)):
        monkeypatch.setitem(opencv.SIGMAS, options["style"], sigmas)
        monkeypatch.setattr(opencv, "TILE", 10_000)
        whole = stylize(pixels, **options)
        monkeypatch.setattr(opencv, "TILE", 64)
        assert off_by(stylize(pixels, **options), whole) <= 1


def test_filters_see_little_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """This bounds the memory."""
    seen: list[int] = []

    def filtered(bgr: Pixels, _: Any) -> Pixels:
        seen.append(max(bgr.shape[:2]))
        return bgr

    monkeypatch.setattr(opencv, "TILE", 64)
    monkeypatch.setattr(opencv, "_filtered", filtered)
    pixels = photo(150, 400)
    monkeypatch.setitem(opencv.SIGMAS, "stylization", (4.0, 0.45))
    assert np.array_equal(stylize(pixels), pixels)
    assert len(seen) == 3 * 7
    assert max(seen) <= 64 + 2 * (3 * 4 + 2)


def test_long_edge_limits_the_result() -> None:
    result = stylize(photo(300, 400, alpha=True), long_edge=100)
    assert result.shape == (75, 100, 4)
    assert Stylize().work_edge(parse_options("stylize", "opencv", {"long_edge": 100})) == 100


# --- colour transfer --------------------------------------------------------------------------------------------------


def test_colour_transfer_matches_the_references_mean_and_deviation() -> None:
    result = stylize(photo(100, 120), style="colour-transfer", reference=ADDRESS)
    for own, target_value in zip(statistics(result), statistics(reference().pixels), strict=True):
        assert np.allclose(own, target_value, atol=0.5)


def test_colour_transfer_to_itself_changes_nothing() -> None:
    pixels = photo(100, 120)
    assert off_by(stylize(pixels, lambda _: Picture(pixels), style="colour-transfer", reference=ADDRESS), pixels) <= 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    height=st.integers(8, 600),
    tint=st.tuples(*[st.floats(0.6, 1)] * 3),
    other=st.tuples(*[st.floats(0.6, 1)] * 3),
)
def test_transferred_matches_the_colours_of_any_reference(
    seed: int, height: int, tint: tuple[float, ...], other: tuple[float, ...]
) -> None:
    pixels, target = photo(height, 40, seed, tint), muted(photo(40, 40, seed + 1, other))
    result = transferred(pixels, colours_of(target))
    for own, target_value in zip(statistics(result), statistics(target), strict=True):
        assert np.allclose(own, target_value, atol=0.3)


def test_transparent_pixels_of_a_reference_do_not_count() -> None:
    target = np.dstack([photo(40, 40), np.zeros((40, 40), np.uint8)])
    target[:20, :, 3] = 255
    shown, hiding = colours_of(np.ascontiguousarray(target[:20, :, :3])), colours_of(target)
    assert np.allclose(shown.mean, hiding.mean, atol=1e-3)
    assert np.allclose(shown.deviation, hiding.deviation, atol=1e-3)


def test_colours_of_a_large_reference_are_sampled_accurately() -> None:
    large = np.repeat(np.repeat(photo(300, 400), 4, axis=0), 4, axis=1)
    assert np.allclose(colours_of(large).mean, statistics(large)[0], atol=0.3)
    assert np.allclose(colours_of(large).deviation, statistics(large)[1], atol=0.3)


def test_noise_of_a_flat_image_is_not_blown_up() -> None:
    flat = np.full((40, 40, 3), 120, np.uint8)
    flat[::7, ::5] += 1
    result = stylize(flat, style="colour-transfer", reference=ADDRESS)
    assert np.ptp(result.astype(int), axis=(0, 1)).max() <= 16
    assert np.allclose(statistics(result)[0], statistics(reference().pixels)[0], atol=2)


def test_reference_is_measured_once_while_it_is_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Pixels] = []

    def measure(pixels: Pixels) -> Any:
        measured.append(pixels)
        return colours_of(pixels)

    monkeypatch.setattr(palette, "colours_of", measure)
    operation, pixels, target, other = Stylize(), photo(30, 30), reference(), Picture(photo(30, 30, seed=9))

    def stylised(picture: Picture) -> bytes:
        return stylize(pixels, lambda _: picture, operation, style="colour-transfer", reference=ADDRESS).tobytes()

    first = stylised(target)
    assert stylised(target) == first
    assert sum(one is target.pixels for one in measured) == 1
    assert stylised(other) != first, "other pixels at the same URL"
    assert stylised(target) == first


def test_palettes_forget_old_references_and_hold_no_pixels() -> None:
    operation = Stylize()
    for number in range(palette.REMEMBERED + 5):
        stylize(photo(8, 8), operation=operation, style="colour-transfer", reference=f"https://images.example/{number}.png")
    gc.collect()
    assert len(operation._palettes._known) == palette.REMEMBERED
    assert all(known[0]() is None for known in operation._palettes._known.values())


@pytest.mark.parametrize(
    ("error", "raised"),
    [(NotFound("no such image"), BadReference), (Timeout("it took too long"), Timeout)],
    ids=["permanent", "retryable"],
)
def test_unreadable_reference_fails_the_image(error: ImageError, raised: type[ImageError]) -> None:
    def read(_: str) -> Picture:
        raise error

    with pytest.raises(raised, match=error.message) as caught:
        stylize(photo(8, 8), read, style="colour-transfer", reference="https://images.example/r.png?signature=secret")
    assert "secret" not in caught.value.message


def test_reference_is_an_error_when_inputs_have_no_reader() -> None:
    item = Item(index=0, source="https://images.example/one.jpg")
    options = parse_options("stylize", "opencv", {"style": "colour-transfer", "reference": ADDRESS})
    with pytest.raises(BadReference, match="can't be read here"):
        Stylize().prepare(Picture(photo(8, 8)), Inputs(item, options))


@pytest.mark.parametrize("options", [{"style": "colour-transfer"}, {"reference": ADDRESS}])
def test_colour_transfer_and_reference_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="go together"):
        parse_options("stylize", "opencv", options)
