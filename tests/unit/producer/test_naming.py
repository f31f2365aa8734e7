"""Names of results that follow the sources' names, folders and columns, and lists in which two results would share one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.sources import BadRow, SourceRow, read_sources
from imagemill.producer.submission import ListCheck
from imagemill.shared.keys import LAYOUTS
from imagemill.shared.ledger.leasing import Share
from imagemill.shared.messages import Item, Job, Output
from imagemill.worker.transfer.store import render_key
from tests.ledgers import Ledger
from tests.unit.producer.jobs import STYLIZE, Invoke, asked, submitted

S3 = "s3://results/shop"
FOLDER = "file:///srv/results"


def row(source: str, number: int = 1, **more: Any) -> SourceRow:
    return SourceRow(f"list.csv:{number}", {"source": source}, **more)


def checked(template: str, *rows: SourceRow | BadRow, output: str = S3) -> tuple[list[Item], list[str]]:
    """The accepted items, and the places and reasons of rows that are not."""
    check, spec = ListCheck(), Job(operation="stylize", output=Output(url=output, key=template))
    items = list(check.accepted(rows, spec, skip_invalid=True))
    return items, [f"{bad.place}: {bad.reason}" for bad in check.bad]


def key(template: str, *rows: SourceRow, output: str = S3) -> str:
    """The key of the last row's result."""
    items, bad = checked(template, *rows, output=output)
    assert bad == []
    return render_key(template, job="spring", item=items[-1], extension="png")


@pytest.mark.parametrize(
    ("template", "given", "expected"),
    [
        ("{path}/{name}", row("https://a.example/shoes/red/1.jpg?w=2"), "shoes/red/1.png"),
        ("{path}/{name}", row("https://a.example/1.jpg"), "1.png"),
        ("{path}/{name}", row("https://a.example/a%20b/%C3%BC.jpg"), "a b/ü.png"),
        ("{path}/{name}", row("s3://bucket/2024/shoes?/1.jpg"), "2024/shoes/1.png"),
        ("{path}/{name}", row("s3://bucket/2024/shoes/1.jpg", root="s3://bucket/2024"), "shoes/1.png"),
        ("{path}/{name}", row("s3://bucket/2024/shoes/1.jpg", root="s3://bucket/2024/"), "shoes/1.png"),
        ("{path}/{name}", row("s3://bucket/a/2024-01/1.jpg", root="s3://bucket/a/2024-"), "2024-01/1.png"),
        ("{path}/{name}", row("file:///srv/in/shoes/1.jpg", root="file:///srv/in"), "shoes/1.png"),
        ("{path}/{name}", row("file:///srv/in/1.jpg"), "srv/in/1.png"),
        ("{path}./{name}", row("https://a.example/1.jpg"), "1.png"),
        ("{name}", row("https://a.example/shoes/1.jpg"), "1.png"),
        ("{stem}.{ext}", row("https://a.example/1.JPG"), "1.png"),
        ("{stem}-{ext}", row("https://a.example/1.JPG"), "1-jpg.png"),
        ("{job}/{stem}/{index:03d}", row("https://a.example/1.JPG"), "spring/1/000.png"),
        ("{Brand}/{sku}", row("https://a.example/1.jpg", columns={"brand": "A/B", "sku": "x 7"}), "A-B/x 7.png"),
    ],
)
def test_results_are_named_after_their_sources(template: str, given: SourceRow, expected: str) -> None:
    assert key(template, given) == expected


@pytest.mark.parametrize("value", ["..", "../../etc", "/etc", "a\\..\\b", "{job}", "{index}", "a\0b", "a\nb", "%2e%2e", "."])
def test_untrusted_columns_and_folders_stay_below_the_output(value: str) -> None:
    for result in (
        key("{sku}/{stem}", row("https://a.example/1.jpg", columns={"sku": value})),
        key("{path}/{stem}", row(f"s3://bucket/x/{value}/1.jpg")) if value.isprintable() else "x/y/1.png",
        key("{path}/{stem}", row("https://a.example/x/%2e%2e/1.jpg")),
        key("{path}/{stem}", row("https://a.example/%2Fetc%2F..%2F/1.jpg")),
    ):
        parts = result.split("/")
        assert parts[-1] == "1.png"
        assert not {"", ".", ".."} & {*parts}
        assert result.isprintable()
        assert not {*"{}\\"} & {*result}


@pytest.mark.parametrize(
    ("template", "one", "other", "output"),
    [
        ("{name}", row("https://a.example/x/1.jpg", 2), row("https://a.example/y/1.jpg", 3), S3),
        ("{path}/{name}", row("https://a.example/x/1.jpg", 2), row("https://b.example/x/1.jpg", 3), S3),
        ("{path}/{name}", row("https://a.example/1.png", 2), row("https://a.example/1.jpg", 3), S3),
        ("{name}.{ext}", row("https://a.example/1.png", 2), row("https://a.example/1.jpg", 3), S3),
        ("{name}", row("s3://b/Caf\u00e9.png", 2), row("s3://b/Cafe\u0301.png", 3), S3),
        ("{name}", row("s3://b/Shoe.png", 2), row("s3://b/shoe.png", 3), FOLDER),
        ("{name}", row("s3://b/Stra\u00dfe.png", 2), row("s3://b/STRASSE.png", 3), FOLDER),
        (
            "{a}{b}",
            row("s3://b/1.png", 2, columns={"a": "1", "b": "12"}),
            row("s3://b/2.png", 3, columns={"a": "11", "b": "2"}),
            S3,
        ),
    ],
)
def test_second_image_with_the_same_name_is_refused(template: str, one: SourceRow, other: SourceRow, output: str) -> None:
    items, (reason,) = checked(template, one, other, output=output)
    assert [item.source for item in items] == [one.fields["source"]]
    assert reason.startswith("list.csv:3: its result would get the same name as that of list.csv:2, '")


@pytest.mark.parametrize(
    ("template", "one", "other"),
    [
        ("{name}", row("s3://b/Shoe.png"), row("s3://b/shoe.png")),
        ("{name}-{ext}", row("s3://b/1.png"), row("s3://b/1.jpg")),
        ("{index}{sku}", row("s3://b/1.png", columns={"sku": "1"}), row("s3://b/1.png", columns={"sku": "2"})),
        ("{sku}", row("s3://b/1.png", columns={"sku": "1"}), row("s3://b/1.png", columns={"sku": "2"})),
    ],
)
def test_different_names_are_accepted(template: str, one: SourceRow, other: SourceRow) -> None:
    items, bad = checked(template, one, other)
    assert bad == []
    assert len({render_key(template, job="x", item=item, extension="png") for item in items}) == 2
    assert [item.duplicate_of for item in items] == [None, None]


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("file:///srv/photos/red/a%20b.jpg", "file:///srv/photos"),
        ("file:///srv/Photos/red/A.JPG", "file:///srv/photos"),
        ("s3://shop/in/red/a.jpg", "s3://shop/in"),
    ],
)
def test_result_never_replaces_its_source(source: str, output: str) -> None:
    root = source.partition("/red/")[0]
    items, bad = checked("{path}/{name}", row(source, root=root), output=output)
    assert items == []
    assert bad == ["list.csv:1: its result would replace the image itself; choose another --output, --layout or --key"]
    assert checked("{path}/{name}", row(source, root=root), output=f"{output}/out")[1] == []


def test_repeated_row_shares_the_result_instead_of_colliding() -> None:
    items, bad = checked("{path}/{name}", row("s3://b/x/1.png"), row("s3://b/y/1.png"), row("s3://b/x/1.png"))
    assert (bad, [item.duplicate_of for item in items]) == ([], [None, None, 0])


def test_repeat_of_a_refused_row_is_refused_too() -> None:
    items, bad = checked("{name}", row("s3://b/x/1.png"), row("s3://b/y/1.png"), row("s3://b/y/1.png"))
    assert (len(items), len(bad)) == (1, 2)


@pytest.mark.parametrize(
    ("template", "columns", "reason"),
    [
        ("{skuu}", {"sku": "1"}, "--key uses {skuu}, but the row has no column of this name; did you mean 'sku'?"),
        ("{nmae}", None, "--key uses {nmae}, but the row has no column of this name; did you mean 'name'?"),
        ("{sku}", {"sku": " "}, "--key uses {sku}, but the row's column is empty"),
        ("{path}../{name}", None, "its output name would be '../{name}'; use another --key"),
        ("{path}./{ext}/..{path}/{path}", None, "its output name would be 'png/..'; use another --key"),
        ("{path}", None, "its output name would be ''; use another --key"),
        ("a" * 900 + "{sku}", {"sku": "x" * 180}, "its output name would be longer than 1,024 bytes; use another --key"),
    ],
)
def test_rows_without_a_usable_name_are_refused(template: str, columns: dict[str, str] | None, reason: str) -> None:
    items, (found,) = checked(template, row("s3://b/1.png", columns=columns))
    assert items == []
    assert found.startswith(f"list.csv:1: {reason}")


def test_names_too_long_for_a_file_are_refused_in_folders_only() -> None:
    given = row(f"s3://b/{'a' * 180}.png", columns={"sku": "b" * 80})
    assert len(checked("{stem}-{sku}", given)[0]) == 1
    reason = "a part of its output name would be longer than 255 bytes; use another --key"
    assert checked("{stem}-{sku}", given, output=FOLDER) == ([], [f"list.csv:1: {reason}"])


def test_usual_template_leaves_items_as_they_were() -> None:
    (item,), _ = checked(LAYOUTS["indexed"], row("s3://b/1.png"))
    assert item == Item(index=0, source="s3://b/1.png")


def test_tree_keeps_the_folders_below_the_given_one(tmp_path: Path) -> None:
    for name in ("1.jpg", "shoes/1.jpg", "shoes/red/1.jpg"):
        path = tmp_path / "in put" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    items, bad = checked(LAYOUTS["tree"], *read_sources([str(tmp_path / "in put")], s3=lambda: None), output=FOLDER)
    keys = [render_key(LAYOUTS["tree"], job="x", item=item, extension="png") for item in items]
    assert (bad, keys) == ([], ["1.png", "shoes/1.png", "shoes/red/1.png"])


def test_workers_are_given_the_names(imagemill: Invoke, ledger: Ledger) -> None:
    job = submitted(imagemill, "https://a.example/x/1.jpg\nhttps://a.example/y/1.jpg\n", "--layout", "tree")
    due = asked(ledger)
    assert isinstance(due, Share)
    template = ledger.spec(job).output.key
    keys = [render_key(template, job=job, item=item, extension="png") for item in due.items]
    assert keys == ["x/1.png", "y/1.png"]


def test_collision_queues_nothing_and_names_both_rows(imagemill: Invoke, ledger: Ledger) -> None:
    result = imagemill(*STYLIZE, "--key", "{name}", stdin="https://a.example/x/1.jpg\nhttps://a.example/y/1.jpg\n")
    assert (result.exit_code, ledger.jobs()) == (2, [])
    assert "stdin:2: its result would get the same name as that of stdin:1, '1'" in result.stderr
