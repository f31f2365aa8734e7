"""URLs of images and outputs: which are accepted, and how they are shown."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urlsplit

from imagemill.shared.plain_text import shortened

SOURCE_SCHEMES = ("http", "https", "s3", "file")
OUTPUT_SCHEMES = ("s3", "file")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
NO_TEXT = re.compile(r"[\ud800-\udfff]")
RAW_BYTE = re.compile(r"[\udc80-\udcff]")
"""A byte that is not UTF-8, as Python decodes it in file names and arguments."""
USER = re.compile(r"(?<=://)[^/?#]*@")
QUERY, QUESTION_MARK = re.compile(r"([?#])"), re.compile(r"(\?)")
LONGEST_SHOWN = 300
PLAIN = re.compile(r"(?:https?|s3)://[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,4})?/[ -~]*")
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def check_source_url(url: str) -> str:
    """The URL itself. Raises ValueError with the reason if workers can't read from it."""
    if PLAIN.fullmatch(url):  # true for most URLs; the checks below take ten times as long
        return url
    parts = _split(url, SOURCE_SCHEMES)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError("a file URL must be of the form file:///absolute/path")
    elif not parts.hostname:
        raise ValueError("the URL has no host" if parts.scheme != "s3" else "the URL has no bucket")
    elif parts.username is not None or parts.password is not None:
        raise ValueError("the URL contains a user name or password; use a presigned link instead")
    return url


def check_output_url(url: str) -> str:
    """`s3://bucket/prefix` or `file:///folder` without a trailing slash. Raises ValueError for any other URL."""
    parts = _split(url, OUTPUT_SCHEMES)
    if parts.query or parts.fragment:
        raise ValueError("an output URL may not contain ? or #")
    if parts.scheme == "s3" and not BUCKET.fullmatch(parts.netloc):
        raise ValueError(f"{parts.netloc!r} is not a bucket name")
    if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        raise ValueError("a folder URL must be of the form file:///absolute/path")
    if ".." in parts.path.split("/"):
        raise ValueError("an output URL may not contain ..")
    return url.rstrip("/")


def _split(url: str, schemes: tuple[str, ...]) -> SplitResult:
    if not url.isprintable() and CONTROL.search(url):  # isprintable alone is three times as fast
        raise ValueError("the URL contains control characters")
    if not url.isprintable() and NO_TEXT.search(url):
        raise ValueError("the URL is not valid text; percent-encode what is not UTF-8")
    parts = urlsplit(url)
    if parts.scheme not in schemes or url[0] == " ":  # urlsplit skips leading spaces, other parsers don't
        *others, last = (f"{scheme}://" for scheme in schemes)
        raise ValueError(f"the URL must start with {', '.join(others)} or {last}")
    _ = parts.port  # raises ValueError outside 0-65535
    return parts


def percent_encoded(url: str) -> str:
    """A URL that may contain bytes of a file name that is not UTF-8, with these bytes as `%E9`. An S3 key has no such form."""
    if url.isprintable() or url.startswith("s3:"):
        return url
    return RAW_BYTE.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", url)


def path_of(url: str) -> Path:
    """The path in a `file:///absolute/path` URL, percent-decoded; its name need not be text. Raises ValueError."""
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(url).path)))


def shown(url: str) -> str:
    """A URL for messages and logs: without query, fragment and user, which may hold signatures, tokens and passwords.

    The middle of a long one is left out, so that a stranger can't fill our records.
    """
    hidden = QUERY if "://" in url else QUESTION_MARK  # other text may be #ffffff
    parts = hidden.split(USER.sub("…@", url), maxsplit=1)
    return shortened(parts[0], LONGEST_SHOWN) + (f"{parts[1]}…" if len(parts) > 1 else "")


def shown_server(url: str) -> str:
    """The URL of a server from a setting, which may be malformed: nothing before its last @ is shown."""
    user, at, rest = url.rpartition("@")
    host = shortened(QUERY.split(rest)[0], LONGEST_SHOWN)
    scheme = re.match(r"[a-z0-9+]+://", user)
    return f"{scheme[0] if scheme else ''}…@{host}" if at else host


def safe_name(text: str) -> str:
    """The last part of a URL or path as a file name without extension; `image` if nothing is left.

    It has no separators or control characters and at most 180 bytes in UTF-8.
    """
    last = (
        unquote(urlsplit(text).path if "://" in text and not text.startswith("s3:") else text)
        .replace("\\", "/")
        .rstrip("/")
        .rsplit("/", 1)[-1]
    )
    stem = last.rsplit(".", 1)[0] if "." in last[1:] else last
    return safe_part(stem, "image")


def safe_part(text: str, default: str) -> str:
    """A text as one part of a key, or `default`: no separators or control characters, at most 180 bytes in UTF-8."""
    kept = "".join(c if c.isalnum() or c in "-_.+() " else "-" for c in unicodedata.normalize("NFC", text))
    short = kept.strip(" .-").encode()[:180].decode(errors="ignore")  # most file systems allow 255 bytes
    return short.strip(" .-") or default
