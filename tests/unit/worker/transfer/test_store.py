"""Storing results: atomically, under distinct keys, and only where the operator allows it."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import pytest
from botocore.exceptions import EndpointConnectionError
from hypothesis import assume, example, given
from hypothesis import strategies as st

from imagemill.shared.errors import NotFound, StorageFull, StorageRefused
from imagemill.shared.keys import check_key, may_collide
from imagemill.shared.messages import Item
from imagemill.shared.settings import FileSettings, S3Settings
from imagemill.worker.transfer.network import Network
from imagemill.worker.transfer.store import FolderStore, S3Store, open_store, render_key
from tests.stores import BlockingStore, ClientOnly, NoS3

JOB = "260730-1f0c9a3e"
DEFAULT = "{job}/{index:06d}-{name}"


def open_folder(url: str, *roots: Path) -> BlockingStore:
    return BlockingStore(FolderStore(url, FileSettings(write_roots=roots)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def store(root: Path) -> BlockingStore:
    return open_folder(root.as_uri(), root)


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
def test_render_key_fills_template(template: str, fields: dict[str, Any], key: str) -> None:
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
    """Any valid template."""
    template = "".join(draw(st.lists(PARTS, min_size=1, max_size=6)))
    try:
        assume(not may_collide(check_key(template)))
        return template
    except ValueError:
        assume(False)
        raise


@given(templates(), st.tuples(st.integers(0, 2000), NAMES), st.tuples(st.integers(0, 2000), NAMES))
@example(DEFAULT, (1, "a"), (2, "a"))
@example("{index}-{name}", (1, "1-a"), (11, "a"))
@example("{name}/{index}", (1, "a/1"), (11, "a"))
def test_render_key_gives_distinct_keys_inside_prefix(
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
        if template.count("{name}") < 2:  # a file name is limited to 255 bytes
            assert max(len(part.encode()) for part in path.parts) <= 255
        assert key.count("/") == template.count("/")
        assert key == render_key(template, job="1111", item=items[keys.index(key)], extension="png")


@pytest.mark.parametrize("template", ["{index}{name}", "{name}{index}", "{index:02d}5{name}", "{name}{job}{index}"])
def test_check_key_rejects_ambiguous_template(template: str) -> None:
    with pytest.raises(ValueError, match="separator between"):
        check_key(template)


# --- folders ---------------------------------------------------------------------------------


def test_put_writes_file_and_returns_its_url(root: Path) -> None:
    store = open_folder(f"file://localhost{root}/a%20b", root)
    store.check()
    url = store.put("x/ü ?#.png", b"image", "image/png")
    assert url == (root / "a b" / "x" / "ü ?#.png").as_uri()
    assert files(root) == {"a b/x/ü ?#.png": b"image"}
    assert store.put("x/ü ?#.png", b"again", "image/png") == url
    assert files(root) == {"a b/x/ü ?#.png": b"again"}


def test_put_stream_stores_content(store: BlockingStore, root: Path) -> None:
    lines = [os.urandom(100) for _ in range(10_000)]
    assert store.put_stream("j/manifest.jsonl", iter(lines), "application/x-ndjson") == (root / "j/manifest.jsonl").as_uri()
    assert files(root) == {"j/manifest.jsonl": b"".join(lines)}


def test_folder_whose_name_is_not_text_takes_results_and_errors_are_text(root: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(root) + b"/\xfc"))
    store = open_folder(folder.as_uri(), root)
    assert store.put("a.png", b"image", "image/png") == f"file://{root}/%FC/a.png"
    store.copy(f"file://{root}/%FC/a.png", "b.png", "image/png", md5=hashlib.md5(b"image", usedforsecurity=False).hexdigest())
    assert (folder / "b.png").read_bytes() == b"image"
    with pytest.raises(StorageRefused) as caught:
        open_folder(folder.as_uri()).put("a.png", b"image", "image/png")
    assert rf"{root}/\udcfc is not in a folder allowed" in caught.value.message


def test_put_respects_umask(store: BlockingStore, root: Path) -> None:
    before = os.umask(0o027)
    try:
        store.put("a.png", b"image", "image/png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / "a.png").stat().st_mode) == 0o640


def test_concurrent_puts_are_atomic_and_synced(store: BlockingStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [bytes([n]) * 300_000 for n in range(8)]
    store.put("a.png", contents[0], "image/png")
    seen: set[bytes] = set()
    synced: list[int] = []
    real_fsync = os.fsync

    def look_then_sync(descriptor: int) -> None:
        seen.add((root / "a.png").read_bytes())
        synced.append(descriptor)
        real_fsync(descriptor)

    monkeypatch.setattr("imagemill.worker.transfer.files.os.fsync", look_then_sync)
    writers = [threading.Thread(target=store.put, args=("a.png", content, "image/png")) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert seen <= set(contents)
    assert len(synced) == 2 * len(contents)  # each file, then its folder
    assert list(files(root)) == ["a.png"]
    assert files(root)["a.png"] in contents


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_failed_put_keeps_old_file_and_leaves_nothing_behind(
    store: BlockingStore, root: Path, monkeypatch: pytest.MonkeyPatch, where: str, nameless: bool
) -> None:
    store.put("a.png", b"before", "image/png")
    if not nameless:
        monkeypatch.setattr("imagemill.worker.transfer.files._open_nameless", lambda _: None)

    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"imagemill.worker.transfer.files.{'os.fsync' if where == 'fsync' else 'Path.replace'}", full)
    with pytest.raises(StorageFull, match=r"a\.png can't be written: no space left on device"):
        store.put("a.png", b"after", "image/png")
    assert files(root) == {"a.png": b"before"}


def test_interrupted_put_leaves_nothing_behind(store: BlockingStore, root: Path) -> None:
    def interrupted() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_stream("a.png", interrupted(), "image/png")
    assert files(root) == {}


def test_error_names_setting_when_no_write_roots_are_set(root: Path) -> None:
    store = open_folder(root.as_uri())
    for call in (store.check, lambda: store.put("a.png", b"image", "image/png")):
        with pytest.raises(StorageRefused, match="IMAGEMILL_FILES__WRITE_ROOTS"):
            call()
    assert files(root) == {}


@pytest.fixture
def outside(root: Path) -> Iterator[Path]:
    """A folder that must stay empty."""
    folder = root.parent / "out-side"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["{outside}", "{outside}/deeper", "{root}/link", "{root}/link/deeper", "{root}/%2e%2e/out-side"]
)
def test_folder_outside_roots_is_refused_before_creating_anything(root: Path, outside: Path, url: str) -> None:
    (root / "link").symlink_to(outside)
    store = open_folder(url.format(root=root.as_uri(), outside=outside.as_uri()), root)
    for call in (store.check, lambda: store.put("a/b.png", b"image", "image/png")):
        with pytest.raises(StorageRefused, match="WRITE_ROOTS"):
            call()


@pytest.mark.parametrize("key", ["link/a.png", "link/deeper/a.png", "../out-side/a.png", "x/../../out-side/a.png"])
def test_key_out_of_roots_is_refused(store: BlockingStore, root: Path, outside: Path, key: str) -> None:
    (root / "link").symlink_to(outside)
    store.check()
    with pytest.raises(StorageRefused, match="WRITE_ROOTS"):
        store.put(key, b"image", "image/png")


def test_put_replaces_link_instead_of_following_it(store: BlockingStore, root: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    (root / "a.png").symlink_to(theirs)
    store.put("a.png", b"image", "image/png")
    assert (theirs.read_bytes(), (root / "a.png").read_bytes()) == (b"theirs", b"image")
    assert not (root / "a.png").is_symlink()


def test_put_follows_linked_folder_inside_roots(store: BlockingStore, root: Path) -> None:
    (root / "real").mkdir()
    (root / "link").symlink_to("real")
    assert store.put("link/a.png", b"image", "image/png") == (root / "link" / "a.png").as_uri()
    assert files(root / "real") == {"a.png": b"image"}


@pytest.mark.parametrize("key", ["a.png/b.png", "folder", "circle/b.png", "x" * 300, "a\0b.png"])
def test_unwritable_path_is_refused_permanently(store: BlockingStore, root: Path, key: str) -> None:
    (root / "a.png").write_bytes(b"image")
    (root / "folder").mkdir()
    (root / "circle").symlink_to("circle")
    with pytest.raises(StorageRefused, match="can't be written"):
        store.put(key, b"image", "image/png")
    assert files(root) == {"a.png": b"image"}


# --- copies within the roots ------------------------------------------------------------------


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()  # noqa: S324


def test_copy_from_any_folder_below_roots(root: Path) -> None:
    data = os.urandom(3 << 20)
    source = open_folder((root / "one").as_uri(), root).put("x/ü ?#.png", data, "image/png")
    other = open_folder((root / "two").as_uri(), root)
    assert other.copy(source, "y/b.png", "image/png", md5=md5(data)) == (root / "two" / "y" / "b.png").as_uri()
    assert files(root) == {"one/x/ü ?#.png": data, "two/y/b.png": data}
    (root / "one" / "x" / "ü ?#.png").write_bytes(b"changed in place")
    assert (root / "two" / "y" / "b.png").read_bytes() == data  # a copy, not a link


def test_copy_onto_itself(store: BlockingStore, root: Path) -> None:
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
def test_copy_of_missing_changed_or_foreign_file_is_not_found(store: BlockingStore, root: Path, source: str) -> None:
    (root.parent / "theirs.png").write_bytes(b"image")
    (root / "link").symlink_to(root.parent / "theirs.png")
    (root / "circle").symlink_to("circle")
    (root / "changed.png").write_bytes(b"imagE")
    os.mkfifo(root / "pipe")
    store.put("b.png", b"before", "image/png")
    before = sorted(root.iterdir())
    with pytest.raises(NotFound):
        store.copy(source.format(root=root.as_uri()), "b.png", "image/png", md5=md5(b"image"))
    assert sorted(root.iterdir()) == before  # nothing left behind
    assert (root / "b.png").read_bytes() == b"before"


def test_copy_out_of_roots_is_refused(store: BlockingStore, root: Path, outside: Path) -> None:
    (root / "link").symlink_to(outside)
    source = store.put("a.png", b"image", "image/png")
    with pytest.raises(StorageRefused, match="WRITE_ROOTS"):
        store.copy(source, "link/a.png", "image/png", md5=md5(b"image"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_refused(store: BlockingStore, root: Path) -> None:
    root.chmod(0o500)
    with pytest.raises(StorageRefused, match="permission denied"):
        store.put("a.png", b"image", "image/png")
    root.chmod(0o700)


@pytest.mark.parametrize(
    "url", ["https://a.example/x", "out", "file://host/x", "s3://B!/x", "file:///a/../b", "s3://bucket/x?y=1"]
)
def test_open_store_rejects_invalid_url(url: str, network: Network) -> None:
    with pytest.raises(StorageRefused, match="can't store results"):
        open_store(url, s3=NoS3(network), files=FileSettings(), s3_settings=S3Settings())


def test_silent_server_is_asked_once_for_all_images(network: Network) -> None:
    asked = []

    class Silent:
        def head_bucket(self, **bucket: str) -> NoReturn:
            asked.append(bucket)
            raise EndpointConnectionError(endpoint_url="http://s3.example")

    store = S3Store("s3://results/jobs", ClientOnly(Silent(), network), S3Settings())
    for check in [network.start(store.check()) for _ in range(8)]:
        check.result(60)
    assert asked == [{"Bucket": "results"}]
