from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagemill.shared.errors import AccessDenied, ForbiddenAddress, NotFound, TooLarge
from imagemill.worker.transfer.files import is_below, read_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"image")
    return folder


def test_files_below_a_root_are_read(root: Path) -> None:
    name = root / "100% with spaces, ü?#.png"
    name.write_bytes(b"odd")
    assert read_file((root / "a.png").as_uri(), [root], 100) == b"image"
    assert read_file(name.as_uri(), [Path("/nowhere"), root], 100) == b"odd"
    assert read_file(f"file://localhost{root}/a.png", [root], 100) == b"image"


def test_without_roots_nothing_is_read_and_the_setting_is_named(root: Path) -> None:
    with pytest.raises(ForbiddenAddress, match="IMAGEMILL_FILES__READ_ROOTS"):
        read_file((root / "a.png").as_uri(), [], 100)


@pytest.mark.parametrize("way", ["../secret.png", "%2e%2e/secret.png", "x/../../secret.png", "link.png", "folder/secret.png"])
def test_ways_out_of_the_root_are_refused(root: Path, way: str) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    with pytest.raises(ForbiddenAddress):
        read_file(f"file://{root}/{way}", [root], 100)


def test_a_sibling_whose_name_begins_like_the_root_is_outside(root: Path) -> None:
    sibling = root.parent / "in-other"
    sibling.mkdir()
    (sibling / "a.png").write_bytes(b"x")
    with pytest.raises(ForbiddenAddress):
        read_file((sibling / "a.png").as_uri(), [root], 100)


def test_nobody_learns_what_exists_outside(root: Path) -> None:
    messages = []
    for name in ("secret.png", "missing.png"):
        with pytest.raises(ForbiddenAddress) as caught:
            read_file((root.parent / name).as_uri(), [root], 100)
        messages.append(caught.value.message.replace(name, "NAME"))
    assert messages[0] == messages[1]


def test_a_link_changed_between_check_and_opening_gets_nobody_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_links_that_stay_inside_and_linked_roots_work(root: Path) -> None:
    (root / "link.png").symlink_to("a.png")
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert read_file((root / "link.png").as_uri(), [root], 100) == b"image"
    assert read_file((linked_root / "a.png").as_uri(), [linked_root], 100) == b"image"


def test_only_regular_files_are_read(root: Path) -> None:
    os.mkfifo(root / "pipe.png")  # opening it must not wait for a writer
    for name in ("pipe.png", "."):
        with pytest.raises(ForbiddenAddress, match="regular"):
            read_file(f"file://{root}/{name}", [root], 100)


def test_what_is_missing(root: Path) -> None:
    for name in ("b.png", "a.png/b.png", "a%00.png"):
        with pytest.raises(NotFound):
            read_file(f"file://{root}/{name}", [root], 100)


def test_links_in_a_circle_are_an_error_of_ours(root: Path) -> None:
    (root / "circle.png").symlink_to("circle.png")
    with pytest.raises(NotFound):
        read_file((root / "circle.png").as_uri(), [root], 100)


def test_the_limit_is_exact(root: Path) -> None:
    assert read_file((root / "a.png").as_uri(), [root], 5) == b"image"
    with pytest.raises(TooLarge, match="5 bytes; the limit is 4"):
        read_file((root / "a.png").as_uri(), [root], 4)


def test_a_file_that_says_nothing_of_its_size_is_limited_while_it_is_read() -> None:
    with pytest.raises(TooLarge):  # the kernel's files have a size of 0
        read_file("file:///proc/cpuinfo", [Path("/proc")], 10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(root: Path) -> None:
    (root / "a.png").chmod(0)
    with pytest.raises(AccessDenied):
        read_file((root / "a.png").as_uri(), [root], 100)


def test_a_root_contains_itself(root: Path) -> None:
    assert is_below(root, [root])
    assert not is_below(root.parent, [root])
