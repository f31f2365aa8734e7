"""Real services, started once per run: Redis, S3 and a server of images."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis
import numpy as np
import pytest
from PIL import Image

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.errors import MissingExtra
from imagemill.shared.settings import Settings
from tests.services import ImageServer, S3Server, ServiceMissing
from tests.workers import clean_environment

# The same examples in every run, so that a newcomer's run passes if ours did; HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def missing(reason: str) -> NoReturn:
    """A service can't be had: skips on a laptop, fails where nobody would notice a skip."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    try:
        server.start()
    except MissingExtra as error:
        missing(error.message)
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A Redis for one test, which may harm it."""
    server = EmbeddedRedis(tmp_path / "redis")
    try:
        server.start()
    except MissingExtra as error:
        missing(error.message)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    try:
        server.start()
    except ServiceMissing as error:
        missing(str(error))
    yield server
    server.stop()


@pytest.fixture
def images() -> Iterator[ImageServer]:
    """A server of images; tests put their own `routes` into it."""
    with ImageServer() as server:
        yield server


def environment_for(redis_url: str, folder: Path, **more: str) -> dict[str, str]:
    """Settings, as environment variables, of a worker that may read from loopback and write to `folder`."""
    return clean_environment(
        IMAGEMILL_REDIS_URL=redis_url,
        IMAGEMILL_FETCH__ALLOW_NETWORKS='["127.0.0.0/8"]',
        IMAGEMILL_FILES__WRITE_ROOTS=json.dumps([str(folder)]),
        IMAGEMILL_FILES__READ_ROOTS=json.dumps([str(folder)]),
        IMAGEMILL_WORKER__LEASE_SECONDS="3",
        IMAGEMILL_WORKER__MISSING_SECONDS="1",
        # Tests share a Redis and photos: each has its own results, but those of tests/integration/test_cache.py.
        **({"IMAGEMILL_WORKER__REUSE": "false"} | more),
    )


def client_for(redis_url: str) -> Client:
    """A producer's client."""
    return Client(Settings(_env_file=None, redis_url=redis_url))  # type: ignore[call-arg]


def photo(seed: int, width: int = 96, height: int = 72, kind: str = "PNG") -> bytes:
    """A small textured image file that differs by `seed`."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3), np.uint8)
    noise[height // 4 : -height // 4, width // 4 : -width // 4] += np.uint8(150)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `imagemill.worker.node.logs.set_up` changes, as it was."""
    manager = logging.Logger.manager
    levels = {name: logger.level for name, logger in manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])  # pytest's own, which `set_up` would close
    yield
    root.setLevel(level)
    for name in manager.loggerDict:
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
