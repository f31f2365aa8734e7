from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imagemill.shared.errors import ConfigurationError, ImagemillError, ServiceUnavailable
from imagemill.shared.settings import WeightsSettings
from imagemill.worker.models import download as module
from imagemill.worker.models.catalogue import WEIGHTS, Weights
from imagemill.worker.models.download import address, pull
from imagemill.worker.models.files import path_of, put_on_record, state, variant
from tests.services.images import Handler, ImageServer, answers, redirect, reply, start_reply
from tests.workers import ROOT, clean_environment

DATA = bytes(range(256)) * 8192  # 2 MiB: more than one block
RELEASE = "/danielgatis/rembg/releases/download/v0.0.0/u2net.onnx"
STORED = "/release-assets/1"
PAUSES = (0.0, 0.0, 0.0)


def weights(data: bytes = DATA, **changes: Any) -> Weights:
    """u2net's row, but of this content."""
    checksum = f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
    return Weights(**{**vars(WEIGHTS[0]), "checksum": checksum, "about_bytes": len(data), **changes})


@pytest.fixture
def settings(tmp_path: Path, images: ImageServer) -> WeightsSettings:
    """A folder, and a mirror with the real layout: a release's address redirects to a store that knows ranges."""
    images.routes[RELEASE] = redirect(STORED)
    images.routes[STORED] = Store()
    return WeightsSettings(folder=tmp_path / "weights", mirror=images.url(""))


class Store:
    """A route that serves a file with ETag and ranges; `cut` is after how many bytes each answer breaks off, in turn."""

    def __init__(self, data: bytes = DATA, *, cut: tuple[int, ...] = (), tag: str = '"1"', ranges: bool = True) -> None:
        self.data, self.cut, self.tag, self.ranges = data, list(cut), tag, ranges
        self.asked: list[str | None] = []

    def __call__(self, handler: Handler) -> None:
        self.asked.append(handler.headers.get("Range"))
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        fits = self.ranges and start and handler.headers.get("If-Range") == self.tag
        if fits and start >= len(self.data):
            reply(handler, 416, b"")
            return
        body = self.data[start:] if fits else self.data
        headers = {"Content-Length": str(len(body)), "ETag": self.tag}
        if fits:
            headers["Content-Range"] = f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"
        start_reply(handler, 206 if fits else 200, headers)
        cut = self.cut.pop(0) if self.cut else len(body)
        handler.wfile.write(body[:cut])
        handler.close_connection = True


def part_of(settings: WeightsSettings) -> Path:
    path = path_of(WEIGHTS[0], settings)
    return path.with_name(f"{path.name}.part")


def left_in(settings: WeightsSettings) -> set[str]:
    """The visible files in the models' folder."""
    return {path.name for path in (settings.folder / "rembg").iterdir() if not path.name.startswith(".")}


def test_a_model_is_fetched_through_a_redirect_and_told_of_while_it_comes(
    settings: WeightsSettings, images: ImageServer
) -> None:
    told: list[tuple[int, int | None]] = []
    assert pull(weights(), settings, lambda *now: told.append(now)) == "pulled"
    assert path_of(weights(), settings).read_bytes() == DATA
    assert state(weights(), settings) == "there"
    assert told[0] == (0, len(DATA))
    assert told[-1] == (len(DATA), len(DATA))
    assert len(told) > 2
    assert left_in(settings) == {"u2net.onnx", "u2net.onnx.sums.json"}


def test_a_second_pull_asks_nobody(settings: WeightsSettings, images: ImageServer) -> None:
    pull(weights(), settings)
    assert pull(weights(), settings) == "there"
    assert images.hits == {RELEASE: 1, STORED: 1}


def test_a_right_file_that_somebody_put_there_is_taken_and_a_wrong_one_replaced(
    settings: WeightsSettings, images: ImageServer
) -> None:
    path = path_of(weights(), settings)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert pull(weights(), settings) == "there"
    assert not images.hits
    path.write_bytes(DATA[:-1])
    assert pull(weights(), settings) == "pulled"
    assert path.read_bytes() == DATA


def test_a_wrong_file_is_refused_and_removed(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(DATA[::-1])
    with pytest.raises(ConfigurationError, match=r"its checksum is md5:.*, not md5:"):
        pull(weights(), settings, pauses=PAUSES)
    assert left_in(settings) == set()


def test_a_broken_connection_is_taken_up_where_it_broke(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = store = Store(cut=(1_500_000, 100_000))
    assert pull(weights(), settings, pauses=PAUSES) == "pulled"
    assert store.asked == [None, "bytes=1500000-", "bytes=1600000-"]
    assert path_of(weights(), settings).read_bytes() == DATA


def test_the_next_pull_goes_on_from_what_an_interrupted_one_left(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(cut=(1_500_000,))
    with pytest.raises(ServiceUnavailable, match="2 MB are kept"):
        pull(weights(), settings, pauses=())
    assert state(weights(), settings) == "missing"
    images.routes[STORED] = store = Store()
    assert pull(weights(), settings) == "pulled"
    assert store.asked == ["bytes=1500000-"]
    assert path_of(weights(), settings).read_bytes() == DATA


@pytest.mark.parametrize(
    ("now", "then"),
    [
        (Store(), Store(tag='"2"')),  # the file has changed meanwhile
        (Store(tag='W/"1"'), Store(tag='W/"1"')),  # a weak tag says nothing about single bytes
        (Store(), Store(ranges=False)),
    ],
    ids=["changed", "weak", "no-ranges"],
)
def test_what_does_not_fit_the_part_that_is_here_starts_anew(
    settings: WeightsSettings, images: ImageServer, now: Store, then: Store
) -> None:
    now.data, now.cut = DATA[::-1], [1_000_000]
    images.routes[STORED] = now
    with pytest.raises(ServiceUnavailable):
        pull(weights(), settings, pauses=())
    images.routes[STORED] = then
    assert pull(weights(), settings) == "pulled"
    assert path_of(weights(), settings).read_bytes() == DATA


@pytest.mark.parametrize(
    ("start", "tag"), [(1_000_000, '"2"'), (999_999, '"1"')], ids=["another version", "another part than asked for"]
)
def test_a_server_that_gives_a_part_that_does_not_fit_is_not_believed(
    settings: WeightsSettings, images: ImageServer, start: int, tag: str
) -> None:
    images.routes[STORED] = Store(cut=(1_000_000,))
    with pytest.raises(ServiceUnavailable):
        pull(weights(), settings, pauses=())
    whole = Store()

    def careless(handler: Handler) -> None:
        if handler.headers.get("Range"):
            span = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
            reply(handler, 206, DATA[start:], headers={"Content-Range": span, "ETag": tag})
        else:
            whole(handler)

    images.routes[STORED] = careless
    assert pull(weights(), settings, pauses=PAUSES) == "pulled"
    assert whole.asked == [None]
    assert path_of(weights(), settings).read_bytes() == DATA


def test_a_part_from_another_address_is_not_mixed_in(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(DATA[::-1], cut=(1_000_000,))
    with pytest.raises(ServiceUnavailable):
        pull(weights(), settings, pauses=())
    images.routes[STORED] = store = Store()
    other = settings.model_copy(update={"mirror": images.url("", host="localhost")})
    assert pull(weights(), other) == "pulled"
    assert store.asked == [None]


def test_a_file_that_is_all_here_but_for_its_name_is_not_fetched_again(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(DATA + b"more", cut=(len(DATA),))
    with pytest.raises(ServiceUnavailable):
        pull(weights(), settings, pauses=())
    images.hits.clear()
    assert pull(weights(), settings) == "pulled"
    assert not images.hits


@pytest.mark.parametrize(
    ("route", "error", "told"),
    [
        (answers(404), ConfigurationError, "answers 404"),
        (answers(503), ServiceUnavailable, "answers 503"),
        (redirect("ftp://127.0.0.1/file"), ConfigurationError, "is not http"),
        (lambda handler: start_reply(handler, 200, {"Content-Length": str(9 * 2**40)}), ConfigurationError, "no model's file"),
    ],
    ids=["missing", "overloaded", "scheme", "too large"],
)
def test_what_a_server_can_say_instead(
    settings: WeightsSettings, images: ImageServer, route: Callable[[Handler], None], error: type[ImagemillError], told: str
) -> None:
    images.routes[STORED] = route
    with pytest.raises(error, match=told):
        pull(weights(), settings, pauses=PAUSES)
    assert not path_of(weights(), settings).exists()


def test_an_overloaded_server_is_asked_again(settings: WeightsSettings, images: ImageServer) -> None:
    fails, store = iter([True, True, True, False]), Store()
    images.routes[STORED] = lambda handler: reply(handler, 503, b"") if next(fails) else store(handler)
    assert pull(weights(), settings, pauses=PAUSES) == "pulled"


def test_nobody_listening_is_a_service_that_is_not_there(tmp_path: Path) -> None:
    with ImageServer() as gone:
        mirror = gone.url("")
    with pytest.raises(ServiceUnavailable, match="refused"):
        pull(weights(), WeightsSettings(folder=tmp_path, mirror=mirror), pauses=())


def test_tls_is_not_given_up_on_the_way() -> None:
    with pytest.raises(ConfigurationError, match="not https"):
        module._Redirects().redirect_request(
            module.urllib.request.Request("https://one.example/a"), None, 302, "Found", {}, "http://two.example/a"
        )


def test_a_disk_that_is_full_is_told_before_anything_is_written(
    settings: WeightsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ConfigurationError, match=r"1 MB free and u2net.onnx needs 69 MB: .*IMAGEMILL_WEIGHTS__FOLDER"):
        pull(weights(), settings)
    assert not part_of(settings).exists()


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="can't be written"):
        pull(weights(), WeightsSettings(folder=tmp_path / "file", mirror="http://127.0.0.1:1"))


def test_threads_that_pull_the_same_file_download_it_once(settings: WeightsSettings, images: ImageServer) -> None:
    go, waits, store = threading.Event(), threading.Semaphore(0), Store()

    def slow(handler: Handler) -> None:
        assert go.wait(60)
        store(handler)

    images.routes[STORED] = slow
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(pull, weights(), settings, waiting=waits.release) for _ in range(3)]
        for _ in range(2):
            assert waits.acquire(timeout=60)  # two of them have said that they wait
        go.set()
        assert sorted(one.result(60) for one in running) == ["pulled", "there", "there"]
    assert store.asked == [None]


PULL_AND_DIE = """
import os, sys
from tests.unit.worker.models.test_download import WeightsSettings, Path, pull, weights
settings = WeightsSettings(folder=Path(sys.argv[1]), mirror=sys.argv[2])
pull(weights(), settings, lambda size, total: size > 1_000_000 and os._exit(9))
"""


def test_a_killed_pull_leaves_neither_a_lock_nor_a_wrong_file(settings: WeightsSettings, images: ImageServer) -> None:
    command = [sys.executable, "-c", PULL_AND_DIE, str(settings.folder), str(settings.mirror)]
    done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    assert state(weights(), settings) == "missing"
    assert pull(weights(), settings) == "pulled"
    assert path_of(weights(), settings).read_bytes() == DATA


def test_a_new_original_takes_what_was_made_of_the_old_one_away(settings: WeightsSettings) -> None:
    path = path_of(weights(), settings)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    variant(path, "int8").write_bytes(b"made")
    put_on_record(path, "int8", accepted=True, told={})
    pull(weights(), settings)
    assert not variant(path, "int8").exists()


@pytest.mark.parametrize(
    ("mirror", "expected"),
    [
        (None, WEIGHTS[0].url),
        ("http://mirror.example:8080", f"http://mirror.example:8080{RELEASE}"),
        ("https://mirror.example/models/", f"https://mirror.example/models{RELEASE}"),
    ],
)
def test_a_mirror_has_the_files_under_their_own_paths(mirror: str | None, expected: str) -> None:
    assert address(WEIGHTS[0], WeightsSettings(mirror=mirror)) == expected


@pytest.mark.parametrize("mirror", ["mirror.example", "file:///srv/models", "https://"])
def test_a_mirror_is_an_http_address(mirror: str) -> None:
    with pytest.raises(ConfigurationError, match="IMAGEMILL_WEIGHTS__MIRROR"):
        address(WEIGHTS[0], WeightsSettings(mirror=mirror))
