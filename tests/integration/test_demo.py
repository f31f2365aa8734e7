"""`imagemill demo` as a process: what it leaves in its folder, with and without a model, and that it leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import psutil
import pytest
from PIL import Image

from imagemill.producer.demo_site import PRIVATE
from tests.conftest import photo
from tests.models import u2net_onnx
from tests.services.images import ImageServer
from tests.services.redis import require_redis
from tests.u2netp import PATH, python_path
from tests.workers import ROOT, clean_environment, wait_until

pytestmark = pytest.mark.integration

CODES = {
    "missing.jpg": "not_found",
    "broken-server.jpg": "server_error",
    "page.jpg": "not_an_image",
    "half.jpg": "truncated",
    "empty.png": "empty_file",
    "bomb.png": "too_many_pixels",
    PRIVATE.rpartition("/")[2]: "forbidden_address",
}


@pytest.fixture(autouse=True, scope="module")
def redis_or_skip() -> None:
    require_redis()


def command(out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "imagemill.producer.cli", "demo", "--out", str(out), *flags]


def environment(out: Path, **settings: str) -> dict[str, str]:
    """Settings of the user's that the demo must ignore, except for an empty weights folder."""
    return clean_environment(
        IMAGEMILL_REDIS_URL="redis://127.0.0.1:1/0",
        IMAGEMILL_WORKER__OPERATIONS='["stylize"]',
        IMAGEMILL_WEIGHTS__FOLDER=str(out.parent / "weights"),
        **settings,
    )


def demo(out: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, *flags), cwd=ROOT, env=environment(out) | settings, capture_output=True, text=True, timeout=120
    )


def alive(folder: Path) -> list[psutil.Process]:
    """Processes that run in the folder or have it on their command line."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or ())]
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


def lines(out: Path, use: str) -> list[dict[str, object]]:
    """The manifest of a job."""
    (manifest,) = out.glob(f"results/{use}/*/manifest.jsonl")
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def result(line: dict[str, object]) -> Path:
    return Path(unquote(str(line["output"]).removeprefix("file://")))


def source(out: Path, line: dict[str, object]) -> Path:
    """The file that the demo served under a URL."""
    return out / unquote(str(line["source"])).partition("?")[0].split("/", 3)[3]


class Pictures(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if (tag, name) == ("img", "src")]


# --- a whole demo, without the model ---


@dataclass
class Demo:
    out: Path
    ended: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo") / "out put"
    return Demo(out, demo(out, "--count", "2", "--offline"))


def test_demo_succeeds_and_names_its_report(finished: Demo) -> None:
    assert finished.ended.returncode == 0, finished.ended.stderr
    assert f"before and after: {finished.out}/report.html" in finished.ended.stdout
    assert "only the 7 bad URLs in each job failed" in finished.ended.stderr
    assert "Traceback" not in (finished.out / "worker.log").read_text()


def test_demo_without_model_explains_in_one_line_how_to_get_it(finished: Demo) -> None:
    (line,) = [line for line in finished.ended.stderr.splitlines() if "u2netp" in line]
    assert line.startswith("cutting out with opencv only")
    assert "`imagemill models pull u2netp`" in line


@pytest.mark.parametrize("use", ["opencv", "inpaint", "stylize"])
def test_only_the_bad_urls_fail_each_with_its_code(use: str, finished: Demo) -> None:
    failed = {str(line["source"]).rpartition("/")[2]: line["code"] for line in lines(finished.out, use) if "code" in line}
    assert failed == CODES


@pytest.mark.parametrize(("use", "count"), [("opencv", 3), ("inpaint", 3), ("stylize", 2)])
def test_every_photo_has_a_result_of_its_size(use: str, count: int, finished: Demo) -> None:
    done = [line for line in lines(finished.out, use) if line["state"] == "done"]
    assert len(done) == count
    for line in done:
        with Image.open(result(line)) as after, Image.open(source(finished.out, line)) as before:
            after.load()
            assert after.size == before.size
            assert after.mode == ("RGBA" if use == "opencv" else "RGB")
            assert after.tobytes() != before.convert(after.mode).tobytes(), "the photo was changed"


def test_report_shows_all_pictures_without_the_server(finished: Demo) -> None:
    sources = Pictures(finished.out / "report.html").sources
    assert len(sources) == 2 * (2 + 3 + 2)  # a duplicate is shown once
    for path in sources:
        with Image.open(finished.out / unquote(path)) as picture:
            picture.load()


def test_nothing_is_left_running(finished: Demo) -> None:
    assert alive(finished.out) == []


# --- with a model ---


def test_model_is_downloaded_and_its_cut_outs_come_first_next_to_opencvs(tmp_path: Path) -> None:
    model = u2net_onnx(tmp_path / "u2netp.onnx").read_bytes()
    path = python_path(model, tmp_path / "catalogue")
    with ImageServer({PATH: model}) as mirror:
        ended = demo(tmp_path / "out", "--count", "1", PYTHONPATH=path, IMAGEMILL_WEIGHTS__MIRROR=mirror.url(""))
    assert ended.returncode == 0, ended.stderr
    first, second, third = Pictures(tmp_path / "out" / "report.html").sources[:3]
    assert first == "photos/flower.jpg"
    assert second.startswith("results/rembg/")
    assert third.startswith("results/opencv/")

    again = demo(tmp_path / "out", "--count", "1", "--offline", "--engine", "rembg", PYTHONPATH=path)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in (tmp_path / "out" / "results").iterdir()} == {"rembg", "inpaint", "stylize"}


def test_required_model_that_is_missing_is_an_error(tmp_path: Path) -> None:
    ended = demo(tmp_path / "out", "--engine", "rembg", "--offline")
    assert ended.returncode != 0
    assert "the engine rembg needs the model u2netp: u2netp is missing" in ended.stderr
    assert "`imagemill models pull u2netp`" in ended.stderr
    assert alive(tmp_path / "out") == []


# --- stopped in the middle ---


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A long demo, in its own process group, as a terminal starts it."""
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command(tmp_path / "out", "--count", "500", "--engine", "opencv"),
            cwd=ROOT,
            env=environment(tmp_path / "out"),
            stdout=log,
            stderr=log,
            process_group=0,
        )
    yield process
    process.kill()
    process.wait()
    for left in alive(tmp_path / "out"):
        left.kill()


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [("starting a Redis", signal.SIGINT, 130), (" images done", signal.SIGINT, 130), (" images done", signal.SIGTERM, 143)],
)
def test_signal_stops_every_process(
    moment: str, number: signal.Signals, status: int, started: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"

    def reached() -> bool:
        assert started.poll() is None, log.read_text()
        return moment in log.read_text()

    wait_until(reached, f"{moment}; the log is {log}")
    os.killpg(started.pid, number)
    assert started.wait(60) == status, log.read_text()
    assert "Traceback" not in log.read_text()
    assert alive(tmp_path / "out") == []


def test_ctrl_c_stops_the_download(tmp_path: Path) -> None:
    with ImageServer() as mirror:
        mirror.routes[PATH] = mirror.hang
        process = subprocess.Popen(
            command(tmp_path / "out"), env=environment(tmp_path / "out", IMAGEMILL_WEIGHTS__MIRROR=mirror.url("")), cwd=ROOT
        )
        assert mirror.stalled.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert alive(tmp_path / "out") == []


# --- own photos and folders ---


def test_own_photos_replace_earlier_results_with_opencv_when_the_mirror_sends_another_file(tmp_path: Path) -> None:
    out, own = tmp_path / "out", tmp_path / "my photos"
    for folder in (own, out / "results" / "stylize"):
        folder.mkdir(parents=True)
    for n, name in enumerate(["a b.jpg", "ü.png"]):
        (own / name).write_bytes(photo(n, kind="JPEG" if n == 0 else "PNG"))
    (out / ".imagemill-demo").touch()
    (out / "results" / "stylize" / "old.png").touch()
    (out / "notes.txt").write_text("mine")
    with ImageServer({PATH: b"another file"}) as mirror:
        ended = demo(out, "--images", str(own), IMAGEMILL_WEIGHTS__MIRROR=mirror.url(""))
        assert mirror.hits[PATH] > 0
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "cutting out with opencv only" in line]
    assert "checksum" in line
    assert Pictures(out / "report.html").sources[1].startswith("results/opencv/")
    assert not (out / "results" / "stylize" / "old.png").exists()
    assert (out / "notes.txt").read_text() == "mine"
    done = [line for line in lines(out, "stylize") if line["state"] == "done"]
    assert [result(line).name for line in done] == ["000000-a b.jpg", "000001-ü.png"]
    assert len(Pictures(out / "report.html").sources) == 2 * (2 + 3 + 2)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(photo(1))
    (tmp_path / "report.html").write_text("mine")
    before = snapshot(tmp_path)
    ended = demo(tmp_path)
    assert ended.returncode == 2
    assert "choose another folder with --out" in ended.stderr
    assert snapshot(tmp_path) == before


def test_folder_without_photos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = demo(tmp_path / "out", "--images", str(tmp_path / "empty"))
    assert ended.returncode == 2
    assert "there are no images in this folder" in ended.stderr
    assert alive(tmp_path / "out") == []
