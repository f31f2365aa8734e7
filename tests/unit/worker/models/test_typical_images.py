from __future__ import annotations

from pathlib import Path

import pytest

from imagemill.shared.errors import UsageError
from imagemill.worker.models import typical_images
from imagemill.worker.models.typical_images import MOST, divide
from tests.conftest import photo


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven photos in nested folders, a duplicate, and a file that is not an image."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for seed in range(7):
        (folder / ("deeper" if seed % 2 else "") / f"{seed}.png").write_bytes(photo(seed, 16, 16))
    (folder / "again.png").write_bytes(photo(0, 16, 16))
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_divide_is_reproducible_and_puts_no_image_on_both_sides(images: Path) -> None:
    calibration, held_back, passed_over = divide(images)
    assert (len(calibration), len(held_back), passed_over) == (5, 2, 2)
    assert len({path.read_bytes() for path in calibration + held_back}) == 7
    assert divide(images) == (calibration, held_back, passed_over)
    moved = images.rename(images.with_name("elsewhere"))
    assert [path.name for path in divide(moved)[1]] == [path.name for path in held_back]


def test_divide_skips_what_is_truncated_or_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typical_images, "MAX_BYTES", 100_000)
    for seed in range(6):
        data = photo(seed, kind="JPEG")
        (tmp_path / f"{seed}.jpg").write_bytes(data if seed else data[: len(data) // 2])
    (tmp_path / "film.mov").write_bytes(bytes(100_001))
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "empty.jpg").touch()
    calibration, held_back, passed_over = divide(tmp_path)
    assert (len(calibration), len(held_back), passed_over) == (3, 2, 3)
    assert {path.name for path in calibration + held_back} == {f"{seed}.jpg" for seed in range(1, 6)}


def test_divide_reads_no_more_files_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(MOST + 10):
        (tmp_path / f"{seed}.png").write_bytes(photo(seed, 16, 16))
    read = list[Path]()
    monkeypatch.setattr(typical_images, "_read", lambda path: read.append(path) or path.read_bytes())
    calibration, held_back, passed_over = divide(tmp_path)
    assert (len(calibration), len(held_back), passed_over) == (MOST - MOST // 3, MOST // 3, 10)
    assert len(read) == MOST


@pytest.mark.parametrize(
    ("files", "has"),
    [
        ({}, "none"),
        ({"1.png": photo(1, 16, 16), "2.png": photo(2, 16, 16)}, "2"),
        ({f"{number}.png": photo(1, 16, 16) for number in range(9)}, "1"),
        (
            {"1.png": photo(1, 16, 16), "a.txt": b"text"},
            "1; files that can't be used: 1, such as a.txt: the file is text",
        ),
    ],
    ids=["empty", "few", "the same", "not an image"],
)
def test_divide_refuses_too_few_images(tmp_path: Path, files: dict[str, bytes], has: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as refused:
        divide(tmp_path)
    assert (
        refused.value.message.partition("; supported")[0]
        == f"at least 5 different images are needed, and 30 are better: {tmp_path} has {has}"
    )
