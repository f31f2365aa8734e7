"""Reading tables: CSV as spreadsheets and shops write it, and the reasons given for invalid rows and tables."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.producer.sources import BadRow, SourceRow, parse, read_sources
from imagemill.shared.errors import InvalidSource
from tests.unit.producer.lists import A, B, no_s3, only, read


@pytest.mark.parametrize(("name", "sign"), [("l.csv", ","), ("l.csv", ";"), ("l.tsv", "\t"), ("l.csv", "\t")])
def test_csv_columns_are_found_by_name_with_any_common_delimiter(write: Any, name: str, sign: str) -> None:
    rows = [["id", "URL ", "Mask", "boxes", "name"], ["7", A, B, '"1,2,3,4;5,6,7,8"', "cat"], ["8", B, "", "", ""]]
    path = write(name, "\n".join(sign.join(row) for row in rows))
    first, second = read(path)
    assert first == SourceRow(f"{path}:2", {"source": A, "mask": B, "boxes": "1,2,3,4;5,6,7,8", "name": "cat"})
    assert second == SourceRow(f"{path}:3", {"source": B})
    assert [box.x for box in parse(first, 0).boxes] == [1, 5]


def test_csv_row_over_several_lines_is_reported_at_its_first_line(write: Any) -> None:
    path = write("l.csv", f'source,note\n{A},"two\nlines"\n\n{B},one\n')
    assert [row.place for row in read(path)] == [f"{path}:2", f"{path}:5"]


def test_byte_order_mark_in_csv_is_removed(write: Any) -> None:
    assert only(read(write("l.csv", b"\xef\xbb\xbfsource\n" + A.encode()))).fields == {"source": A}


@pytest.mark.parametrize(
    "header", ["Image Src", "image_link", "Images", "IMAGE-URL", "Picture", "photo url", "Main Image", "whatever", "sku", ""]
)
@pytest.mark.parametrize("place", [0, 2])
def test_column_of_images_is_found_by_what_shops_call_it_or_by_content(header: str, place: int, write: Any) -> None:
    names, cells = ["id", "title"], ["7", "Shoe"]
    names.insert(place, header)
    cells.insert(place, A)
    row = only(read(write("l.csv", f"{','.join(names)}\n{','.join(cells)}\n")))
    assert row.fields == {"source": A}


@pytest.mark.parametrize("sign", [", ", ",", "|", " ", "; ", "\n"])
def test_cell_with_several_urls_is_a_row_for_each(sign: str, write: Any) -> None:
    rows = read(write("l.csv", f'SKU,Name,Images\nS1,Shoe,"{A}{sign}{B}"\n'))
    assert [row.fields for row in rows if isinstance(row, SourceRow)] == [
        {"source": A, "name": "Shoe"},
        {"source": B, "name": "Shoe"},
    ]


def test_column_for_one_url_may_hold_several_but_commas_belong_to_a_url(write: Any) -> None:
    rows = read(write("l.csv", f'source\n"{A}, {B}"\n"{A}|{B}"\n"https://cdn.example/w_300,{A}"\n'))
    assert [row.fields["source"] for row in rows if isinstance(row, SourceRow)] == [
        A,
        B,
        A,
        B,
        f"https://cdn.example/w_300,{A}",
    ]


@pytest.mark.parametrize("column", ["mask", "control_image"])
def test_several_images_can_not_share_a_mask_or_control_image(column: str, write: Any) -> None:
    row = only(read(write("l.csv", f'images,{column}\n"{A},{B}",{A}\n')))
    assert isinstance(row, BadRow)
    assert "a row for each" in row.reason


def test_header_may_be_missing_or_announced(write: Any) -> None:
    assert [row.fields for row in read(write("a.csv", f"{A}\n{B}\n"))] == [{"source": A}, {"source": B}]  # type: ignore[union-attr]
    assert only(read(write("b.csv", f"shoe,{A},3\n"))).fields == {"source": A}
    assert only(read(write("c.csv", f"sep=;\r\nsource;name\r\n{A};x\r\n"))).fields == {"source": A, "name": "x"}
    assert only(read(write("d.csv", f"sep=|\nid|picture\n1|{A}\n"))).fields == {"source": A}


def test_column_option_chooses_by_name_or_number(write: Any) -> None:
    path = str(write("l.csv", f"Front,Back\n{A},{B}\n"))
    for column in ("back", "Back", "2"):
        assert only(list(read_sources([path], s3=no_s3, column=column))).fields == {"source": B}
    with pytest.raises(InvalidSource, match="no column 'Bakc'; did you mean 'Back'"):
        list(read_sources([path], s3=no_s3, column="Bakc"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"Front,Back\n{A},{B}\n", r"several columns hold URLs \('Front' and 'Back'\); choose one: --column 'Front'"),
        (f"{A},{B}\n", "2 URLs and no names of columns: .*--column 1"),
        ("id,address\n1,here\n", "one must be 'source'.*found 'id, address'; the first row is '1, here'"),
        ("", "one must be 'source'"),
    ],
)
def test_table_with_more_than_one_reading_is_refused_with_the_option_that_helps(text: str, reason: str, write: Any) -> None:
    with pytest.raises(InvalidSource, match=reason):
        read(write("l.csv", text))


def test_blank_rows_and_empty_columns_are_ignored(write: Any) -> None:
    rows = read(write("l.csv", f"source,name,,\n\n{A},a,,\n,,\n , \n{B},b,,,,\n"))
    assert [row.fields for row in rows] == [{"source": A, "name": "a"}, {"source": B, "name": "b"}]  # type: ignore[union-attr]


@pytest.mark.parametrize("header", ["url,image", "source,mask,Mask"])
def test_csv_with_two_columns_for_one_field_is_refused(write: Any, header: str) -> None:
    with pytest.raises(InvalidSource, match="two columns hold the"):
        read(write("l.csv", f"{header}\n{A},{B},{B}\n"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{A},x,too,many", "4 values for 2 columns"),
        (",named", "no URL in the source column"),
        (f'"{A}"x,name', "the row is not CSV"),
    ],
)
def test_invalid_csv_row_is_a_bad_row_and_reading_continues(write: Any, line: str, reason: str) -> None:
    path = write("l.csv", f"source,name\n{line}\n{B},b\n")
    bad, good = read(path)
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:2"
    assert reason in bad.reason
    assert good.fields == {"source": B, "name": "b"}


def test_unclosed_csv_quote_is_a_bad_row(write: Any) -> None:
    path = write("l.csv", f'source\n"{A}\n' + f"{B}\n" * 20_000)
    rows = read(path)
    assert isinstance(rows[0], BadRow)
    assert rows[0].place == f"{path}:2"


def test_table_that_is_not_utf8_is_windows_1252(write: Any) -> None:
    rows = read(
        write("l.csv", f"source,name\n{A},Café 5 €\n".encode("cp1252") + B.encode() + b",\x81\n" + f"{A},Łódź\n".encode())
    )
    assert rows[0] == SourceRow(rows[0].place, {"source": A, "name": "Café 5 €"})
    assert [row.reason for row in rows[1:] if isinstance(row, BadRow)] == [
        "the line is not UTF-8",
        "the line is UTF-8 and an earlier one Windows-1252; save the list as UTF-8",
    ]
