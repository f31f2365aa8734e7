"""A new engine is one row and one module: the command line, the ledger and a real worker need nothing else."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from imagemill.producer.cli import main
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from imagemill.shared.engines import ENGINES, parse_options
from imagemill.shared.errors import InvalidOption
from imagemill.shared.messages import Job, Output
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.registry import create
from tests.conftest import client_for, environment_for, photo
from tests.extra_engine import ROW
from tests.services.images import ImageServer
from tests.unit.worker.operations import conformance
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def row() -> Iterator[None]:
    """The engine's row is in the table."""
    ENGINES.append(ROW)
    yield
    ENGINES.remove(ROW)


def test_job_runs_on_an_engine_added_from_outside(redis_server: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    images.routes["/1.png"] = photo(1)
    environment = environment_for(redis_server.url, tmp_path, IMAGEMILL_WORKER__ENGINES='["invert"]')
    node = WorkerProcess(environment, tmp_path, name="extra")
    node.command = [sys.executable, "-m", "tests.extra_engine", *node.command[3:]]
    with node, client_for(redis_server.url) as client:
        node.wait_ready()
        spec = Job(
            operation="stylize",
            options=parse_options("stylize", "invert", {"strength": "1"}),
            output=Output(url=(tmp_path / "out").as_uri()),
        )
        submission = client.submit([SourceRow("1", {"source": images.url("/1.png")})], spec)
        assert submission.served
        assert client.wait(submission.job, timeout=60).done == 1
        (result,) = client.results(submission.job)
    with Image.open(unquote(urlsplit(result.output or "").path)) as made, Image.open(io.BytesIO(photo(1))) as source:
        assert np.array_equal(np.asarray(made), 255 - np.asarray(source))


def test_added_engine_passes_the_conformance_kit() -> None:
    engine = create("stylize", "invert")
    engine.load(Device())
    conformance.check(engine, parse_options("stylize", "invert", {"strength": 1}))


def test_command_line_knows_the_options_of_an_added_engine() -> None:
    with pytest.raises(InvalidOption, match="strength"):
        parse_options("stylize", "invert", {"strenth": 1})
    refused = CliRunner().invoke(main, ["submit", "a.png", "--operation", "stylize", "--engine", "invrt", "--output", "out"])
    assert refused.exit_code == 2
    assert "did you mean 'invert'" in refused.output
