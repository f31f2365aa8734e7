from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, NoReturn

import pytest

from imagemill.shared.errors import AccessDenied, ForbiddenAddress, NotFound, TooLarge
from imagemill.worker.transfer.files import is_below, publish, read_file, replacing, writing
from tests.workers import clean_environment


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"image")
    return folder


def test_file_below_root_is_read(root: Path) -> None:
    name = root / "100% with spaces, ü?#.png"
    name.write_bytes(b"odd")
    assert read_file((root / "a.png").as_uri(), [root], 100) == b"image"
    assert read_file(name.as_uri(), [Path("/nowhere"), root], 100) == b"odd"
    assert read_file(f"file://localhost{root}/a.png", [root], 100) == b"image"


def test_file_whose_name_is_not_text_is_read(root: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(root) + b"/\xfc"))
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"odd")
    assert read_file(f"file://{root}/%FC/caf%E9.png", [root], 100) == b"odd"
    assert read_file(f"file://{root}/%FC/caf%E9.png", [folder], 100) == b"odd"
    with pytest.raises(NotFound, match=r"%FC/caf%E8\.png does not exist"):
        read_file(f"file://{root}/%FC/caf%E8.png", [root], 100)


def test_error_names_setting_when_no_roots_are_set(root: Path) -> None:
    with pytest.raises(ForbiddenAddress, match="IMAGEMILL_FILES__READ_ROOTS"):
        read_file((root / "a.png").as_uri(), [], 100)


@pytest.mark.parametrize("way", ["../secret.png", "%2e%2e/secret.png", "x/../../secret.png", "link.png", "folder/secret.png"])
def test_path_out_of_root_is_forbidden(root: Path, way: str) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    with pytest.raises(ForbiddenAddress):
        read_file(f"file://{root}/{way}", [root], 100)


def test_sibling_with_root_as_name_prefix_is_forbidden(root: Path) -> None:
    sibling = root.parent / "in-other"
    sibling.mkdir()
    (sibling / "a.png").write_bytes(b"x")
    with pytest.raises(ForbiddenAddress):
        read_file((sibling / "a.png").as_uri(), [root], 100)


def test_error_does_not_reveal_whether_file_outside_exists(root: Path) -> None:
    messages = []
    for name in ("secret.png", "missing.png"):
        with pytest.raises(ForbiddenAddress) as caught:
            read_file((root.parent / name).as_uri(), [root], 100)
        messages.append(caught.value.message.replace(name, "NAME"))
    assert messages[0] == messages[1]


def test_link_swapped_before_opening_is_forbidden(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = root / "link.png"
    link.symlink_to(root / "a.png")
    real_open = os.open

    def swapped(path: Path, flags: int) -> int:
        link.unlink()
        link.symlink_to(root.parent / "secret.png")
        return real_open(path, flags)

    monkeypatch.setattr("imagemill.worker.transfer.files.os.open", swapped)
    with pytest.raises(ForbiddenAddress):
        read_file(link.as_uri(), [root], 100)


def test_link_inside_root_and_linked_root_work(root: Path) -> None:
    (root / "link.png").symlink_to("a.png")
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert read_file((root / "link.png").as_uri(), [root], 100) == b"image"
    assert read_file((linked_root / "a.png").as_uri(), [linked_root], 100) == b"image"


def test_pipe_and_folder_are_forbidden(root: Path) -> None:
    os.mkfifo(root / "pipe.png")  # opening it must not block until there is a writer
    for name in ("pipe.png", "."):
        with pytest.raises(ForbiddenAddress, match="regular"):
            read_file(f"file://{root}/{name}", [root], 100)


def test_missing_file_is_not_found(root: Path) -> None:
    for name in ("b.png", "a.png/b.png", "a%00.png"):
        with pytest.raises(NotFound):
            read_file(f"file://{root}/{name}", [root], 100)


def test_symlink_loop_is_not_found(root: Path) -> None:
    (root / "circle.png").symlink_to("circle.png")
    with pytest.raises(NotFound):
        read_file((root / "circle.png").as_uri(), [root], 100)


def test_size_limit_is_exact(root: Path) -> None:
    assert read_file((root / "a.png").as_uri(), [root], 5) == b"image"
    with pytest.raises(TooLarge, match="5 bytes; the limit is 4"):
        read_file((root / "a.png").as_uri(), [root], 4)


def test_size_limit_applies_while_reading_file_that_reports_size_zero() -> None:
    with pytest.raises(TooLarge):  # files in /proc report size 0
        read_file("file:///proc/cpuinfo", [Path("/proc")], 10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_access_denied(root: Path) -> None:
    (root / "a.png").chmod(0)
    with pytest.raises(AccessDenied):
        read_file((root / "a.png").as_uri(), [root], 100)


def test_root_is_below_itself(root: Path) -> None:
    assert is_below(root, [root])
    assert not is_below(root.parent, [root])


# --- replacing ---


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


# --- writing ---


@pytest.fixture(params=["nameless", "named"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that can create files without a name, and on one that can't."""
    real = os.open

    def without(path: Path, flags: int, *more: int, **named: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *more, **named)

    if request.param == "named":
        monkeypatch.setattr(os, "open", without)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("old", [b"old", None])
def test_written_file_appears_when_it_is_complete(tmp_path: Path, old: bytes | None) -> None:
    target = tmp_path / "a"
    if old is not None:
        target.write_bytes(old)
    with writing(target) as file:
        file.write(b"new")
        file.flush()
        assert (target.read_bytes() if target.exists() else None) == old
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("_way")
def test_failed_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail(file: BinaryIO) -> NoReturn:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), writing(target) as file:
        fail(file)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_killed_process_leaves_no_file_behind(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from imagemill.worker.transfer.files import writing\n"
        "with writing(pathlib.Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    assert subprocess.run(command, env=clean_environment(), check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
