"""Fixtures of the line's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.worker.line import device_loop as module
from imagemill.worker.transfer.network import Network
from tests.ledgers import Ledger
from tests.services.images import ImageServer
from tests.unit.worker.line.jobs import LineJob


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line notices at once that its images are done."""
    monkeypatch.setattr(module, "GLANCE", 0.01)


@pytest.fixture
def job(ledger: Ledger, images: ImageServer, tmp_path: Path, network: Network) -> Iterator[LineJob]:
    job = LineJob(ledger, images, tmp_path / "out", network)
    yield job
    job.close()


@pytest.fixture
def other(ledger: Ledger, images: ImageServer, tmp_path: Path, network: Network) -> Iterator[LineJob]:
    """Another job, with results in another folder."""
    job = LineJob(ledger, images, tmp_path / "other", network)
    yield job
    job.close()
