"""Fixtures of the node's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.worker.line import device_loop
from imagemill.worker.node import feeder
from tests.services.images import ImageServer
from tests.unit.worker.node.doctors import Doctor, run_doctor
from tests.unit.worker.node.feeding import Feeding
from tests.unit.worker.node.site import Site


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feeder looks around more often."""
    monkeypatch.setattr(feeder, "RENEWAL_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(device_loop, "GLANCE", 0.02)


@pytest.fixture
def feeding(redis_server: EmbeddedRedis, raw: Any, images: ImageServer, tmp_path: Path, quick: None) -> Iterator[Feeding]:
    """A feeder at an empty Redis."""
    feeding = Feeding(redis_server.url, raw, images, tmp_path / "out")
    yield feeding
    feeding.close()


@pytest.fixture
def site(redis_server: EmbeddedRedis, images: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(redis_server.url, images, tmp_path, monkeypatch)
    yield site
    for child in site.children:
        child.close()
        child.network.close()
        child.ledger.close()
        child.fleet.close()


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doctor:
    """Runs `imagemill doctor` in an empty folder, on a host without GPUs."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("IMAGEMILL_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return run_doctor
