"""Fixtures of the line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ledgers import Ledger
from tests.services.images import ImageServer
from tests.unit.worker.line.chunks import Chunk


@pytest.fixture
def chunk(ledger: Ledger, images: ImageServer, tmp_path: Path) -> Chunk:
    return Chunk(ledger, images, tmp_path / "out")
