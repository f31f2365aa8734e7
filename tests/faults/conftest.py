"""A Redis of its own for each test, a node's settings, and a gate that holds the node's device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.conftest import client_for, environment_for


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    folder = tmp_path / "gate"
    folder.mkdir()
    return folder


@pytest.fixture
def environment(own_redis: EmbeddedRedis, tmp_path: Path, gate: Path) -> dict[str, str]:
    return environment_for(own_redis.url, tmp_path, IMAGEMILL_TEST_GATE=str(gate), IMAGEMILL_WORKER__OPERATIONS='["stylize"]')


@pytest.fixture
def client(own_redis: EmbeddedRedis) -> Iterator[Client]:
    with client_for(own_redis.url) as client:
        yield client
