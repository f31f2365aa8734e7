"""A real worker node for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.conftest import environment_for
from tests.workers import WorkerProcess


@pytest.fixture(scope="module")
def environment(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The worker's settings; files of tests override this fixture. A stalled download times out after 2 s."""
    return environment_for(redis_server.url, tmp_path_factory.getbasetemp(), IMAGEMILL_FETCH__TOTAL_TIMEOUT="2")


@pytest.fixture(scope="module")
def worker(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A ready node with two child processes."""
    with WorkerProcess(environment, tmp_path_factory.mktemp("worker"), concurrency=2) as node:
        yield node.wait_ready()
