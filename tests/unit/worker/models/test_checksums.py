from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagemill.worker.models import checksums as module
from imagemill.worker.models.checksums import digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "u2net.onnx"
    path.write_bytes(b"weights")
    return path


def test_digest_is_computed_again_only_when_the_file_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest(file) == hashlib.sha256(b"weights").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(module, "read_blocks", lambda _: pytest.fail("read again"))
        assert digest(file) == hashlib.sha256(b"weights").hexdigest()
    file.write_bytes(b"another")  # of the same length
    os.utime(file, ns=(1, 1))
    assert digest(file) == hashlib.sha256(b"another").hexdigest()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"size": 7}', '{"sha256": "0", "size": 1, "mtime_ns": 1, "checksum": ""}'])
def test_damaged_file_of_sums_is_ignored(file: Path, content: str) -> None:
    digest(file)
    (sums,) = file.parent.glob("*.sums.json")
    sums.write_text(content)
    assert digest(file) == hashlib.sha256(b"weights").hexdigest()


def test_digest_is_computed_once_per_process_in_a_read_only_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(module, "write_json", refuse)
    assert digest(file) == hashlib.sha256(b"weights").hexdigest()
    assert not list(file.parent.glob("*.json"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "read_blocks", lambda _: pytest.fail("read again"))
        assert digest(file) == hashlib.sha256(b"weights").hexdigest()
    file.write_bytes(b"another file")
    assert digest(file) == hashlib.sha256(b"another file").hexdigest()


def test_threads_that_need_a_digest_at_once_read_the_file_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def slow(path: Path) -> Iterator[bytes]:
        reads.append(path)
        time.sleep(0.1)
        yield path.read_bytes()

    monkeypatch.setattr(module, "read_blocks", slow)
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(digest, [file] * 8)) == {hashlib.sha256(b"weights").hexdigest()}
    assert reads == [file]
