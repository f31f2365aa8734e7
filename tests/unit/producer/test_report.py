"""The HTML report: its contents, and that untrusted text and URLs can't inject anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from imagemill.producer.outliers import Outlier
from imagemill.producer.report import MOST_FAILURES, MOST_FLAGGED, REMARKS, JobPage, allowed, render, worded
from imagemill.shared.engines import ENGINES
from imagemill.shared.messages import Item, ItemResult, Job, JobStatus, Policy, Row, row
from imagemill.worker.checking.quality import REPAIR_NOTES
from imagemill.worker.imaging.facts import FILE_NOTES

A = "https://shop.example/"
EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'&amp;"


class Page(HTMLParser):
    """A page as a browser parses it: tags with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.items: list[str] = []  # texts of <li> elements
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data)
            if self.tags[-1][0] == "li" and data.strip():
                self.items.append(data)

    def all(self, tag: str, attribute: str) -> list[str | None]:
        return [attributes.get(attribute) for name, attributes in self.tags if name == tag]

    @property
    def pictures(self) -> list[str | None]:
        return self.all("img", "src")


def spec(operation: str = "stylize", **options: Any) -> Job:
    return Job.model_validate({"operation": operation, "output": {"url": "s3://results/x"}, "options": options})


def status(rows: Iterable[Row], **changes: Any) -> JobStatus:
    rows = list(rows)
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "failed")}
    fields = {
        "job": "260730-1f0c9a3e", "operation": "stylize", "engine": "opencv", "lane": "stylize.opencv", "state": "done",
        "total": len(rows), **counts, "duplicates": sum(row.duplicate_of is not None for row in rows),
        "priority": "normal", "output": "s3://results/x", "created": 0.0, "ended": 8.0, "seconds": 8.0,
    }  # fmt: skip
    return JobStatus.model_validate(fields | changes)


def done(index: int, source: str | None = None, **facts: Any) -> Row:
    item = Item(index=index, source=source or f"{A}{index}.jpg")
    output = facts.pop("output", f"s3://results/x/{index}.png")
    return row(item, ItemResult(index=index, state="done", output=output, **facts))


def failed(index: int, code: str = "not_found", message: str = "there is no such image", **facts: Any) -> Row:
    result = ItemResult(index=index, state="failed", code=code, message=message, **facts)
    return row(Item(index=index, source=f"{A}{index}.jpg"), result)


def again(first: Row, index: int) -> Row:
    """A later row with the same URL."""
    return first.model_copy(update={"index": index, "duplicate_of": first.index})


def page(rows: Iterable[Row], *, job: Job | None = None, changes: dict[str, Any] | None = None, **options: Any) -> Page:
    rows = list(rows)
    options = {"picture": lambda url: url.replace("s3://", "https://s3.example/"), **options}
    return Page(render([JobPage(status(rows, **(changes or {})), job or spec(), iter(rows))], **options))


def framed(shown: Page) -> list[str]:
    """The highlighted options."""
    changed = [attributes.get("class") == "changed" for tag, attributes in shown.tags if tag == "li"]
    return [text for text, stands_out in zip(shown.items, changed, strict=True) if stands_out]


# --- contents ---


def test_page_shows_pairs_failures_and_figures() -> None:
    facts = dict(source_size=(640, 480), source_bytes=48_000, output_size=(320, 240), output_bytes=3_100_000)
    rows = [
        done(0, **facts, seconds={"fetch": 0.2, "run": 0.04}, notes=("kept small",)),
        failed(1, attempts=3, seconds={"fetch": 0.4}),
        done(2, seconds={"fetch": 0.6, "run": 0.02}),
    ]
    shown = page([*rows, again(rows[0], 3), again(rows[0], 4)])
    for text in (
        "Images 5", "Done 4", "Failed 1", "Duplicates 2", "Time 8.0 s", "Images/s 0.50", "done, 1 failed",
        "fetch 400 ms", "run 30 ms", "640 × 480, 48.0 kB → 320 × 240, 3.1 MB", "kept small",
        "2 duplicates", "not_found 1 image", "there is no such image 3",
        "Before and after 2 images", "0.jpg 000000",
    ):  # fmt: skip
        assert text in shown.text, text
    assert "Remaining" not in shown.text
    assert shown.pictures == [
        f"{A}0.jpg", "https://s3.example/results/x/0.png", f"{A}2.jpg", "https://s3.example/results/x/2.png",
    ]  # fmt: skip
    assert shown.all("img", "alt")[:2] == [f"before: {A}0.jpg", f"after: {A}0.jpg"]


def test_filled_area_is_outlined_before_and_after() -> None:
    shown = page([done(0, output_size=(640, 480), filled="M10,20 30,20 30,40Z"), done(1, output_size=(640, 480))])
    drawn = [(attributes["viewbox"]) for tag, attributes in shown.tags if tag == "svg"]
    paths = [(attributes["d"], attributes["transform"]) for tag, attributes in shown.tags if tag == "path"]
    assert drawn == ["0 0 640 480"] * 2
    assert paths == [("M10,20 30,20 30,40Z", "scale(0.64 0.48)")] * 4, "a light and a dark line"
    assert "Before and after 2 images; filled areas are outlined" in shown.text
    assert "outlined" not in page([done(0)]).text


def test_expired_images_are_a_group_that_a_retry_may_help() -> None:
    late = [row(Item(index=n, source=f"{A}{n}.jpg"), None, "expired") for n in range(2)]
    shown = page(late, changes={"state": "failed"})
    assert "expired 2 images, retry may help" in shown.text
    assert "the deadline passed before this image began" in shown.text
    assert "failed, 2 failed" not in shown.text


@pytest.mark.parametrize(
    ("state", "tile"), [("running", "Remaining 3"), ("paused", "Remaining 3"), ("cancelled", "Not started 3")]
)
def test_unfinished_images_are_counted_with_their_duplicates(state: str, tile: str) -> None:
    items = [Item(index=0, source=A), Item(index=1, source=A, duplicate_of=0), Item(index=2, source=f"{A}x")]
    rows = [row(item, None, "cancelled" if state == "cancelled" else "pending") for item in items]
    shown = page([*rows, done(3)], changes={"state": state})
    assert tile in shown.text
    assert state in shown.text


def test_failures_are_grouped_most_frequent_first() -> None:
    rows = [failed(0, "timeout", retryable=True), *(failed(n) for n in (1, 2)), again(failed(2), 3)]
    text = page(rows).text
    assert text.index("not_found 3 images") < text.index("timeout 1 image, retry may help")
    assert "Failures 4 of 4" in text
    assert "Before and after" not in text


def test_long_list_of_failures_is_truncated_with_a_note() -> None:
    rows = [failed(n) for n in range(MOST_FAILURES + 7)] + [failed(9999, "timeout")]
    shown = page(rows)
    assert len([tag for tag, attributes in shown.tags if tag == "td" and attributes.get("class") == "reason"]) == MOST_FAILURES
    assert f"not_found {MOST_FAILURES + 7} images" in shown.text
    assert "timeout 1 image not listed" in shown.text
    assert "imagemill results 260730-1f0c9a3e --failed prints them all" in shown.text


@pytest.mark.parametrize(
    ("most", "pictures", "text"), [(2, 4, "2 images, 3 more not shown"), (5, 10, "5 images"), (0, 0, "Images 5")]
)
def test_number_of_shown_images_is_limited(most: int, pictures: int, text: str) -> None:
    shown = page([done(n) for n in range(5)], most=most)
    assert len(shown.pictures) == pictures
    assert text in shown.text


def test_changed_options_come_first() -> None:
    job = spec("inpaint", mask=f"{A}mask.png?Signature=secret", boxes="1,2,3,4", radius=7)
    shown = page([done(0)], job=job)
    options = shown.text[shown.text.index("Options") :]
    assert options.index("radius=7.0") < options.index("method=telea")
    assert f"mask={A}mask.png?…" in options
    assert "boxes=1, 2, 3, 4" in options
    assert "secret" not in shown.text
    assert len(framed(shown)) == 3


def test_page_of_several_jobs_begins_with_an_overview() -> None:
    first, second = [done(0), failed(1)], [done(0)]
    pages = [
        JobPage(status(first), spec(), first),
        JobPage(status(second, operation="inpaint", job="another-job"), spec("inpaint"), second),
    ]
    shown = Page(render(pages, picture=lambda _: None, title="Two & more"))
    assert "Two & more" in shown.text
    assert "2 jobs, 3 images: 2 done, 1 failed" in shown.text
    links = [href for href in shown.all("a", "href") if href]
    assert links == ["#job-1", "#job-2"]
    assert shown.all("section", "id") == ["job-1", "job-2"]


def test_comparison_shows_the_other_engines_result_next_to_its_own_with_labels() -> None:
    rows = [done(0), done(1)]
    job = Job.model_validate(
        {
            "operation": "remove-background",
            "output": {"url": "s3://results/x"},
            "options": {"engine": "rembg", "model": "u2netp"},
        }
    )
    others = {f"{A}1.jpg": "https://s3.example/results/other.png"}
    compared = JobPage(status(rows), job, rows, compared="opencv", others=others)
    shown = Page(render([compared], picture=lambda url: url.replace("s3:", "https:")))
    labels = [text for text in shown.words if text in ("before", "rembg u2netp", "opencv")]
    assert labels[-5:] == ["before", "rembg u2netp", "before", "rembg u2netp", "opencv"]
    assert shown.pictures[-1] == "https://s3.example/results/other.png"


def test_pictures_come_before_figures_and_failures_when_there_is_a_lead() -> None:
    rows = [done(0), failed(1)]
    shown = Page(render([JobPage(status(rows), spec(), rows)] * 2, picture=lambda url: url, lead="Look at this."))
    order = [shown.text.index(text) for text in ("Look at this.", "Before and after", "Images 2", "Failures", "Operation")]
    assert order == sorted(order)


def test_empty_job_renders() -> None:
    assert "Images 0" in page([], changes={"seconds": 0.0}).text


def test_flagged_images_and_outliers_come_before_all_others() -> None:
    rows = [done(n) for n in range(5)] + [done(5, notes=("enlarged", "flag:blurred", "flag:cast")), failed(6)]
    drift = {3: Outlier("lightness", -7.2)}
    pages = [JobPage(status(rows), spec(), rows, drift)]
    shown = Page(render(pages, picture=lambda url: url.replace("s3://", "https://s3.example/"), most=0))
    assert "Flagged 1 image outside a limit of the quality check" in shown.text
    assert "Flagged 1 Outliers 1 Time" in shown.text
    for note in ("enlarged", "flag:blurred", "flag:cast"):
        assert worded(note) in shown.text
    assert "Outliers 1 image unlike the rest of the job" in shown.text
    assert "3.jpg 000003 lightness is 7 deviations below the rest" in shown.text
    assert shown.pictures == [
        f"{A}5.jpg", "https://s3.example/results/x/5.png", f"{A}3.jpg", "https://s3.example/results/x/3.png",
    ]  # fmt: skip
    assert "Flagged" not in page([done(0)]).text


def test_long_list_of_flagged_images_is_truncated_with_a_count() -> None:
    rows = [done(n, notes=("flag:blank",)) for n in range(MOST_FLAGGED + 3)]
    shown = page(rows, most=0)
    assert len(shown.pictures) == 2 * MOST_FLAGGED
    assert f"{MOST_FLAGGED + 3} images outside a limit of the quality check; first {MOST_FLAGGED} shown" in shown.text


def test_options_include_the_check() -> None:
    policy = {"quality": {"mode": "repair", "most_cast": 2}}
    job = spec().model_copy(update={"policy": Policy.model_validate(policy)})
    assert framed(page([done(0)], job=job)) == ["check=repair", "most_cast=2.0"]


def test_options_include_output_and_loras() -> None:
    output = {"url": "s3://results/x", "format": "png", "icc": "keep"}
    options = {"engine": "diffusion", "loras": "mine:0.5;other"}
    shown = page([done(0)], job=Job.model_validate({"operation": "stylize", "output": output, "options": options}))
    assert framed(shown) == ["loras=mine:0.5; other:1", "format=png", "icc=keep"]
    assert "attempts=3" in shown.text


@pytest.mark.parametrize(
    ("operation", "options", "text"),
    [
        ("stylize", {"engine": "diffusion", "control": "canny;tile:0.4"}, "control=canny; tile:0.4"),
        ("stylize", {"engine": "diffusion", "control": "none"}, "control=none"),
        (
            "remove-background",
            {"engine": "rembg", "model": "sam", "points": "10,20;0.5,0.25,0"},
            "points=10, 20, 1; 0.5, 0.25, 0",
        ),
        ("remove-background", {"engine": "rembg", "model": "sam", "boxes": "1,2,3,4"}, "boxes=1, 2, 3, 4"),
    ],
)
def test_options_are_shown_as_typed(operation: str, options: dict[str, Any], text: str) -> None:
    job = {"operation": operation, "output": {"url": "s3://results/x"}, "options": options}
    assert text in framed(page([done(0)], job=Job.model_validate(job)))


@pytest.mark.parametrize(("operation", "icc"), [("inpaint", "icc=keep"), ("stylize", "icc=srgb")])
def test_options_include_the_default_profile_of_the_operation(operation: str, icc: str) -> None:
    job = Job.model_validate({"operation": operation, "output": {"url": "s3://results/x"}})
    shown = page([done(0)], job=job)
    assert icc in shown.text
    assert framed(shown) == []


PASSING_NOTES = {"cached", "matting_failed", "matting_timed_out"} | FILE_NOTES
FORMER_NOTES = {"prompt_cut"}  # that jobs of earlier versions still have


@pytest.mark.parametrize(
    "note", sorted(REPAIR_NOTES.union(PASSING_NOTES, FORMER_NOTES, *(engine.lasting_notes for engine in ENGINES)))
)
def test_every_note_is_explained(note: str) -> None:
    assert worded(note) == f"{note}: {REMARKS[note]}"


# --- untrusted text and URLs ---


def test_untrusted_text_is_escaped() -> None:
    rows = [
        done(0, f"{A}{EVIL}.jpg", notes=(EVIL,), output=f"s3://results/{EVIL}"),
        failed(1, EVIL, EVIL),
        failed(2).model_copy(update={"source": EVIL, "item": EVIL}),
    ]
    shown = page(rows, picture=lambda _: A + EVIL.replace(" ", ""), title=EVIL, changes={"output": f"s3://x/{EVIL}"})
    assert not [tag for tag, _ in shown.tags if tag == "script"]
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    assert shown.pictures == [A + EVIL.replace(" ", "")] * 2
    assert shown.text.count(EVIL) >= 4, "it is shown literally"


BAD = [
    "javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\nscript:alert(1)", "java\tscript:alert(1)",
    "\x01javascript:alert(1)", "data:image/svg+xml,<svg onload=alert(1)>", "data:text/html;base64,PHNjcmlwdD4=", "vbscript:x",
    "blob:https://a/b", "ftp://a/b.png", "s3://results/x.png", "//evil.example/a.png", "\\\\evil.example\\a.png", "http://[::1/",
    "view-source:x", "a:b", "1a:b", "", None,
]  # fmt: skip
GOOD = [
    "http://a/b.png",
    "HTTPS://a/b?c=d:e#f",
    "file:///srv/out/a.png",
    "results/a%20b.png",
    "../a.png",
    "./a:b.png",
    "/a.png",
]


@pytest.mark.parametrize("address", BAD)
def test_dangerous_urls_are_left_out(address: str | None) -> None:
    assert allowed(address) is None
    shown = page([done(0)], picture=lambda _: address)
    assert shown.pictures == []
    assert [href for href in shown.all("a", "href") if href] == []
    assert shown.text.count("not available") == 2


@pytest.mark.parametrize("address", GOOD)
def test_image_urls_are_used_unchanged(address: str) -> None:
    assert page([done(0)], picture=lambda _: address).pictures == [address, address]


def test_page_loads_nothing_but_images() -> None:
    html = render([JobPage(status([done(0)]), spec(), [done(0)])], picture=lambda _: "a.png")
    shown = Page(html)
    loading = {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    assert not loading & {tag for tag, _ in shown.tags}
    assert {name for tag, attributes in shown.tags for name in attributes if name in ("src", "srcset")} == {"src"}
    assert [tag for tag, attributes in shown.tags if "src" in attributes] == ["img", "img"]
    assert "url(" not in html
    assert "@import" not in html
    policy = dict(zip(shown.all("meta", "http-equiv"), shown.all("meta", "content"), strict=True))["Content-Security-Policy"]
    assert "default-src 'none'" in (policy or "")


def test_rows_are_read_once_and_only_shown_images_get_links() -> None:
    asked: list[str] = []

    def picture(url: str) -> str:
        asked.append(url)
        return "a.png"

    def rows() -> Iterator[Row]:
        yield from (done(n) for n in range(4))

    render([JobPage(status(rows()), spec(), rows())], picture=picture, most=1)
    assert asked == [f"{A}0.jpg", "s3://results/x/0.png"]
