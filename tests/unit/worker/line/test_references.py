"""References and masks of a whole job are fetched once, whether that succeeds or fails."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from imagemill.shared.errors import ImageError, NotAnImage, NotFound, ServerError, TooManyPixels
from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.references import References
from imagemill.worker.line.stopped import Stopped
from imagemill.worker.transfer.fetch import Fetched, Fetcher, cut_short
from imagemill.worker.transfer.network import Network
from tests.conftest import photo
from tests.services.images import Handler, ImageServer, failing, html, reply
from tests.stores import NoS3
from tests.workers import wait_until


@pytest.fixture
def fetcher(network: Network) -> Fetcher:
    settings = FetchSettings.model_validate({"allow_networks": ["127.0.0.0/8"], "total_timeout": 20})
    return Fetcher(settings, FileSettings(), NoS3(network), network)


@pytest.fixture
def references(fetcher: Fetcher) -> References:
    return References(fetcher, max_pixels=100_000, attempts=2)


def test_reference_is_fetched_once_for_concurrent_requests(references: References, images: ImageServer) -> None:
    go_on = threading.Event()

    def slow(handler: Handler) -> None:
        go_on.wait(60)
        reply(handler, 200, photo(1))

    images.routes["/a.png"] = slow
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(references.picture, images.url("/a.png")) for _ in range(8)]
        wait_until(lambda: images.hits["/a.png"], "the server is asked")
        assert not any(one.done() for one in asked)
        go_on.set()
        first, *others = (one.result(60) for one in asked)
    assert all(other is first for other in others)
    assert (first.size, images.hits["/a.png"]) == ((96, 72), 1)


@pytest.mark.parametrize("found", [True, False], ids=["found", "failing"])
def test_items_of_one_image_share_its_download(
    found: bool, fetcher: Fetcher, references: References, images: ImageServer
) -> None:
    go_on, url = threading.Event(), images.url("/a.png")

    def slow(handler: Handler) -> None:
        go_on.wait(60)
        reply(handler, 200 if found else 404, photo(1))

    async def items() -> list[Fetched | BaseException]:
        coming = [asyncio.create_task(references.bring_source(url, 1)) for _ in range(3)]
        await asyncio.sleep(0)  # all have asked
        go_on.set()
        return await asyncio.gather(*coming, return_exceptions=True)

    images.routes["/a.png"] = slow
    files = fetcher.network.call(items())
    assert images.hits["/a.png"] == 1
    if not found:
        assert [type(file) for file in files] == [NotFound] * 3
        assert fetcher.room.used == 0
        return
    datas = [file.data for file in files if isinstance(file, Fetched)]
    assert datas[0] == photo(1)
    assert datas[1] is datas[2] is datas[0]
    assert fetcher.room.used == 3 * len(photo(1))
    for _ in files:
        fetcher.room.release(len(photo(1)))
    fetcher.network.call(references.bring_source(url, 1))
    assert images.hits["/a.png"] == 2, "nothing is kept when nobody asks"


@pytest.mark.parametrize("fault", [MemoryError("no room"), ValueError("a bug")], ids=lambda fault: type(fault).__name__)
def test_whatever_ends_a_shared_download_ends_each_image_alone(
    fault: Exception, references: References, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling the others would end the whole line."""

    async def broken(*_: object, **__: object) -> Fetched:
        await asyncio.sleep(0)  # until all have asked
        raise fault

    async def items() -> list[Fetched | BaseException]:
        return await asyncio.gather(*(references.bring_source("http://a/b.png", 1) for _ in range(3)), return_exceptions=True)

    monkeypatch.setattr(Fetcher, "fetch", broken)
    assert fetcher.network.call(items()) == [fault] * 3


def test_kept_references_count_in_the_pixel_budget(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes.update({f"/{name}.png": photo(1) for name in "ac"})
    mask = io.BytesIO()
    Image.new("L", (96, 72), 255).save(mask, "PNG")
    images.routes["/b.png"] = mask.getvalue()
    budget, granted = PixelBudget(5 * 96 * 72), list[int]()
    references = References(fetcher, max_pixels=100_000, attempts=1, budget=budget)
    references.picture(images.url("/a.png"))
    references.mask(images.url("/b.png"))
    for _ in range(4):
        budget.enter(96 * 72, granted.append)
    assert len(granted) == 3
    references.picture(images.url("/c.png"))  # more than half: the oldest is forgotten
    for _ in range(2):
        references.picture(images.url("/a.png"))
    assert (images.hits["/a.png"], images.hits["/c.png"]) == (2, 1)
    del references
    gc.collect()
    budget.look()
    assert len(granted) == 4


def test_one_url_can_be_both_reference_and_mask(references: References, images: ImageServer) -> None:
    images.routes["/a.png"] = photo(1)
    picture, mask = references.picture(images.url("/a.png")), references.mask(images.url("/a.png"), "luma")
    assert picture.pixels.shape == (72, 96, 3)
    assert mask.levels.shape == (72, 96)
    assert references.mask(images.url("/a.png"), "luma") is mask
    assert images.hits["/a.png"] == 2


def test_passing_errors_are_retried(references: References, images: ImageServer) -> None:
    images.routes["/a.png"] = failing(1, 503, photo(1))
    assert references.picture(images.url("/a.png")).size == (96, 72)


@pytest.mark.parametrize(("path", "kind"), [("/none.png", NotFound), ("/page.png", NotAnImage), ("/large.png", TooManyPixels)])
@pytest.mark.parametrize("what", ["picture", "mask"])
def test_failed_reference_fails_every_image_without_another_fetch(
    what: str, path: str, kind: type[ImageError], references: References, images: ImageServer
) -> None:
    images.routes |= {"/page.png": html(), "/large.png": photo(1, 400, 300)}
    for _ in range(3):
        with pytest.raises(kind):
            getattr(references, what)(images.url(path))
    assert images.hits[path] == 1


def test_new_references_are_fetched_again(fetcher: Fetcher, images: ImageServer) -> None:
    for _ in range(2):
        images.routes["/a.png"] = photo(1)
        References(fetcher, max_pixels=100_000, attempts=1).picture(images.url("/a.png"))
    assert images.hits["/a.png"] == 2


@pytest.mark.parametrize("what", ["picture", "mask"])
def test_stop_releases_those_who_wait_for_another_ones_download(what: str, fetcher: Fetcher, images: ImageServer) -> None:
    stop, images.routes["/a.png"] = threading.Event(), images.hang
    references = References(fetcher, max_pixels=100_000, attempts=3, stop=stop)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(getattr(references, what), images.url("/a.png"))
        assert images.stalled.wait(60)
        others = [threads.submit(getattr(references, what), images.url("/a.png")) for _ in range(2)]
        stop.set()
        for one in others:
            with pytest.raises(Stopped):
                one.result(60)
        assert not first.done()
        images.released.set()
        with pytest.raises(ImageError):
            first.result(60)
    assert images.hits["/a.png"] == 1


@pytest.mark.parametrize("what", ["picture", "mask"])
def test_stop_ends_the_tries_of_a_shared_download(what: str, fetcher: Fetcher, images: ImageServer) -> None:
    stop = threading.Event()

    def busy(handler: Handler) -> None:
        stop.set()
        reply(handler, 503, b"try later")

    images.routes["/a.png"] = busy
    references = References(fetcher, max_pixels=100_000, attempts=3, stop=stop)
    with pytest.raises(ServerError) as caught:
        getattr(references, what)(images.url("/a.png"))
    assert cut_short(caught.value, stop, 3)
    assert images.hits["/a.png"] == 1


def test_reference_does_not_wait_for_the_room_of_images_that_wait_for_it(images: ImageServer, network: Network) -> None:
    images.routes["/a.png"] = photo(1)
    settings = FetchSettings.model_validate({"allow_networks": ["127.0.0.0/8"], "total_timeout": 20, "memory": 1000})
    fetcher = Fetcher(settings, FileSettings(), NoS3(network), network)
    assert fetcher.room.try_reserve(1000)
    assert References(fetcher, max_pixels=100_000, attempts=1).picture(images.url("/a.png")).size == (96, 72)
    assert fetcher.room.used == 1000
