"""Nodes and an exporter that serve metrics, and what they report."""

from __future__ import annotations

import socket
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from imagemill.producer.sources import SourceRow
from tests.services.images import ImageServer
from tests.services.s3 import free_ports
from tests.workers import WorkerProcess, wait_until


class Scraped:
    """The samples of one scrape."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=10) as answer:
            self.text = answer.read().decode()
        families = text_string_to_metric_families(self.text)
        self.samples = [sample for family in families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        return sum(sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of a metric's samples by one of its labels, without those that are 0."""
        sums: Counter[str] = Counter()
        for sample in self.samples:
            if sample.name == name:
                sums[sample.labels[label]] += sample.value
        return {value: count for value, count in sums.items() if count}


class MeteredNode(WorkerProcess):
    """A node that serves metrics; `command` may be changed before it starts."""

    def __init__(self, environment: dict[str, str], folder: Path, **options: object) -> None:
        super().__init__(environment, folder, **options)  # type: ignore[arg-type]
        (self.port,) = free_ports(1)
        self.command = [*self.command, "--metrics", str(self.port)]

    def wait_ready(self, seconds: float = 120.0) -> WorkerProcess:
        super().wait_ready(seconds)
        children = psutil.Process(self.process.pid).children()
        (self.server,) = (child for child in children if "imagemill.worker.node.metrics_server" in child.cmdline())
        return self

    def pool(self) -> list[int]:
        """The processes that work on images."""
        return [child for child in self.children() if child != self.server.pid]

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def scrape(self) -> Scraped:
        """What the node tells Prometheus, once its server has started."""
        wait_until(self._listens, "the node serves metrics")
        return Scraped(f"http://127.0.0.1:{self.port}/metrics")


class Exporter:
    """A running `imagemill exporter`; called, it scrapes it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self) -> Scraped:
        return Scraped(f"http://127.0.0.1:{self.port}/metrics")


def rows_of(images: ImageServer, *names: str) -> list[SourceRow]:
    return [SourceRow(name, {"source": images.url(name), "name": name.strip("/").partition(".")[0]}) for name in names]
