"""A real Prometheus reads real nodes: rules and panels have answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_prometheus import PROMETHEUS
from tests.services.s3 import free_ports

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]
pytest_plugins = ["tests.integration.test_metrics"]

VARIABLES = {"$node": ".*", "$lane": ".*", "$operation": ".*", "$__range": "5m"}


class Prometheus:
    """A server that scrapes every second; `query` returns samples as (labels, value)."""

    def __init__(self, folder: Path, exporter: int, nodes: list[int]) -> None:
        (self._port,) = free_ports(1)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(PROMETHEUS / "rules" / "*.yml")],
            "scrape_configs": [scraping("imagemill-exporter", [exporter]), scraping("imagemill-node", nodes)],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        url = f"http://127.0.0.1:{self._port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return [(one["metric"], float(one["value"][1])) for one in found["data"]["result"]]

    def answers(self) -> bool:
        try:
            return bool(self.query("up"))
        except OSError:
            return False


def scraping(job: str, ports: list[int]) -> dict[str, Any]:
    return {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
