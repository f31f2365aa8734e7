from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.imaging.scale import fit, resize
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background import matte
from imagemill.worker.operations.remove_background.matte import EMPTY, foreground_colours, subject_box
from imagemill.worker.operations.remove_background.opencv import GrabCut
from imagemill.worker.operations.remove_background.saliency import barrier_distance, content_box

SIZE = (420, 300)  # width, height


def cut(pixels: Pixels, **options: Any) -> tuple[Pixels, list[str]]:
    operation = GrabCut()
    operation.load(Device(threads=1))
    inputs = Inputs(
        Item(index=0, source="https://images.example/one.jpg"), parse_options("remove-background", "opencv", options)
    )
    work = operation.prepare(Picture(pixels), inputs)
    return operation.finish(work, operation.run(work.samples)).pixels, work.notes


def grid(size: tuple[int, int]) -> tuple[Any, Any]:
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    return x, y


def noise(size: tuple[int, int], spread: float, grain: float = 0) -> Any:
    result = np.random.default_rng(1).normal(0, 1, (size[1], size[0], 3)).astype(np.float32)
    result = cv2.GaussianBlur(result, (0, 0), grain) if grain else result
    return result * spread / result.std()


def plain(size: tuple[int, int]) -> Any:
    return np.full((size[1], size[0], 3), (228, 230, 226), np.float32) + noise(size, 2)


def gradient(size: tuple[int, int]) -> Any:
    x, y = grid(size)
    return np.stack([70 + 110 * y / size[1], 110 + 70 * x / size[0], 190 - 40 * y / size[1]], axis=2) + noise(size, 3)


def texture(size: tuple[int, int]) -> Any:
    return np.array((96, 118, 70), np.float32) + noise(size, 22, grain=2)


def blob(size: tuple[int, int]) -> Any:
    x, y = grid(size)
    angle = np.arctan2(y - 0.52 * size[1], x - 0.45 * size[0])
    return np.hypot(x - 0.45 * size[0], y - 0.52 * size[1]) - 70 * (1 + 0.25 * np.cos(3 * angle))


def bottle(size: tuple[int, int]) -> Any:
    """A subject that touches the lower edge, as in portraits."""
    x, y = grid(size)
    body = np.maximum(abs(x - 0.55 * size[0]) - 60, 0.4 * size[1] - y)
    neck = np.maximum(abs(x - 0.55 * size[0]) - 22, 0.15 * size[1] - y)
    return np.minimum(body, neck)


def ring(size: tuple[int, int]) -> Any:
    x, y = grid(size)
    return abs(np.hypot(x - 0.5 * size[0], y - 0.5 * size[1]) - 75) - 28


Shape = Callable[[tuple[int, int]], Any]


def scene(
    background: Shape, shape: Shape, colours: list[tuple[int, int, int]], size: tuple[int, int] = SIZE
) -> tuple[Pixels, Any]:
    """An image of a subject with stripes of `colours` and an edge one pixel wide, and its true alpha 0..1."""
    alpha = np.clip(0.5 - shape(size), 0, 1)
    x, _ = grid(size)
    subject = np.array(colours, np.float32)[(x // 30).astype(int) % len(colours)]
    pixels = background(size) * (1 - alpha[..., None]) + subject * alpha[..., None]
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8), alpha


def iou(alpha: Grey, truth: Any) -> float:
    ours, theirs = alpha > 127, truth > 0.5
    return float((ours & theirs).sum() / (ours | theirs).sum())


@pytest.mark.parametrize("colours", [[(190, 60, 40)], [(190, 60, 40), (235, 180, 40)]], ids=["one colour", "two colours"])
@pytest.mark.parametrize(
    ("background", "shape"),
    [
        (plain, blob),
        (plain, bottle),
        (plain, ring),
        (gradient, blob),
        (gradient, bottle),
        (texture, blob),
        (texture, bottle),
        (texture, ring),
    ],
)
@pytest.mark.parametrize("bars", [0, 30], ids=["", "letterbox"])
def test_subject_is_found_up_to_its_edge(
    background: Shape, shape: Shape, colours: list[tuple[int, int, int]], bars: int
) -> None:
    pixels, truth = scene(background, shape, colours)
    for barred in (pixels, truth):
        barred[:bars], barred[len(barred) - bars :] = 0, 0
    result, notes = cut(pixels)
    assert iou(result[..., 3], truth) > 0.95
    assert not notes
    around = np.ones((11, 11), np.uint8)
    inside, outside = cv2.erode(truth, around) == 1, cv2.dilate(truth, around) == 0
    assert (result[..., 3][inside] == 255).mean() > 0.995, "no holes in the subject"
    assert (result[..., 3][outside] == 0).mean() > 0.995, "no specks outside it"
    assert np.array_equal(result[inside][:, :3], pixels[inside]), "the subject's own pixels are untouched"


@pytest.mark.parametrize("size", [(420, 300), (1500, 1100)], ids=["full size", "mask found at a smaller size"])
@pytest.mark.parametrize(("feather", "most", "middling"), [(0, 60, 4), (1.5, 14, 2.5), (4, 14, 5)])
def test_rim_has_no_halo_of_the_old_background(size: tuple[int, int], feather: float, most: float, middling: float) -> None:
    """A hard edge makes mixed pixels opaque with their mixed colour, so only a feathered rim is clean everywhere."""
    red, green = np.array((200, 40, 40)), np.array((40, 210, 60))
    pixels, truth = scene(lambda _: np.full((size[1], size[0], 3), green, np.float32), blob, [tuple(red)], size)
    result, _ = cut(pixels, feather=feather)
    assert iou(result[..., 3], truth) > 0.95
    alpha = result[..., 3:] / 255
    rim = (alpha[..., 0] > 0) & (alpha[..., 0] < 1)
    assert (abs(pixels[rim].astype(int) - red) * alpha[rim]).max() > 40, "the source itself has a halo"
    on_blue = result[..., :3] * alpha + np.array((0, 0, 255)) * (1 - alpha)
    wanted = red * alpha + np.array((0, 0, 255)) * (1 - alpha)
    halo = abs(on_blue - wanted)[rim].max(axis=1)
    assert halo.max() < most
    assert halo.mean() < middling


def test_feather_softens_the_edge() -> None:
    pixels, _ = scene(plain, blob, [(190, 60, 40)])
    soft = [
        int(((alpha := cut(pixels, feather=feather)[0][..., 3]) > 0).sum() - (alpha == 255).sum())
        for feather in (0, 1.5, 6, 20)
    ]
    assert soft == sorted(set(soft)), "a wider feather has more partly transparent pixels"


def test_background_colour_gives_an_opaque_result() -> None:
    pixels, _ = scene(gradient, blob, [(190, 60, 40)])
    cutout, _ = cut(pixels)
    result, _ = cut(pixels, background="#0080ff")
    alpha = cutout[..., 3:] / 255
    assert result.shape[2] == 3
    assert abs(result - (cutout[..., :3] * alpha + np.array((0, 128, 255)) * (1 - alpha))).max() <= 2
    assert (result[cutout[..., 3] == 0] == (0, 128, 255)).all()


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((200, 300, 3), 200, np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.rint(np.clip(plain((300, 200)), 0, 255)).astype(np.uint8),
        np.full((120, 120, 4), 255, np.uint8),
    ],
    ids=["flat", "black", "faint noise", "opaque RGBA"],
)
def test_result_is_empty_with_a_note_when_there_is_no_subject(pixels: Pixels) -> None:
    result, notes = cut(pixels)
    assert notes == [EMPTY]
    assert not result[..., 3].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 2000), (5000, 12), (7, 7), (9, 9)], ids=str)
@pytest.mark.parametrize("channels", [3, 4])
def test_cut_out_keeps_any_size(size: tuple[int, int], channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), np.uint8)
    result, _ = cut(pixels, long_edge="none")
    assert result.shape == (size[1], size[0], 4)
    if channels == 4:
        assert (result[..., 3] <= pixels[..., 3]).all(), "hidden pixels stay hidden"


def test_transparent_pixels_stay_transparent_and_have_no_influence() -> None:
    pixels, truth = scene(gradient, blob, [(190, 60, 40)])
    hidden = np.zeros(truth.shape, bool)
    hidden[:, 300:] = True
    rgba = np.dstack([pixels, np.where(hidden, 0, 255).astype(np.uint8)])
    result, _ = cut(rgba)
    assert not result[..., 3][hidden].any()
    assert iou(result[..., 3], truth * ~hidden) > 0.95
    rgba[hidden, :3] = (255, 0, 255)
    assert np.array_equal(cut(rgba)[0][..., 3], result[..., 3])


@pytest.mark.parametrize("strength", [1, 0.4], ids=["opaque", "like glass"])
def test_existing_cut_out_keeps_its_edge_and_colours(strength: float) -> None:
    pixels, truth = scene(texture, blob, [(190, 60, 40)])
    alpha = np.rint(cv2.GaussianBlur(truth, (0, 0), 2) * 255 * strength).astype(np.uint8)
    result, notes = cut(np.dstack([pixels, alpha]))
    assert not notes
    assert np.array_equal(result[..., 3], alpha)
    assert np.array_equal(result[alpha > 0][:, :3], pixels[alpha > 0])


def test_plain_backdrop_is_seen_through_a_wide_ring() -> None:
    x, y = grid((500, 400))
    pixels, truth = scene(plain, lambda _: abs(np.hypot(x - 250, y - 200) - 107) - 33, [(190, 60, 40)], (500, 400))
    assert iou(cut(pixels)[0][..., 3], truth) > 0.97


def test_subject_that_touches_the_frame_reaches_it() -> None:
    x, y = grid((1000, 800))
    subject = np.dstack([150 + 40 * np.sin(x / 9), 40 + 20 * np.cos(y / 7), 30 + 0 * x])
    backdrop = np.dstack([200 + x * 0.02, 205 + y * 0.02, 210 + 0 * x]) + noise((1000, 800), 1.5)
    pixels = np.where(x[..., None] > 400, subject, backdrop).astype(np.uint8)
    alpha = cut(pixels)[0][..., 3]
    assert iou(alpha, x > 400) > 0.99
    for rim in (alpha[:3, 410:], alpha[-3:, 410:], alpha[:, -3:]):
        assert rim.mean() > 220


@pytest.mark.parametrize(("width", "height"), [(300, 200), (3000, 2000)])
def test_box_ignores_specks_and_keeps_smaller_parts(width: int, height: int) -> None:
    alpha = np.zeros((height, width), np.uint8)
    alpha[60:160, 100:200] = 255
    alpha[20:29, 10:13], alpha[180:189, 280:283] = 200, 200  # 27 pixels each
    assert subject_box(alpha) == (100, 60, 200, 160)
    alpha[60:80, 210:220] = 255
    assert subject_box(alpha) == (100, 60, 220, 160)
    assert subject_box(np.where(alpha == 200, alpha, 0).astype(np.uint8)) == (10, 20, 283, 189)


@pytest.mark.parametrize(("long_edge", "wanted"), [(210, (210, 150)), (1600, SIZE), ("none", SIZE)])
def test_long_edge_limits_the_result(long_edge: Any, wanted: tuple[int, int]) -> None:
    pixels, truth = scene(plain, blob, [(190, 60, 40)])
    result, _ = cut(pixels, long_edge=long_edge)
    assert (result.shape[1], result.shape[0]) == wanted
    alpha = resize(np.rint(truth * 255).astype(np.uint8), wanted)
    assert iou(result[..., 3], alpha / 255) > 0.95


def test_result_does_not_depend_on_earlier_images() -> None:
    pixels, _ = scene(texture, ring, [(190, 60, 40)])
    first, _ = cut(pixels)
    cut(scene(gradient, bottle, [(20, 200, 90)])[0])
    cv2.setRNGSeed(12345)
    assert np.array_equal(cut(pixels)[0], first)


@pytest.mark.parametrize("rough", [False, True])
def test_rim_colours_come_from_the_subject_without_seams_between_strips(rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = grid((240, 900))
    alpha = np.clip((70 - abs(x - 120)) / 30, 0, 1).astype(np.float32)
    subject = np.stack([255 * y / 900, np.full_like(y, 90), 255 - 255 * y / 900], axis=2)
    pixels = np.rint(subject * alpha[..., None] + 255 * (1 - alpha[..., None])).astype(np.uint8)
    monkeypatch.setattr(matte, "STRIP", 15_000)
    found = foreground_colours(pixels, alpha, rough=rough).astype(int)
    rim = (alpha > 0) & (alpha < 1)
    assert abs(found - subject)[100:800][rim[100:800]].max() < 6
    assert abs(pixels - subject)[rim].max() > 200
    assert np.array_equal(found[alpha == 1], pixels[alpha == 1])
    subject[y // 45 % 2 > 0] = 0
    pixels = np.rint(subject * alpha[..., None] + 255 * (1 - alpha[..., None])).astype(np.uint8)
    found = foreground_colours(pixels, alpha, rough=rough).astype(int)
    monkeypatch.setattr(matte, "STRIP", 1 << 20)
    assert abs(found - foreground_colours(pixels, alpha, rough=rough)).max() <= 1, "no seams"


@pytest.mark.parametrize("size", [(1400, 900), (1399, 899), (700, 451)])
def test_rim_colours_come_from_the_subject_at_any_size(size: tuple[int, int]) -> None:
    x, y = grid(size)
    alpha = np.rint(np.clip((0.5 - np.hypot(x / size[0] - 0.5, y / size[1] - 0.5)) * 40, 0, 1) * 255).astype(np.uint8)
    subject = np.stack([255 * y / size[1], np.full_like(y, 90), 255 * x / size[0]], axis=2)
    share = alpha[..., None] / 255
    pixels = np.rint(subject * share + 255 * (1 - share)).astype(np.uint8)
    found = np.full((*alpha.shape, 4), 7, np.uint8)
    foreground_colours(pixels, alpha, out=found)
    rim = (alpha >= 3) & (alpha <= 252)
    assert (abs(found[..., :3] - subject) * share)[rim].mean() < 2
    assert (found[~rim] == 7).all()
    assert (found[..., 3] == 7).all()


@pytest.mark.parametrize("alpha", [0.0, 0.001, 0.999, 1.0])
def test_colours_stay_the_same_without_a_rim(alpha: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert np.array_equal(foreground_colours(pixels, np.full((20, 30), alpha, np.float32)), pixels)


@pytest.mark.parametrize(
    ("bars", "found"),
    [
        ((0, 0, 0, 0), (0, 0, 0, 0)),
        ((20, 30, 0, 0), (20, 30, 0, 0)),
        ((10, 8, 6, 8), (10, 8, 6, 8)),
        ((60, 0, 0, 0), (0, 0, 0, 0)),
    ],
    ids=["none", "above and below", "all around", "more than a third is not a bar"],
)
def test_content_box_excludes_letterbox_bars(bars: tuple[int, ...], found: tuple[int, ...]) -> None:
    pixels = np.rint(np.clip(texture((160, 120)), 0, 255)).astype(np.uint8)
    top, bottom, left, right = bars
    pixels[:top], pixels[120 - bottom :], pixels[:, :left], pixels[:, 160 - right :] = 0, 0, 0, 0
    rows, columns = content_box(pixels)
    assert (rows.start, 120 - rows.stop, columns.start, 160 - columns.stop) == found


def test_plain_wall_behind_a_straight_subject_is_not_a_bar() -> None:
    pixels = np.full((120, 160, 3), 250, np.uint8)
    pixels[30:, 45:120] = (120, 60, 30)
    assert content_box(pixels) == (slice(0, 120), slice(0, 160))


def test_barrier_distance_is_the_lowest_barrier_on_any_path_from_the_seeds() -> None:
    lab = np.zeros((21, 21, 3), np.float32)
    lab[5:16, 5:16, 0] = 30  # a wall ...
    lab[8:13, 8:13, 0] = 0  # ... around a yard of the border's own colour
    seeds = np.zeros((21, 21), bool)
    seeds[0] = True
    distance = barrier_distance(lab, seeds)
    assert distance[18, 3] == 0
    assert distance[6, 6] == distance[10, 10] == 30
    lab[10, :9, 0] = 12  # a gate that is lower
    assert barrier_distance(lab, seeds)[10, 10] == 12


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    channels=st.sampled_from([3, 4]),
    levels=st.sampled_from([1, 2, 3, 256]),
    seed=st.integers(0, 9),
    options=st.fixed_dictionaries(
        {
            "long_edge": st.sampled_from([16, 33, "none"]),
            "feather": st.sampled_from([0, 1.5, 20]),
        }
    ),
)
def test_cut_out_of_random_images_is_well_formed(
    size: tuple[int, int], channels: int, levels: int, seed: int, options: dict[str, Any]
) -> None:
    drawn = np.random.default_rng(seed).integers(0, levels, (size[1], size[0], channels))
    pixels = (drawn * (255 // max(1, levels - 1))).astype(np.uint8)
    result, notes = cut(pixels, **options)
    edge = None if options["long_edge"] == "none" else options["long_edge"]
    assert (result.shape[1], result.shape[0], result.shape[2]) == (*fit(size, edge), 4)
    assert result.dtype == np.uint8
    assert (notes == [EMPTY]) <= (not result[..., 3].any()), "a result with the note is empty"
