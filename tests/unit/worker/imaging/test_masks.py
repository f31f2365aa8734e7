"""Reading masks: holes as people draw them, and what is refused because it isn't clear."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import BadMask, NotAnImage, TooManyPixels, Truncated
from imagemill.worker.imaging.masks import NOTES, Mask, read_mask
from tests.unit.worker.imaging.samples import SWAPPED, exif, save, scene

HEIGHT, WIDTH = 96, 128
ON = np.zeros((HEIGHT, WIDTH), bool)
ON[30:54, 40:72] = True
HOLE = np.where(ON, np.uint8(255), np.uint8(0))
PHOTO = scene(WIDTH, HEIGHT) // 2 + np.random.default_rng(0).integers(0, 128, (HEIGHT, WIDTH, 3)).astype(np.uint8)
WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def read(data: bytes, **options: str) -> Mask:
    return read_mask(data, max_pixels=20_000, **options)  # type: ignore[arg-type]


def paint(colour: tuple[int, int, int], on: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    return np.where(ON[..., None], np.uint8(colour), np.uint8(on))


def sixteen(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels.astype(np.uint16))[1].tobytes()


def palette(index: np.ndarray, *colours: tuple[int, int, int]) -> bytes:
    image = Image.fromarray(index.astype(np.uint8), "L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([value for colour in colours for value in colour])
    return save("png", image)


def blurred(sigma: float) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(HOLE, (0, 0), sigma), np.uint8)


PLAIN: dict[str, Callable[[], bytes]] = {
    "grey": lambda: save("png", HOLE),
    "rgb": lambda: save("png", paint(WHITE)),
    "gif": lambda: save("gif", HOLE),
    "bmp": lambda: save("bmp", HOLE),
    "tiff": lambda: save("tiff", HOLE),
    "webp": lambda: save("webp", paint(WHITE), lossless=True),
    "one bit": lambda: save("png", Image.fromarray(HOLE).convert("1")),
    "16 bits": lambda: save("png", Image.fromarray(HOLE.astype(np.uint16) * 257)),
    "opaque alpha": lambda: save("png", np.dstack([paint(WHITE), HOLE * 0 + 255])),
    "even alpha": lambda: save("png", np.dstack([paint(WHITE), HOLE * 0 + 128])),
    "profile": lambda: save("png", paint(WHITE), icc_profile=SWAPPED),
    "jpeg": lambda: save("jpeg", HOLE, quality=30),
}
READ: dict[str, tuple[str, Callable[[], bytes]]] = {
    "rubbed out of a photo": ("alpha", lambda: save("png", np.dstack([PHOTO, 255 - HOLE]))),
    "rubbed out and cleared": (
        "alpha",
        lambda: save("png", np.dstack([PHOTO, 255 - HOLE]) * (~ON[..., None]).astype(np.uint8)),
    ),
    "half rubbed out": ("alpha", lambda: save("png", np.dstack([PHOTO, 255 - HOLE // 2]))),
    "rubbed out of white": ("alpha", lambda: save("png", np.dstack([paint(WHITE, WHITE), 255 - HOLE]))),
    "white paint": ("alpha", lambda: save("png", np.dstack([paint(WHITE, WHITE), HOLE]))),
    "black paint": ("alpha", lambda: save("png", np.dstack([paint(BLUE, BLUE) * 0, HOLE]))),
    "red paint": ("alpha", lambda: save("png", np.dstack([paint(RED, RED), HOLE]))),
    "thin paint": ("alpha", lambda: save("png", np.dstack([paint(RED, RED), HOLE // 3]))),
    "premultiplied paint": ("alpha", lambda: save("png", np.dstack([HOLE] * 4))),
    "paint over what is hidden": ("alpha", lambda: save("png", np.dstack([np.where(ON[..., None], 255, PHOTO), HOLE]))),
    "numbers 0 and 1": ("levels", lambda: save("png", ON.astype(np.uint8))),
    "16 bits up to 1": ("levels", lambda: sixteen(ON)),
    "16 bits up to 255": ("levels", lambda: sixteen(HOLE)),
    "16 bits up to 255 in colour": ("levels", lambda: sixteen(paint(WHITE))),
    "dark grey": ("levels", lambda: save("png", HOLE // 5 * 2)),
    "grey": ("levels", lambda: save("png", HOLE // 2 + 1)),
    "grey on grey": ("levels", lambda: save("png", paint((150,) * 3, (100,) * 3))),
    "grey on grey as jpeg": ("levels", lambda: save("jpeg", paint((150,) * 3, (100,) * 3), quality=40)),
    "red": ("colour", lambda: save("png", paint(RED))),
    "green": ("colour", lambda: save("png", paint(GREEN))),
    "blue": ("colour", lambda: save("png", paint(BLUE))),
    "blue as jpeg": ("colour", lambda: save("jpeg", paint(BLUE), quality=30, subsampling=0)),
    "red on white": ("colour", lambda: save("png", paint(RED, WHITE))),
    "label": ("colour", lambda: palette(ON, (0, 0, 0), (128, 0, 0))),
    "label of class 15": ("colour", lambda: palette(ON * 15, *[(0, 0, 0)] * 15, (192, 128, 128))),
    "inverted": ("inverted", lambda: save("png", 255 - HOLE)),
    "inverted as jpeg": ("inverted", lambda: save("jpeg", 255 - HOLE, quality=30)),
    "inverted numbers 0 and 1": ("inverted", lambda: save("png", (~ON).astype(np.uint8))),
    "inverted palette": ("inverted", lambda: palette(ON, (255, 255, 255), (0, 0, 0))),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_white_on_black_is_read_as_it_is(kind: str) -> None:
    mask = read(PLAIN[kind]())
    assert (mask.levels.dtype, mask.levels.shape, mask.notes) == (np.dtype(np.uint8), HOLE.shape, ())
    assert mask.levels.flags.c_contiguous
    assert np.abs(mask.levels.astype(int) - HOLE).max() <= (60 if kind == "jpeg" else 0)


@pytest.mark.parametrize("kind", READ)
def test_any_other_clear_form_gives_the_same_hole_and_a_note(kind: str) -> None:
    note, make = READ[kind]
    mask = read(make())
    assert np.array_equal(mask.levels > 127, ON)
    assert mask.notes == (f"mask_read_as:{note}",)
    assert mask.levels.flags.c_contiguous


@pytest.mark.parametrize("sigma", [0.7, 2, 4])
def test_soft_edges_keep_their_levels(sigma: float) -> None:
    assert np.array_equal(read(save("png", blurred(sigma))).levels, blurred(sigma))
    painted = np.dstack([paint(WHITE, WHITE), blurred(sigma)])
    assert np.abs(read(save("png", painted)).levels.astype(int) - blurred(sigma)).max() <= 8


def test_orientation_is_applied() -> None:
    assert np.array_equal(read(save("png", HOLE, exif=exif(6))).levels, np.rot90(HOLE, -1))


@pytest.mark.parametrize("make", [lambda: save("png", HOLE * 0), lambda: save("jpeg", HOLE * 0), lambda: save("gif", HOLE * 0)])
def test_black_and_unpainted_masks_are_empty(make: Callable[[], bytes]) -> None:
    assert not read(make()).levels.any()
    assert not read(save("png", np.dstack([paint(WHITE, WHITE), HOLE * 0]))).levels.any()


def drawn(draw: Callable[[np.ndarray], object]) -> np.ndarray:
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    draw(canvas)
    return canvas


def block(width: float, height: float, top: float) -> np.ndarray:
    mask = np.zeros_like(HOLE)
    rows, columns = round(top * HEIGHT), round((1 - width) / 2 * WIDTH)
    mask[rows : rows + round(height * HEIGHT), columns : columns + round(width * WIDTH)] = 255
    return mask


def upper(share: float) -> np.ndarray:
    return np.repeat(np.where(np.arange(HEIGHT) < share * HEIGHT, np.uint8(255), np.uint8(0)), WIDTH).reshape(HEIGHT, WIDTH)


LABELS = np.dstack([HOLE, np.roll(HOLE, 36, 1), HOLE * 0])
OUTLINE = drawn(lambda canvas: cv2.ellipse(canvas, (64, 48), (40, 30), 0, 0, 360, 255, 1, cv2.LINE_AA))
RAMP = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "photo": ("it is a picture", lambda: save("png", PHOTO)),
    "photo as jpeg": ("it is a picture", lambda: save("jpeg", PHOTO, quality=80)),
    "grey photo": ("it is a picture", lambda: save("png", Image.fromarray(PHOTO).convert("L"))),
    "photo painted over": ("it is a picture", lambda: save("png", np.where(ON[..., None], np.uint8(RED), PHOTO))),
    "gradient": ("it is a picture", lambda: save("png", RAMP)),
    "labels": ("it is a drawing in 3 colours", lambda: save("png", LABELS)),
    "grey labels": ("it is a drawing in 3 colours", lambda: save("png", HOLE // 3 + np.roll(HOLE, 36, 1) // 3 * 2)),
    "numbers 0, 1 and 2": (
        "it has hardly any contrast (levels 0 to 2)",
        lambda: save("png", ON + 2 * np.roll(ON, 36, 1).astype(np.uint8)),
    ),
    "grey everywhere": ("it has hardly any contrast (levels 128 to 128)", lambda: save("png", HOLE * 0 + 128)),
    "gradient of transparency": (
        "its transparency has more than two levels",
        lambda: save("png", np.dstack([paint(RED, RED), RAMP])),
    ),
    "photo that fades out": ("its transparency has more than two levels", lambda: save("png", np.dstack([PHOTO, RAMP]))),
    "a drawing and another in its alpha": (
        "it shows a drawing and has transparent parts",
        lambda: save("png", np.dstack([paint(WHITE), np.roll(HOLE, 9, 0)])),
    ),
    "a cut-out": ("it would fill 94% of the image", lambda: save("png", np.dstack([PHOTO, HOLE]))),
    "more than half, around a rest": ("it would fill 64% of the image", lambda: save("png", 255 - block(0.6, 0.6, 0.2))),
    "nearly all, around a rest at the rim": (
        "it would fill 85% of the image",
        lambda: save("png", 255 - block(0.3, 0.5, 0)),
    ),
    "an outline": ("it is an outline", lambda: save("png", OUTLINE)),
    "an outline on transparent": ("it is an outline", lambda: save("png", np.dstack([paint(RED, RED), OUTLINE]))),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_ambiguous_mask_is_refused_with_a_sentence_that_helps(kind: str) -> None:
    sentence, make = REFUSED[kind]
    with pytest.raises(BadMask) as caught:
        read(make())
    assert str(caught.value).startswith(sentence)
    assert any(hint in str(caught.value) for hint in ("mask_from=", "paint the area to fill white on black"))


def test_lines_that_enclose_other_paint_are_not_an_outline() -> None:
    stamp = cv2.rectangle(OUTLINE.copy(), (50, 44), (70, 50), 255, cv2.FILLED)
    assert np.array_equal(read(save("png", stamp)).levels, stamp)


@pytest.mark.parametrize("share", [0.55, 0.625, 0.875])
def test_mask_of_more_than_half_counts_unless_it_lies_around_the_rest(share: float) -> None:
    mask = read(save("png", upper(share)))
    assert np.array_equal(mask.levels, upper(share))
    assert mask.notes == ()


@pytest.mark.parametrize(
    ("mask_from", "make", "wanted"),
    [
        ("luma", lambda: save("png", RAMP), RAMP),
        ("luma", lambda: save("png", OUTLINE), OUTLINE),
        ("luma", lambda: save("png", upper(0.9)), upper(0.9)),
        ("luma", lambda: save("png", np.dstack([paint(WHITE, WHITE), HOLE])), HOLE),
        ("luma", lambda: sixteen(HOLE), HOLE),
        ("alpha", lambda: save("png", np.dstack([paint(RED, RED), upper(0.9)])), upper(0.9)),
        ("alpha", lambda: save("png", np.dstack([PHOTO, 255 - upper(0.9)])), upper(0.9)),
        ("alpha", lambda: save("png", np.dstack([paint(WHITE), HOLE])), HOLE),
        ("inverted", lambda: save("png", HOLE), 255 - HOLE),
        ("inverted", lambda: save("png", upper(0.625)), 255 - upper(0.625)),
        ("inverted", lambda: save("png", np.dstack([PHOTO, HOLE])), HOLE),
        ("inverted", lambda: save("png", (~ON).astype(np.uint8)), HOLE),
    ],
)
def test_mask_from_says_how_to_read_it_without_a_note(mask_from: str, make: Callable[[], bytes], wanted: np.ndarray) -> None:
    mask = read(make(), mask_from=mask_from)
    assert np.array_equal(mask.levels, wanted)
    assert not [note for note in mask.notes if note != "mask_read_as:levels"]


def test_tiff_with_nearly_black_samples_of_16_bits_is_refused() -> None:
    with pytest.raises(BadMask, match="save it with 8 bits"):
        read(save("tiff", Image.fromarray(HOLE.astype(np.uint16))))


def test_alpha_needs_transparent_parts() -> None:
    with pytest.raises(BadMask, match="it has no transparent parts"):
        read(save("png", HOLE), mask_from="alpha")


def test_errors_of_the_file_stay_what_they_are() -> None:
    with pytest.raises(TooManyPixels):
        read_mask(PLAIN["grey"](), max_pixels=HOLE.size - 1)
    with pytest.raises(Truncated):
        read(PLAIN["grey"]()[:-40])
    with pytest.raises(NotAnImage):
        read(b"<html>")


def test_results_with_these_notes_can_be_reused() -> None:
    for engine in ENGINES:
        assert engine.lasting_notes.issuperset(NOTES) == (engine.operation == "inpaint")
