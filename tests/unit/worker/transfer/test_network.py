"""Hundreds of transfers in one thread, whatever goes wrong with one of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import resource
import threading
from typing import Any, NoReturn

import pytest

from imagemill.shared import errors
from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import OPEN_FILES, Network, allow_open_files
from tests.services.images import ImageServer, answers
from tests.stores import NoS3
from tests.unit.worker.transfer.peer import Answer, Peer, Request
from tests.unit.worker.transfer.samples import LOOPBACK, PNG, MakeFetcher, got
from tests.workers import wait_until

MANY = 300


def test_hundreds_of_downloads_run_at_once_in_one_thread(make: MakeFetcher, network: Network) -> None:
    all_here, threads = asyncio.Event(), list[int]()

    async def together(_: Request) -> Answer:
        if peer.running == MANY:
            threads.append(threading.active_count())
            all_here.set()
        await all_here.wait()
        return Answer(body=PNG)

    fetcher = make(**LOOPBACK, total_timeout=60)
    with Peer(network, together) as peer:
        before = threading.active_count()
        running = [network.start(fetcher.fetch(f"{peer.url}/{n}.png")) for n in range(MANY)]
        assert all(one.result(60).data == PNG for one in running)
    assert threads == [before]


def test_cancelled_download_is_ended_and_gives_back_its_room(make: MakeFetcher, images: ImageServer, network: Network) -> None:
    images.routes |= {"/slow.png": images.trickle(PNG * 100), "/a.png": PNG}
    fetcher = make(**LOOPBACK)
    running = network.start(fetcher.fetch(images.url("/slow.png")))
    wait_until(lambda: fetcher.room.used, "the body has begun")
    running.cancel()
    wait_until(lambda: not fetcher.room.used, "its room is free")
    assert got(fetcher, images.url("/a.png")).data == PNG
    with pytest.raises(concurrent.futures.CancelledError):
        running.result(60)


async def bug() -> NoReturn:
    raise ZeroDivisionError


async def leave() -> NoReturn:
    raise SystemExit


def test_loop_goes_on_after_any_error(
    make: MakeFetcher, images: ImageServer, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    images.routes["/a.png"] = PNG
    with pytest.raises(ZeroDivisionError):
        network.call(bug())
    with pytest.raises(SystemExit):
        network.start(leave()).result(60)
    network.start(asyncio.sleep(0), lambda _: 1 // 0).result(60)
    network.loop.call_soon_threadsafe(lambda: 1 // 0)
    assert got(make(**LOOPBACK), images.url("/a.png")).data == PNG
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3


def test_transfers_go_on_after_sockets_could_not_be_watched(
    make: MakeFetcher, images: ImageServer, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.routes |= {"/a.png": PNG, "/hang.png": images.hang}
    fetcher = make(**LOOPBACK)
    hanging = network.start(fetcher.fetch(images.url("/hang.png")))
    assert images.stalled.wait(60)

    class Full:
        """No other socket can be watched any more; the first one may still be on the way from sending to waiting."""

        def register(self, *_: Any) -> NoReturn:
            raise OSError(28, "no space for another watch")

        def poll(self, _: float) -> list[Any]:
            return []

        modify = unregister = close = lambda *_: None

    monkeypatch.setattr(network._multi, "_sockets", Full())
    with pytest.raises(errors.Unreachable):
        got(fetcher, images.url("/a.png"))
    with pytest.raises(errors.Unreachable):
        hanging.result(60)
    assert got(fetcher, images.url("/a.png")).data == PNG


def test_close_ends_what_is_running(images: ImageServer) -> None:
    network = Network()
    fetcher = Fetcher(FetchSettings.model_validate(LOOPBACK), FileSettings(), NoS3(network), network)
    images.routes["/hang.png"] = images.hang
    running = [network.start(fetcher.fetch(images.url("/hang.png"))), network.start(asyncio.sleep(3600))]
    assert images.stalled.wait(60)
    network.close()
    network.close()
    assert all(one.cancelled() for one in running)


def test_open_connection_is_used_again_after_an_error_status(make: MakeFetcher, images: ImageServer) -> None:
    images.routes |= {"/a.png": PNG, "/b.png": answers(503)}
    fetcher = make(**LOOPBACK)
    for _ in range(3):
        got(fetcher, images.url("/a.png"))
        with pytest.raises(errors.ServerError):
            got(fetcher, images.url("/b.png"))
    assert images.connections == 1


def test_process_may_open_more_files_than_the_usual_soft_limit() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        allow_open_files()
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised == (min(OPEN_FILES, limits[1]) if limits[1] != resource.RLIM_INFINITY else OPEN_FILES, limits[1])
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == raised
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
