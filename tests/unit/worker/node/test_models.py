"""Where models don't fit into memory together, jobs with different models don't take turns image by image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.worker.node import feeder as module
from tests.services.images import ImageServer
from tests.unit.worker.node.feeding import Feeding
from tests.workers import wait_until

pytestmark = pytest.mark.integration

MODELS = ("u2net", "silueta")


@pytest.fixture
def feeding(redis_server: EmbeddedRedis, raw: Any, images: ImageServer, tmp_path: Path) -> Iterator[Feeding]:
    lanes = [f"remove-background.rembg.{model}" for model in MODELS]
    feeding = Feeding(redis_server.url, raw, images, tmp_path / "out", lanes=lanes)
    yield feeding
    feeding.close()


def swaps(feeding: Feeding) -> int:
    """How often the device went from one job to the other."""
    names = [name.partition("/")[0] for name in feeding.operation.begun]
    return sum(one != other for one, other in pairwise(names))


def test_model_is_kept_while_there_is_work_for_it(feeding: Feeding) -> None:
    jobs = [feeding.submit(12, model=model) for model in MODELS]
    feeding.operation.let(24)
    with feeding.shift():
        for job in jobs:
            feeding.check_done(job, 12)
    assert swaps(feeding) == 1


def test_other_model_gets_its_turn_after_a_while(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWAP_SECONDS", 0.0)
    jobs = [feeding.submit(12, model=model) for model in MODELS]
    feeding.operation.let(24)
    with feeding.shift():
        for job in jobs:
            feeding.check_done(job, 12)
    assert swaps(feeding) > 1


def test_models_that_fit_into_memory_together_need_not_take_turns(feeding: Feeding) -> None:
    feeding.has_room = True
    jobs = [feeding.submit(12, model=model, owner=model) for model in MODELS]
    feeding.operation.let(24)
    with feeding.shift():
        for job in jobs:
            feeding.check_done(job, 12)
    assert swaps(feeding) > 1


def test_urgent_job_gets_its_model_at_once(feeding: Feeding) -> None:
    normal = feeding.submit(12, model="u2net")
    with feeding.shift():
        feeding.wait_for(begun=1, leased=3)
        urgent = feeding.submit(2, model="silueta", priority="high")
        wait_until(lambda: feeding.ledger.status(urgent).state == "running", "the urgent job is taken")
        feeding.operation.let(14)
        feeding.check_done(urgent, 2)
        feeding.check_done(normal, 12)
    names = [name.partition("/")[0] for name in feeding.operation.begun]
    assert names[:3] == [normal, urgent, urgent]
