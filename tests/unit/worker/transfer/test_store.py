"""Where results go: whole or not at all, under keys of their own, and only where the operator allows it."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from imagemill.shared.errors import NotFound, StorageRefused, StorageUnavailable
from imagemill.shared.messages import Item, check_key
from imagemill.shared.settings import FileSettings, S3Settings
from imagemill.worker.transfer.store import FolderStore, open_store, render_key

JOB = "260730-1f0c9a3e"
DEFAULT = "{job}/{index:06d}-{name}"


def no_s3() -> NoReturn:
    raise AssertionError("S3 was asked")


def open_folder(url: str, *roots: Path) -> Any:
    return open_store(url, s3=no_s3, files=FileSettings(write_roots=roots), s3_settings=S3Settings())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def store(root: Path) -> FolderStore:
    return open_folder(root.as_uri(), root)  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "fields", "key"),
    [
        (DEFAULT, {"source": "https://a.example/x/b%20c.jpg?size=1"}, f"{JOB}/000012-b c.png"),
        (DEFAULT, {"source": "s3://bucket/folder/ü.tar.webp"}, f"{JOB}/000012-ü.tar.png"),
        (DEFAULT, {"source": "https://a.example/"}, f"{JOB}/000012-image.png"),
        ("{index}", {}, "12.png"),
        ("{index:02d}/{name}", {"name": "cover.JPG"}, "12/cover.png"),
        ("{index:02d}/{name}", {"name": "v1.5"}, "12/v1.5.png"),
        ("{index:02d}/{name}", {"name": "../../etc/passwd"}, "12/passwd.png"),
        ("{index:02d}/{name}", {"name": ".."}, "12/image.png"),
        ("{index:02d}/{name}", {"name": "{index}"}, "12/index.png"),
        ("all/{item}", {}, f"all/{Item(index=12, source='https://a.example/b.jpg').id}.png"),
    ],
)
def test_keys(template: str, fields: dict[str, Any], key: str) -> None:
    item = Item.model_validate({"index": 12, "source": "https://a.example/b.jpg", **fields})
    assert render_key(template, job=JOB, item=item, extension="png") == key
    assert render_key(template, job=JOB, item=item, extension=".png") == key


PARTS = st.sampled_from(["{job}", "{index}", "{index:02d}", "{item}", "{name}", "-", "/", "a", "1", "."])
NAMES = (
    st.none()
    | st.text(max_size=12)
    | st.text("01aü-./\\ ", max_size=5)
    | st.sampled_from(["..", "../../x", "a" * 200, "画" * 150, "x.png", "con", "%2e%2e%2f", "a\0b"])
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Any template that a job may have."""
    template = "".join(draw(st.lists(PARTS, min_size=1, max_size=6)))
    try:
        return check_key(template)
    except ValueError:
        assume(False)
        raise


@given(templates(), st.tuples(st.integers(0, 2000), NAMES), st.tuples(st.integers(0, 2000), NAMES))
@example(DEFAULT, (1, "a"), (2, "a"))
@example("{index}-{name}", (1, "1-a"), (11, "a"))
@example("{name}/{index}", (1, "a/1"), (11, "a"))
def test_two_images_of_a_job_never_share_a_key_nor_leave_their_folder(
    template: str, one: tuple[int, str | None], other: tuple[int, str | None]
) -> None:
    assume(one[0] != other[0])
    items = [Item(index=index, source="https://a.example/1.jpg", name=name) for index, name in (one, other)]
    keys = [render_key(template, job="1111", item=item, extension="png") for item in items]
    assert keys[0] != keys[1]
    for key in keys:
        path = PurePosixPath(key)
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert path.suffix == ".png" or path.name == ".png"
        assert key.isprintable()
        assert "\\" not in key
        if template.count("{name}") < 2:  # a file's name may have 255 bytes
            assert max(len(part.encode()) for part in path.parts) <= 255
        assert key.count("/") == template.count("/")
        assert key == render_key(template, job="1111", item=items[keys.index(key)], extension="png")


@pytest.mark.parametrize("template", ["{index}{name}", "{name}{index}", "{index:02d}5{name}", "{name}{job}{index}"])
def test_a_template_by_which_two_images_could_share_a_key_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="separator between"):
        check_key(template)


# --- a folder ---------------------------------------------------------------------------------


def test_results_are_files_below_the_folder_at_the_address_that_is_told(root: Path) -> None:
    store = open_folder(f"file://localhost{root}/a%20b", root)
    store.check()
    told = store.put("x/ü ?#.png", b"image", "image/png")
    assert told == (root / "a b" / "x" / "ü ?#.png").as_uri()
    assert files(root) == {"a b/x/ü ?#.png": b"image"}
    assert store.put("x/ü ?#.png", b"again", "image/png") == told
    assert files(root) == {"a b/x/ü ?#.png": b"again"}


def test_a_file_is_stored_like_bytes(store: FolderStore, root: Path, tmp_path: Path) -> None:
    source = tmp_path / "manifest"
    source.write_bytes(os.urandom(3 << 20))
    assert store.put_file("j/manifest.jsonl", source, "application/x-ndjson") == (root / "j/manifest.jsonl").as_uri()
    assert files(root) == {"j/manifest.jsonl": source.read_bytes()}


def test_results_may_be_read_by_whoever_the_umask_lets(store: FolderStore, root: Path) -> None:
    before = os.umask(0o027)
    try:
        store.put("a.png", b"image", "image/png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / "a.png").stat().st_mode) == 0o640


def test_nobody_ever_sees_a_part_of_a_result(store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [bytes([n]) * 300_000 for n in range(8)]
    store.put("a.png", contents[0], "image/png")
    seen: set[bytes] = set()
    synced: list[int] = []
    real_fsync = os.fsync

    def look_then_sync(descriptor: int) -> None:
        seen.add((root / "a.png").read_bytes())
        synced.append(descriptor)
        real_fsync(descriptor)

    monkeypatch.setattr("imagemill.worker.transfer.atomic.os.fsync", look_then_sync)
    writers = [threading.Thread(target=store.put, args=("a.png", content, "image/png")) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert seen <= set(contents)
    assert len(synced) == 2 * len(contents)  # the file before it appears, and the folder that names it
    assert list(files(root)) == ["a.png"]
    assert files(root)["a.png"] in contents


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_nothing_is_left_of_what_could_not_be_written(
    store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store.put("a.png", b"before", "image/png")

    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"imagemill.worker.transfer.atomic.{'os.fsync' if where == 'fsync' else 'Path.replace'}", full)
    with pytest.raises(StorageUnavailable, match=r"a\.png can't be written: no space left on device"):
        store.put("a.png", b"after", "image/png")
    assert files(root) == {"a.png": b"before"}


def test_nothing_is_left_when_the_worker_is_interrupted(
    store: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_source: IO[bytes], file: IO[bytes], _size: int) -> NoReturn:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("imagemill.worker.transfer.store.shutil.copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put_file("a.png", Path(__file__), "image/png")
    assert files(root) == {}


def test_without_write_roots_nothing_is_written_and_the_setting_is_named(root: Path) -> None:
    store = open_folder(root.as_uri())
    for call in (store.check, lambda: store.put("a.png", b"image", "image/png")):
        with pytest.raises(StorageRefused, match="IMAGEMILL_FILES__WRITE_ROOTS"):
            call()
    assert files(root) == {}


@pytest.fixture
def outside(root: Path) -> Iterator[Path]:
    """A folder that nothing may appear in."""
    folder = root.parent / "out-side"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["{outside}", "{outside}/deeper", "{root}/link", "{root}/link/deeper", "{root}/%2e%2e/out-side"]
)
def test_a_folder_outside_the_roots_is_refused_before_anything_is_made(root: Path, outside: Path, url: str) -> None:
    (root / "link").symlink_to(outside)
    store = open_folder(url.format(root=root.as_uri(), outside=outside.as_uri()), root)
    for call in (store.check, lambda: store.put("a/b.png", b"image", "image/png")):
        with pytest.raises(StorageRefused, match="WRITE_ROOTS"):
            call()


@pytest.mark.parametrize("key", ["link/a.png", "link/deeper/a.png", "../out-side/a.png", "x/../../out-side/a.png"])
def test_no_key_leads_out_of_the_roots(store: FolderStore, root: Path, outside: Path, key: str) -> None:
    (root / "link").symlink_to(outside)
    store.check()
    with pytest.raises(StorageRefused, match="WRITE_ROOTS"):
        store.put(key, b"image", "image/png")


def test_a_link_in_a_result_s_place_is_replaced_and_not_followed(store: FolderStore, root: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    (root / "a.png").symlink_to(theirs)
    store.put("a.png", b"image", "image/png")
    assert (theirs.read_bytes(), (root / "a.png").read_bytes()) == (b"theirs", b"image")
    assert not (root / "a.png").is_symlink()


def test_links_that_stay_inside_work(store: FolderStore, root: Path) -> None:
    (root / "real").mkdir()
    (root / "link").symlink_to("real")
    assert store.put("link/a.png", b"image", "image/png") == (root / "link" / "a.png").as_uri()
    assert files(root / "real") == {"a.png": b"image"}


@pytest.mark.parametrize("key", ["a.png/b.png", "folder", "circle/b.png", "x" * 300, "a\0b.png"])
def test_what_an_operator_must_mend_is_not_tried_again(store: FolderStore, root: Path, key: str) -> None:
    (root / "a.png").write_bytes(b"image")
    (root / "folder").mkdir()
    (root / "circle").symlink_to("circle")
    with pytest.raises(StorageRefused, match="can't be written"):
        store.put(key, b"image", "image/png")
    assert files(root) == {"a.png": b"image"}


# --- copies within the roots ------------------------------------------------------------------


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()  # noqa: S324


def test_a_result_is_copied_from_any_folder_below_the_roots(root: Path) -> None:
    data = os.urandom(3 << 20)
    source = open_folder((root / "one").as_uri(), root).put("x/ü ?#.png", data, "image/png")
    other = open_folder((root / "two").as_uri(), root)
    assert other.copy(source, "y/b.png", "image/png", md5=md5(data)) == (root / "two" / "y" / "b.png").as_uri()
    assert files(root) == {"one/x/ü ?#.png": data, "two/y/b.png": data}
    (root / "one" / "x" / "ü ?#.png").write_bytes(b"changed in place")
    assert (root / "two" / "y" / "b.png").read_bytes() == data  # no link


def test_a_result_can_be_copied_onto_itself(store: FolderStore, root: Path) -> None:
    source = store.put("a.png", b"image", "image/png")
    assert store.copy(source, "a.png", "image/png", md5=md5(b"image")) == source
    assert files(root) == {"a.png": b"image"}


@pytest.mark.parametrize(
    "source",
    [
        "{root}/none.png",
        "{root}/none/a.png",
        "{root}/changed.png",
        "{root}",
        "{root}/pipe",
        "{root}/circle",
        "{root}/%00",
        "{root}/link",
        "{root}/../theirs.png",
        "{root}/%2e%2e/theirs.png",
        "s3://results/a.png",
        "https://a.example/a.png",
        "",
    ],
)
def test_what_is_gone_changed_or_elsewhere_is_not_copied(store: FolderStore, root: Path, source: str) -> None:
    (root.parent / "theirs.png").write_bytes(b"image")
    (root / "link").symlink_to(root.parent / "theirs.png")
    (root / "circle").symlink_to("circle")
    (root / "changed.png").write_bytes(b"imagE")
    os.mkfifo(root / "pipe")
    store.put("b.png", b"before", "image/png")
    before = sorted(root.iterdir())
    with pytest.raises(NotFound):
        store.copy(source.format(root=root.as_uri()), "b.png", "image/png", md5=md5(b"image"))
    assert sorted(root.iterdir()) == before  # no part of it either
    assert (root / "b.png").read_bytes() == b"before"


def test_no_copy_leaves_the_roots(store: FolderStore, root: Path, outside: Path) -> None:
    (root / "link").symlink_to(outside)
    source = store.put("a.png", b"image", "image/png")
    with pytest.raises(StorageRefused, match="WRITE_ROOTS"):
        store.copy(source, "link/a.png", "image/png", md5=md5(b"image"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(store: FolderStore, root: Path) -> None:
    root.chmod(0o500)
    with pytest.raises(StorageRefused, match="permission denied"):
        store.put("a.png", b"image", "image/png")
    root.chmod(0o700)


@pytest.mark.parametrize(
    "url", ["https://a.example/x", "out", "file://host/x", "s3://B!/x", "file:///a/../b", "s3://bucket/x?y=1"]
)
def test_what_is_no_place_for_results(url: str) -> None:
    with pytest.raises(StorageRefused, match="results can't go to"):
        open_store(url, s3=no_s3, files=FileSettings(), s3_settings=S3Settings())
