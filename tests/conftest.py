"""Fixtures and helpers that several rooms share: real services, clients of them, settings and photos."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery.apps.worker
import hypothesis
import numpy as np
import pytest
import redis
from PIL import Image

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared import log_fields
from imagemill.shared.fleet import Fleet
from imagemill.shared.settings import Settings
from imagemill.worker.transfer.network import Network
from tests.ledgers import Ledger
from tests.services.images import ImageServer
from tests.services.redis import running_redis
from tests.services.s3 import S3Server
from tests.workers import clean_environment

# Every run uses the same examples, so results are repeatable; HYPOTHESIS_PROFILE=default searches for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """The Redis that tests share."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A Redis for one test, which may stop it or fill it."""
    with running_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def raw(redis_server: EmbeddedRedis) -> Iterator[Any]:
    """A plain Redis client for the shared Redis, which is emptied first."""
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def client(redis_server: EmbeddedRedis) -> Iterator[Client]:
    with client_for(redis_server.url) as client:
        yield client


@pytest.fixture
def ledger(redis_server: EmbeddedRedis) -> Iterator[Ledger]:
    ledger = Ledger(redis_server.url)
    yield ledger
    ledger.close()


@pytest.fixture
def fleet(redis_server: EmbeddedRedis) -> Iterator[Fleet]:
    fleet = Fleet(redis_server.url)
    yield fleet
    fleet.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def images() -> Iterator[ImageServer]:
    """A web server of images; tests add their own `routes`."""
    with ImageServer() as server:
        yield server


@pytest.fixture
def network() -> Iterator[Network]:
    """The event loop of transfers."""
    network = Network()
    yield network
    network.close()


def environment_for(redis_url: str, folder: Path, **more: str) -> dict[str, str]:
    """Environment variables of a worker that may fetch from loopback and read and write `folder`."""
    return clean_environment(
        IMAGEMILL_REDIS_URL=redis_url,
        IMAGEMILL_FETCH__ALLOW_NETWORKS='["127.0.0.0/8"]',
        IMAGEMILL_FILES__WRITE_ROOTS=json.dumps([str(folder)]),
        IMAGEMILL_FILES__READ_ROOTS=json.dumps([str(folder)]),
        IMAGEMILL_WORKER__LEASE_SECONDS="3",
        # Tests share a Redis and photos, so a worker must not reuse the results of another test.
        **({"IMAGEMILL_WORKER__REUSE": "false"} | more),
    )


def client_for(redis_url: str) -> Client:
    """A producer's client of this Redis."""
    return Client(Settings(_env_file=None, redis_url=redis_url))  # type: ignore[call-arg]


def photo(seed: int, width: int = 96, height: int = 72, kind: str = "PNG") -> bytes:
    """A small textured image file; each `seed` gives a different one."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3), np.uint8)
    noise[height // 4 : -height // 4, width // 4 : -width // 4] += np.uint8(150)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore afterwards what `imagemill.worker.node.logs.set_up` changes."""
    manager = logging.Logger.manager
    levels = {name: logger.level for name, logger in manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(log_fields, "PROCESS", {})  # of a node that another test has started in this process
    monkeypatch.setattr(root, "handlers", [])  # `set_up` would close pytest's own handlers
    for name in ("stdout", "stderr", "__stdout__", "__stderr__", "excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(celery.apps.worker, "safe_say", celery.apps.worker.safe_say)
    yield
    logging.captureWarnings(False)
    root.setLevel(level)
    for name in manager.loggerDict:
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
