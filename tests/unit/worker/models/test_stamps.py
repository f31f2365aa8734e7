"""What tells that a model's files have changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imagemill.worker.models.stamps import size, stamp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.v1").mkdir()
    (tmp_path / "net.onnx").write_bytes(b"12345")
    (tmp_path / "net" / "unet").mkdir(parents=True)
    (tmp_path / "net" / "unet" / "weights.safetensors").write_bytes(b"123")
    return tmp_path


def replace(path: Path) -> None:
    """As a download does it, with the same size and time."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "net.onnx").write_bytes(b"123"),
        lambda folder: (folder / "net.onnx").unlink(),
        lambda folder: os.utime(folder / "net.onnx"),
        lambda folder: replace(folder / "net.onnx"),
        lambda folder: (folder / "net.int8.onnx").touch(),
        lambda folder: (folder / "net" / "unet" / "config.json").touch(),
        lambda folder: (folder / "net" / "unet" / "weights.safetensors").write_bytes(b"1"),
    ],
    ids=["size", "gone", "time", "replaced", "another version", "another part", "part"],
)
def test_every_change_of_a_models_files_is_seen(change: Callable[[Path], object], folder: Path) -> None:
    before = stamp(folder, "net")
    assert stamp(folder, "net") == before
    change(folder)
    assert stamp(folder, "net") != before


@pytest.mark.parametrize("other", ["network.onnx", "net.onnx.sums.json", ".net.onnx", "net/.part", "net/a.sums.json"])
def test_other_files_and_remembered_checksums_do_not_count_as_a_change(other: str, folder: Path) -> None:
    before = stamp(folder, "net")
    (folder / other).touch()
    assert stamp(folder, "net") == before


def test_size_covers_all_files_and_missing_files_have_an_empty_stamp(folder: Path) -> None:
    assert size(folder, "net") == 8
    assert stamp(folder, "gone") == stamp(folder / "gone", "net") == ()
    (folder / "net.gone").symlink_to(folder / "nowhere")
    assert size(folder, "net") == 8, "a broken link is passed over"
