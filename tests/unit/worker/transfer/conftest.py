"""Fetchers for the tests of transfer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.worker.transfer.fetch import Fetcher
from tests.unit.worker.transfer.samples import LOOPBACK, MakeFetcher, no_s3


@pytest.fixture
def make() -> Iterator[MakeFetcher]:
    fetchers: list[Fetcher] = []

    def new(**settings: Any) -> Fetcher:
        fetchers.append(Fetcher(FetchSettings.model_validate(settings), FileSettings(), no_s3))
        return fetchers[-1]

    yield new
    for fetcher in fetchers:
        fetcher.close()


@pytest.fixture
def fetcher(make: MakeFetcher) -> Fetcher:
    return make(**LOOPBACK, total_timeout=20)
