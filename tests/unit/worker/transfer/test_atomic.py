from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from imagemill.worker.transfer.atomic import publish, replacing


def test_target_keeps_old_content_until_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with replacing(target) as part:
        part.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_failed_block_leaves_target_and_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail(part: Path) -> NoReturn:
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        fail(part)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_block_that_writes_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_publish_syncs_file_before_rename_and_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, target = tmp_path / "part", tmp_path / "a"
    part.write_bytes(b"new")
    synced: list[tuple[bool, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.path.samestat(os.fstat(descriptor), tmp_path.stat()), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    publish(part, target)
    assert synced == [(False, False), (True, True)]
    assert (target.read_bytes(), part.exists()) == (b"new", False)
