"""Fixtures of tests that read metrics."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.conftest import client_for, environment_for
from tests.services.s3 import free_ports
from tests.watch.metering import Exporter
from tests.workers import ROOT


@pytest.fixture
def environment(own_redis: EmbeddedRedis, tmp_path: Path) -> dict[str, str]:
    return environment_for(own_redis.url, tmp_path, IMAGEMILL_WORKER__OPERATIONS='["stylize"]', IMAGEMILL_WORKER__REUSE="true")


@pytest.fixture
def client(own_redis: EmbeddedRedis) -> Iterator[Client]:
    with client_for(own_redis.url) as opened:
        yield opened


@pytest.fixture
def exported(environment: dict[str, str]) -> Iterator[Exporter]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "imagemill.producer.cli", "exporter", "--port", str(port)]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"127.0.0.1:{port}" in process.stderr.readline()
        yield Exporter(port)
        process.terminate()
        assert process.wait(30) == 0
