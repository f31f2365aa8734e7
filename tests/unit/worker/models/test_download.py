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
from imagemill.worker.models.download import pull, url_of
from imagemill.worker.models.files import path_of, record_variant, state, variant
from tests.services.images import Handler, ImageServer, answers, redirect, reply, start_reply
from tests.workers import ROOT, clean_environment, wait_until

DATA = bytes(range(256)) * 8192  # 2 MiB: more than one block
RELEASE = "/danielgatis/rembg/releases/download/v0.0.0/u2net.onnx"
STORED = "/release-assets/1"
PAUSES = (0.0, 0.0, 0.0)


def weights(data: bytes = DATA, **changes: Any) -> Weights:
    """u2net's entry, with the checksum of this content."""
    checksum = f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
    return Weights(**{**vars(WEIGHTS[0]), "checksum": checksum, "about_bytes": len(data), **changes})


@pytest.fixture
def settings(tmp_path: Path, images: ImageServer) -> WeightsSettings:
    """A folder, and a mirror like the real server: a release's URL redirects to a file store that supports ranges."""
    images.routes[RELEASE] = redirect(STORED)
    images.routes[STORED] = Store()
    return WeightsSettings(folder=tmp_path / "weights", mirror=images.url(""))


class Store:
    """A route that serves a file with ranges; `cut` gives the bytes after which each answer in turn breaks off."""

    def __init__(self, data: bytes = DATA, *, cut: tuple[int, ...] = (), ranges: bool = True) -> None:
        self.data, self.cut, self.ranges = data, list(cut), ranges
        self.ranges_asked: list[str | None] = []

    def __call__(self, handler: Handler) -> None:
        self.ranges_asked.append(handler.headers.get("Range"))
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        fits = self.ranges and start
        if fits and start >= len(self.data):
            reply(handler, 416, b"")
            return
        body = self.data[start:] if fits else self.data
        headers = {"Content-Length": str(len(body))}
        if fits:
            headers["Content-Range"] = f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"
        start_reply(handler, 206 if fits else 200, headers)
        cut = self.cut.pop(0) if self.cut else len(body)
        handler.wfile.write(body[:cut])
        handler.close_connection = True


def part_of(settings: WeightsSettings) -> Path:
    path = path_of(settings.folder, WEIGHTS[0])
    return path.with_name(f"{path.name}.part")


def visible_files(settings: WeightsSettings) -> set[str]:
    """The visible files in rembg's folder."""
    return {path.name for path in (settings.folder / "rembg").iterdir() if not path.name.startswith(".")}


def test_pull_follows_a_redirect_and_reports_progress(settings: WeightsSettings, images: ImageServer) -> None:
    progress: list[tuple[int, int | None]] = []
    assert pull(weights(), settings, lambda *now: progress.append(now)) == "pulled"
    assert path_of(settings.folder, weights()).read_bytes() == DATA
    assert state(settings.folder, weights()) == "there"
    assert progress[0] == (0, len(DATA))
    assert progress[-1] == (len(DATA), len(DATA))
    assert len(progress) > 2
    assert visible_files(settings) == {"u2net.onnx", "u2net.onnx.sums.json"}


def test_second_pull_sends_no_request(settings: WeightsSettings, images: ImageServer) -> None:
    pull(weights(), settings)
    assert pull(weights(), settings) == "present"
    assert images.hits == {RELEASE: 1, STORED: 1}


def test_pull_keeps_a_correct_file_from_elsewhere_and_replaces_a_wrong_one(
    settings: WeightsSettings, images: ImageServer
) -> None:
    path = path_of(settings.folder, weights())
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert pull(weights(), settings) == "present"
    assert not images.hits
    path.write_bytes(DATA[:-1])
    assert pull(weights(), settings) == "pulled"
    assert path.read_bytes() == DATA


def test_file_with_a_wrong_checksum_is_deleted(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(DATA[::-1])
    with pytest.raises(ConfigurationError, match=r"its checksum is md5:.*, not md5:"):
        pull(weights(), settings, pauses=PAUSES)
    assert visible_files(settings) == set()


def test_pull_resumes_after_a_broken_connection(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = store = Store(cut=(1_500_000, 100_000))
    assert pull(weights(), settings, pauses=PAUSES) == "pulled"
    assert store.ranges_asked == [None, "bytes=1500000-", "bytes=1600000-"]
    assert path_of(settings.folder, weights()).read_bytes() == DATA


def test_next_pull_resumes_an_interrupted_one(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(cut=(1_500_000,))
    with pytest.raises(ServiceUnavailable, match="2 MB so far are kept"):
        pull(weights(), settings, pauses=())
    assert state(settings.folder, weights()) == "missing"
    images.routes[STORED] = store = Store()
    assert pull(weights(), settings) == "pulled"
    assert store.ranges_asked == ["bytes=1500000-"]
    assert path_of(settings.folder, weights()).read_bytes() == DATA


@pytest.mark.parametrize(("ranges", "asked"), [(True, ["bytes=1000000-", None]), (False, ["bytes=1000000-"])])
def test_pull_starts_again_when_the_part_is_of_another_version_or_cannot_be_resumed(
    settings: WeightsSettings, images: ImageServer, ranges: bool, asked: list[str | None]
) -> None:
    images.routes[STORED] = Store(DATA[::-1], cut=(1_000_000,))
    with pytest.raises(ServiceUnavailable):
        pull(weights(), settings, pauses=())
    images.routes[STORED] = store = Store(ranges=ranges)
    assert pull(weights(), settings) == "pulled"
    assert store.ranges_asked == asked
    assert path_of(settings.folder, weights()).read_bytes() == DATA


def test_pull_starts_again_when_the_server_sends_the_wrong_range(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(cut=(1_000_000,))
    with pytest.raises(ServiceUnavailable):
        pull(weights(), settings, pauses=())
    whole = Store()

    def careless(handler: Handler) -> None:
        if handler.headers.get("Range"):
            span = f"bytes 999999-{len(DATA) - 1}/{len(DATA)}"
            reply(handler, 206, DATA[999_999:], headers={"Content-Range": span})
        else:
            whole(handler)

    images.routes[STORED] = careless
    assert pull(weights(), settings, pauses=PAUSES) == "pulled"
    assert whole.ranges_asked == [None]
    assert path_of(settings.folder, weights()).read_bytes() == DATA


def test_resumed_file_with_a_wrong_checksum_is_downloaded_once_more(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = store = Store(DATA[::-1], cut=(1_000_000,))
    with pytest.raises(ConfigurationError, match="is not the published file and was deleted"):
        pull(weights(), settings, pauses=PAUSES)
    assert store.ranges_asked == [None, "bytes=1000000-", None]
    assert visible_files(settings) == set()


def test_complete_part_is_published_without_a_request(settings: WeightsSettings, images: ImageServer) -> None:
    images.routes[STORED] = Store(DATA + b"more", cut=(len(DATA),))
    with pytest.raises(ServiceUnavailable):
        pull(weights(), settings, pauses=())
    images.hits.clear()
    assert pull(weights(), settings) == "pulled"
    assert not images.hits


@pytest.mark.parametrize(
    ("route", "error", "message"),
    [
        (answers(404), ConfigurationError, "answers 404"),
        (answers(503), ServiceUnavailable, "answers 503"),
        (redirect("ftp://127.0.0.1/file"), ConfigurationError, "is not http"),
        (
            lambda handler: start_reply(handler, 200, {"Content-Length": str(9 * 2**40)}),
            ConfigurationError,
            "more than any model",
        ),
    ],
    ids=["missing", "overloaded", "scheme", "too large"],
)
def test_error_answers_are_translated(
    settings: WeightsSettings, images: ImageServer, route: Callable[[Handler], None], error: type[ImagemillError], message: str
) -> None:
    images.routes[STORED] = route
    with pytest.raises(error, match=message):
        pull(weights(), settings, pauses=PAUSES)
    assert not path_of(settings.folder, weights()).exists()


def test_pull_retries_when_the_server_is_overloaded(settings: WeightsSettings, images: ImageServer) -> None:
    fails, store = iter([True, True, True, False]), Store()
    images.routes[STORED] = lambda handler: reply(handler, 503, b"") if next(fails) else store(handler)
    assert pull(weights(), settings, pauses=PAUSES) == "pulled"


def test_refused_connection_is_service_unavailable(tmp_path: Path) -> None:
    with ImageServer() as stopped:
        mirror = stopped.url("")
    with pytest.raises(ServiceUnavailable, match="refused"):
        pull(weights(), WeightsSettings(folder=tmp_path, mirror=mirror), pauses=())


def test_redirect_from_https_to_http_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not https"):
        module._Redirects().redirect_request(
            module.urllib.request.Request("https://one.example/a"), None, 302, "Found", {}, "http://two.example/a"
        )


def test_full_disk_is_an_error_before_anything_is_written(settings: WeightsSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ConfigurationError, match=r"1 MB free and u2net.onnx needs 69 MB: .*IMAGEMILL_WEIGHTS__FOLDER"):
        pull(weights(), settings)
    assert not part_of(settings).exists()


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="can't be written"):
        pull(weights(), WeightsSettings(folder=tmp_path / "file", mirror="http://127.0.0.1:1"))


def test_concurrent_pulls_download_a_file_once(settings: WeightsSettings, images: ImageServer) -> None:
    proceed, waiting, store = threading.Event(), threading.Semaphore(0), Store()

    def slow(handler: Handler) -> None:
        assert proceed.wait(60)
        store(handler)

    images.routes[STORED] = slow
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(pull, weights(), settings, waiting=waiting.release) for _ in range(3)]
        for _ in range(2):
            assert waiting.acquire(timeout=60)
        proceed.set()
        assert sorted(pulls.result(60) for pulls in running) == ["present", "present", "pulled"]
    assert store.ranges_asked == [None]


PULL_AND_DIE = """
import os, sys
from tests.unit.worker.models.test_download import WeightsSettings, Path, pull, weights
settings = WeightsSettings(folder=Path(sys.argv[1]), mirror=sys.argv[2])
pull(weights(), settings, lambda size, total: size > 1_000_000 and os._exit(9))
"""


def test_killed_pull_leaves_neither_a_lock_nor_a_wrong_file(settings: WeightsSettings, images: ImageServer) -> None:
    command = [sys.executable, "-c", PULL_AND_DIE, str(settings.folder), str(settings.mirror)]
    done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    assert state(settings.folder, weights()) == "missing"
    assert pull(weights(), settings) == "pulled"
    assert path_of(settings.folder, weights()).read_bytes() == DATA


PULL_OR_WAIT = PULL_AND_DIE.replace("os._exit(9)", "False").replace(
    "False)", "False, waiting=lambda: print('waits', flush=True))"
)


def test_eight_processes_that_pull_into_one_folder_at_once_download_the_file_once(
    settings: WeightsSettings, images: ImageServer
) -> None:
    """As eight hosts do that start with a shared folder."""
    proceed, store = threading.Event(), Store()

    def slow(handler: Handler) -> None:
        assert proceed.wait(60)
        store(handler)

    images.routes[STORED] = slow
    command = [sys.executable, "-c", PULL_OR_WAIT, str(settings.folder), str(settings.mirror)]
    pulls = [
        subprocess.Popen(command, env=clean_environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        lines = [pool.submit(process.stdout.readline) for process in pulls if process.stdout]
        wait_until(lambda: sum(line.done() for line in lines) == 7, "seven wait for the eighth")
        proceed.set()
    for process in pulls:
        assert (process.wait(60), process.communicate()[1]) == (0, "")
    assert store.ranges_asked == [None]
    assert path_of(settings.folder, weights()).read_bytes() == DATA


def test_new_original_removes_the_variants_of_the_old_one(settings: WeightsSettings) -> None:
    path = path_of(settings.folder, weights())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    variant(path, "int8").write_bytes(b"made")
    record_variant(path, "int8", accepted=True, details={})
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
def test_mirror_serves_files_under_their_own_paths(mirror: str | None, expected: str) -> None:
    assert url_of(WEIGHTS[0], WeightsSettings(mirror=mirror)) == expected


@pytest.mark.parametrize("mirror", ["mirror.example", "file:///srv/models", "https://"])
def test_mirror_must_be_an_http_url(mirror: str) -> None:
    with pytest.raises(ConfigurationError, match="IMAGEMILL_WEIGHTS__MIRROR"):
        url_of(WEIGHTS[0], WeightsSettings(mirror=mirror))
