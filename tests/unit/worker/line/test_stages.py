"""Single stages: the check, masks, images that need no work, and results that are reused."""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
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
from imagemill.worker.operations.base import Inputs, Sample, Untouched, Work
from tests.conftest import photo
from tests.fakes import Invert
from tests.services.images import answers, html
from tests.unit.worker.line.chunks import SIZE, Chunk, Masked, pixels, running, source

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


def test_result_is_measured_and_flagged(chunk: Chunk) -> None:
    items = chunk.photos(3)
    chunk.line(Lucky(blank), items).run(items)
    for row in chunk.rows():
        assert row.result is not None
        assert row.result.notes == ("seed_0", "flag:blank")
        assert row.result.quality is not None
        assert row.result.quality.entropy == 0


def test_nothing_is_measured_when_the_check_is_off(chunk: Chunk) -> None:
    items = chunk.photos(1)
    chunk.line(Lucky(blank), items, quality={"mode": "off"}).run(items)
    (row,) = chunk.rows()
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
    tries: tuple[Callable[[np.ndarray], np.ndarray], ...], notes: tuple[str, ...], chunk: Chunk
) -> None:
    items = chunk.photos(7)
    operation = Lucky(*tries)
    line = chunk.line(operation, items, quality={"mode": "repair", **ALL_BLANK}, threads=2, look_ahead=2 * SIZE)
    with running(line, items):
        pass
    assert sorted(set(operation.seeds)) == [0, 1]
    assert (line.records.done, line.records.failed) == (7, 0)
    assert sorted(chunk.entries()) == list(range(7))
    better = tries[notes[0] == "seed_1"]
    for row in chunk.rows():
        assert row.result is not None
        assert row.result.notes == (*notes, "flag:blank")
        assert np.array_equal(pixels(row), better(source(row.index)))


@pytest.mark.parametrize("quality", [{"mode": "flag", **ALL_BLANK}, {"mode": "repair"}], ids=["only flagged", "good"])
def test_no_second_attempt_for_good_results_or_when_only_flagging(quality: dict[str, Any], chunk: Chunk) -> None:
    items = chunk.photos(3)
    operation = Lucky(same, same)
    chunk.line(operation, items, quality=quality).run(items)
    assert operation.seeds == [0, 0, 0]
    assert chunk.codes() == ["done"] * 3


def test_first_result_is_kept_when_the_second_attempt_cannot_be_batched(chunk: Chunk) -> None:
    class Ungrouped(Lucky):
        def group_key(self, sample: Sample[Any, Any]) -> Hashable:
            if sample.data[1]:
                raise MemoryError
            return super().group_key(sample)

    items = chunk.photos(3)
    operation = Ungrouped(blank, same)
    with running(chunk.line(operation, items, quality={"mode": "repair", **ALL_BLANK}), items):
        pass
    assert operation.seeds == [0, 0, 0]
    for row in chunk.rows():
        assert row.result is not None
        assert (row.state, row.result.notes) == ("done", ("seed_0", "flag:blank"))
        assert np.array_equal(pixels(row), blank(source(row.index)))
    assert sorted(chunk.entries()) == [0, 1, 2]


def test_failed_image_gets_no_second_attempt(chunk: Chunk) -> None:
    items = chunk.photos(2)
    operation = Lucky(fails, same)
    with running(chunk.line(operation, items, quality={"mode": "repair"}), items):
        pass
    assert chunk.codes() == ["operation_failed"] * 2


def test_stop_keeps_the_first_result(chunk: Chunk) -> None:
    class Stops(Lucky):
        def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
            chunk.stop.set()
            return super().finish(work, outputs)

    items = chunk.photos(1)
    operation = Stops(blank, same)
    with running(chunk.line(operation, items, quality={"mode": "repair"}), items):
        pass
    assert operation.seeds == [0]
    assert chunk.codes() == ["done"]


def mask(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (96, 72), level).save(file, "PNG")
    return file.getvalue()


def test_job_mask_is_fetched_once_and_an_items_own_mask_overrides_it(chunk: Chunk) -> None:
    items = chunk.photos(6)
    chunk.images.routes |= {"/job.png": mask(200), "/own.png": mask(100)}
    items[2] = items[2].model_copy(update={"mask": chunk.images.url("/own.png")})
    chunk.line(Masked(), items, kind="inpaint", mask=chunk.images.url("/job.png")).run(items)
    assert [int(pixels(row)[0, 0, 0]) for row in chunk.rows()] == [200, 200, 100, 200, 200, 200]
    assert chunk.images.hits["/job.png"] == chunk.images.hits["/own.png"] == 1


def test_no_mask_is_fetched_for_an_operation_without_masks(chunk: Chunk) -> None:
    items = [chunk.photos(1)[0].model_copy(update={"mask": chunk.images.url("/own.png")})]
    chunk.line(Invert(), items).run(items)
    assert chunk.codes() == ["done"]
    assert chunk.images.hits["/own.png"] == 0


@pytest.mark.parametrize("bad", [answers(404), html(), b"", mask(9)[:50]], ids=["missing", "a page", "empty", "cut"])
def test_bad_mask_is_reported_as_bad_mask(bad: Any, chunk: Chunk) -> None:
    items = chunk.photos(3)
    chunk.images.routes["/bad.png"] = bad
    items[1] = items[1].model_copy(update={"mask": chunk.images.url("/bad.png?Signature=secret")})
    chunk.line(Masked(), items, kind="inpaint").run(items)
    assert chunk.codes() == ["done", "bad_mask", "done"]
    message = chunk.rows()[1].message or ""
    assert "/bad.png" in message
    assert "secret" not in message


def test_bad_job_mask_is_fetched_once(chunk: Chunk) -> None:
    items = chunk.photos(5)
    chunk.line(Masked(), items, kind="inpaint", mask=chunk.images.url("/none.png")).run(items)
    assert chunk.codes() == ["bad_mask"] * 5
    assert chunk.images.hits["/none.png"] == 1


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
def test_untouched_image_keeps_its_own_bytes_when_the_format_allows(data: bytes, form: str, same: bool, chunk: Chunk) -> None:
    chunk.images.routes |= {"/a": data, "/b.png": photo(2)}
    items = chunk.items(["/a"])
    line = chunk.line(Nothing(), items, form=form)
    line.run(items)
    (row,) = chunk.rows()
    result = row.result
    assert (chunk.codes(), line.records.done) == (["done"], 1)
    assert result is not None
    assert result.notes == ("empty_mask",)
    assert result.output_size == ((72, 96) if data == turned(1) else (96, 72))
    stored = Path(unquote(urlsplit(row.output or "").path)).read_bytes()
    assert result.output_bytes == len(stored)
    assert (stored == data) == same
    with Image.open(io.BytesIO(stored)) as image:
        assert image.size == result.output_size
    assert "encode" not in result.seconds or not same


@pytest.mark.timeout(60)
def test_stop_while_storing_an_untouched_image_leaves_it_unrecorded(chunk: Chunk) -> None:
    items = chunk.photos(3)
    line = chunk.line(Nothing(), items, form="same", threads=2, look_ahead=SIZE)

    def refuse(*_: Any) -> NoReturn:
        chunk.stop.set()
        raise StorageUnavailable("try later")

    line.context.store.put = refuse  # type: ignore[method-assign]
    line.run(items)
    assert chunk.codes() == ["pending"] * 3


@pytest.mark.parametrize(("note", "remembered"), [("repaired_seed", True), ("a_deadline_was_missed", False)])
def test_result_is_remembered_only_when_its_notes_are_lasting(note: str, remembered: bool, chunk: Chunk) -> None:
    class Noted(Invert):
        def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
            work: Any = super().prepare(picture, inputs)
            work.notes.append(note)
            return work

    cache = MagicMock(spec=Cache)
    cache.get.return_value = None
    items = chunk.photos(1)
    line = chunk.line(Noted(), items)
    line.context = replace(line.context, cache=cache)
    line.run(items)
    assert cache.put.called == remembered
