"""Which URLs are accepted, and how they are shown."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared import urls
from imagemill.shared.urls import check_output_url, check_source_url, path_of, percent_encoded, safe_name, shown, shown_server


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.jpg",
        "http://example.com",
        "HTTPS://EXAMPLE.COM/a b.jpg?x=1#y",
        "https://münchen.example/ä.jpg",
        "http://[2001:db8::1]:8080/a.jpg",
        "http://example.com:65535/a.jpg",
        "s3://bucket/key with spaces/ä.png",
        "s3://my_old_bucket/key",
        "file:///photos/a.jpg",
        "file://localhost/photos/a.jpg",
        "https://example.com/@user.jpg",
        "https://example.com/a.jpg?mail=me@example.com",
    ],
)
def test_source_urls_are_accepted_unchanged(url: str) -> None:
    assert check_source_url(url) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "must start with"),
        ("a.jpg", "must start with"),
        ("//example.com/a.jpg", "must start with"),
        ("ftp://example.com/a.jpg", "must start with http://, https://, s3:// or file://"),
        ("javascript:alert(1)", "must start with"),
        ("data:image/png;base64,AA==", "must start with"),
        (" https://example.com/a.jpg", "must start with"),
        ("http:///a.jpg", "has no host"),
        ("https://?a.jpg", "has no host"),
        ("s3:///key", "has no bucket"),
        ("http://user@example.com/a.jpg", "user name or password"),
        ("http://:secret@example.com/a.jpg", "user name or password"),
        ("http://example.com@evil.example/a.jpg", "user name or password"),
        ("http://example.com:65536/a.jpg", "ort"),
        ("http://example.com:80x/a.jpg", "ort"),
        ("http://[::1/a.jpg", "IPv6"),
        ("https://example.com/\n.jpg", "control characters"),
        ("https://example.com/\x00", "control characters"),
        ("https://exa\tmple.com/", "control characters"),
        ("https://example.com/\x85", "control characters"),
        ("file:///photos/caf\udce9.jpg", "percent-encode what is not UTF-8"),
        ("file://server/share/a.jpg", "file:///absolute/path"),
        ("file:photos/a.jpg", "file:///absolute/path"),
        ("file://", "file:///absolute/path"),
    ],
)
def test_invalid_source_urls_are_refused_with_a_reason(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_source_url(url)


URLISH = st.lists(
    st.sampled_from(["http", "https", "s3", "file", "://", ":", "/", "?", "#", "@", "[", "]",
         "::1", ".", "-", "80", "99999", "a", "B", " ", "\\", "%00", "ä", "\n", "\x7f"]),
    max_size=12,
).map("".join)  # fmt: skip


def accepted(url: str) -> bool:
    try:
        check_source_url(url)
    except ValueError:
        return False
    return True


@given(URLISH | URLISH.map(lambda rest: "https://a" + rest))
def test_quick_check_accepts_nothing_that_the_full_check_refuses(url: str) -> None:
    quick = accepted(url)
    plain, urls.PLAIN = urls.PLAIN, urls.re.compile(r"(?!)")  # never matches
    try:
        thorough = accepted(url)
    finally:
        urls.PLAIN = plain
    assert quick == thorough


@given(st.characters())
def test_control_characters_match_unicode(character: str) -> None:
    assert bool(urls.CONTROL.fullmatch(character)) == (unicodedata.category(character) == "Cc")


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("s3://results", "s3://results"),
        ("s3://results/a/b/", "s3://results/a/b"),
        ("file:///srv/out/", "file:///srv/out"),
    ],
)
def test_output_urls_lose_their_trailing_slash(url: str, normal: str) -> None:
    assert check_output_url(url) == normal


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/out", "must start with s3:// or file://"),
        ("/srv/out", "must start with"),
        ("s3://UPPER/x", "'UPPER' is not a bucket name"),
        ("s3://a", "'a' is not a bucket name"),
        ("s3:///x", "'' is not a bucket name"),
        ("s3://user@bucket/x", "is not a bucket name"),
        ("s3://bucket/x?y", "may not contain \\? or #"),
        ("s3://bucket/x#y", "may not contain \\? or #"),
        ("s3://bucket/../x", "may not contain \\.\\."),
        ("file:///srv/../etc", "may not contain \\.\\."),
        ("file://host/srv", "file:///absolute/path"),
        ("file://srv", "file:///absolute/path"),
        ("s3://bucket/\n", "control characters"),
    ],
)
def test_invalid_output_urls_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_output_url(url)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://example.com/a.jpg", "https://example.com/a.jpg"),
        ("https://example.com/a.jpg?X-Amz-Signature=abc&x=1?2", "https://example.com/a.jpg?…"),
        ("https://me:secret@example.com/a.jpg", "https://…@example.com/a.jpg"),
        ("https://me:se@cret@example.com/a@b.jpg", "https://…@example.com/a@b.jpg"),
        ("redis://:secret@cache:6379/0", "redis://…@cache:6379/0"),
        ("not a URL", "not a URL"),
    ],
)
def test_shown_hides_secrets(url: str, text: str) -> None:
    assert shown(url) == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("https://example.com/photos/cat%20one.jpg?x=/y.png", "cat one"),
        ("s3://bucket/a/b.tar.gz", "b.tar"),
        ("../../etc/passwd", "passwd"),
        ("https://example.com/..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("C:\\photos\\猫.png", "猫"),
        ("https://example.com/", "image"),
        ("https://example.com", "image"),
        ("..", "image"),
        (".jpg", "jpg"),
        ("a\x00b\n.png", "a-b"),
        ("e\u0301.png", "é"),
        ("name.", "name"),
    ],
)
def test_safe_name(text: str, name: str) -> None:
    assert safe_name(text) == name


@given(
    st.text(max_size=300)
    | st.text(max_size=300).map(lambda text: "https://example.com/" + text.replace("[", "").replace("]", ""))
)
def test_safe_name_is_always_a_valid_file_name(text: str) -> None:
    try:
        name = safe_name(text)
    except ValueError:  # a URL that check_source_url refuses
        assert not accepted(text)
        return
    assert name
    assert len(name.encode()) <= 180
    assert not set(name) & set('/\\:*?"<>|\x00\n')
    assert not name.startswith((".", "-", " "))
    assert name == safe_name(name + ".jpg")


FILE_NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not {0, ord("/")} & set(name) and name not in (b".", b".."))


@given(FILE_NAMES)
def test_every_file_name_survives_its_url_and_gives_a_name_that_is_text(name: bytes) -> None:
    path = Path(os.fsdecode(b"/photos/" + name))
    url = check_source_url(path.as_uri())
    assert path_of(url) == path
    assert url.isascii()
    safe_name(url).encode()


def test_bytes_that_are_not_text_are_percent_encoded_and_nothing_else() -> None:
    assert percent_encoded("file:///ä/100%/caf\udce9\udcff.jpg") == "file:///ä/100%/caf%E9%FF.jpg"
    assert percent_encoded("s3://bucket/caf\udce9.jpg") == "s3://bucket/caf\udce9.jpg"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://x/a.png?token=hush", "https://x/a.png?…"),
        ("https://x/a.png#access_token=hush", "https://x/a.png#…"),
        ("https://x/a.png#hush?hush", "https://x/a.png#…"),
        ("https://u:hush@x/@2x.png", "https://…@x/@2x.png"),
        ("#ffffff", "#ffffff"),
        (f"https://x/{'a' * 5000}.png?hush", f"https://x/{'a' * 140}…{'a' * 145}.png?…"),
    ],
)
def test_shown_url_has_no_secret_and_is_short(url: str, text: str) -> None:
    assert shown(url) == text


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://minio:9000", "http://minio:9000"),
        ("http://key:hush@minio:9000", "http://…@minio:9000"),
        ("http://key:hu/sh@minio:9000", "http://…@minio:9000"),
        ("http://key:hu?s#h@minio:9000/?hush", "http://…@minio:9000/"),
        ("http://key:hu@sh@minio:9000", "http://…@minio:9000"),
        ("key:hush@minio:9000", "…@minio:9000"),
        ("//key:hush@minio:9000", "…@minio:9000"),
    ],
)
def test_server_is_shown_without_credentials_even_if_its_url_is_malformed(url: str, text: str) -> None:
    assert shown_server(url) == text
