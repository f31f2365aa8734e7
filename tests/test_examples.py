"""The examples run as their comments say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import BadRow, parse, read_sources
from imagemill.shared.presets import Presets
from imagemill.shared.settings import load_settings
from tests.conftest import environment_for, photo
from tests.workers import ROOT, WorkerProcess

EXAMPLES = ROOT / "examples"


@pytest.mark.integration
def test_python_example_prints_a_result_per_photo(redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    environment = environment_for(redis_server.url, tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "good.png").write_bytes(photo(1))
    (tmp_path / "photos" / "empty.png").write_bytes(b"")
    with WorkerProcess(environment, tmp_path, name="examples") as worker:
        worker.wait_ready()
        command = [sys.executable, str(EXAMPLES / "submit.py"), "photos", "results"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    first, empty, good = done.stdout.splitlines()
    assert first.endswith(": 2 images")
    assert "empty_file" in empty
    assert good.endswith(".png")
    assert done.returncode == 1, done.stderr
    assert len(list((tmp_path / "results").rglob("*.png"))) == 1


def test_list_example_has_no_bad_rows() -> None:
    rows = list(read_sources([str(EXAMPLES / "list.csv")], s3=lambda: None))
    items = [parse(row, index) for index, row in enumerate(rows) if not isinstance(row, BadRow)]
    assert [len(item.boxes) for item in items] == [1, 2, 1]
    assert [item.name for item in items] == ["chair-front", "chair-side", None]


def test_presets_example_is_valid() -> None:
    known = Presets(EXAMPLES / "looks.yaml")
    assert {"pencil", "autumn"} < set(known.names())
    assert known.get("autumn").resolved()["policy"]["quality"] == {"mode": "repair", "least_edges": 0.3}


def test_compose_example_overrides_a_service_with_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    services = yaml.safe_load((EXAMPLES / "docker-compose.override.yml").read_text(encoding="utf-8"))["services"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    assert set(services) <= set(compose["services"])
    for name, value in services["worker"]["environment"].items():
        monkeypatch.setenv(name, value)
    assert load_settings().worker.max_pixels == 100_000_000
