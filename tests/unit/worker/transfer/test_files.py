from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from imagemill.shared.errors import AccessDenied, ForbiddenAddress, NotFound, TooLarge
from imagemill.worker.transfer.files import is_below, publish, read_file, replacing
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


def test_failed_block_leaves_the_target_and_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail(part: Path) -> NoReturn:
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        fail(part)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# Writes the first half, names what the folder holds then, and waits to be killed.
HALF = """
import sys, time
from pathlib import Path
from imagemill.worker.transfer import files
if sys.argv[2] == "named":
    files._open_nameless = lambda _: None
with files.replacing(Path(sys.argv[1]) / "a") as part, part.open("wb") as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["nameless", "named"])
def test_killed_writer_leaves_at_most_one_file_which_the_next_removes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    for _ in range(2):
        command = [sys.executable, "-c", HALF, str(tmp_path), kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment()) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"written\n"
            process.kill()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == (1 if kind == "nameless" else 2)
    if kind == "named":
        monkeypatch.setattr("imagemill.worker.transfer.files._open_nameless", lambda _: None)
    with replacing(tmp_path / "a") as part:
        part.write_bytes(b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def test_name_left_between_two_steps_is_used_by_the_next_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when its complete file has the hidden name, and not yet the target's."""
    (tmp_path / "a").write_bytes(b"old")
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: None)
        killed.setattr(Path, "unlink", lambda *_: None)
        with replacing(tmp_path / "a") as part:
            part.write_bytes(b"left")
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"left", b"old"]
    with replacing(tmp_path / "a") as part:
        part.write_bytes(b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def test_writer_whose_file_another_writer_has_removed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagemill.worker.transfer.files._open_nameless", lambda _: None)
    target = tmp_path / "a"

    def write(content: bytes, meanwhile: Callable[[Path], object]) -> None:
        with replacing(target) as part:
            part.write_bytes(content)
            meanwhile(part)

    with pytest.raises(FileNotFoundError):
        write(b"slow", lambda _: write(b"quick", lambda _: None))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"quick"]
    with pytest.raises(OSError, match="another process"):
        write(b"slow", lambda part: (part.unlink(), part.write_bytes(b"half")))
    assert target.read_bytes() == b"quick"


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
