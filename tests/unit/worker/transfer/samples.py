"""Helpers shared by the tests of transfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from imagemill.shared.errors import ImageError
from imagemill.worker.transfer.fetch import Fetched, Fetcher

MakeFetcher = Callable[..., Fetcher]

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR and so on"
LOOPBACK: dict[str, Any] = {"allow_networks": ["127.0.0.0/8", "::1/128"]}


def got(fetcher: Fetcher, url: str, **options: Any) -> Fetched:
    """What a download gives; its room is given back."""
    fetched = fetcher.network.call(fetcher.fetch(url, **options))
    assert fetched.room == fetcher.room.used == len(fetched.data)
    fetcher.room.release(fetched.room)
    return fetched


def caught(fetcher: Fetcher, url: str, kind: type[ImageError], **options: Any) -> ImageError:
    with pytest.raises(kind) as info:
        got(fetcher, url, **options)
    assert type(info.value) is kind
    assert fetcher.room.used == 0
    return info.value
