"""The line of one chunk, with a real fetcher, folder and ledger: every image ends in one record, whatever its neighbours do."""

from __future__ import annotations

import io
import sys
import threading
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import MagicMock
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import BrokerUnavailable, DeviceLost, OperationFailed, OutOfMemory, StorageUnavailable
from imagemill.shared.messages import Item, Job, Row
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings, Settings, WorkerSettings
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.line.batch_sizes import BatchSizes, Known
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.line import Line
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.stages import Context
from imagemill.worker.operations.base import Inputs, Sample, Spec, Untouched, Work
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.store import open_store
from tests.conftest import photo
from tests.devices import DEAD, FakeGpu
from tests.fakes import Invert
from tests.ledgers import Ledger
from tests.services.images import Handler, ImageServer, answers, failing, html, reply
from tests.workers import wait_until

FETCH: dict[str, Any] = {"allow_networks": ["127.0.0.0/8"], "total_timeout": 20}
SIZE = 96 * 72  # pixels of conftest's photo


def no_s3() -> NoReturn:
    raise AssertionError("S3 was asked")


class Bench:
    """A job in a real ledger, and the flow that works on it."""

    def __init__(self, ledger: Ledger, images: ImageServer, folder: Path) -> None:
        self.ledger, self.images, self.folder = ledger, images, folder
        self.job = f"flow-{uuid.uuid4().hex[:12]}"
        self.stop = threading.Event()
        self.fetchers: list[Fetcher] = []

    def items(self, sources: Sequence[str | dict[str, Any]]) -> list[Item]:
        """Paths of the image server, or rows with a `source` that is one."""
        rows = [row if isinstance(row, dict) else {"source": row} for row in sources]
        return [Item.model_validate({"index": n, **{k: self._url(v) for k, v in row.items()}}) for n, row in enumerate(rows)]

    def photos(self, count: int) -> list[Item]:
        """That many different photos, served."""
        self.images.routes |= {f"/{n}.png": photo(n) for n in range(count)}
        return self.items([f"/{n}.png" for n in range(count)])

    def line(
        self,
        operation: Invert,
        items: list[Item],
        *,
        kind: str = "stylize",
        form: str = "png",
        attempts: int = 3,
        threads: int = 16,
        look_ahead: int = 10**8,
        node: str = "here",
        sizes: BatchSizes | None = None,
        wait: float = 0.0,
        batch: str = "throughput",
        quality: dict[str, Any] | None = None,
        **options: Any,
    ) -> Line:
        """A line for the job, which is made at the first call."""
        fields = {
            "operation": kind,
            "output": {"url": self.folder.as_uri(), "format": form, "key": "{index}"},
            "options": options,
            "policy": {"attempts": attempts, "batch": batch, "quality": quality or {}},
        }
        spec = Job.model_validate(fields)
        if not self.fetchers:
            self.ledger.open_job(self.job, spec)
            self.ledger.add_chunks(self.job, [(0, items)])
            self.ledger.seal(self.job, chunks=1, total=len(items), duplicates={})
        files = FileSettings(write_roots=(self.folder,))
        settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            fetch=FetchSettings.model_validate(FETCH | {"threads": threads}),
            worker=WorkerSettings(look_ahead=look_ahead, batch_wait=wait),
        )
        self.fetchers.append(Fetcher(settings.fetch, files, no_s3))
        store = open_store(spec.output.url, s3=no_s3, files=files, s3_settings=S3Settings())
        context = Context.of(
            self.job, spec, settings, operation=operation, fetcher=self.fetchers[-1], store=store, stop=self.stop
        )
        return Line(context, ledger=self.ledger, settings=settings, node=node, sizes=sizes)

    def rows(self) -> list[Row]:
        return list(self.ledger.rows(self.job))

    def codes(self) -> list[str | None]:
        """Per image its code, `done`, or `pending` where it has no record."""
        return [row.code or row.state for row in self.rows()]

    def recorded(self) -> set[int]:
        return {row.index for row in self.rows() if row.state != "pending"}

    def entries(self) -> list[int]:
        """The index of every result that was ever recorded."""
        return [result.index for result in self.ledger.follow(self.job, wait=0.001)[1]]

    def _url(self, path: Any) -> Any:
        return self.images.url(path) if isinstance(path, str) and path.startswith("/") else path


@pytest.fixture
def bench(ledger: Ledger, images: ImageServer, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(ledger, images, tmp_path / "out")
    yield bench
    for fetcher in bench.fetchers:
        fetcher.close()


def pixels(row: Row) -> np.ndarray:
    assert row.output is not None, row
    with Image.open(unquote(urlsplit(row.output).path)) as image:
        return np.asarray(image)


def source(number: int) -> np.ndarray:
    """The pixels of conftest's photo."""
    noise = np.random.default_rng(number).integers(0, 60, (72, 96, 3), np.uint8)
    noise[18:-18, 24:-24] += np.uint8(150)
    return noise


@contextmanager
def running(line: Line, items: list[Item]) -> Iterator[None]:
    """The flow in a thread; on leaving it must end by itself."""
    thread = threading.Thread(target=line.run, args=(items,), daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive(), "the line hangs"


class Bands(Invert):
    """Four samples per image, each a band of rows, which share batches with any other of their shape."""

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        return Work([Sample(band, None) for band in np.array_split(picture.pixels, 4)], plan=picture)

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        return Picture(np.vstack(outputs))


class Faulty(Invert):
    """Raises `fault` at `stage` for the image 1; `samples` of it do when it comes to `run`."""

    def __init__(self, stage: str = "", fault: Exception | None = None) -> None:
        self.stage, self.fault = stage, fault

    def _at(self, stage: str, index: int) -> None:
        if stage == self.stage and index == 1 and self.fault is not None:
            raise self.fault

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        index = inputs.item.index
        self._at("prepare", index)
        if self.stage == "empty" and index == 1:
            return Work([], plan=None)
        return Work([Sample((index, picture.pixels), None)], plan=(index, picture))

    def group_key(self, sample: Sample[Any, Any]) -> Hashable:
        self._at("group", sample.data[0])
        return "all"

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        for sample in samples:
            self._at("run", sample.data[0])
        return [255 - sample.data[1] for sample in samples]

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        index, picture = work.plan
        self._at("finish", index)
        return Picture(outputs[0], picture.format)


class Gate(Invert):
    """One image at a time; the `at`-th `run` says so and waits until it is opened, and no image is finished before."""

    spec = Spec("stylize", "opencv", max_batch=1)

    def __init__(self, at: int = 1) -> None:
        self.at, self.begun = at, 0
        self.inside, self.open = threading.Event(), threading.Event()

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.begun += 1
        if self.begun == self.at:
            self.inside.set()
            assert self.open.wait(60)
        return super().run(samples)

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        assert self.inside.wait(20), "the device waits for a result to be stored"
        return super().finish(work, outputs)


# --- every image ends in one record ---


@pytest.mark.parametrize("operation", [Invert, Bands])
def test_each_image_gets_its_own_result_and_one_record(operation: type[Invert], bench: Bench) -> None:
    items = bench.photos(20)
    bench.line(operation(), items).run(items)
    rows = bench.rows()
    for row in rows:
        assert np.array_equal(pixels(row), 255 - source(row.index))
    assert sorted(bench.entries()) == list(range(20))
    status = bench.ledger.status(bench.job)
    assert (status.done, status.failed) == (20, 0)


def test_a_chunk_that_comes_twice_is_counted_once(bench: Bench) -> None:
    items = bench.photos(4)
    for node, counted in (("here", 4), ("there", 0)):
        line = bench.line(Invert(), items, node=node)
        line.run(items)
        assert (line.records.done, line.records.failed) == (counted, 0)
    assert sorted(bench.entries()) == [0, 1, 2, 3]
    assert {row.result.node for row in bench.rows() if row.result} == {"here"}


def test_a_record_tells_what_it_took(bench: Bench) -> None:
    bench.images.routes["/a.png"] = failing(1, 503, photo(1))
    items = bench.items(["/a.png"])
    bench.line(Invert(), items).run(items)
    (row,) = bench.rows()
    result = row.result
    assert result is not None
    assert (result.attempts, result.source_format, result.source_bytes) == (2, "png", len(photo(1)))
    assert result.source_size == result.output_size == (96, 72)
    assert {"fetch", "wait", "decode", "prepare", "run", "finish", "check", "encode", "store"} == result.seconds.keys()


def route(stage: str) -> Any:
    """What the server answers for the bad image of a stage."""
    if stage == "fetch":
        return answers(404)
    if stage == "decode":
        return photo(1)[:-400]
    return photo(1, 16384, 1) if stage == "encode" else photo(1)


@pytest.mark.parametrize(
    ("stage", "fault", "code"),
    [
        ("fetch", None, "not_found"),
        ("decode", None, "truncated"),
        ("prepare", OperationFailed("no"), "operation_failed"),
        ("prepare", MemoryError("malloc"), "out_of_memory"),
        ("prepare", ZeroDivisionError("by zero"), "internal_error"),
        ("empty", None, "internal_error"),
        ("group", KeyError("no such group"), "internal_error"),
        ("run", OutOfMemory("the device is full"), "out_of_memory"),
        ("run", OperationFailed("no"), "operation_failed"),
        ("run", ZeroDivisionError("by zero"), "internal_error"),
        ("finish", OperationFailed("no"), "operation_failed"),
        ("finish", ZeroDivisionError("by zero"), "internal_error"),
        ("encode", None, "operation_failed"),
        ("store", None, "storage_refused"),
    ],
)
def test_a_bad_image_fails_alone_with_the_code_of_what_went_wrong(
    stage: str, fault: Exception | None, code: str, bench: Bench
) -> None:
    items = bench.photos(5)
    bench.images.routes["/1.png"] = route(stage)
    if stage == "store":
        (bench.folder / "1.webp").mkdir(parents=True)
    line = bench.line(Faulty(stage, fault), items, form="webp")
    line.run(items)
    assert bench.codes() == ["done", code, "done", "done", "done"]
    assert (line.records.done, line.records.failed) == (4, 1)
    bad = bench.rows()[1]
    assert bad.message
    assert bad.attempts == 1
    assert all(pixels(row).shape == (72, 96, 3) for row in bench.rows() if row.index != 1)


def test_an_image_whose_tile_fails_is_recorded_once(bench: Bench) -> None:
    class Blemish(Bands):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            if any(np.array_equal(sample.data, source(1)[:18]) for sample in samples):
                raise OperationFailed("this tile can't be done")
            return super().run(samples)

    items = bench.photos(4)
    bench.line(Blemish(), items).run(items)
    assert bench.codes() == ["done", "operation_failed", "done", "done"]
    assert sorted(bench.entries()) == [0, 1, 2, 3]


# --- batches ---


class Sized(Invert):
    """Notes how large its batches are, and takes 800 bytes for each image."""

    spec = Spec("stylize", "opencv", max_batch=8)

    def __init__(self, room: int) -> None:
        """On a GPU on which so many images fit, which is known."""
        self.gpu = FakeGpu(1000 * room)
        self.known = BatchSizes(self.gpu, {repr((72, 96, 3)): Known({1: 800}, fits=room)})
        self.sizes: list[int] = []
        self.ran = threading.Event()

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        self.gpu.take(800 * len(samples))
        self.sizes.append(len(samples))
        self.ran.set()
        return super().run(samples)


@pytest.mark.parametrize(
    ("room", "batch", "expected"), [(8, "throughput", [8, 4]), (3, "throughput", [3] * 4), (8, "quality", [4] * 3)]
)
def test_on_a_gpu_a_batch_is_as_large_as_fits_and_as_the_policy_allows(
    room: int, batch: str, expected: list[int], bench: Bench
) -> None:
    items, operation = bench.photos(12), Sized(room)
    bench.line(operation, items, sizes=operation.known, wait=60, batch=batch, threads=3).run(items)
    assert operation.sizes == expected
    assert bench.codes() == ["done"] * 12


@pytest.mark.parametrize("together", [True, False])
def test_a_record_tells_how_many_images_went_through_the_model_together(together: bool, bench: Bench) -> None:
    """Half of the first batch, since that does not fit; one where the engine runs each for itself all the same."""
    items, operation = bench.photos(6), Sized(room=4)
    operation.together = lambda _: together  # type: ignore[method-assign]
    operation.known = BatchSizes(operation.gpu, {repr((72, 96, 3)): Known({1: 500}, fits=8)})
    bench.line(operation, items, sizes=operation.known, wait=60, threads=3).run(items)
    assert operation.sizes == [3, 3]
    batches = [row.result.batch for row in bench.rows() if row.result]
    assert batches == [3 if together else 1] * 6


def test_no_image_waits_for_long_because_another_is_slow(bench: Bench) -> None:
    items, operation = bench.photos(4), Sized(room=8)

    def slow(handler: Handler) -> None:
        assert operation.ran.wait(60), "the others wait for this one"
        reply(handler, 200, photo(3))

    bench.images.routes["/3.png"] = slow
    bench.line(operation, items, sizes=operation.known, wait=0.1).run(items)
    assert sum(operation.sizes) == 4
    assert bench.codes() == ["done"] * 4


def test_a_lost_device_ends_it_and_fails_no_image(bench: Bench) -> None:
    class Poisoned(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            raise DEAD["illegal access"]()

    items = bench.photos(6)
    with pytest.raises(DeviceLost):
        bench.line(Poisoned(), items).run(items)
    assert bench.codes() == ["pending"] * 6


# --- all stages at once, in bounded memory ---


def test_while_one_image_is_on_the_device_the_next_are_fetched_and_the_last_is_stored(bench: Bench) -> None:
    items = bench.photos(6)
    operation = Gate(at=2)
    with running(bench.line(operation, items), items):
        assert operation.inside.wait(60)
        wait_until(lambda: len(bench.recorded()) == 1, "the image before it is stored and recorded")
        wait_until(lambda: sum(bench.images.hits.values()) == 6, "the images behind it are fetched")
        assert len(list(bench.folder.glob("*.png"))) == 1
        operation.open.set()
    assert bench.codes() == ["done"] * 6


class Counting(Invert):
    """Counts the pixels that the flow holds: from `prepare` until the image is `finish`ed, at the least."""

    spec = Spec("stylize", "opencv", max_batch=3)

    def __init__(self, fetched: Callable[[], bool]) -> None:
        self.fetched, self.counting = fetched, threading.Lock()
        self.held = self.most = 0

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        with self.counting:
            self.held += picture.size[0] * picture.size[1]
            self.most = max(self.most, self.held)
        return super().prepare(picture, inputs)

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        wait_until(self.fetched, "all images are there to be decoded")
        return super().run(samples)

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        with self.counting:
            self.held -= outputs[0].shape[0] * outputs[0].shape[1]
        return super().finish(work, outputs)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_never_more_pixels_are_decoded_than_the_look_ahead(most: int, bench: Bench) -> None:
    items = bench.photos(15)
    operation = Counting(lambda: sum(bench.images.hits.values()) == 15)
    bench.line(operation, items, look_ahead=most * SIZE + SIZE // 2).run(items)
    assert operation.most <= most * SIZE
    assert bench.codes() == ["done"] * 15


def test_an_image_larger_than_the_look_ahead_is_done_all_the_same(bench: Bench) -> None:
    items = bench.photos(5)
    bench.line(Invert(), items, look_ahead=SIZE - 1).run(items)
    assert bench.codes() == ["done"] * 5


@settings(max_examples=50)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=24), st.integers(1, 10))
def test_the_budget_is_kept_except_by_one_alone_and_everyone_gets_in(sizes: list[int], total: int) -> None:
    budget, counting = PixelBudget(total), threading.Lock()
    inside: list[int] = []
    crowds: list[list[int]] = []

    def pass_through(pixels: int) -> None:
        budget.acquire(pixels)
        with counting:
            inside.append(pixels)
            crowds.append(list(inside))
        with counting:
            inside.remove(pixels)
        budget.release(pixels)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(pass_through, sizes))
    assert len(crowds) == len(sizes)
    # Images of no pixels cost nothing, so they keep anybody company.
    assert all(sum(crowd) <= total or sum(size > 0 for size in crowd) == 1 for crowd in crowds)


def waits(thread: threading.Thread) -> bool:
    """Whether a thread waits for a condition."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code is threading.Condition.wait.__code__


def test_small_images_do_not_overtake_a_large_one_for_ever() -> None:
    budget, came = PixelBudget(10), []

    def enter(pixels: int) -> None:
        budget.acquire(pixels)
        came.append(pixels)
        budget.release(pixels)

    budget.acquire(6)
    large = threading.Thread(target=enter, args=(8,))
    large.start()
    wait_until(lambda: waits(large), "the large one waits")
    small = [threading.Thread(target=enter, args=(1,)) for _ in range(4)]
    for one in small:
        one.start()
    # All are inside `acquire` now or, were it unfair, through it.
    wait_until(lambda: all(not one.is_alive() or asks(one) for one in small), "the small ones have asked")
    budget.release(6)
    for one in (large, *small):
        one.join(60)
    assert came == [8, 1, 1, 1, 1]


def asks(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not PixelBudget.acquire.__code__:
        frame = frame.f_back
    return frame is not None


# --- the check ---

ALL_BLANK = {"least_entropy": 8}
"""A limit beyond which every photo lies; those with more bits lie nearer to it."""


class Lucky(Invert):
    """Where there is chance in a result: `tries` says what each seed's try of an image gives, or raises."""

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


def test_a_result_is_measured_and_flagged(bench: Bench) -> None:
    items = bench.photos(3)
    bench.line(Lucky(blank), items).run(items)
    for row in bench.rows():
        assert row.result is not None
        assert row.result.notes == ("seed_0", "flag:blank")
        assert row.result.quality is not None
        assert row.result.quality.entropy == 0


def test_without_the_check_nothing_is_measured(bench: Bench) -> None:
    items = bench.photos(1)
    bench.line(Lucky(blank), items, quality={"mode": "off"}).run(items)
    (row,) = bench.rows()
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
def test_a_bad_result_is_tried_once_more_and_the_better_one_stays(
    tries: tuple[Callable[[np.ndarray], np.ndarray], ...], notes: tuple[str, ...], bench: Bench
) -> None:
    items = bench.photos(7)
    operation = Lucky(*tries)
    line = bench.line(operation, items, quality={"mode": "repair", **ALL_BLANK}, threads=2, look_ahead=2 * SIZE)
    with running(line, items):
        pass
    assert sorted(set(operation.seeds)) == [0, 1]
    assert (line.records.done, line.records.failed) == (7, 0)
    assert sorted(bench.entries()) == list(range(7))
    better = tries[notes[0] == "seed_1"]
    for row in bench.rows():
        assert row.result is not None
        assert row.result.notes == (*notes, "flag:blank")
        assert np.array_equal(pixels(row), better(source(row.index)))


@pytest.mark.parametrize("quality", [{"mode": "flag", **ALL_BLANK}, {"mode": "repair"}], ids=["only flagged", "good"])
def test_what_is_only_flagged_or_good_is_not_tried_again(quality: dict[str, Any], bench: Bench) -> None:
    items = bench.photos(3)
    operation = Lucky(same, same)
    bench.line(operation, items, quality=quality).run(items)
    assert operation.seeds == [0, 0, 0]
    assert bench.codes() == ["done"] * 3


def test_a_second_try_that_cannot_be_batched_leaves_the_first(bench: Bench) -> None:
    class Ungrouped(Lucky):
        def group_key(self, sample: Sample[Any, Any]) -> Hashable:
            if sample.data[1]:
                raise MemoryError
            return super().group_key(sample)

    items = bench.photos(3)
    operation = Ungrouped(blank, same)
    with running(bench.line(operation, items, quality={"mode": "repair", **ALL_BLANK}), items):
        pass
    assert operation.seeds == [0, 0, 0]
    for row in bench.rows():
        assert row.result is not None
        assert (row.state, row.result.notes) == ("done", ("seed_0", "flag:blank"))
        assert np.array_equal(pixels(row), blank(source(row.index)))
    assert sorted(bench.entries()) == [0, 1, 2]


def test_an_image_that_fails_is_not_tried_again(bench: Bench) -> None:
    items = bench.photos(2)
    operation = Lucky(fails, same)
    with running(bench.line(operation, items, quality={"mode": "repair"}), items):
        pass
    assert bench.codes() == ["operation_failed"] * 2


def test_a_stop_keeps_the_first_try(bench: Bench) -> None:
    class Stops(Lucky):
        def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
            bench.stop.set()
            return super().finish(work, outputs)

    items = bench.photos(1)
    operation = Stops(blank, same)
    with running(bench.line(operation, items, quality={"mode": "repair"}), items):
        pass
    assert operation.seeds == [0]
    assert bench.codes() == ["done"]


# --- when it ends early ---


def test_a_stop_finishes_what_is_on_the_device_and_leaves_the_rest_without_a_record(bench: Bench) -> None:
    items = bench.photos(12)
    operation = Gate()
    with running(bench.line(operation, items, threads=2, look_ahead=SIZE), items):
        assert operation.inside.wait(60)
        bench.stop.set()
        operation.open.set()
    assert (
        sorted(bench.codes()) == ["done"] + ["pending"] * 11
    )  # two threads fetch: either of the first two may have come first
    assert sum(bench.images.hits.values()) <= 3, "nothing more is fetched"


@pytest.mark.parametrize("what", ["source", "mask"])
def test_a_stop_makes_no_failure_of_an_image_that_would_have_been_tried_again(what: str, bench: Bench) -> None:
    def busy(handler: Handler) -> None:
        bench.stop.set()
        reply(handler, 503, b"try later")

    bench.images.routes |= {"/a.png": photo(1), "/busy.png": busy}
    items = bench.items([{"source": "/a.png"} | {what: "/busy.png"}])
    bench.line(Masked(), items, kind="inpaint").run(items)
    assert bench.codes() == ["pending"]


def test_without_its_ledger_it_stops_and_raises(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    ledger = Ledger(own_redis.url)
    bench = Bench(ledger, images, tmp_path / "out")
    items = bench.photos(30)
    operation = Gate()
    line = bench.line(operation, items, threads=1, look_ahead=SIZE)
    raised: list[Exception] = []

    def run() -> None:
        try:
            line.run(items)
        except BrokerUnavailable as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert operation.inside.wait(60)
    own_redis.kill()
    operation.open.set()
    thread.join(120)
    assert len(raised) == 1
    assert (line.records.done, line.records.failed) == (0, 0)
    assert sum(images.hits.values()) < 30
    ledger.close()
    bench.fetchers[0].close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [SoftTimeLimitExceeded(), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_when_the_chunks_time_is_up_it_ends_at_once_and_fails_no_image(error: BaseException, bench: Bench) -> None:
    class Endless(Invert):
        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            raise error

    items = bench.photos(12)
    with pytest.raises(type(error)):
        bench.line(Endless(), items, threads=4, look_ahead=SIZE).run(items)
    assert bench.codes() == ["pending"] * 12
    assert sum(bench.images.hits.values()) < 12


# --- after a process died ---


class Order(Invert):
    """Notes the order in which images are begun."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        self.order.append(inputs.item.index)
        return super().prepare(picture, inputs)


def test_after_a_crash_images_go_one_by_one_the_least_tried_first_and_the_deadly_is_given_up(bench: Bench) -> None:
    items = bench.photos(5)
    operation = Order()
    line = bench.line(operation, items, attempts=3)
    for index, times in ((0, 1), (1, 2), (3, 1)):
        for _ in range(times):
            bench.ledger.count_attempt(bench.job, index)
    line.run_alone(items, lost=3)
    assert operation.order == [2, 4, 0, 3]
    assert bench.codes() == ["done", "worker_lost", "done", "done", "done"]
    assert (line.records.done, line.records.failed) == (4, 1)
    lost = bench.rows()[1]
    assert (lost.attempts, bench.images.hits["/1.png"]) == (3, 0)
    assert "died 3 times" in (lost.message or "")
    assert [row.attempts for row in bench.rows() if row.index != 1] == [3, 2, 3, 2]
    assert bench.ledger.attempts(bench.job, range(5)) == {0: 2, 1: 2, 2: 1, 3: 2, 4: 1}


def test_nobody_is_given_up_for_a_neighbours_crash(bench: Bench) -> None:
    items = bench.photos(3)
    bench.line(Invert(), items, attempts=1).run_alone(items, lost=1)
    assert bench.codes() == ["done"] * 3


@pytest.mark.parametrize("reached", [False, True])
def test_a_stop_uses_up_nobodys_attempts(reached: bool, bench: Bench) -> None:
    class Stops(Invert):
        def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
            if not reached:
                bench.stop.set()
            return super().prepare(picture, inputs)

        def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
            bench.stop.set()
            return super().run(samples)

    items = bench.photos(4)
    bench.line(Stops(), items).run_alone(items, lost=1)
    assert bench.codes() == ["done" if reached else "pending", "pending", "pending", "pending"]
    assert bench.ledger.attempts(bench.job, range(4)) == {0: int(reached), 1: 0, 2: 0, 3: 0}


# --- masks ---


class Masked(Invert):
    """Says in the result's corner how bright the mask is."""

    spec = Spec("inpaint", "opencv", needs_mask=True, max_batch=4)

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        level = 0 if inputs.mask is None else int(inputs.mask.max())
        corner = picture.pixels.copy()
        corner[0, 0] = 255 - level
        return Work([Sample(corner, None)], plan=picture)


def mask(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (96, 72), level).save(file, "PNG")
    return file.getvalue()


def test_a_jobs_mask_is_fetched_once_and_an_images_own_comes_before_it(bench: Bench) -> None:
    items = bench.photos(6)
    bench.images.routes |= {"/job.png": mask(200), "/own.png": mask(100)}
    items[2] = items[2].model_copy(update={"mask": bench.images.url("/own.png")})
    bench.line(Masked(), items, kind="inpaint", mask=bench.images.url("/job.png")).run(items)
    assert [int(pixels(row)[0, 0, 0]) for row in bench.rows()] == [200, 200, 100, 200, 200, 200]
    assert bench.images.hits["/job.png"] == bench.images.hits["/own.png"] == 1


def test_an_operation_without_masks_fetches_none(bench: Bench) -> None:
    items = [bench.photos(1)[0].model_copy(update={"mask": bench.images.url("/own.png")})]
    bench.line(Invert(), items).run(items)
    assert bench.codes() == ["done"]
    assert bench.images.hits["/own.png"] == 0


@pytest.mark.parametrize("bad", [answers(404), html(), b"", mask(9)[:50]], ids=["missing", "a page", "empty", "cut"])
def test_a_bad_mask_is_said_to_be_the_mask(bad: Any, bench: Bench) -> None:
    items = bench.photos(3)
    bench.images.routes["/bad.png"] = bad
    items[1] = items[1].model_copy(update={"mask": bench.images.url("/bad.png?Signature=secret")})
    bench.line(Masked(), items, kind="inpaint").run(items)
    assert bench.codes() == ["done", "bad_mask", "done"]
    message = bench.rows()[1].message or ""
    assert "/bad.png" in message
    assert "secret" not in message


def test_a_bad_mask_of_the_job_is_asked_for_once(bench: Bench) -> None:
    items = bench.photos(5)
    bench.line(Masked(), items, kind="inpaint", mask=bench.images.url("/none.png")).run(items)
    assert bench.codes() == ["bad_mask"] * 5
    assert bench.images.hits["/none.png"] == 1


# --- images that stay as they are ---


class Nothing(Invert):
    """Finds nothing to do, and says so."""

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
        return Untouched(("empty_mask",))

    def run(self, samples: Sequence[Sample[Any, Any]]) -> list[Any]:
        raise AssertionError("nothing was to be done")

    def finish(self, work: Work[Any, Any, Any], outputs: Sequence[Any]) -> Picture:
        raise AssertionError("nothing was done")


def turned(number: int) -> bytes:
    """A JPEG that is to be shown on its side."""
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
def test_an_untouched_image_keeps_its_own_bytes_where_the_format_allows(
    data: bytes, form: str, same: bool, bench: Bench
) -> None:
    bench.images.routes |= {"/a": data, "/b.png": photo(2)}
    items = bench.items(["/a"])
    line = bench.line(Nothing(), items, form=form)
    line.run(items)
    (row,) = bench.rows()
    result = row.result
    assert (bench.codes(), line.records.done) == (["done"], 1)
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
def test_a_stop_while_an_untouched_image_is_stored_leaves_it_and_holds_up_nobody(bench: Bench) -> None:
    items = bench.photos(3)
    line = bench.line(Nothing(), items, form="same", threads=2, look_ahead=SIZE)

    def refuse(*_: Any) -> NoReturn:
        bench.stop.set()
        raise StorageUnavailable("try later")

    line.context.store.put = refuse  # type: ignore[method-assign]
    line.run(items)
    assert bench.codes() == ["pending"] * 3


# --- reuse ---


@pytest.mark.parametrize(("note", "remembered"), [("repaired_seed", True), ("a_deadline_was_missed", False)])
def test_result_is_remembered_only_when_its_notes_are_lasting(note: str, remembered: bool, bench: Bench) -> None:
    class Noted(Invert):
        def prepare(self, picture: Picture, inputs: Inputs[Any]) -> Any:
            work: Any = super().prepare(picture, inputs)
            work.notes.append(note)
            return work

    cache = MagicMock(spec=Cache)
    cache.get.return_value = None
    items = bench.photos(1)
    line = bench.line(Noted(), items)
    line.context = replace(line.context, cache=cache)
    line.run(items)
    assert cache.put.called == remembered
