"""The command line in-process, on the shared Redis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.settings import Settings
from tests.unit.producer.jobs import Invoke


@pytest.fixture
def imagemill(redis_server: EmbeddedRedis, raw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `imagemill ...` in an empty folder, on an empty Redis."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", redis_server.url)

    def invoke(*args: str, stdin: str | None = None, client: Callable[[Settings], Client] | None = None) -> Result:
        return CliRunner().invoke(main, args, input=stdin, obj=client)

    return invoke


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
