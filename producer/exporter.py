"""`imagemill exporter`: what Redis knows about the whole installation, for Prometheus."""

from __future__ import annotations

import logging
import signal
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import click
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from imagemill.shared.dead import DeadLetters
from imagemill.shared.errors import ConfigurationError, ServiceUnavailable, sentence
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.reading import LaneLoad, Load, ReadLedger
from imagemill.shared.messages import Node
from imagemill.shared.settings import Settings, load_settings

log = logging.getLogger(__name__)

MOST_OWNERS = 20
"""Owners with labels of their own; the others are summed up as `other`."""
LOAD_LABELS = ["lane", "priority", "owner"]


class Installation(Collector):
    """Reads Redis whenever Prometheus asks."""

    def __init__(self, settings: Settings) -> None:
        self._fleet, self._ledger, self._dead = Fleet.of(settings), ReadLedger.of(settings), DeadLetters.of(settings)
        self._version = version("imagemill")

    def describe(self) -> Iterable[Any]:
        return []  # so that registering this does not read Redis

    def collect(self) -> Iterator[Any]:
        """All metrics; without Redis, only that it is down."""
        yield one("imagemill_build_info", "The version of imagemill that exports this.", 1, version=self._version)
        up, found = 1.0, []
        try:
            nodes = self._fleet.nodes()
            found = [*self._load(nodes), *self._nodes(nodes), *self._rest()]
        except ServiceUnavailable as error:
            up = 0.0
            log.warning("Redis not read", extra={"action": "export", "reason": error.message})
        yield one("imagemill_redis_up", "1 if Redis responds, 0 if not.", up)
        yield from found

    def _load(self, nodes: list[Node]) -> Iterator[GaugeMetricFamily]:
        load = self._ledger.load()
        waiting = GaugeMetricFamily("imagemill_images_waiting", "Images to be handed out.", labels=LOAD_LABELS)
        running = GaugeMetricFamily("imagemill_images_running", "Images that workers have taken.", labels=LOAD_LABELS)
        oldest = GaugeMetricFamily(
            "imagemill_oldest_waiting_seconds",
            "How long ago the oldest job with images to hand out was submitted, due or retried.",
            labels=LOAD_LABELS,
        )
        for row in bounded(load.rows):
            labels = [row.lane, row.priority, row.owner]
            waiting.add_metric(labels, row.waiting)
            running.add_metric(labels, row.running)
            oldest.add_metric(labels, row.oldest)
        yield from (waiting, running, oldest)
        yield one("imagemill_unfinished_jobs", "Jobs with waiting or running images.", load.jobs)
        yield one(
            "imagemill_lease_overdue_seconds", "How long ago the oldest lease should have ended; 0 is normal.", load.overdue
        )
        yield from self._lanes(load, nodes)

    def _lanes(self, load: Load, nodes: list[Node]) -> Iterator[GaugeMetricFamily]:
        serving = dict.fromkeys((*load.lanes, *(row.lane for row in load.rows)), 0)
        for node in nodes:
            for lane in node.lanes if node.ready else ():
                serving[lane] = serving.get(lane, 0) + 1
        served = GaugeMetricFamily("imagemill_lane_nodes", "Nodes that are ready to work in a lane.", labels=["lane"])
        for lane, count in serving.items():
            served.add_metric([lane], count)
        yield served
        speeds: defaultdict[tuple[str, str], float] = defaultdict(float)
        for lane, child, rate in load.rates:
            speeds[child.rpartition("/")[0], lane] += rate
        speed = GaugeMetricFamily(
            "imagemill_node_images_per_second",
            "Images per second reported by a node's children, in lanes with work.",
            labels=["node", "lane"],
        )
        alive = {node.node for node in nodes}
        for (name, lane), rate in speeds.items():
            if name in alive:
                speed.add_metric([name, lane], rate)
        yield speed

    def _nodes(self, nodes: list[Node]) -> Iterator[GaugeMetricFamily]:
        ready = GaugeMetricFamily(
            "imagemill_node_ready",
            "1 for a node that takes work, 0 for one that is still loading.",
            labels=["node", "host", "device"],
        )
        for node in nodes:
            ready.add_metric([node.node, node.host, node.device], float(node.ready))
        yield ready
        peak = GaugeMetricFamily(
            "imagemill_node_memory_peak_ratio", "Highest share of its GPU's memory that a node has used.", labels=["node"]
        )
        for name, (share, _) in self._fleet.memory().items():
            peak.add_metric([name], share)
        yield peak
        yield from self._gpus()

    def _gpus(self) -> Iterator[GaugeMetricFamily]:
        expected = GaugeMetricFamily("imagemill_gpus_expected", "GPUs that a host should have.", labels=["host"])
        present = GaugeMetricFamily("imagemill_gpus_present", "GPUs that a host has.", labels=["host"])
        for host, (should, has) in self._fleet.gpus().items():
            if should is not None:
                expected.add_metric([host], should)
            present.add_metric([host], has)
        yield from (expected, present)

    def _rest(self) -> Iterator[GaugeMetricFamily]:
        used, limit = self._ledger.memory()
        yield one("imagemill_redis_memory_used_bytes", "Memory that Redis uses.", used)
        yield one("imagemill_redis_memory_limit_bytes", "Memory that Redis may use; 0 if it has no limit.", limit)
        yield one("imagemill_dead_letters", "Entries in Redis that were unreadable and set aside.", self._dead.count())


def one(name: str, help_text: str, value: float, **labels: str) -> GaugeMetricFamily:
    """A gauge with a single value."""
    family = GaugeMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def bounded(rows: list[LaneLoad]) -> list[LaneLoad]:
    """The rows, one for each lane, priority and owner, with all but the busiest owners joined into `other`."""
    images: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        if row.owner:
            images[row.owner] += row.waiting + row.running
    named = {"", *sorted(images, key=lambda owner: (-images[owner], owner))[:MOST_OWNERS]}
    joined: dict[tuple[str, str, str], LaneLoad] = {}
    for row in rows:
        owner = row.owner if row.owner in named else "other"
        before = joined.get(place := (row.lane, row.priority, owner), LaneLoad(*place, 0, 0, 0.0))
        counts = before.waiting + row.waiting, before.running + row.running, max(before.oldest, row.oldest)
        joined[place] = LaneLoad(*place, *counts)
    return list(joined.values())


@click.command()
@click.option("--port", default=9808, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
def exporter(port: int, host: str) -> None:
    """Serve the whole installation's metrics to Prometheus."""
    registry = CollectorRegistry()
    registry.register(Installation(load_settings()))
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigurationError(f"can't listen on {host}:{port}: {sentence(error)}") from error
    click.echo(f"metrics on http://{host}:{port}/metrics", err=True)
    stopped.wait()
    server.shutdown()
    thread.join()
