"""Addresses of images and of outputs: what is accepted, and how they are shown."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import SplitResult, unquote, urlsplit

SOURCE_SCHEMES = ("http", "https", "s3", "file")
OUTPUT_SCHEMES = ("s3", "file")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
USER = re.compile(r"(?<=://)[^/?#]*@")
PLAIN = re.compile(r"(?:https?|s3)://[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,4})?/[ -~]*")
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def check_source_url(url: str) -> str:
    """The address itself, or a ValueError that says what is wrong with it."""
    if PLAIN.fullmatch(url):  # nearly all of a list are; what follows would find them right, in ten times the time
        return url
    parts = _split(url, SOURCE_SCHEMES)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError("a file's address is file:///absolute/path")
    elif not parts.hostname:
        raise ValueError("the address names no host" if parts.scheme != "s3" else "the address names no bucket")
    elif parts.username is not None or parts.password is not None:
        raise ValueError("the address carries a user name or password; use a presigned link instead")
    return url


def check_output_url(url: str) -> str:
    """`s3://bucket/prefix` or `file:///folder` without a trailing slash, or a ValueError."""
    parts = _split(url, OUTPUT_SCHEMES)
    if parts.query or parts.fragment:
        raise ValueError("an output's address has no ? and no #")
    if parts.scheme == "s3" and not BUCKET.fullmatch(parts.netloc):
        raise ValueError(f"{parts.netloc!r} is no bucket's name")
    if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        raise ValueError("a folder's address is file:///absolute/path")
    if ".." in parts.path.split("/"):
        raise ValueError("an output's address has no ..")
    return url.rstrip("/")


def _split(url: str, schemes: tuple[str, ...]) -> SplitResult:
    if not url.isprintable() and CONTROL.search(url):  # the first alone is three times as fast
        raise ValueError("the address contains control characters")
    parts = urlsplit(url)
    if parts.scheme not in schemes or url[0] == " ":  # urlsplit looks past leading spaces, others don't
        raise ValueError(f"an address starts with {', '.join(f'{s}://' for s in schemes)}")
    _ = parts.port  # raises ValueError outside 0-65535
    return parts


def shown(url: str) -> str:
    """An address as logs may show it: without query and user, where signatures, tokens and passwords stand."""
    head, mark, _ = USER.sub("…@", url).partition("?")
    return head + ("?…" if mark else "")


def safe_name(text: str) -> str:
    """The last part of an address or path as a file name without extension: no separators, no
    control characters, at most 180 bytes of any script; `image` if nothing is left."""
    last = unquote(urlsplit(text).path if "://" in text else text).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    stem = last.rsplit(".", 1)[0] if "." in last[1:] else last
    kept = "".join(c if c.isalnum() or c in "-_.+() " else "-" for c in unicodedata.normalize("NFC", stem))
    short = kept.strip(" .-").encode()[:180].decode(errors="ignore")  # file systems stop at 255 bytes
    return short.strip(" .-") or "image"
