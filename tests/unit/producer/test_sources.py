"""Reading every kind of list, and the reasons given for invalid rows and lists."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.producer.sources import MAX_LINE, MAX_SHOWN, BadRow, Skipped, SourceRow, parse, read_sources, refused
from imagemill.shared.errors import InvalidSource
from tests.unit.producer.lists import A, B, no_s3, only, read

# --- text -------------------------------------------------------------------------------------


def test_text_list_has_one_url_per_line_and_skips_comments(write: Any) -> None:
    path = write("list.txt", f"# shop\n\n{A}\r\n  {B}  \n")
    assert read(path) == [SourceRow(f"{path}:3", {"source": A}), SourceRow(f"{path}:4", {"source": B})]


def test_byte_order_mark_is_removed(write: Any) -> None:
    assert only(read(write("list.txt", b"\xef\xbb\xbf" + A.encode()))).fields == {"source": A}


LIST = f"# a comment\n{A}\n{B}\n"
TABLE = f"source;name\n{A};Café\n{B};Łódź\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_lists_are_read_in_any_unicode_and_with_any_line_ends(encoding: str, ends: str, suffix: str, write: Any) -> None:
    table = read(write(f"table.{suffix}", TABLE.replace("\n", ends).encode(encoding)))
    assert [row.fields for row in table if isinstance(row, SourceRow)] == [
        {"source": A, "name": "Café"},
        {"source": B, "name": "Łódź"},
    ]
    listed = read(write("list.txt", LIST.replace("\n", ends).encode(encoding)))
    assert [row.fields for row in listed if isinstance(row, SourceRow)] == [{"source": A}, {"source": B}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04abc", "save it as CSV"),
        (b"\xd0\xcf\x11\xe0abc", "save it as CSV"),
        (b"\x1f\x8b\x08abc", "unpack it first"),
        (b"%PDF-1.7", "not a list"),
        ("source\nx".encode("utf-32"), "save the list as UTF-8"),
        (b"a\0\1\2b\0c", "save the list as UTF-8"),
    ],
)
def test_files_that_only_claim_to_be_lists_are_refused(content: bytes, reason: str, write: Any) -> None:
    for name in ("l.csv", "l.txt"):
        with pytest.raises(InvalidSource, match=reason):
            read(write(name, content))


@pytest.mark.parametrize(
    "line",
    [
        *(f"  {A}  ", f"\t{A}", f"\u200b{A}", f"{A}\u200b", f"\u00a0{A}\u00a0", f'"{A}"', f"'{A}'", f"<{A}>", f"{A},", f"{A};"),
        f"<{A}>,",
    ],
)
def test_what_comes_along_with_a_copied_url_is_removed(line: str, write: Any) -> None:
    assert only(read(write("l.txt", f"{B}\n{line}\n"))[1:]).fields == {"source": A}


def test_url_from_a_web_page_is_unescaped(write: Any) -> None:
    assert only(read(write("l.txt", f"{A}?w=1&amp;h=2\n"))).fields == {"source": f"{A}?w=1&h=2"}


def test_line_that_is_not_utf8_is_a_bad_row_and_reading_continues(write: Any) -> None:
    path = write("list.txt", b"https://example.com/\xff.jpg\n" + A.encode())
    bad, good = read(path)
    assert bad == BadRow(f"{path}:1", "the line is not UTF-8", r"https://example.com/\xff.jpg")
    assert good.fields == {"source": A}


@pytest.mark.parametrize("length", [MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE])
def test_overlong_line_is_a_bad_row_and_is_truncated(write: Any, length: int) -> None:
    path = write("list.txt", b"x" * length + b"\n" + A.encode())
    bad, good = read(path)
    assert isinstance(bad, BadRow)
    assert "longer than 65,536 bytes" in bad.reason
    assert len(bad.text) == MAX_SHOWN
    assert good == SourceRow(f"{path}:2", {"source": A})


def test_longest_allowed_line_is_read(write: Any) -> None:
    assert only(read(write("list.txt", "x" * (MAX_LINE - 1) + "\n"))).fields["source"] == "x" * (MAX_LINE - 1)


def test_lists_are_streamed(tmp_path: Path) -> None:
    """The first row of a list is available while the list is still being written."""
    pipe = tmp_path / "list.txt"
    os.mkfifo(pipe)
    first_was_read = threading.Event()

    def produce() -> None:
        with pipe.open("w") as stream:
            stream.write(A + "\n")
            stream.flush()
            assert first_was_read.wait(30)
            stream.write(B + "\n")

    writer = threading.Thread(target=produce, daemon=True)
    writer.start()
    # The first read of a buffered reader returns whatever has arrived.
    rows = iter(read_sources([str(pipe)], s3=no_s3))
    assert next(rows).fields == {"source": A}
    first_was_read.set()
    assert next(rows).fields == {"source": B}
    assert list(rows) == []
    writer.join()


# --- JSONL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
def test_jsonl_lines_are_objects_or_strings(write: Any, suffix: str) -> None:
    full = {"url": B, "mask": "https://example.com/m.png", "boxes": [[1, 2, 3, 4]], "name": "b"}
    path = write(f"list.{suffix}", f"{json.dumps(A)}\n{json.dumps(full)}\n\n")
    first, second = read(path)
    assert first == SourceRow(f"{path}:1", {"source": A})
    assert second == SourceRow(
        f"{path}:2", {"source": B, "mask": "https://example.com/m.png", "boxes": [[1, 2, 3, 4]], "name": "b"}
    )


@pytest.mark.parametrize("name", ["source", "url", "image"])
def test_url_field_has_three_names(write: Any, name: str) -> None:
    assert only(read(write("list.jsonl", json.dumps({name: A})))).fields == {"source": A}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps({"source": A, "maks": B}), "unknown field 'maks'; did you mean 'mask'?"),
        (json.dumps({"source": A, "control-image": B}), "unknown field 'control-image'; did you mean 'control_image'?"),
        (json.dumps({"source": A, "prompt": "x"}), "options are the same for all images of a job: use --set prompt=VALUE"),
        (json.dumps({"source": A, "mask-from": "x"}), "unknown field 'mask-from'; options are the same"),
        (json.dumps({"mask": B}), "no field 'source'"),
        (json.dumps({"source": A, "url": B}), "both 'source' and 'url' name the image"),
        ("[1, 2]", "a JSON object or string"),
        ('{"source": ', "the line is not JSON"),
        ("[" * 60_000, "nested too deeply"),
        (json.dumps({"source": ""}), "no field 'source'"),
    ],
)
def test_invalid_json_line_is_a_bad_row_with_its_line_number(write: Any, line: str, reason: str) -> None:
    path = write("list.jsonl", f"{json.dumps(A)}\n{line}\n{json.dumps(B)}\n")
    rows = read(path)
    assert len(rows) == 3
    bad = rows[1]
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:2"
    assert reason in bad.reason


def test_null_and_empty_values_are_ignored(write: Any) -> None:
    row = only(read(write("list.jsonl", json.dumps({"source": A, "mask": None, "name": "", "boxes": None}))))
    assert row.fields == {"source": A}


# --- CSV --------------------------------------------------------------------------------------


# --- stdin ------------------------------------------------------------------------------------


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize(
    "data", [f"\n# mine\n{A}\n", f'\n  {{"url": "{A}"}}\n', f"{A}"], ids=["text", "json", "no newline at the end"]
)
def test_stdin_is_text_or_jsonl(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data.encode()))
    row = only(read("-"))
    assert row.fields == {"source": A}
    assert row.place == f"stdin:{data.count(chr(10)) or 1}"


# --- folders, prefixes and single addresses ---------------------------------------------------


def test_folder_yields_its_images_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.jpg", "sub/ä b#1?.webp", ".git/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = read(tmp_path)
    assert [row.place for row in rows] == [f"{tmp_path}/{name}" for name in ("a.jpg", "b.PNG", "sub/ä b#1?.webp")]
    last = parse(rows[-1], 2)
    assert last.source == f"file://{tmp_path}/sub/%C3%A4%20b%231%3F.webp"


def test_file_name_that_is_not_text_has_a_url(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    row = only(read(tmp_path))
    row.place.encode()
    assert parse(row, 0).source.endswith("/%FF.jpg")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("list.txt", b"file:///photos/caf\xe9.jpg\r\n"),
        ("list.jsonl", rb'{"url": "file:///photos/caf\udce9.jpg"}'),  # as Python writes the name that os.listdir returns
        ("list.csv", b"url\nfile:///photos/caf%E9.jpg\n"),
    ],
)
def test_list_may_hold_file_names_that_are_not_text(name: str, line: bytes, write: Any) -> None:
    assert parse(only(read(write(name, line))), 0).source == "file:///photos/caf%E9.jpg"


def test_argument_may_be_a_file_name_that_is_not_text(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    Path(path).touch()
    for argument in (path, f"file://{path}"):
        assert parse(only(read(argument)), 0).source == f"file://{tmp_path}/caf%E9.jpg"


def test_s3_key_that_is_not_text_is_refused() -> None:
    with pytest.raises(InvalidSource, match="source"):
        parse(only(read("s3://bucket/caf\udce9.jpg")), 0)


def test_images_are_known_by_name_or_content_and_others_are_named(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jfif", "c.avif", "d.HEIC", "e.jxl", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "no-extension").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "photo.bin").write_bytes(b"RIFF....WEBP")
    (tmp_path / "camera.NEF").write_bytes(b"II*\0")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path)
    skipped = Skipped()
    rows = read_sources([str(tmp_path)], s3=no_s3, skipped=skipped)
    names = [Path(row.place).name for row in rows]
    assert names == ["a.JPG", "b.jfif", "c.avif", "d.HEIC", "e.jxl", "no-extension", "photo.bin"]
    assert (skipped.count, {Path(name).name for name in skipped.names}) == (4, {"link", "camera.NEF", "notes.txt", "pipe"})


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match="no images in this folder"):
        read(tmp_path)


def test_relative_path_becomes_an_absolute_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b.jpg").touch()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert only(read("../a b.jpg")) == SourceRow("../a b.jpg", {"source": f"file://{tmp_path}/a%20b.jpg"})


@pytest.mark.parametrize(
    "url", [A, "https://example.com/image?id=7", "s3://bucket/a.JPG", "s3://bucket/what?.png", "file:///x.jpg"]
)
def test_single_url_is_one_row(url: str) -> None:
    assert only(read(url)).fields == {"source": url}


class Pages:
    """The part of a boto3 client that lists objects."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys
        self.asked: dict[str, str] = {}

    def get_paginator(self, name: str) -> Pages:
        assert name == "list_objects_v2"
        return self

    def paginate(self, **asked: str) -> Iterator[dict[str, Any]]:
        self.asked = asked
        for key in self.keys:
            yield {"Contents": [{"Key": key}]}


@pytest.mark.parametrize("url", ["s3://bucket/photos/", "s3://bucket/photos"])
def test_s3_prefix_is_listed(url: str) -> None:
    client = Pages(["photos/a.jpg", "photos/list.txt", "photos/b.png"])
    rows = list(read_sources([url], s3=lambda: client))
    assert [row.fields["source"] for row in rows if isinstance(row, SourceRow)] == [
        "s3://bucket/photos/a.jpg",
        "s3://bucket/photos/b.png",
    ]
    assert client.asked == {"Bucket": "bucket", "Prefix": url.removeprefix("s3://bucket/")}


def test_s3_prefix_without_images_is_an_error() -> None:
    with pytest.raises(InvalidSource, match="no images under this prefix"):
        list(read_sources(["s3://bucket/photos/"], s3=lambda: Pages([])))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere.csv", "no such file or folder: 'nowhere.csv'"),
        ("https://example.com/list.csv?token=hidden", "lists are read only from files and stdin"),
        ("http://[::1/a.jpg", "is not a URL"),
    ],
)
def test_unreadable_source_is_refused_before_reading_starts(source: str, reason: str) -> None:
    with pytest.raises(InvalidSource) as caught:
        read_sources([A, source], s3=no_s3)
    assert reason in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("l.json", "one JSON object per line"), ("l.xlsx", "save the sheet .* as CSV"), ("l.doc", "not a list")],
)
def test_other_files_are_refused_with_advice(write: Any, name: str, reason: str) -> None:
    with pytest.raises(InvalidSource, match=reason):
        read(write(name, "[]"))


def test_several_sources_are_read_in_order(write: Any) -> None:
    assert [row.fields["source"] for row in read(write("1.txt", A), B, write("2.jsonl", json.dumps(A)))] == [A, B, A]


# --- items ------------------------------------------------------------------------------------


def test_parse_returns_an_item() -> None:
    item = parse(SourceRow("stdin:1", {"source": A, "mask": B, "boxes": "0.1,0.2,0.3,0.4", "name": "cat"}), 7)
    assert (item.index, item.source, item.mask, item.name) == (7, A, B, "cat")
    assert item.boxes[0].unit == "fraction"
    drawn = parse(SourceRow("stdin:1", {"source": A, "control_image": B}), 7)
    assert drawn.control_image == B
    plain = parse(SourceRow("stdin:1", {"source": A}), 7)
    assert drawn.digest != plain.digest
    assert plain.digest == hashlib.sha256(f"{A}\nNone\n()\nNone".encode()).hexdigest(), "as before there were control images"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"source": "example.com/a.jpg"}, "source: "),
        ({"source": "ftp://example.com/a.jpg"}, "source: "),
        ({"source": "https:///a.jpg"}, "source: "),
        ({"source": "file://host/a.jpg"}, "source: "),
        ({"source": "https://example.com/\x07.jpg"}, "source: "),
        ({"source": "https://example.com:99999/a.jpg"}, "source: "),
        ({"source": "https://example.com/" + "a" * 4096}, "source: "),
        ({"source": 7}, "source: "),
        ({"source": A, "mask": "here"}, "mask: "),
        ({"source": A, "control_image": "here"}, "control_image: "),
        ({"source": A, "boxes": "1,2,3"}, "boxes.0: "),
        ({"source": A, "boxes": [[1, 2, 0, 4]]}, "boxes.0.width: "),
        ({"source": A, "name": "n" * 201}, "name: "),
        ({"source": A, "masks": B}, "unknown field 'masks'; did you mean 'mask'?"),
        ({"source": A, "index": 3}, "unknown field 'index'"),
        ({"source": A, "seed": 3}, "unknown field 'seed'; options are the same for all images of a job"),
    ],
)
def test_parse_reports_the_invalid_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSource) as caught:
        parse(SourceRow("stdin:1", fields), 0)
    assert caught.value.message.startswith(field)


def test_credentials_in_a_url_are_never_shown(write: Any) -> None:
    bad = "htp://user:pass@example.com/a.jpg?sig=hidden"
    row = only(read(write("l.txt", bad)))
    with pytest.raises(InvalidSource) as caught:
        parse(row, 0)
    for text in (caught.value.message, refused(row, "").text):
        assert "example.com/a.jpg" in text
        assert "hidden" not in text
        assert "pass" not in text


@given(st.binary(max_size=400), st.sampled_from(["txt", "csv", "jsonl"]))
def test_any_bytes_yield_rows_bad_rows_or_invalid_source(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.write_bytes((b"source,name\n" if kind == "csv" else b"") + data)
    try:
        rows = read(path)
    except InvalidSource:
        return
    for row in rows:
        assert row.place.startswith(f"{path}:")
        if isinstance(row, SourceRow):
            with suppress(InvalidSource):
                assert parse(row, 0).source
