"""What the demo works on: photos, retouches, lists, and addresses that fail each in its own way."""

from __future__ import annotations

import http.client
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from imagemill.producer.demo_site import NO_SUBJECT, OWN_PHOTOS, PRIVATE, SHIPPED, Material, Site, bomb, gather
from imagemill.producer.sources import read_sources
from imagemill.shared import errors
from imagemill.shared.messages import Item
from imagemill.shared.s3 import make_client
from imagemill.shared.settings import S3Settings
from imagemill.worker.imaging import codec
from tests.conftest import photo

MOST = 64_000_000  # pixels; a worker's limit


def opened(material: Material, path: str) -> Image.Image:
    return Image.open(io.BytesIO((material.folder / path).read_bytes()))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of somebody's photos, among other things."""
    folder = tmp_path / "own"
    (folder / "older").mkdir(parents=True)
    for n, name in enumerate(["a.png", "a.jpg", "B ü#1.PNG", "honeymoon.png"]):
        (folder / name).write_bytes(photo(n, kind="JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "notes.txt").write_text("no photo")
    (folder / "older" / "c.png").write_bytes(photo(9))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "demo").mkdir()
    return tmp_path / "demo"


@pytest.fixture
def site(own: Path, folder: Path) -> Iterator[Site]:
    with Site(gather(folder, own, None)) as site:
        yield site


def get(site: Site, path: str) -> tuple[int, bytes]:
    """Status and body of a path, sent as it is."""
    connection = http.client.HTTPConnection(site.host, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- material ---


def test_the_photos_that_ship(folder: Path) -> None:
    material = gather(folder, None, None)
    assert material.photos == [f"photos/{name}" for name in SHIPPED]
    assert material.no_subject == [f"photos/{name}" for name in SHIPPED if name in NO_SUBJECT]
    assert [retouch.path for retouch in material.retouches].count("photos/scratched/astronaut.png") == 1
    for path in [*material.photos, *(retouch.path for retouch in material.retouches)]:
        opened(material, path).load()


@pytest.mark.parametrize(("count", "photos"), [(None, 4), (2, 2), (99, 4)])
def test_photos_of_ones_own(own: Path, folder: Path, count: int | None, photos: int) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*.*")}
    material = gather(folder, own, count)
    assert material.photos == ["photos/B ü#1.PNG", "photos/a.jpg", "photos/a.png", "photos/honeymoon.png"][:photos]
    assert material.no_subject == []
    assert {path: path.read_bytes() for path in own.rglob("*.*")} == before
    assert len({retouch.path for retouch in material.retouches}) == photos + 1, "a.jpg and a.png stay apart"


def test_of_a_large_folder_a_share_is_taken(own: Path, folder: Path) -> None:
    for n in range(OWN_PHOTOS + 3):
        (own / f"more-{n:02}.png").write_bytes(photo(n))
    assert len(gather(folder, own, None).photos) == OWN_PHOTOS


def test_what_is_retouched_lies_where_the_list_says(own: Path, folder: Path) -> None:
    material = gather(folder, own, None)
    dated = [retouch for retouch in material.retouches if retouch.box]
    (scratched,) = [retouch for retouch in material.retouches if retouch.mask]
    for retouch, name in zip(dated, material.photos, strict=True):
        before, after = (np.asarray(opened(material, path).convert("RGB"), np.int16) for path in (name, retouch.path))
        assert retouch.box is not None
        x, y, width, height = retouch.box
        changed = np.abs(after - before).max(2) > 90  # more than JPEG does
        inside = np.zeros_like(changed)
        inside[int(y * 72) : int((y + height) * 72) + 1, int(x * 96) : int((x + width) * 96) + 1] = True
        assert changed[inside].any()
        assert not changed[~inside].any()
    before, after = (np.asarray(opened(material, path), np.int16) for path in (material.photos[0], scratched.path))
    mask = np.asarray(opened(material, scratched.mask or ""))
    assert (before != after).any()
    assert np.array_equal(before[mask == 0], after[mask == 0])


def test_a_folder_without_photos_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UsageError, match="there are no images in this folder"):
        gather(folder, tmp_path / "empty", None)


def test_photos_that_nobody_can_read(folder: Path, own: Path) -> None:
    (own / "a.png").write_bytes(b"no photo")
    material = gather(folder, own, None)
    assert "photos/a.png" in material.photos, "the worker says what is wrong with it"
    assert len([retouch for retouch in material.retouches if retouch.box]) == 3
    for path in own.iterdir():
        if path.is_file():
            path.write_bytes(b"no photo")
    for path in (folder / "photos").iterdir():
        _ = path.is_file() and path.unlink()
    (folder / "photos").rename(folder / "old")
    with pytest.raises(errors.UsageError, match="none of the photos can be read"):
        gather(folder, own, None)


def test_without_the_demos_packages_it_says_how_to_get_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'imagemill\[demo\]', or name yours with --images"):
        gather(folder, None, None)


# --- the server ---


def test_the_server_gives_what_the_lists_name_and_nothing_else_of_the_folder(site: Site) -> None:
    (site.material.folder / "secret.txt").write_text("secret")
    (site.material.folder / "photos" / "later.png").write_bytes(b"not listed")
    for path in site.material.photos:
        assert get(site, f"/{quote(path)}?copy=2") == (200, (site.material.folder / path).read_bytes())
    for path in (
        "/secret.txt",
        "/photos/later.png",
        "/photos/../secret.txt",
        "/%2e%2e/own/notes.txt",
        "/photos",
        "/",
        "//etc/passwd",
    ):
        assert get(site, path) == (404, b"not found")


def test_each_bad_address_is_bad_in_its_own_way(site: Site) -> None:
    answers = {url.rpartition("/")[2]: get(site, urlsplit(url).path) for url in site.bad if url != PRIVATE}
    assert {name: status for name, (status, _) in answers.items() if status != 200} == {
        "missing.jpg": 404,
        "broken-server.jpg": 500,
    }
    assert answers["empty.png"][1] == b""
    assert answers["page.jpg"][1].startswith(b"<!doctype html>")
    for name, kind in (("half.jpg", errors.Truncated), ("bomb.png", errors.TooManyPixels)):
        with pytest.raises(kind):
            codec.decode(answers[name][1], codec.probe(answers[name][1], max_pixels=MOST))
    assert len(answers["bomb.png"][1]) < 200_000


@pytest.mark.parametrize("side", [1, 7, 64])
def test_a_bomb_is_a_valid_image(side: int) -> None:
    picture = codec.decode(bomb(side), codec.probe(bomb(side), max_pixels=MOST))
    assert picture.size == (side, side)
    assert not picture.pixels.any()


# --- the lists ---


def items(path: Path) -> list[Any]:
    """As `imagemill submit` reads the list."""
    return [row.fields for row in read_sources([str(path)], s3=lambda: make_client(S3Settings()))]


def test_every_list_can_be_submitted_and_has_each_bad_address_once(site: Site) -> None:
    for path in site.lists(None).values():
        read = [Item.model_validate({"index": n, **fields}) for n, fields in enumerate(items(path))]
        sources = Counter(item.source for item in read)
        assert [sources[url] for url in site.bad] == [1] * 7
        for item in read:
            named = [url for url in (item.source, item.mask) if url and url not in site.bad]
            assert all(get(site, urlsplit(url).path)[0] == 200 for url in named)


def test_what_the_lists_ask_for(site: Site) -> None:
    lists = {name: rows(path) for name, path in site.lists(None).items()}
    good = {name: [row for row in listed if row["source"] not in site.bad] for name, listed in lists.items()}
    photos = [site.url(path) for path in site.material.photos]
    assert [row["source"] for row in good["stylize"]] == photos
    assert [row["source"] for row in good["remove-background"]] == [*photos, photos[0]], "one of them twice"
    assert all(("mask" in row) != ("boxes" in row) for row in good["inpaint"])
    assert len(good["inpaint"]) == 5
    assert all(row.get("boxes") for row in lists["inpaint"] if row["source"] in site.bad)
    assert unquote(photos[0]).endswith("/photos/B ü#1.PNG")


def test_what_has_no_subject_is_not_cut_out(folder: Path) -> None:
    with Site(gather(folder, None, None)) as site:
        listed = [row["source"] for row in rows(site.lists(None)["remove-background"])]
    assert site.url("photos/cat.png") in listed
    assert not any(source.endswith(NO_SUBJECT) for source in listed)


def test_a_larger_demo_has_each_photo_again_under_another_address(site: Site) -> None:
    lists = {name: rows(path) for name, path in site.lists(11).items()}
    good = [row["source"] for row in lists["stylize"] if row["source"] not in site.bad]
    assert len(good) == len(set(good)) == 11
    assert {source.partition("?")[0] for source in good} == {site.url(path) for path in site.material.photos}
    masks = Counter("mask" in row for row in lists["inpaint"] if row["source"] not in site.bad)
    assert masks == {True: 2, False: 9}
