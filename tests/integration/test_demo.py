"""`imagemill demo` from outside: what it leaves in its folder, and that it leaves nothing running."""

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
from tests.services.redis import require_redis
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
OPERATIONS = ("inpaint", "remove-background", "stylize")


@pytest.fixture(autouse=True, scope="module")
def redis_or_skip() -> None:
    require_redis()


def command(out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "imagemill.producer.cli", "demo", "--out", str(out), *flags]


def environment() -> dict[str, str]:
    """With settings of the user's own, of which the demo must make no use."""
    return clean_environment(IMAGEMILL_REDIS_URL="redis://127.0.0.1:1/0", IMAGEMILL_WORKER__OPERATIONS='["stylize"]')


def demo(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def alive(folder: Path) -> list[psutil.Process]:
    """Processes that work in the folder or were told of it."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or ())]
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


def lines(out: Path, operation: str) -> list[dict[str, object]]:
    """The manifest of an operation's job."""
    (manifest,) = out.glob(f"results/{operation}/*/manifest.jsonl")
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def result(line: dict[str, object]) -> Path:
    return Path(unquote(str(line["output"]).removeprefix("file://")))


def sources_beside(out: Path, line: dict[str, object]) -> Path:
    """The file that the demo served under an address."""
    return out / unquote(str(line["source"])).partition("?")[0].split("/", 3)[3]


class Pictures(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if (tag, name) == ("img", "src")]


# --- a whole demo ---


@dataclass
class Demo:
    out: Path
    ended: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo") / "out put"
    return Demo(out, demo(out, "--count", "2"))


def test_it_succeeds_and_says_where_to_look(finished: Demo) -> None:
    assert finished.ended.returncode == 0, finished.ended.stderr
    assert f"before and after: {finished.out}/report.html" in finished.ended.stdout
    assert "only the 7 bad addresses per job failed" in finished.ended.stderr
    assert "Traceback" not in (finished.out / "worker.log").read_text()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_the_bad_addresses_failed_each_with_its_code(operation: str, finished: Demo) -> None:
    failed = {str(line["source"]).rpartition("/")[2]: line["code"] for line in lines(finished.out, operation) if "code" in line}
    assert failed == CODES


@pytest.mark.parametrize(("operation", "count"), [("inpaint", 3), ("remove-background", 3), ("stylize", 2)])
def test_every_photo_has_a_result_of_its_size(operation: str, count: int, finished: Demo) -> None:
    done = [line for line in lines(finished.out, operation) if line["state"] == "done"]
    assert len(done) == count
    for line in done:
        with Image.open(result(line)) as after, Image.open(sources_beside(finished.out, line)) as before:
            after.load()
            assert after.size == before.size
            assert after.mode == ("RGBA" if operation == "remove-background" else "RGB")
            assert after.tobytes() != before.convert(after.mode).tobytes(), "something was done"


def test_the_report_shows_them_without_the_server(finished: Demo) -> None:
    sources = Pictures(finished.out / "report.html").sources
    assert len(sources) == 2 * (3 + 2 + 2)  # a duplicate is shown once
    for source in sources:
        with Image.open(finished.out / unquote(source)) as picture:
            picture.load()


def test_nothing_is_left_running(finished: Demo) -> None:
    assert alive(finished.out) == []


# --- stopped in the middle ---


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A long demo, in a process group of its own, as a terminal starts it."""
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            command(tmp_path / "out", "--count", "500"), cwd=ROOT, env=environment(), stdout=said, stderr=said, process_group=0
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
def test_ctrl_c_ends_everything(
    moment: str, number: signal.Signals, status: int, started: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    said = tmp_path / "said"

    def reached() -> bool:
        assert started.poll() is None, said.read_text()
        return moment in said.read_text()

    wait_until(reached, f"{moment}; what it said is in {said}")
    os.killpg(started.pid, number)
    assert started.wait(60) == status, said.read_text()
    assert "Traceback" not in said.read_text()
    assert alive(tmp_path / "out") == []


# --- photos and folders of one's own ---


def test_photos_of_ones_own_in_the_folder_of_an_earlier_demo(tmp_path: Path) -> None:
    out, own = tmp_path / "out", tmp_path / "my photos"
    for folder in (own, out / "results" / "stylize"):
        folder.mkdir(parents=True)
    for n, name in enumerate(["a b.jpg", "ü.png"]):
        (own / name).write_bytes(photo(n, kind="JPEG" if n == 0 else "PNG"))
    (out / ".imagemill-demo").touch()
    (out / "results" / "stylize" / "old.png").touch()
    (out / "notes.txt").write_text("mine")
    ended = demo(out, "--images", str(own))
    assert ended.returncode == 0, ended.stderr
    assert not (out / "results" / "stylize" / "old.png").exists()
    assert (out / "notes.txt").read_text() == "mine"
    done = [line for line in lines(out, "stylize") if line["state"] == "done"]
    assert [result(line).name for line in done] == ["000000-a b.jpg", "000001-ü.png"]
    assert len(Pictures(out / "report.html").sources) == 2 * (3 + 2 + 2)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_other_things_in_it_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(photo(1))
    (tmp_path / "report.html").write_text("mine")
    before = snapshot(tmp_path)
    ended = demo(tmp_path)
    assert ended.returncode == 2
    assert "is not empty and no demo's folder: name another one with --out" in ended.stderr
    assert snapshot(tmp_path) == before


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = demo(tmp_path / "out", "--images", str(tmp_path / "empty"))
    assert ended.returncode == 2
    assert "there are no images in this folder" in ended.stderr
    assert alive(tmp_path / "out") == []
