from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import BadMask
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels
from imagemill.worker.operations.base import Inputs, Untouched
from imagemill.worker.operations.inpaint import opencv
from imagemill.worker.operations.inpaint.mask import (
    EMPTY,
    LARGE,
    Region,
    build_mask,
    distance_to,
    fade,
    regions,
    shrunk,
    zone_of,
)
from imagemill.worker.operations.inpaint.opencv import Inpaint


def inputs(mask: Grey | None = None, boxes: Any = (), **options: Any) -> Inputs:
    item = Item(index=0, source="https://images.example/one.jpg", boxes=boxes)
    return Inputs(item, parse_options("inpaint", "opencv", options), mask)


def inpaint(pixels: Pixels, mask: Grey | None = None, boxes: Any = (), **options: Any) -> tuple[Pixels, list[str]]:
    operation = Inpaint()
    operation.load(Device(threads=1))
    picture = Picture(pixels.copy())  # `finish` writes into it
    work = operation.prepare(picture, inputs(mask, boxes, **options))
    if isinstance(work, Untouched):
        return picture.pixels, list(work.notes)
    return operation.finish(work, operation.run(work.samples)).pixels, work.notes


def slope(height: int, width: int, channels: int = 3) -> Pixels:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    planes = [40 + 150 * x / width, 200 - 120 * y / height, 60 + 60 * (x / width + y / height), 80 + 150 * y / height]
    return np.ascontiguousarray(np.rint(np.stack(planes[:channels], axis=2)), np.uint8)


def noisy(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def square(height: int, width: int, rows: slice, columns: slice, value: int = 255) -> Grey:
    mask = np.zeros((height, width), np.uint8)
    mask[rows, columns] = value
    return mask


def nearest(hole: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distance of each pixel to the nearest one of the hole, the long way."""
    y, x = np.mgrid[: hole.shape[0], : hole.shape[1]]
    places = np.argwhere(hole)
    return np.sqrt(((np.stack([y, x], axis=2)[:, :, None] - places) ** 2).sum(axis=3).min(axis=2))


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
@pytest.mark.parametrize("effort", [opencv.EFFORT, 2e4], ids=["at full size", "enormous hole, made smaller"])
def test_a_hole_in_a_smooth_picture_is_filled_close_to_the_truth(
    method: str, effort: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opencv, "EFFORT", effort)
    truth = slope(120, 160)
    mask = square(120, 160, slice(40, 75), slice(60, 110))
    damaged = truth.copy()
    damaged[mask > 0] = (255, 0, 255)
    made, notes = inpaint(damaged, mask, method=method)
    assert not notes
    assert abs(made.astype(int) - truth)[mask > 0].mean() < 5
    assert abs(made.astype(int) - truth).max() < 24
    assert np.array_equal(made[mask == 0], truth[mask == 0])


def test_the_fill_of_an_enormous_hole_takes_nothing_from_inside_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is made smaller, pixels of the hole must not be averaged into its rim."""
    mask = square(80, 90, slice(11, 58), slice(13, 70))
    hole = mask > 0
    monkeypatch.setattr(opencv, "EFFORT", 3e3)
    grey = np.full((80, 90, 3), 100, np.uint8)
    grey[hole] = 255
    assert (inpaint(grey, mask, method="navier-stokes")[0] == 100).all()


def test_the_methods_differ_and_so_do_radii() -> None:
    pixels, mask = noisy(40, 40), square(40, 40, slice(10, 25), slice(12, 30))
    made = [
        inpaint(pixels, mask, method=method, radius=radius)[0].tobytes()
        for method, radius in (("telea", 3), ("telea", 9), ("navier-stokes", 3))
    ]
    assert len(set(made)) == 3
    assert inpaint(pixels, mask)[0].tobytes() == inpaint(pixels, mask)[0].tobytes()


@pytest.mark.parametrize("transparent", [False, True], ids=["rgb", "rgba"])
def test_holes_far_apart_are_filled_alike_alone_and_together(transparent: bool) -> None:
    pixels = noisy(90, 200, 4 if transparent else 3)
    left = square(90, 200, slice(10, 30), slice(8, 30))
    right = square(90, 200, slice(50, 80), slice(150, 190))
    together, _ = inpaint(pixels, left | right)
    assert len(Inpaint().prepare(Picture(pixels), inputs(left | right)).samples) == 2
    assert np.array_equal(together[:, :100], inpaint(pixels, left)[0][:, :100])
    assert np.array_equal(together[:, 100:], inpaint(pixels, right)[0][:, 100:])
    if transparent:
        assert np.array_equal(together[..., 3], pixels[..., 3]), "alpha is kept, in the hole too"


@settings(max_examples=120, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([3, 4]),
    seed=st.integers(0, 99),
    marks=st.lists(st.tuples(*[st.integers(0, 39)] * 4, st.integers(0, 255)), max_size=4),
    options=st.fixed_dictionaries(
        {
            "method": st.sampled_from(["telea", "navier-stokes"]),
            "radius": st.sampled_from([0.5, 3, 9]),
            "mask_threshold": st.sampled_from([0, 127, 254]),
            "mask_dilate": st.integers(0, 6),
            "mask_feather": st.integers(0, 8),
        }
    ),
)
def test_outside_the_hole_and_its_fade_every_bit_stays(
    size: tuple[int, int], channels: int, seed: int, marks: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    height, width = size
    pixels, mask = noisy(height, width, channels, seed), np.zeros(size, np.uint8)
    for top, left, tall, wide, value in marks:
        mask[top : top + tall + 1, left : left + wide + 1] = value
    hole = mask > options["mask_threshold"]
    if not hole.any():
        made, notes = inpaint(pixels, mask, **options)
        assert notes == [EMPTY]
        assert np.array_equal(made, pixels)
        return
    hole = nearest(hole) <= options["mask_dilate"] + 1e-4
    if hole.all():
        with pytest.raises(BadMask, match="whole image"):
            inpaint(pixels, mask, **options)
        return
    made, notes = inpaint(pixels, mask, **options)
    kept = nearest(hole) > options["mask_feather"] + 1e-4
    assert notes == ([LARGE] if hole.mean() > 0.3 else [])
    assert np.array_equal(made[kept], pixels[kept])
    if channels == 4:
        assert np.array_equal(made[..., 3], pixels[..., 3])


def test_the_fill_fades_out_over_the_feather() -> None:
    pixels, mask = noisy(60, 60), square(60, 60, slice(20, 40), slice(15, 34))
    weight = fade(build_mask((60, 60), inputs(mask)), 5) / 255
    assert (weight[mask > 0] == 1).all()
    assert np.allclose(weight[30, 34:41], [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0], atol=0.5 / 255)
    change = abs(inpaint(pixels, mask, mask_feather=5)[0].astype(int) - pixels).mean(axis=2)
    rings = [change[(weight > low) & (weight <= low + 0.25)].mean() for low in (0.75, 0.5, 0.25, 0)]
    assert rings == sorted(rings, reverse=True)
    assert rings[-1] > 0
    assert not change[weight == 0].any()


def test_a_fade_as_wide_as_the_image_still_fills_from_it() -> None:
    truth = slope(40, 50)
    mask = square(40, 50, slice(15, 25), slice(20, 30))
    damaged = truth.copy()
    damaged[mask > 0] = 255
    made, _ = inpaint(damaged, mask, mask_feather=200)
    assert abs(made.astype(int) - truth).max() < 12


@pytest.mark.parametrize(("threshold", "filled"), [(0, {1, 128, 255}), (127, {128, 255}), (128, {255}), (254, {255})])
def test_what_is_above_the_threshold_is_filled(threshold: int, filled: set[int]) -> None:
    mask = np.array([[0, 1, 128, 255]], np.uint8)
    hole = build_mask((4, 1), inputs(mask, mask_threshold=threshold))
    assert {int(value) for value in mask[hole == 255]} == filled
    assert set(np.unique(hole)) <= {0, 255}


@pytest.mark.parametrize("dilate", [0, 1, 4, 7])
def test_dilation_grows_the_hole_by_that_many_pixels_all_around(dilate: int) -> None:
    mask = square(30, 34, slice(12, 14), slice(3, 20))
    wanted = nearest(mask > 0) <= dilate
    hole = build_mask((34, 30), inputs(mask, mask_dilate=dilate))
    assert np.array_equal(hole > 0, wanted)
    assert np.allclose(distance_to(mask), nearest(mask > 0), atol=1e-4)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ("10,5,20,8", slice(5, 13), slice(10, 30)),
        ("0,0,1,1", slice(0, 1), slice(0, 1)),
        ("90,50,100,100", slice(50, 60), slice(90, 100)),
        ("99,59,1,1", slice(59, 60), slice(99, 100)),
        ("3.4,2.6,0.2,0.2", slice(3, 4), slice(3, 4)),
        ("0.5,0.25,0.25,0.5", slice(15, 45), slice(50, 75)),
        ("0.0,0.0,1.0,0.5", slice(0, 30), slice(0, 100)),
        ("0.99,0.0,0.01,1.0", slice(0, 60), slice(99, 100)),
        ([0.1, 0.5, 0.001, 0.001], slice(30, 31), slice(10, 11)),
    ],
)
def test_a_box_is_filled_where_it_lies(box: Any, rows: slice, columns: slice) -> None:
    wanted = square(60, 100, rows, columns)
    assert np.array_equal(build_mask((100, 60), inputs(boxes=[box])), wanted)
    assert np.array_equal(build_mask((100, 60), inputs(boxes=[box], mask=np.zeros((60, 100), np.uint8))), wanted)
    options = {"boxes": box} if isinstance(box, str) else {"boxes": [box]}
    assert np.array_equal(build_mask((100, 60), inputs(**options)), wanted), "the job's boxes are the item's"


def test_mask_and_boxes_of_item_and_job_add_up() -> None:
    mask = square(60, 100, slice(0, 10), slice(0, 10))
    options = parse_options("inpaint", "opencv", {"boxes": "50,0,3,1;0.9,0.9,0.1,0.1"})
    item = Item(index=0, source="https://images.example/one.jpg", boxes=["20,20,5,5"])
    assert np.count_nonzero(build_mask((100, 60), Inputs(item, options, mask))) == 100 + 25 + 3 + 60


@pytest.mark.parametrize("box", ["100,0,5,5", "0,60,5,5", "4000,3000,1,1", "1.0,0.5,0.00001,0.1"])
def test_a_box_outside_the_image_is_an_error_that_names_both(box: str) -> None:
    with pytest.raises(BadMask, match="outside the image, which is 100x60"):
        build_mask((100, 60), inputs(boxes=[box]))


@pytest.mark.parametrize(
    ("mask", "boxes", "message"),
    [
        (None, (), "give a mask"),
        (np.zeros((60, 60), np.uint8), (), "60x60 and the image 100x60"),
        (np.zeros((100, 60), np.uint8), ["1,1,2,2"], "60x100 and the image 100x60"),
        (np.full((60, 100), 255, np.uint8), (), "whole image"),
        (None, ["0,0,50,60", "50,0,50,60"], "whole image"),
    ],
    ids=["missing", "square", "on its side", "all white", "boxes over everything"],
)
def test_a_mask_that_can_not_be_is_refused(mask: Grey | None, boxes: Any, message: str) -> None:
    with pytest.raises(BadMask, match=message):
        inpaint(slope(60, 100), mask, boxes)


@pytest.mark.parametrize("times", [0.25, 0.5, 2, 3])
def test_a_mask_of_another_size_but_the_same_proportions_is_scaled(times: float) -> None:
    height, width = 60, 100
    mask = square(int(height * times), int(width * times), slice(int(20 * times), int(40 * times)), slice(0, int(40 * times)))
    hole = build_mask((width, height), inputs(mask))
    assert np.array_equal(hole, square(height, width, slice(20, 40), slice(0, 40)))


def test_an_empty_mask_changes_nothing_and_says_so() -> None:
    pixels = noisy(20, 30, 4)
    made, notes = inpaint(pixels, np.zeros((20, 30), np.uint8), mask_dilate=5, mask_feather=5)
    assert np.array_equal(made, pixels)
    assert notes == [EMPTY]


@settings(max_examples=60, deadline=None)
@given(
    holes=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 79), st.integers(1, 9), st.integers(1, 9)), max_size=9),
    margin=st.floats(0, 12),
)
def test_regions_cover_every_hole_with_its_margin_and_never_meet(holes: list[tuple[int, ...]], margin: float) -> None:
    hole = np.zeros((60, 80), np.uint8)
    for top, left, height, width in holes:
        hole[top : top + height, left : left + width] = 255
    covered = np.zeros(hole.shape, int)
    for region in regions(hole, margin):
        covered[region.rows, region.columns] += 1
    assert covered.max(initial=0) <= 1
    if hole.any():
        y, x = np.mgrid[:60, :80]
        places = np.argwhere(hole)
        near = np.maximum(abs(y[..., None] - places[:, 0]), abs(x[..., None] - places[:, 1])).min(axis=2) <= margin
        assert covered[near].all()


def test_specks_without_end_become_one_region(monkeypatch: pytest.MonkeyPatch) -> None:
    hole = np.zeros((400, 400), np.uint8)
    hole[4::40, 4::50] = 255
    assert len(regions(hole, 5)) == 80
    monkeypatch.setattr("imagemill.worker.operations.inpaint.mask.ROUNDS", 0)
    assert regions(hole, 5) == [Region(slice(0, 370), slice(0, 360))]


@pytest.mark.parametrize("reach", [1, 7, 60])
def test_maps_made_in_blocks_are_those_of_the_whole(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(reach)
    marks = (rng.random((150, 170)) < 0.002).astype(np.uint8) * 255
    marks[:, 80:] = 0
    whole = build_mask((170, 150), inputs(marks, mask_dilate=reach)), fade(marks, reach)
    monkeypatch.setattr("imagemill.worker.operations.inpaint.mask.BLOCK", 16)
    assert np.array_equal(build_mask((170, 150), inputs(marks, mask_dilate=reach)), whole[0])
    assert np.array_equal(fade(marks, reach), whole[1])
    assert np.array_equal(whole[1] > 0, nearest(marks > 0) <= reach + 1e-4), "the fade is as wide as was asked for"
    assert np.array_equal(whole[1] == 255, marks == 255)


def test_a_zone_is_all_that_is_not_kept_but_never_everything() -> None:
    shares = np.array([[0, 1, 128, 255]], np.uint8)
    assert zone_of(shares).tolist() == [[0, 255, 255, 255]]
    assert zone_of(shares[:, 1:]).tolist() == [[0, 0, 255]]


def test_each_pixel_that_a_speck_was_averaged_into_is_in_the_shrunk_zone() -> None:
    zone = square(160, 320, slice(33, 34), slice(100, 101))
    assert np.array_equal(shrunk(zone, (20, 10)), square(10, 20, slice(2, 3), slice(6, 7)))
    mostly = square(160, 320, slice(0, 160), slice(0, 319))
    mostly[:, ::2] = 0
    mostly[:, 160:] = 255
    assert np.array_equal(shrunk(mostly, (2, 1)), [[0, 255]])


@pytest.mark.parametrize(("rows", "notes"), [(29, []), (31, [LARGE])])
def test_a_mask_over_thirty_per_cent_is_done_and_flagged(rows: int, notes: list[str]) -> None:
    assert inpaint(slope(100, 40), square(100, 40, slice(0, rows), slice(0, 40)))[1] == notes
