"""Fetchers for the tests of transfer."""

from __future__ import annotations

from typing import Any

import pytest

from imagemill.shared.settings import FetchSettings, FileSettings
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from tests.stores import NoS3
from tests.unit.worker.transfer.samples import LOOPBACK, MakeFetcher


@pytest.fixture
def make(network: Network) -> MakeFetcher:
    def new(**settings: Any) -> Fetcher:
        return Fetcher(FetchSettings.model_validate(settings), FileSettings(), NoS3(network), network)

    return new


@pytest.fixture
def fetcher(make: MakeFetcher) -> Fetcher:
    return make(**LOOPBACK, total_timeout=20)
