"""A running node picks up models that are put into its folder, and survives those that are damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagemill.producer.client import Client
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.sources import SourceRow
from tests.conftest import client_for, environment_for, photo
from tests.integration.jobs import cli, spec
from tests.models import u2net_onnx
from tests.services.images import ImageServer
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration

U2NET, SILUETA = (f"remove-background.rembg.{model}" for model in ("u2net", "silueta"))


def test_models_come_change_and_go_while_a_node_runs(own_redis: EmbeddedRedis, images: ImageServer, tmp_path: Path) -> None:
    """The node starts without any; of two children, both learn about whatever one of them finds."""
    images.routes |= {f"/{number}.png": photo(number) for number in range(4)}
    weights = tmp_path / "weights"
    good = u2net_onnx(tmp_path / "good.onnx", width=1).read_bytes()
    environment = environment_for(
        own_redis.url,
        tmp_path,
        IMAGEMILL_WEIGHTS__FOLDER=str(weights),
        IMAGEMILL_WORKER__ENGINES='["rembg"]',
        IMAGEMILL_WORKER__OPERATIONS='["remove-background"]',
    )
    looking_all_the_time(environment, tmp_path / "python")

    def put(model: str, content: bytes) -> None:
        path = weights / "rembg" / f"{model}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def submit(client: Client, model: str) -> str:
        rows = [SourceRow(path, {"source": images.url(path)}) for path in images.routes]
        return client.submit(rows, spec("remove-background", tmp_path, engine="rembg", model=model)).job

    def done(client: Client, job: str) -> None:
        status = client.wait(job, timeout=60)
        assert (status.state, status.done, status.failed) == ("done", 4, 0)

    with WorkerProcess(environment, tmp_path, concurrency=2) as node, client_for(own_redis.url) as client:
        node.wait_ready()
        children = node.children()
        (report,) = client.nodes()
        assert report.lanes == ()
        assert report.lacks == (f"no model of the engine rembg is in {weights / 'rembg'}: imagemill models pull u2net",)
        first = submit(client, "u2net")
        assert client.explain([client.status(first)])[0].why == f"no node offers {U2NET}"
        put("u2net", good)
        put("silueta", good)
        done(client, first)
        done(client, submit(client, "silueta"))

        put("silueta", good[:1000])
        waits = submit(client, "silueta")
        wait_until(lambda: SILUETA in client.nodes()[0].faults, "its lane is out of service")
        done(client, submit(client, "u2net"))
        status = client.status(waits)
        assert (status.done, status.failed) == (0, 0)
        why = f"no node offers {SILUETA}: out of service on {report.node}, the model silueta can't be opened from"
        assert str(client.explain([status])[0].why).startswith(why)
        shown = f"{SILUETA} is out of service: the model silueta"  # not while it is tried again, as its file has just changed
        wait_until(lambda: shown in cli(environment, "fleet").stderr, "fleet says why")
        put("silueta", good)
        done(client, waits)
        assert node.children() == children, "no process had to be replaced"

        (weights / "rembg" / "u2net.onnx").unlink()
        wait_until(lambda: client.nodes()[0].lanes == (SILUETA,), "the model that is gone is not offered")


def looking_all_the_time(environment: dict[str, str], folder: Path) -> None:
    """Python imports `sitecustomize` before anything else: there, the interval between looks is set to nothing."""
    folder.mkdir()
    lines = "from imagemill.worker.node import lookout", "lookout.LOOK_SECONDS = 0.0"
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
