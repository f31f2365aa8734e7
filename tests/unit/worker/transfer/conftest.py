"""Fetchers for the tests of transfer."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.worker.transfer.fetch import Fetcher
from tests.unit.worker.transfer.samples import LOOPBACK, MakeFetcher, no_s3


@pytest.fixture
def make() -> MakeFetcher:
    def new(**settings: Any) -> Fetcher:
        return Fetcher(FetchSettings.model_validate(settings), FileSettings(), no_s3)

    return new


@pytest.fixture
def fetcher(make: MakeFetcher) -> Fetcher:
    return make(**LOOPBACK, total_timeout=20)
