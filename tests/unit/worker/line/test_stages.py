"""Single stages: the check, masks, images that need no work, and results that are reused."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import MagicMock
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from imagemill.shared.errors import OperationFailed, StorageUnavailable
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.operations.base import Evidence, Inputs, Sample, Spec, Untouched, Work
from imagemill.worker.operations.inpaint.mask import Hole, find_hole
from tests.conftest import photo
from tests.fakes import Invert
from tests.services.images import answers, html
from tests.unit.worker.imaging.metadata.sources import photo as annotated
from tests.unit.worker.imaging.samples import png_by_hand
from tests.unit.worker.line.jobs import SIZE, LineJob, Masked, drain, pixels, source

ALL_BLANK = {"least_entropy": 8}
"""A limit that no photo meets; photos with more entropy come closer."""


class Lucky(Invert):
    """An engine with chance: `tries[seed]` turns the source into that attempt's result, or raises."""

    def __init__(self, *tries: Callable[[np.ndarray], np.ndarray]) -> None:
        self.tries = tries
        self.seeds: list[int] = []

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        return self._with_seed(picture, 0)

    def _with_seed(self, picture: Picture, seed: int) -> Work:
        samples = [Sample((picture.pixels, seed), None)]
        return Work(samples, plan=picture, notes=[f"seed_{seed}"], retry=lambda: self._with_seed(picture, seed + 1))

    def group_key(self, sample: Sample[Any, Any]) -> Hashable:
        return sample.data[0].shape

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.seeds += [seed for _, seed in (sample.data for sample in samples)]
        return [self.tries[seed](pixels) for pixels, seed in (sample.data for sample in samples)]


def same(pixels: np.ndarray) -> np.ndarray:
    return pixels


def blank(pixels: np.ndarray) -> np.ndarray:
    return np.full_like(pixels, 9)


def fails(pixels: np.ndarray) -> np.ndarray:
    raise OperationFailed("no")


def test_result_is_measured_and_flagged(job: LineJob) -> None:
    items = job.photos(3)
    job.run(Lucky(blank), items)
    for row in job.rows():
        assert row.result is not None
        assert row.result.notes == ("seed_0", "flag:blank")
        assert row.result.quality is not None
        assert row.result.quality.entropy == 0


def test_nothing_is_measured_when_the_check_is_off(job: LineJob) -> None:
    items = job.photos(1)
    job.run(Lucky(blank), items, quality={"mode": "off"})
    (row,) = job.rows()
    assert row.result is not None
    assert (row.result.quality, row.result.notes) == (None, ("seed_0",))


@pytest.mark.parametrize(
    ("tries", "notes"),
    [
        ((blank, same), ("seed_1", "repaired_seed")),
        ((same, blank), ("seed_0",)),
        ((blank, fails), ("seed_0",)),
        ((blank, blank), ("seed_0",)),
    ],
    ids=["the second is better", "the first is better", "the second fails", "both alike"],
)
def test_bad_result_gets_a_second_attempt_and_the_better_one_is_kept(
    tries: tuple[Callable[[np.ndarray], np.ndarray], ...], notes: tuple[str, ...], job: LineJob
) -> None:
    items = job.photos(7)
    operation = Lucky(*tries)
    tally = job.run(operation, items, quality={"mode": "repair", **ALL_BLANK}, threads=2, look_ahead=2 * SIZE)
    assert sorted(set(operation.seeds)) == [0, 1]
    assert (tally.done, tally.failed) == (7, 0)
    assert sorted(job.entries()) == list(range(7))
    better = tries[notes[0] == "seed_1"]
    for row in job.rows():
        assert row.result is not None
        assert row.result.notes == (*notes, "flag:blank")
        assert np.array_equal(pixels(row), better(source(row.index)))


@pytest.mark.parametrize("quality", [{"mode": "flag", **ALL_BLANK}, {"mode": "repair"}], ids=["only flagged", "good"])
def test_no_second_attempt_for_good_results_or_when_only_flagging(quality: dict[str, Any], job: LineJob) -> None:
    items = job.photos(3)
    operation = Lucky(same, same)
    job.run(operation, items, quality=quality)
    assert operation.seeds == [0, 0, 0]
    assert job.codes() == ["done"] * 3


def test_first_result_is_kept_when_the_second_attempt_cannot_be_batched(job: LineJob) -> None:
    class Ungrouped(Lucky):
        def group_key(self, sample: Sample[Any, Any]) -> Hashable:
            if sample.data[1]:
                raise MemoryError
            return super().group_key(sample)

    items = job.photos(3)
    operation = Ungrouped(blank, same)
    job.run(operation, items, quality={"mode": "repair", **ALL_BLANK})
    assert operation.seeds == [0, 0, 0]
    for row in job.rows():
        assert row.result is not None
        assert (row.state, row.result.notes) == ("done", ("seed_0", "flag:blank"))
        assert np.array_equal(pixels(row), blank(source(row.index)))
    assert sorted(job.entries()) == [0, 1, 2]


def test_failed_image_gets_no_second_attempt(job: LineJob) -> None:
    items = job.photos(2)
    operation = Lucky(fails, same)
    job.run(operation, items, quality={"mode": "repair"})
    assert job.codes() == ["operation_failed"] * 2


def test_stop_keeps_the_first_result(job: LineJob) -> None:
    class Stops(Lucky):
        def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
            job.stop.set()
            return super().finish(work, outputs)

    items = job.photos(1)
    operation = Stops(blank, same)
    job.run(operation, items, quality={"mode": "repair"})
    assert operation.seeds == [0]
    assert job.codes() == ["done"]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mask(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (96, 72), level).save(file, "PNG")
    return file.getvalue()


def test_job_mask_is_fetched_once_and_an_items_own_mask_overrides_it(job: LineJob) -> None:
    items = job.photos(6)
    job.server.routes |= {"/job.png": mask(200), "/own.png": mask(100)}
    items[2] = items[2].model_copy(update={"mask": job.server.url("/own.png")})
    job.run(Masked(), items, kind="inpaint", mask=job.server.url("/job.png"), mask_from="luma")
    assert [int(pixels(row)[0, 0, 0]) for row in job.rows()] == [200, 200, 100, 200, 200, 200]
    assert job.server.hits["/job.png"] == job.server.hits["/own.png"] == 1


def test_no_mask_is_fetched_for_an_operation_without_masks(job: LineJob) -> None:
    items = [job.photos(1)[0].model_copy(update={"mask": job.server.url("/own.png")})]
    job.run(Invert(), items)
    assert job.codes() == ["done"]
    assert job.server.hits["/own.png"] == 0


@pytest.mark.parametrize("bad", [answers(404), html(), b"", mask(9)[:50]], ids=["missing", "a page", "empty", "cut"])
def test_bad_mask_is_reported_as_bad_mask(bad: Any, job: LineJob) -> None:
    items = job.photos(3)
    job.server.routes["/bad.png"] = bad
    items[1] = items[1].model_copy(update={"mask": job.server.url("/bad.png?Signature=secret")})
    job.run(Masked(), items, kind="inpaint")
    assert job.codes() == ["done", "bad_mask", "done"]
    message = job.rows()[1].message or ""
    assert "/bad.png" in message
    assert "secret" not in message


class Fill(Invert):
    """Fills the hole, and passes on how its mask was read."""

    spec = Masked.spec

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        hole = find_hole(picture.size, inputs)
        assert isinstance(hole, Hole)
        return Work([Sample(picture.pixels, None)], plan=picture, notes=hole.notes)


def test_notes_say_how_each_mask_was_read(job: LineJob) -> None:
    hole = np.zeros((72, 96), np.uint8)
    hole[20:40, 30:50] = 1
    job.server.routes |= {"/plain.png": png(hole * 255), "/numbers.png": png(hole), "/inverted.png": png(255 - hole * 255)}
    items = [
        item.model_copy(update={"mask": job.server.url(f"/{name}.png")})
        for item, name in zip(job.photos(3), ("plain", "numbers", "inverted"), strict=True)
    ]
    job.run(Fill(), items, kind="inpaint")
    read = [row.result.notes if row.result else None for row in job.rows()]
    assert read == [(), ("mask_read_as:levels",), ("mask_read_as:inverted",)]


@pytest.mark.parametrize("copied", [False, True])
def test_the_image_itself_is_not_a_mask_unless_its_hole_is_rubbed_out(copied: bool, job: LineJob) -> None:
    hole = np.zeros((72, 96), np.uint8)
    hole[20:40, 30:50] = 255
    photo = np.random.default_rng(0).integers(0, 256, (72, 96, 3)).astype(np.uint8)
    job.server.routes |= {"/scan.png": png(hole), "/rubbed.png": png(np.dstack([photo, 255 - hole]))}
    job.server.routes |= {f"/copy-of-{name}": job.server.routes[f"/{name}"] for name in ("scan.png", "rubbed.png")}
    masks = [f"/copy-of-{name}" if copied else f"/{name}" for name in ("scan.png", "rubbed.png")]
    rows = [{"source": "/scan.png", "mask": masks[0]}, {"source": "/rubbed.png", "mask": masks[1]}]
    job.run(Fill(), job.items(rows), kind="inpaint")
    assert job.codes() == ["bad_mask", "done"]
    assert (job.rows()[0].message or "").endswith("it is the image itself")


def test_mask_counts_in_the_pixel_budget(job: LineJob, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def enter_now(budget: PixelBudget, pixels: int) -> bool:
        asked.append(pixels)
        return real(budget, pixels)

    real = PixelBudget.enter_now
    monkeypatch.setattr(PixelBudget, "enter_now", enter_now)
    hole = np.zeros((72, 96), np.uint8)
    hole[20:40, 30:50] = 255
    job.server.routes["/own.png"] = own = png(hole)
    items = [job.photos(1)[0].model_copy(update={"mask": job.server.url("/own.png")})]
    job.run(Masked(), items, kind="inpaint")
    assert job.codes() == ["done"]
    assert asked == [SIZE + math.prod(Image.open(io.BytesIO(own)).size)]


class Controlled(Invert):
    """Makes the item's own control image the result."""

    spec = Spec("stylize", "opencv", takes_control=True)

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        shown = picture.pixels if inputs.control is None else inputs.control
        return Work([Sample(255 - shown, None)], plan=picture, evidence=Evidence(comparable=False))


def test_own_control_image_is_fetched_for_an_operation_that_takes_one(job: LineJob) -> None:
    job.server.routes |= {"/lines.png": png(np.full((10, 20, 3), 77, np.uint8)), "/bad.png": html(), "/gone.png": answers(404)}
    own = ("/lines.png", None, "/bad.png?Signature=secret", "/gone.png")
    items = [
        item.model_copy(update={"control_image": url and job.server.url(url), "mask": job.server.url("/mask.png")})
        for item, url in zip(job.photos(4), own, strict=True)
    ]
    job.run(Controlled(), items)
    assert job.codes() == ["done", "done", "bad_reference", "bad_reference"]
    assert pixels(job.rows()[0]).shape == (10, 20, 3)
    assert (pixels(job.rows()[0]) == 77).all()
    assert pixels(job.rows()[1]).shape == (72, 96, 3)
    message = job.rows()[2].message or ""
    assert "the control image" in message
    assert "secret" not in message
    assert job.server.hits["/mask.png"] == 0


def test_bad_job_mask_is_fetched_once(job: LineJob) -> None:
    items = job.photos(5)
    job.run(Masked(), items, kind="inpaint", mask=job.server.url("/none.png"))
    assert job.codes() == ["bad_mask"] * 5
    assert job.server.hits["/none.png"] == 1


class Nothing(Invert):
    """Finds nothing to do."""

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        return Untouched(("empty_mask",))

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        raise AssertionError("run was called")

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        raise AssertionError("finish was called")


def turned(number: int) -> bytes:
    """A JPEG with an EXIF rotation."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(photo(number))).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "form", "same"),
    [
        (photo(1), "same", True),
        (photo(1), "png", True),
        (photo(1, kind="JPEG"), "same", True),
        (photo(1, kind="JPEG"), "jpeg", True),
        (photo(1, kind="WEBP"), "same", True),
        (photo(1, kind="JPEG"), "png", False),
        (photo(1), "jpeg", False),
        (photo(1, kind="BMP"), "same", False),
        (turned(1), "same", False),
    ],
    ids=["png", "png as png", "jpeg", "jpeg as jpeg", "webp", "jpeg as png", "png as jpeg", "bmp", "turned jpeg"],
)
def test_untouched_image_keeps_its_own_bytes_when_the_format_allows(data: bytes, form: str, same: bool, job: LineJob) -> None:
    job.server.routes |= {"/a": data, "/b.png": photo(2)}
    items = job.items(["/a"])
    tally = job.run(Nothing(), items, form=form)
    (row,) = job.rows()
    result = row.result
    assert (job.codes(), tally.done) == (["done"], 1)
    assert result is not None
    assert result.notes == ("empty_mask",)
    assert result.output_size == ((72, 96) if data == turned(1) else (96, 72))
    stored = Path(unquote(urlsplit(row.output or "").path)).read_bytes()
    assert result.output_bytes == len(stored)
    assert (stored == data) == same
    with Image.open(io.BytesIO(stored)) as image:
        assert image.size == result.output_size
    assert "encode" not in result.seconds or not same


@pytest.mark.parametrize("keep", ["keep", "copyright", "none"])
@pytest.mark.parametrize("touched", [False, True])
def test_result_gets_the_metadata_that_the_job_keeps(touched: bool, keep: str, job: LineJob) -> None:
    data = annotated("jpeg")
    job.server.routes |= {"/a": data}
    job.run(Invert() if touched else Nothing(), job.items(["/a"]), form="same", metadata=keep)
    (row,) = job.rows()
    stored = Path(unquote(urlsplit(row.output or "").path)).read_bytes()
    with Image.open(io.BytesIO(stored)) as image:
        tags = image.getexif()
        assert image.format == "JPEG"
    assert (315 in tags, 34853 in tags) == (keep != "none", keep == "keep")
    assert (stored == data) == (keep == "keep" and not touched)


@pytest.mark.timeout(60)
def test_stop_while_storing_an_untouched_image_leaves_it_unrecorded(job: LineJob) -> None:
    items = job.photos(3)
    line = job.line(threads=2, look_ahead=SIZE)
    images = job.join(line, Nothing(), items, form="same", enter=False)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        job.stop.set()
        raise StorageUnavailable("try later")

    job.context.store.put = refuse  # type: ignore[method-assign]
    line.enter(images)
    drain(line, images)
    assert job.codes() == ["pending"] * 3


@pytest.mark.parametrize(("note", "remembered"), [("repaired_seed", True), ("a_deadline_was_missed", False)])
def test_result_is_remembered_only_when_its_notes_are_lasting(note: str, remembered: bool, job: LineJob) -> None:
    class Noted(Invert):
        def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
            work: Any = super().prepare(picture, inputs)
            work.notes.append(note)
            return work

    cache = MagicMock(spec=Cache)
    cache.get.return_value = [None]
    items = job.photos(1)
    job.run(Noted(), items, cache=cache)
    assert cache.put.called == remembered


WIDE = png_by_hand(2, 1, 16, 0, b"\0\1\2\3\4")


@pytest.mark.parametrize(
    ("operation", "form", "data", "notes"),
    [
        (Invert(), "png", photo(1)[:-12], ("no_end_marker",)),
        (Invert(), "png", WIDE, ("reduced_to_8_bits",)),
        (Nothing(), "same", photo(1)[:-12], ("no_end_marker", "empty_mask")),
        (Nothing(), "jpeg", WIDE[:-12], ("reduced_to_8_bits", "no_end_marker", "empty_mask")),
        (Nothing(), "same", WIDE, ("empty_mask",)),  # the very file, with all of its bits
    ],
    ids=["computed", "computed-16", "kept", "encoded-anew", "kept-16"],
)
@pytest.mark.parametrize("mode", ["off", "flag"])
def test_notes_on_the_file_reach_the_result_and_keep_it_reusable(
    operation: Invert, form: str, data: bytes, notes: tuple[str, ...], mode: str, job: LineJob
) -> None:
    cache = MagicMock(spec=Cache)
    cache.get.return_value = [None]
    job.server.routes["/a"] = data
    kind = "inpaint" if isinstance(operation, Nothing) else "stylize"  # a note on an empty mask is lasting there
    job.run(operation, job.items(["/a"]), form=form, cache=cache, quality={"mode": mode}, kind=kind)
    (row,) = job.rows()
    assert row.result is not None
    assert tuple(note for note in row.result.notes if not note.startswith("flag:")) == notes
    assert cache.put.called
