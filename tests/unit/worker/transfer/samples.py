"""Helpers shared by the tests of transfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from imagemill.shared.errors import ImageError
from imagemill.worker.transfer.fetch import Fetcher

MakeFetcher = Callable[..., Fetcher]

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR and so on"
LOOPBACK: dict[str, Any] = {"allow_networks": ["127.0.0.0/8", "::1/128"]}


def no_s3() -> NoReturn:
    raise AssertionError("the S3 client was requested")


def caught(fetcher: Fetcher, url: str, kind: type[ImageError], **options: Any) -> ImageError:
    with pytest.raises(kind) as info:
        fetcher.fetch(url, **options)
    assert type(info.value) is kind
    return info.value
