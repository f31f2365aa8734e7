"""The demo's loopback server and its lists: photos, and URLs that each fail in a different way."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from imagemill.producer.demo_photos import gather
from imagemill.producer.demo_site import PRIVATE, Site, bomb
from imagemill.producer.sources import read_sources
from imagemill.shared import errors
from imagemill.shared.messages import Item
from imagemill.shared.s3 import make_client
from imagemill.shared.settings import S3Settings
from imagemill.worker.imaging import codec
from tests.conftest import photo

MAX_PIXELS = 64_000_000  # of a worker, by default


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    own, folder = tmp_path / "own", tmp_path / "demo"
    own.mkdir()
    folder.mkdir()
    for n, name in enumerate(["B ü#1.PNG", "a.png", "honeymoon.png", "notes.png"]):
        (own / name).write_bytes(photo(n))
    with Site(gather(folder, own, None)) as site:
        yield site


def get(site: Site, path: str) -> tuple[int, bytes]:
    """Status and body of a path, which is sent without normalising it."""
    connection = http.client.HTTPConnection(site.host, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the server ---


def test_server_serves_listed_files_and_nothing_else_from_the_folder(site: Site) -> None:
    folder = site.material.folder
    (folder / "secret.txt").write_text("secret")
    (folder / "photos" / "later.png").write_bytes(b"not listed")
    for path in site.material.photos["stylize"]:
        assert get(site, f"/{quote(path)}?copy=2") == (200, (folder / path).read_bytes())
    for path in (
        "/secret.txt",
        "/photos/later.png",
        "/photos/../secret.txt",
        "/%2e%2e/own/notes.png",
        "/photos",
        "/",
        "//etc/passwd",
    ):
        assert get(site, path) == (404, b"not found")


def test_each_bad_url_fails_in_its_own_way(site: Site) -> None:
    answers = {url.rpartition("/")[2]: get(site, urlsplit(url).path) for url in site.bad if url != PRIVATE}
    assert {name: status for name, (status, _) in answers.items() if status != 200} == {
        "missing.jpg": 404,
        "broken-server.jpg": 500,
    }
    assert answers["empty.png"][1] == b""
    assert answers["page.jpg"][1].startswith(b"<!doctype html>")
    for name, kind in (("half.jpg", errors.Truncated), ("bomb.png", errors.TooManyPixels)):
        with pytest.raises(kind):
            codec.decode(answers[name][1], codec.probe(answers[name][1], max_pixels=MAX_PIXELS))
    assert len(answers["bomb.png"][1]) < 200_000


@pytest.mark.parametrize("side", [1, 7, 64])
def test_bomb_is_a_valid_image(side: int) -> None:
    picture = codec.decode(bomb(side), codec.probe(bomb(side), max_pixels=MAX_PIXELS))
    assert picture.size == (side, side)
    assert not picture.pixels.any()


# --- the lists ---


def items(path: Path) -> list[Any]:
    """The rows as `imagemill submit` reads them."""
    return [row.fields for row in read_sources([str(path)], s3=lambda: make_client(S3Settings()))]


def test_every_list_can_be_submitted_and_contains_each_bad_url_once(site: Site) -> None:
    for path in site.lists(None).values():
        read = [Item.model_validate({"index": n, **fields}) for n, fields in enumerate(items(path))]
        sources = Counter(item.source for item in read)
        assert [sources[url] for url in site.bad] == [1] * 7
        for item in read:
            urls = [url for url in (item.source, item.mask) if url and url not in site.bad]
            assert all(get(site, urlsplit(url).path)[0] == 200 for url in urls)


def test_lists_contain_every_photo_and_one_duplicate_per_cut_out(site: Site) -> None:
    lists = {use: rows(path) for use, path in site.lists(None).items()}
    good = {use: [row for row in listed if row["source"] not in site.bad] for use, listed in lists.items()}
    photos = [site.url(path) for path in site.material.photos["stylize"]]
    assert [row["source"] for row in good["stylize"]] == photos
    for use in ("rembg", "opencv"):
        assert [row["source"] for row in good[use]] == [*photos, photos[0]]
    assert all(("mask" in row) != ("boxes" in row) for row in good["inpaint"])
    assert len(good["inpaint"]) == 5
    assert all(row.get("boxes") for row in lists["inpaint"] if row["source"] in site.bad)
    assert unquote(photos[0]).endswith("/photos/B ü#1.PNG")


def test_larger_count_repeats_photos_with_different_urls(site: Site) -> None:
    lists = {use: rows(path) for use, path in site.lists(11).items()}
    good = [row["source"] for row in lists["stylize"] if row["source"] not in site.bad]
    assert len(good) == len(set(good)) == 11
    assert {source.partition("?")[0] for source in good} == {site.url(path) for path in site.material.photos["stylize"]}
    masks = Counter("mask" in row for row in lists["inpaint"] if row["source"] not in site.bad)
    assert masks == {True: 3, False: 8}
