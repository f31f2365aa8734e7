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

from imagemill.producer.client import Client
from tests.conftest import photo
from tests.deploy.test_prometheus import PROMETHEUS, panels, rules
from tests.integration.jobs import spec
from tests.services.images import ImageServer, answers
from tests.services.s3 import free_ports
from tests.watch.metering import Exporter, MeteredNode, rows_of
from tests.workers import wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]

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


def test_prometheus_answers_every_rule_and_panel_while_nodes_work(
    environment: dict[str, str], client: Client, images: ImageServer, exported: Exporter, tmp_path: Path
) -> None:
    images.routes |= {f"/{n}.png": photo(n) for n in range(300)} | {"/none.png": answers(404)}
    environment |= {"IMAGEMILL_TEST_SECONDS": "0.2"}
    nodes = [MeteredNode(environment, tmp_path, name=name, fake="Invert") for name in ("a", "b")]
    ports = [node.port for node in nodes]
    with nodes[0], nodes[1], Prometheus(tmp_path, exported.port, ports) as prometheus:
        wait_until(prometheus.answers, "Prometheus has scraped something")
        wait_until(lambda: len(prometheus.query('up{job=~"imagemill-.*"} == 1')) == 3, "all targets are up")
        wait_until(lambda: len(prometheus.query("imagemill_node_ready == 1")) == 2, "both nodes are ready")
        names = ["/none.png", *(f"/{n}.png" for n in range(300))]
        job = client.submit(rows_of(images, *names), spec("stylize", tmp_path)).job
        first_row = [panel for panel in panels() if panel["gridPos"]["y"] == 1]
        for panel in first_row:
            for target in panel["targets"]:
                wait_until(lambda target=target: prometheus.query(target["expr"]), f"{panel['title']}: {target['expr']}")
        assert [labels["code"] for labels, _ in prometheus.query(first_row[2]["targets"][0]["expr"])] == ["not_found"]
        for expression in (
            *(target["expr"] for panel in panels() for target in panel["targets"]),
            *(rule["expr"] for rule in (*rules("alert"), *rules("record"))),
        ):
            prometheus.query(expression)  # raises if Prometheus can't run it
        assert prometheus.query('ALERTS{alertstate="firing"}') == []
        client.cancel(job)
