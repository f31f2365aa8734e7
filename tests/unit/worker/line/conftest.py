"""Fixtures of the line's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ledgers import Ledger
from tests.services.images import ImageServer
from tests.unit.worker.line.chunks import Chunk


@pytest.fixture
def chunk(ledger: Ledger, images: ImageServer, tmp_path: Path) -> Iterator[Chunk]:
    chunk = Chunk(ledger, images, tmp_path / "out")
    yield chunk
    for fetcher in chunk.fetchers:
        fetcher.close()
